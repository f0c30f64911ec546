"""Shards behind a URL: the same bytes, one download a node, whole files only, within a budget."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from flaky_server import FlakyServer

from ds_classifier import processes
from ds_classifier.data import fetch
from ds_classifier.data.convert import convert
from ds_classifier.data.loader import (
    ShardDataset,
    TrainingPositions,
    ValidationPositions,
    create_loader,
)
from ds_classifier.data.order import SampleOrder
from ds_classifier.data.shards import Manifest, Shard, open_shards
from ds_classifier.data.sources import Source, open_source
from ds_classifier.data.store import ShardStore, open_named, open_split

SIZE = 300_000
FAST = dict(stall_timeout_s=0.5, retries=3, pause_s=0.02)
fork = multiprocessing.get_context("fork")


def make_shards(folder: Path, number: int, *, seed: int = 0, size: int = SIZE) -> list[Shard]:
    """Files of random bytes, in the place of tars, that must arrive as they are."""
    folder.mkdir(exist_ok=True)
    shards = []
    for i in range(number):
        content = random.Random(seed * 100 + i).randbytes(size)
        (folder / f"s-{i}.tar").write_bytes(content)
        shards.append(Shard(f"s-{i}.tar", 1, size, hashlib.sha256(content).hexdigest()))
    return shards


@contextmanager
def serving(folder: Path):
    server = FlakyServer(folder)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(server, its shards, a function that makes a store of them)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    shards = make_shards(tmp_path / "far", 6)
    with serving(tmp_path / "far") as server:

        def store(**options) -> ShardStore:
            options = FAST | dict(cache_dir=tmp_path / "cache") | options
            return ShardStore(server.url, shards, **options)

        yield server, shards, store


def whole(store: ShardStore, shard: int) -> bytes:
    return store.read(shard, 0, store.shards[shard].bytes)


def correct(store: ShardStore, shard: int) -> bool:
    return hashlib.sha256(whole(store, shard)).hexdigest() == store.shards[shard].sha256


def cached(store: ShardStore) -> list[int]:
    return sorted(int(path.stem[2:]) for path in store.folder.glob("*.tar"))


def part(store: ShardStore, shard: int) -> Path:
    return store.folder / f".s-{shard}.tar.part"


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def outcomes(function, processes: int, seconds: float = 20) -> list:
    """What `function()` gives, or its error's text, in so many processes at once."""
    barrier, queue = fork.Barrier(processes), fork.Queue()

    def run():
        barrier.wait()
        try:
            queue.put(function())
        except (OSError, ValueError) as error:
            queue.put(f"{type(error).__name__}: {error}")

    started = [fork.Process(target=run) for _ in range(processes)]
    for process in started:
        process.start()
    found = [queue.get(timeout=seconds) for _ in started]
    for process in started:
        process.join(seconds)
    return found


def forked(function) -> multiprocessing.Process:
    """A process that runs `function` and then lives until it is killed."""

    def run():
        function()
        signal.pause()

    process = fork.Process(target=run, daemon=True)
    process.start()
    return process


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


# ----------------------------------------------------------------------------- the same bytes


def test_ranges_are_those_of_the_local_file(served, tmp_path):
    server, shards, store = served
    near, far = ShardStore(tmp_path / "far", shards), store()
    draw = random.Random(1)
    for _ in range(50):
        shard, offset = draw.randrange(6), draw.randrange(SIZE)
        length = draw.randrange(SIZE - offset + 1)
        expected = (tmp_path / "far" / f"s-{shard}.tar").read_bytes()[offset : offset + length]
        assert near.read(shard, offset, length) == far.read(shard, offset, length) == expected
    assert {server.count(f"s-{i}.tar") for i in range(6)} == {1}


def test_local_shards_use_no_cache(served, tmp_path):
    server, shards, _ = served
    store = ShardStore(tmp_path / "far", shards, cache_dir=tmp_path / "unused")
    store.prefetch([0, 1])
    assert correct(store, 0)
    assert not (tmp_path / "unused").exists()
    assert server.requests == []


