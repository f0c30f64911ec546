"""Stores of shards at a URL for tests: files of random bytes, a server, processes that use them."""

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


def bytes_in(folder: Path, *patterns: str) -> int:
    """Of the files that are there, while others come and go."""
    total = 0
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
