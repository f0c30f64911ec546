"""Shards at a URL: the same bytes, one download per node, within a budget."""

import os
import pickle
import pwd
import random
import resource
import time
from pathlib import Path

import pytest
from stores import (
    FAST,
    SIZE,
    bytes_in,
    cached,
    correct,
    fork,
    forked,
    kill,
    make_shards,
    outcomes,
    serving,
    wait_until,
    whole,
)

from ds_classifier.data.shards import Shard
from ds_classifier.data.store import ShardStore

# ----------------------------------------------------------------------------- the same bytes


def test_ranges_are_those_of_the_local_file(served_store, tmp_path):
    server, shards, store = served_store
    near, far = ShardStore(tmp_path / "far", shards), store()
    draw = random.Random(1)
    for _ in range(50):
        shard, offset = draw.randrange(6), draw.randrange(SIZE)
        length = draw.randrange(SIZE - offset + 1)
        expected = (tmp_path / "far" / f"s-{shard}.tar").read_bytes()[offset : offset + length]
        assert near.read(shard, offset, length) == far.read(shard, offset, length) == expected
    assert {server.count(f"s-{i}.tar") for i in range(6)} == {1}


def test_local_shards_use_no_cache(served_store, tmp_path):
    server, shards, _ = served_store
    store = ShardStore(tmp_path / "far", shards, cache_dir=tmp_path / "unused")
    store.prefetch([0, 1])
    assert correct(store, 0)
    assert not (tmp_path / "unused").exists()
    assert server.requests == []