def test_few_handles_stay_open(tmp_path):
    shards = make_shards(tmp_path / "many", 300, size=10)
    store = ShardStore(tmp_path / "many", shards)
    before = len(os.listdir("/proc/self/fd"))
    assert all(correct(store, i) for i in [*range(300), *range(300)])
    assert len(os.listdir("/proc/self/fd")) - before <= 256
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_that_points_outside_is_refused(served):
    with pytest.raises(ValueError, match=r"s-2\.tar.*need at most 300000"):
        served[2]().read(2, SIZE - 10, 11)


def test_a_used_store_can_be_pickled_and_forked(served):
    _, _, store = served
    used = store()
    used.prefetch([0, 1])
    assert correct(used, 0)
    assert correct(pickle.loads(pickle.dumps(used)), 1)
    assert outcomes(lambda: correct(used, 0) and correct(used, 2), 3) == [True] * 3


# ------------------------------------------------------------------------- one download a node


def test_processes_share_one_download(served):
    server, _, store = served
    server.faults["s-0.tar"] = ["slow"]  # 0.2 s
    assert outcomes(lambda: correct(store(), 0), 6) == [True] * 6
    assert server.count("s-0.tar") == 1


def test_processes_that_fetch_ahead_share_the_work(served):
    server, _, store = served
    for i in range(6):
        server.faults[f"s-{i}.tar"] = ["slow"]

    def work():
        ours = store()
        ours.prefetch(range(6))
        return all(correct(ours, i) for i in range(6))

    assert outcomes(work, 4) == [True] * 4
    assert [server.count(f"s-{i}.tar") for i in range(6)] == [1] * 6


def test_the_window_is_fetched_in_its_order_before_it_is_read(served):
    server, _, store = served
    ours = store()
    ours.prefetch([4, 2, 5])
    wait_until(lambda: cached(ours) == [2, 4, 5])
    assert [name for name, _ in server.requests] == ["s-4.tar", "s-2.tar", "s-5.tar"]


def test_a_download_that_fails_for_one_fails_for_those_who_waited(served):
    server, _, store = served
    server.faults["s-0.tar"] = ["stall"] * 50
    began = time.monotonic()
    errors = outcomes(lambda: whole(store(retries=1), 0), 4)
    assert all(e.startswith("OSError") and "stalled" in e and "2 tries" in e for e in errors)
    assert server.count("s-0.tar") == 2
    assert time.monotonic() - began < 5


def test_two_data_sets_of_equal_names_are_kept_apart(served, tmp_path):
    _, _, store = served
    others = make_shards(tmp_path / "other", 6, seed=1)
    with serving(tmp_path / "other") as server:
        second = ShardStore(server.url, others, cache_dir=tmp_path / "cache", **FAST)
        assert correct(store(), 0)
        assert correct(second, 0)
        assert store().folder.parent == second.folder.parent
        # A newer version at the same address, of the same sizes, is another data set too.
        newer = make_shards(tmp_path / "other", 6, seed=2)
        third = ShardStore(server.url, newer, cache_dir=tmp_path / "cache", **FAST)
        assert correct(third, 0)


# ---------------------------------------------------------------------------- bad connections


@pytest.mark.parametrize("no_ranges", [False, True])
@pytest.mark.parametrize(
    "faults",
    [
        [500, 503, 500],
        ["reset"],
        ["close", "close", "reset"],
        ["stall"],
        ["drip"],
        ["head"],
        ["chunk"],
        ["long"],
        ["short"],
        ["wrong"],
        [429, "wrong", "reset"],
    ],
    ids=lambda faults: "-".join(map(str, faults)),
)
def test_what_goes_wrong_and_then_right_is_recovered(served, faults, no_ranges):
    server, _, store = served
    server.no_ranges = no_ranges
    server.faults["s-1.tar"] = list(faults)
    ours, began = store(), time.monotonic()
    assert correct(ours, 1)
    assert time.monotonic() - began < 10  # a drip would take 15 s
    assert not part(ours, 1).exists()
    assert server.count("s-1.tar") == len(faults) + 1
    cut = {"reset", "close", "stall", "drip"} & set(faults)
    assert bool(cut) == any(asked for _, asked in server.requests)


