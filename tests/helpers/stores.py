"""Shards of random bytes at a URL, their store, and processes that read from it."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from flaky_server import FlakyServer

from ds_classifier.data.shards import Shard
from ds_classifier.data.store import ShardStore

SIZE = 300_000
FAST = dict(stall_timeout_s=0.5, retries=3, pause_s=0.02)
fork = multiprocessing.get_context("fork")


def make_shards(folder: Path, number: int, *, seed: int = 0, size: int = SIZE) -> list[Shard]:
    """Write files of random bytes in place of tars; return them as shards."""
    folder.mkdir(exist_ok=True)
    shards = []
    for i in range(number):
        content = random.Random(seed * 100 + i).randbytes(size)
        (folder / f"s-{i}.tar").write_bytes(content)
        shards.append(Shard(f"s-{i}.tar", 1, size, hashlib.sha256(content).hexdigest()))
    return shards


@contextmanager
def serving(folder: Path):
    """Serve a folder by HTTP; yields the server."""
    server = FlakyServer(folder)
    try:
        yield server
    finally:
        server.close()


def whole(store: ShardStore, shard: int) -> bytes:
    """Read all bytes of a shard."""
    return store.read(shard, 0, store.shards[shard].bytes)


def correct(store: ShardStore, shard: int) -> bool:
    """Return whether the store gives the shard's own bytes."""
    return hashlib.sha256(whole(store, shard)).hexdigest() == store.shards[shard].sha256


def cached(store: ShardStore) -> list[int]:
    """Return the numbers of the shards in the cache."""
    return sorted(int(path.stem[2:]) for path in store.folder.glob("*.tar"))


def part(store: ShardStore, shard: int) -> Path:
    """Return the file that an unfinished download is written to."""
    return store.folder / f".s-{shard}.tar.part"


def wait_until(condition, seconds: float = 10) -> None:
    """Wait until condition() is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def outcomes(function, processes: int, seconds: float = 20) -> list:
    """Call function() in several processes at once; return each result, or its error's text."""
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
    """Start a process that calls function() and then lives until it is killed."""

    def run():
        function()
        signal.pause()

    process = fork.Process(target=run, daemon=True)
    process.start()
    return process


def kill(process) -> None:
    """Send SIGKILL to a process and wait for its end."""
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def bytes_in(folder: Path, *patterns: str) -> int:
    """Return the bytes of all files that match, while other processes add and delete some."""
    total = 0
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