def test_a_user_without_a_home_needs_one_only_for_shards_at_a_url(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    shards = make_shards(tmp_path / "near", 1)
    assert correct(ShardStore(tmp_path / "near", shards, cache_dir=Path("~/cache")), 0)
    with pytest.raises(ValueError, match=r"--cache_dir: got ~/cache, but .* no home directory"):
        ShardStore("http://127.0.0.1:9/x", shards, cache_dir=Path("~/cache"))


def test_few_handles_stay_open(tmp_path):
    shards = make_shards(tmp_path / "many", 300, size=10)
    store = ShardStore(tmp_path / "many", shards)
    before = len(os.listdir("/proc/self/fd"))
    assert all(correct(store, i) for i in [*range(300), *range(300)])
    assert len(os.listdir("/proc/self/fd")) - before <= 256
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_fewer_handles_stay_open_where_the_limit_is_lower(tmp_path):
    shards = make_shards(tmp_path / "many", 60, size=10)
    store = ShardStore(tmp_path / "many", shards)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert all(correct(store, i) for i in [*range(60), *range(60)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    store.close()


def test_an_index_that_points_outside_is_refused(served_store):
    with pytest.raises(ValueError, match=r"s-2\.tar.*need at most 300000"):
        served_store[2]().read(2, SIZE - 10, 11)


def test_a_used_store_can_be_pickled_and_forked(served_store):
    _, _, store = served_store
    used = store()
    used.prefetch([0, 1])
    assert correct(used, 0)
    assert correct(pickle.loads(pickle.dumps(used)), 1)
    assert outcomes(lambda: correct(used, 0) and correct(used, 2), 3) == [True] * 3


# ----------------------------------------------------------------------- one download per node


def test_processes_share_one_download(served_store):
    server, _, store = served_store
    server.faults["s-0.tar"] = ["slow"]  # 0.2 s
    assert outcomes(lambda: correct(store(), 0), 6) == [True] * 6
    assert server.count("s-0.tar") == 1


def test_processes_that_fetch_ahead_share_the_work(served_store):
    server, _, store = served_store
    for i in range(6):
        server.faults[f"s-{i}.tar"] = ["slow"]

    def work():
        ours = store()
        ours.prefetch(range(6))
        return all(correct(ours, i) for i in range(6))

    assert outcomes(work, 4) == [True] * 4
    assert [server.count(f"s-{i}.tar") for i in range(6)] == [1] * 6


def test_the_window_is_fetched_in_its_order_before_it_is_read(served_store):
    server, _, store = served_store
    ours = store()
    ours.prefetch([4, 2, 5])
    wait_until(lambda: cached(ours) == [2, 4, 5])
    assert [name for name, _ in server.requests] == ["s-4.tar", "s-2.tar", "s-5.tar"]


def test_a_download_that_fails_for_one_fails_for_those_who_waited(served_store):
    server, _, store = served_store
    server.faults["s-0.tar"] = ["stall"] * 50
    began = time.monotonic()
    errors = outcomes(lambda: whole(store(retries=1), 0), 4)
    assert all(e.startswith("OSError") and "stalled" in e and "2 tries" in e for e in errors)
    assert server.count("s-0.tar") == 2
    assert time.monotonic() - began < 5


def test_two_data_sets_of_equal_names_are_kept_apart(served_store, tmp_path):
    _, _, store = served_store
    others = make_shards(tmp_path / "other", 6, seed=1)
    with serving(tmp_path / "other") as server:
        second = ShardStore(server.url, others, cache_dir=tmp_path / "cache", **FAST)
        assert correct(store(), 0)
        assert correct(second, 0)
        assert store().folder.parent == second.folder.parent
        # A newer version at the same URL, with the same sizes, is another data set too.
        newer = make_shards(tmp_path / "other", 6, seed=2)
        third = ShardStore(server.url, newer, cache_dir=tmp_path / "cache", **FAST)
        assert correct(third, 0)


# --------------------------------------------------------------------------------- the budget


def test_the_least_recently_used_goes_first(served_store):
    _, _, store = served_store
    for shard in (0, 1, 2, 0, 3):
        ours = store(budget_bytes=3 * SIZE + 10)
        assert correct(ours, shard)
        ours.close()
    assert cached(ours) == [0, 2, 3]


def test_a_window_of_a_live_process_is_never_removed(served_store, tmp_path):
    server, _, store = served_store
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


def test_fetching_ahead_waits_for_room_and_reading_does_not(served_store):
    _, _, store = served_store
    ours, theirs = store(budget_bytes=2 * SIZE), store(budget_bytes=2 * SIZE)
    ours.prefetch([0, 1])
    wait_until(lambda: cached(ours) == [0, 1])
    theirs.prefetch([2])
    time.sleep(0.6)
    assert cached(ours) == [0, 1]
    assert correct(theirs, 2)  # needed at once
    assert cached(ours) == [0, 1, 2]
    ours.prefetch([1])
    theirs.prefetch([3])
    wait_until(lambda: 3 in cached(ours))
    assert cached(ours) == [1, 3]


def test_the_budget_holds_with_many_processes(served_store):
    """Two processes with windows of 2 of 6 shards, and a budget of 5: shards are often removed."""
    _, _, store = served_store
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
        most = max(most, bytes_in(ours.folder, "*.tar", ".*.part"))
        time.sleep(0.002)
    assert [process.exitcode for process in processes] == [0, 0]
    assert 3 * SIZE < most <= budget


def test_budgets_below_the_largest_shard_are_refused(served_store):
    _, _, store = served_store
    with pytest.raises(ValueError, match=r"need at least 0\.0003, the largest"):
        store(budget_bytes=SIZE - 1)


def test_a_window_beyond_the_budget_is_fetched_in_part(served_store):
    server, _, store = served_store
    ours = store(budget_bytes=2 * SIZE)
    ours.prefetch([4, 1, 2])
    wait_until(lambda: cached(ours) == [1, 4])
    time.sleep(0.3)
    assert server.count("s-2.tar") == 0
    assert correct(ours, 2)  # needed at once: it exceeds the budget


def test_the_files_of_dead_processes_are_removed(served_store, tmp_path):
    _, _, store = served_store
    for _ in range(5):
        assert outcomes(lambda: correct(store(), 0), 1) == [True]
    assert correct(store(), 0)
    assert len(list((tmp_path / "cache" / ".users").iterdir())) == 1


@pytest.mark.parametrize(
    "name",
    ["../x.tar", "/etc/x.tar", "pipe:touch x.tar", "a b.tar", "$(x).tar", ".x.tar", "-x.tar", "x"],
)
def test_dangerous_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="shard name"):
        ShardStore("http://127.0.0.1", [Shard(name, 1, 1, "")], cache_dir=tmp_path)


def test_signed_urls_need_a_name_and_are_not_shown(tmp_path):
    shards = make_shards(tmp_path / "far", 1)
    with pytest.raises(ValueError, match=r"\{name\}") as error:
        whole(ShardStore("http://127.0.0.1:1/x?sig=secret", shards, cache_dir=tmp_path), 0)
    assert "secret" not in str(error.value)
    signed = "http://127.0.0.1:1/x/{name}?sig=secret"
    with pytest.raises(OSError, match=r"x/s-0\.tar: got no whole file") as error:
        whole(ShardStore(signed, shards, cache_dir=tmp_path, **FAST), 0)
    assert "secret" not in str(error.value)