def test_a_killed_download_is_resumed(served):
    server, _, store = served
    server.faults["s-0.tar"] = ["stall"]
    ours = store()
    process = forked(lambda: store(stall_timeout_s=30).read(0, 0, 10))
    wait_until(lambda: part(ours, 0).exists() and part(ours, 0).stat().st_size == SIZE // 2)
    kill(process)
    assert cached(ours) == []
    assert correct(ours, 0)
    assert server.requests == [("s-0.tar", None), ("s-0.tar", f"bytes={SIZE // 2}-")]


def test_a_killed_download_is_free_though_its_child_lives(served, tmp_path):
    """A DataLoader worker forked during the download holds none of its parent's locks."""
    server, _, store = served
    server.faults["s-0.tar"] = ["stall"]
    ours = store()

    def fork_while_fetching():
        theirs = store(stall_timeout_s=30)
        theirs.prefetch([0])
        wait_until(lambda: part(ours, 0).exists() and part(ours, 0).stat().st_size == SIZE // 2)
        if os.fork() == 0:
            (tmp_path / "child").write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)

    process = forked(fork_while_fetching)
    wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    kill(process)
    try:
        assert outcomes(lambda: correct(store(), 0), 1, seconds=5) == [True]
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_progress_is_no_failure(served, monkeypatch):
    """A large shard over a bad line arrives, though it breaks off more often than retries say."""
    server, _, store = served
    monkeypatch.setattr(fetch, "PROGRESS", 10_000)
    server.faults["s-0.tar"] = ["close"] * 4
    assert correct(store(retries=1), 0)
    server.no_ranges = True  # now each try stops at the same place
    server.faults["s-1.tar"] = ["close"] * 4
    with pytest.raises(OSError, match="2 tries"):
        whole(store(retries=1), 1)


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        (500, "HTTP 500", 4),
        (404, "HTTP 404", 1),
        ("wrong", "got sha256", 4),
        ("short", "got a file of 299000 bytes; need 300000", 4),
        ("long", "got a file of 301000 bytes; need 300000", 4),
    ],
)
def test_what_stays_wrong_ends_in_one_error(served, fault, reason, tries):
    server, _, store = served
    server.faults["s-1.tar"] = [fault] * 50
    ours = store()
    with pytest.raises(OSError) as error:
        whole(ours, 1)
    assert f"{server.url}/s-1.tar: got no whole file in {tries} tr" in str(error.value)
    assert reason in str(error.value)
    assert server.count("s-1.tar") == tries
    assert cached(ours) == []
    assert not part(ours, 1).exists()


def test_a_server_that_is_not_there(tmp_path):
    shards = make_shards(tmp_path / "far", 1)
    with serving(tmp_path / "far") as server:
        url = server.url
    store = ShardStore(url, shards, cache_dir=tmp_path / "cache", **FAST)
    with pytest.raises(OSError, match=r"4 tries.*refused"):
        whole(store, 0)


def test_a_part_longer_than_the_shard_is_thrown_away(served):
    _, _, store = served
    ours = store()
    ours.folder.mkdir(parents=True)
    part(ours, 0).write_bytes(bytes(SIZE + 5))
    assert correct(ours, 0)


def test_a_cached_file_that_was_cut_is_fetched_again(served):
    server, _, store = served
    assert correct(store(), 0)
    os.truncate(store().folder / "s-0.tar", 100)
    assert correct(store(), 0)
    assert server.count("s-0.tar") == 2


# --------------------------------------------------------------------------------- the budget


def test_the_least_recently_used_goes_first(served):
    _, _, store = served
    for shard in (0, 1, 2, 0, 3):
        ours = store(budget_bytes=3 * SIZE + 10)
        assert correct(ours, shard)
        ours.close()
    assert cached(ours) == [0, 2, 3]


def test_a_window_of_a_live_process_is_never_removed(served, tmp_path):
    server, _, store = served
    budget = dict(budget_bytes=3 * SIZE)
    ours = store(**budget)

    def hold():
        store(**budget).prefetch([0])

    process = forked(hold)
    wait_until(lambda: cached(ours) == [0])
    for shard in (1, 2, 3, 4, 5, 1, 2):
        assert correct(ours, shard)
        assert 0 in cached(ours)
        assert len(cached(ours)) <= 3
    assert server.count("s-0.tar") == 1
    kill(process)
    for shard in (3, 4, 5):
        assert correct(store(**budget), shard)
    assert cached(ours) == [3, 4, 5]


