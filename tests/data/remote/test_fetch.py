"""Downloads over bad connections and by other schemes give complete files, or one error."""

import errno
import os
import signal
import time

import pytest
from stores import (
    FAST,
    SIZE,
    cached,
    correct,
    forked,
    kill,
    make_shards,
    outcomes,
    part,
    serving,
    wait_until,
    whole,
)

from ds_classifier.data.remote import fetch
from ds_classifier.data.remote.cache import FileCache
from ds_classifier.data.store import ShardStore
from ds_classifier.distributed import processes


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
def test_downloads_recover_from_faults(served_store, faults, no_ranges):
    server, _, store = served_store
    server.no_ranges = no_ranges
    server.faults["s-1.tar"] = list(faults)
    ours = store(stall_timeout_s=2.0)  # long, since a busy machine pauses too
    began = time.monotonic()
    assert correct(ours, 1)
    assert time.monotonic() - began < 10  # a drip to the end takes 15 s
    assert not part(ours, 1).exists()
    assert server.count("s-1.tar") == len(faults) + 1
    cut = {"reset", "close", "stall", "drip"} & set(faults)
    assert bool(cut) == any(asked for _, asked in server.requests)


def test_a_killed_download_is_resumed(served_store):
    server, _, store = served_store
    server.faults["s-0.tar"] = ["stall"]
    ours = store()
    process = forked(lambda: store(stall_timeout_s=30).read(0, 0, 10))
    wait_until(lambda: part(ours, 0).exists() and part(ours, 0).stat().st_size == SIZE // 2)
    kill(process)
    assert cached(ours) == []
    assert correct(ours, 0)
    assert server.requests == [("s-0.tar", None), ("s-0.tar", f"bytes={SIZE // 2}-")]


def test_a_killed_download_is_unlocked_while_its_child_lives(served_store, tmp_path):
    """A DataLoader worker forked during the download holds none of its parent's locks."""
    server, _, store = served_store
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


def test_a_try_with_progress_does_not_count_as_a_failure(served_store, monkeypatch):
    """A large shard over a bad connection arrives after more breaks than `retries`."""
    server, _, store = served_store
    monkeypatch.setattr(fetch, "PROGRESS", 10_000)
    server.faults["s-0.tar"] = ["close"] * 4
    assert correct(store(retries=1), 0)
    server.no_ranges = True  # now each try ends at the same byte
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
def test_a_fault_that_stays_ends_in_one_error(served_store, fault, reason, tries):
    server, _, store = served_store
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


def test_a_part_longer_than_the_shard_is_discarded(served_store):
    _, _, store = served_store
    ours = store()
    ours.folder.mkdir(parents=True)
    part(ours, 0).write_bytes(bytes(SIZE + 5))
    assert correct(ours, 0)


def test_a_cached_file_that_was_cut_is_fetched_again(served_store):
    server, _, store = served_store
    assert correct(store(), 0)
    os.truncate(store().folder / "s-0.tar", 100)
    assert correct(store(), 0)
    assert server.count("s-0.tar") == 2


def test_other_schemes_go_through_gopen(served_store, tmp_path):
    _, shards, _ = served_store
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
def test_a_program_that_fails_is_a_failed_try(served_store, tmp_path, command, reason):
    _, shards, _ = served_store
    location = "pipe:" + command.replace("{file}", f"{tmp_path}/far/{{name}}")
    options = FAST | dict(retries=1, cache_dir=tmp_path / "cache", allow_pipe=True)
    store = ShardStore(location, shards, **options)
    began = time.monotonic()
    with pytest.raises(OSError, match=f"2 tries.*{reason}"):
        whole(store, 0)
    assert time.monotonic() - began < 5
    assert cached(store) == []


@pytest.mark.parametrize("end", ["gives up", "is done", "is killed"])
def test_programs_end_with_their_reader(served_store, tmp_path, end):
    """Every process of the shell ends: also one in the background, or one that ignores signals."""
    _, shards, _ = served_store
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
def test_a_cache_on_a_disk_without_locks_is_named(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ValueError, match=rf"--cache_dir: got {tmp_path}, .*{os.strerror(number)}"):
        FileCache(tmp_path, budget_bytes=None)