def test_fetching_ahead_waits_for_room_and_reading_does_not(served):
    _, _, store = served
    ours, theirs = store(budget_bytes=2 * SIZE), store(budget_bytes=2 * SIZE)
    ours.prefetch([0, 1])
    wait_until(lambda: cached(ours) == [0, 1])
    theirs.prefetch([2])
    time.sleep(0.6)
    assert cached(ours) == [0, 1]
    assert correct(theirs, 2)  # needed now
    assert cached(ours) == [0, 1, 2]
    ours.prefetch([1])
    theirs.prefetch([3])
    wait_until(lambda: 3 in cached(ours))
    assert cached(ours) == [1, 3]


def test_the_budget_holds_with_many_processes(served):
    """Two windows of 2 within a budget of 5, of 6 shards, which so come and go all the time."""
    _, _, store = served
    budget = 5 * SIZE
    ours = store(budget_bytes=budget)

    def work(seed):
        draw, mine = random.Random(seed), store(budget_bytes=budget)
        for _ in range(25):
            window = draw.sample(range(6), 2)
            mine.prefetch(window)
            for shard in window:
                assert correct(mine, shard)
            assert set(window) <= set(cached(mine))
        mine.close()

    processes = [fork.Process(target=work, args=(seed,)) for seed in range(2)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        sizes = []
        for path in [*ours.folder.glob("*.tar"), *ours.folder.glob(".*.part")]:
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
        time.sleep(0.002)
    assert [process.exitcode for process in processes] == [0, 0]
    assert 3 * SIZE < most <= budget


def test_budgets_that_cannot_do_are_refused(served):
    _, _, store = served
    with pytest.raises(ValueError, match=r"need at least 300000, the\s+largest"):
        store(budget_bytes=SIZE - 1)


def test_a_window_beyond_the_budget_is_fetched_as_far_as_it_goes(served):
    server, _, store = served
    ours = store(budget_bytes=2 * SIZE)
    ours.prefetch([4, 1, 2])
    wait_until(lambda: cached(ours) == [1, 4])
    time.sleep(0.3)
    assert server.count("s-2.tar") == 0
    assert correct(ours, 2)  # needed at once, it takes a place


# ------------------------------------------------------------------------- schemes and manifests


def test_other_schemes_go_through_gopen(served, tmp_path):
    _, shards, _ = served
    options = dict(cache_dir=tmp_path / "cache", **FAST)
    assert correct(ShardStore(f"file:{tmp_path}/far", shards, **options), 0)
    piped = f"pipe:cat {tmp_path}/far/{{name}}"
    assert correct(ShardStore(piped, shards, allow_pipe=True, **options), 0)
    with pytest.raises(ValueError, match="runs a program"):
        ShardStore(piped, shards, **options)
    with pytest.raises(OSError, match="1 try"):
        whole(ShardStore(f"file:{tmp_path}/nowhere", shards, **options), 0)
    with pytest.raises(OSError, match=r"1 try.*gopen cannot open"):
        whole(ShardStore("nosuch://bucket", shards, **options), 0)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("head -c 1000 {file}; exit 3", "exit 3"),
        ("head -c 1000 {file}", "got 1000 of 300000"),
        ("head -c 1000 {file}; sleep 30", "stalled"),
        ("head -c 1000 {file}; exec >&-; sleep 30", "does not end"),
        ("cat {file} {file}", "more than 300000"),
    ],
)
def test_a_program_that_fails_is_a_failed_try(served, tmp_path, command, reason):
    _, shards, _ = served
    location = "pipe:" + command.replace("{file}", f"{tmp_path}/far/{{name}}")
    options = FAST | dict(retries=1, cache_dir=tmp_path / "cache", allow_pipe=True)
    store = ShardStore(location, shards, **options)
    began = time.monotonic()
    with pytest.raises(OSError, match=f"2 tries.*{reason}"):
        whole(store, 0)
    assert time.monotonic() - began < 5
    assert cached(store) == []


@pytest.mark.parametrize("end", ["gives up", "is done", "is killed"])
def test_programs_end_with_their_reader(served, tmp_path, end):
    """With all that their shell has started, in the background too, and whatever they ignore."""
    _, shards, _ = served
    pids = tmp_path / "pids"
    asleep = f"sh -c 'trap \"\" TERM HUP PIPE; echo $$ >> {pids}; exec sleep 60 >/dev/null' &"
    rest = "" if end == "is done" else "sleep 60 | cat"
    location = f"pipe:{asleep} cat {tmp_path}/far/{{name}}; {asleep} {rest}"
    options = FAST | dict(stall_timeout_s=2.0 if end == "gives up" else 30.0, retries=0)
    store = ShardStore(location, shards, cache_dir=tmp_path / "c", allow_pipe=True, **options)

    def asleep_now() -> int:
        numbers = pids.read_text().split() if pids.exists() else []
        return sum(processes.started(int(number)) > 0 for number in numbers)

    if end == "is killed":
        process = forked(lambda: whole(store, 0))
        wait_until(lambda: asleep_now() == 2)
        kill(process)
    elif end == "is done":
        assert correct(store, 0)
    else:
        with pytest.raises(OSError, match="stalled"):
            whole(store, 0)
    assert len(pids.read_text().split()) == 2
    wait_until(lambda: asleep_now() == 0)


@pytest.mark.parametrize(
    "name",
    ["../x.tar", "/etc/x.tar", "pipe:touch x.tar", "a b.tar", "$(x).tar", ".x.tar", "-x.tar", "x"],
)
def test_names_that_could_do_harm_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="shard name"):
        ShardStore("http://127.0.0.1", [Shard(name, 1, 1, "")], cache_dir=tmp_path)


def test_signed_addresses_name_the_place_and_are_not_shown(tmp_path):
    shards = make_shards(tmp_path / "far", 1)
    with pytest.raises(ValueError, match=r"\{name\}") as error:
        whole(ShardStore("http://127.0.0.1:1/x?sig=secret", shards, cache_dir=tmp_path), 0)
    assert "secret" not in str(error.value)
    signed = "http://127.0.0.1:1/x/{name}?sig=secret"
    with pytest.raises(OSError, match=r"x/s-0\.tar: got no whole file") as error:
        whole(ShardStore(signed, shards, cache_dir=tmp_path, **FAST), 0)
    assert "secret" not in str(error.value)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    """The digits in shards of a few dozen pictures."""
    out = tmp_path_factory.mktemp("many")
    digits = open_source("digits")
    val = Source("digits", digits.classes, {"val": digits.splits["val"]})
    convert(val, out, samples_per_shard=50)
    return out / "val"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_data_from_a_url_is_that_of_the_directory(
    many_shards, tmp_path, workers, monkeypatch
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    near = open_shards(many_shards)
    assert len(near.manifest.shards) > 3
    positions = ValidationPositions(near.manifest.samples, batch=50, rank=0, world_size=1)
    with serving(many_shards) as server:
        far = open_split(server.url, cache_dir=tmp_path, **FAST)
        assert far.manifest == near.manifest
        assert np.array_equal(far.index, near.index)
        assert far.key(100) == near.key(100)
        for ours, theirs in zip(
            create_loader(ShardDataset(far, image_size=8), positions, workers=workers),
            create_loader(ShardDataset(near, image_size=8), positions, workers=0),
            strict=True,
        ):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
        open_split(server.url, cache_dir=tmp_path, **FAST)
        assert {server.count(s.name) for s in near.manifest.shards} == {1}
        assert (server.count("index.npy"), server.count("manifest.json")) == (1, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_an_epoch_are_fetched_ahead_once_and_within_the_budget(
    many_shards, tmp_path, workers, monkeypatch
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    near = open_shards(many_shards)
    sizes = [shard.samples for shard in near.manifest.shards]
    largest = max(shard.bytes for shard in near.manifest.shards)
    order = SampleOrder(sizes, seed=0, lanes=2, shuffle_shards=1)
    shape = dict(first_step=0, global_batch=12, micro_batch=12, rank=0, world_size=1)
    batches = TrainingPositions(order, steps=order.num_samples // 12, **shape)
    begins = order.open_shards(np.arange(order.num_samples))  # in the order of their first use
    with serving(many_shards) as server:
        budget = dict(budget_bytes=5 * largest)
        far = open_split(server.url, cache_dir=tmp_path, **budget, **FAST)
        options = dict(image_size=8, order=order)
        loader = create_loader(
            ShardDataset(far, batches=batches, **options), batches, workers=workers, prefetch=1
        )
        local = iter(create_loader(ShardDataset(near, **options), batches, workers=0))
        most, first = 0, {near.manifest.shards[shard].name for shard in begins[:4]}

        def here() -> set[str]:
            return {path.name for path in far.folder.glob("*.tar")}

        for step, batch in enumerate(loader):
            assert torch.equal(batch.images, next(local).images)
            if step == 0:  # the blocks being read, and those after them
                wait_until(lambda: first <= here())
            most = max(most, sum(path.stat().st_size for path in far.folder.glob("*.tar")))
            time.sleep(0.02)
        assert 3 * largest < most <= budget["budget_bytes"]
        requests = [name for name, _ in server.requests if name.endswith(".tar")]
        assert set(requests) == {shard.name for shard in near.manifest.shards}
        assert len(requests) <= len(sizes) + order.lanes  # a shard at a lane's edge may come twice


def changed(split: Path, copy: Path, change) -> Path:
    """A copy of a split whose manifest was changed by someone who knows how to sign it."""
    shutil.copytree(split, copy)
    manifest = Manifest.from_json((copy / "manifest.json").read_text())
    fields = json.loads(manifest.to_json())
    change(fields)
    for key in ("format", "version", "fingerprint"):
        fields.pop(key)
    fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
    (copy / "manifest.json").write_text(Manifest(**fields).to_json())
    return copy


def test_a_newer_index_is_not_taken_from_the_cache(many_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "far"
    shutil.copytree(many_shards, folder)
    with serving(folder) as server:
        old = open_split(server.url, cache_dir=tmp_path / "cache", **FAST)
        index = np.load(folder / "index.npy")
        index["label"] = 1
        np.save(folder / "index.npy", index)
        sha256 = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
        newer = changed(folder, tmp_path / "newer", lambda f: f.update(index_sha256=sha256))
        shutil.copy(newer / "manifest.json", folder / "manifest.json")
        new = open_split(server.url, cache_dir=tmp_path / "cache", **FAST)
    assert set(new.index["label"]) == {1} != set(old.index["label"])


def test_dead_processes_leave_nothing_that_grows(served, tmp_path):
    _, _, store = served
    for _ in range(5):
        assert outcomes(lambda: correct(store(), 0), 1) == [True]
    assert correct(store(), 0)
    assert len(list((tmp_path / "cache" / ".users").iterdir())) == 1


def _rename(name):
    return lambda fields: fields["shards"][0].update(name=name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_rename("../../x.tar"), "leaves the directory"),
        (_rename("pipe:touch x.tar"), "shard name"),
        (_rename("index.npy"), "shard name"),
        (_rename(5), "not a manifest"),
        (lambda fields: fields["shards"][0].update(bytes=-1), "not a manifest"),
        (lambda fields: fields["shards"].append(fields["shards"][0]), "two shards of one name"),
        (lambda fields: fields.update(index_sha256="0" * 64), "got sha256"),
        (lambda fields: fields.update(samples=7), "index.npy: got no whole file"),
    ],
)
def test_hostile_manifests_are_refused(many_shards, tmp_path, monkeypatch, change, reason):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = changed(many_shards, tmp_path / "far", change)
    with (
        serving(folder) as server,
        pytest.raises((ValueError, OSError), match=reason),
    ):
        open_split(server.url, cache_dir=tmp_path / "cache", **FAST)
    assert not [path for path in (tmp_path / "cache").glob("**/*.tar")]


def test_a_split_that_is_not_served_is_wrong_use(served, tmp_path):
    """A ValueError, which ends with exit code 2; a server in trouble is another matter."""
    server, _, _ = served
    named = dict(cache_dir=str(tmp_path / "cache"), cache_gb=1.0, image_size=8)
    with pytest.raises(ValueError, match="1 try; the last: HTTP 404") as error:
        open_named(f"{server.url}/nowhere", **named)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"1 try; the last: .*/manifest.json: No such file"):
        open_named(f"file:{tmp_path}/nowhere", **named)


def test_small_files_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_bytes(b"x" * 100)
    with serving(tmp_path / "far") as server:
        server.faults["x"] = [500, "close", "stall"]
        patience = fetch.Patience(**FAST)
        got = fetch.fetch_small(f"{server.url}/x", limit_bytes=100, patience=patience)
        assert got == b"x" * 100
        with pytest.raises(ValueError, match="more than 99 bytes"):
            fetch.fetch_small(f"{server.url}/x", limit_bytes=99)
    with pytest.raises(ValueError, match="runs a program"):
        fetch.fetch_small("pipe:echo x", limit_bytes=99)
