"""The ranks' knowledge of each other without collectives: each one's status, and which are gone.

Every rank writes its status under its own key of torch's TCPStore, once per second, in a thread;
rank 0's process serves the store. Every wait here has a time limit, because the rank that should
answer may be dead, stopped, or cut off.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ds_classifier import distributed
from ds_classifier.distributed import processes, rendezvous

BEAT_SECONDS = 1.0
_START_SECONDS = 120  # for all ranks to write their host and process, once connected


class Peers:
    """The other ranks of this run. Make it on every rank, after the process group.

    status: returns what this rank is doing, JSON-able; called in the thread.
    attempt: the time of this start of the run, the same text on all ranks.
    verdict: what ended the run, once a rank has posted it: {"message": ..., "code": ...}.
    lost: when rank 0's store became unreachable (time.monotonic), or None.
    A single rank has no peers, store or thread.
    """

    def __init__(self, status: Callable[[], dict[str, Any]]):
        self.attempt = time.strftime("%Y-%m-%d_%H-%M-%S")
        self.verdict: dict[str, Any] | None = None
        self.lost: float | None = None
        self._status = status
        self._beat = 0
        self._outgoing: dict[str, Any] | None = None
        self._statuses: dict[int, dict[str, Any]] | None = None
        self._wanted, self._wake, self._closed = False, threading.Event(), threading.Event()
        self._who: dict[int, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._talk, name="peers", daemon=True)
        if distributed.world_size() > 1:
            self._connect()
            self._thread.start()

    def _connect(self) -> None:
        """Exchange host and process of all ranks, and the attempt of rank 0."""
        self._store = rendezvous.connect(seconds=_START_SECONDS)
        if distributed.rank() == 0:
            self._store.set("attempt", self.attempt)
        pid = os.getpid()
        me = dict(space=_pid_space(), host=socket.gethostname(), pid=pid)
        self._store.set(
            _who(distributed.rank()), json.dumps(me | {"start": processes.started(pid)})
        )
        self.attempt = self._store.get("attempt").decode()
        # Rank 0 reads all keys for everyone: W ranks that read W keys would make W^2 requests.
        if distributed.rank() == 0:
            keys = [_who(rank) for rank in range(distributed.world_size())]
            texts = [text.decode() for text in self._store.multi_get(keys)]
            self._store.set("everybody", json.dumps(texts))
        everybody = json.loads(self._store.get("everybody"))
        self._who = {rank: json.loads(text) for rank, text in enumerate(everybody)}

    def _talk(self) -> None:
        """Write this rank's status and read the verdict, once per second."""
        try:
            while not self._closed.is_set():
                self._write()
                if self._outgoing is not None:
                    self._store.compare_set("verdict", "", json.dumps(self._outgoing))
                if self._store.check(["verdict"]):
                    self.verdict = json.loads(self._store.get("verdict"))
                if self._wanted:
                    self._wanted = False
                    self._statuses = self._read_twice()
                self._wake.wait(BEAT_SECONDS)
                self._wake.clear()
        except Exception:  # any error of the network: the store is gone
            self.lost = time.monotonic()

    def _write(self) -> None:
        """Write this rank's status, with a count that shows others that it is alive."""
        self._beat += 1
        mine = self._status() | {"beat": self._beat}
        self._store.set(_status(distributed.rank()), json.dumps(mine))

    def _read_twice(self) -> dict[int, dict[str, Any]]:
        """Return all ranks' statuses. "silent" is True for those that wrote none for two beats."""
        ranks = range(distributed.world_size())
        keys = [_status(rank) for rank in ranks]
        self._store.wait(keys, timedelta(seconds=2 * BEAT_SECONDS))
        before = [json.loads(text) for text in self._store.multi_get(keys)]
        for _ in range(5):  # other ranks may read at the same time: they must see this one alive
            time.sleep(0.5 * BEAT_SECONDS)
            self._write()
        after = [json.loads(text) for text in self._store.multi_get(keys)]
        mine = distributed.rank()
        return {
            rank: after[rank]
            | {"silent": rank != mine and after[rank]["beat"] == before[rank]["beat"]}
            for rank in ranks
        }

    def statuses(self, patience: float = 8.0) -> dict[int, dict[str, Any]]:
        """Return the status of each rank; {} if rank 0's store does not answer.

        patience: seconds to wait for the store.
        """
        self._statuses, self._wanted = None, True
        self._wake.set()
        self._wait(lambda: self._statuses is not None, patience)
        return self._statuses or {}

    def post(self, verdict: dict[str, Any], patience: float = 3.0) -> None:
        """Post what ended the run, unless another rank did before.

        patience: seconds to wait for the store.
        """
        self._outgoing = verdict
        self._wake.set()
        self._wait(lambda: self.verdict is not None, patience)

    def _wait(self, done: Callable[[], bool], patience: float) -> None:
        deadline = time.monotonic() + patience
        while self._who and self.lost is None and not done() and time.monotonic() < deadline:
            time.sleep(0.05)

    def gone(self) -> list[int]:
        """Return the ranks of this host whose process has ended."""
        here = _pid_space()
        return [
            rank
            for rank, who in self._who.items()
            if who["space"] == here and processes.started(who["pid"]) != who["start"]
        ]

    def name(self, rank: int) -> str:
        """Return a rank's name with its process and host."""
        who = self._who.get(rank)
        return f"rank {rank} (process {who['pid']} on {who['host']})" if who else f"rank {rank}"

    def close(self) -> None:
        """Stop the thread: the interpreter must not end while it is in torch's C++."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)


def _who(rank: int) -> str:
    return f"who/{rank}"


def _status(rank: int) -> str:
    return f"status/{rank}"


def _pid_space() -> str:
    """Return the space in which process numbers are unique: host, boot and container."""
    return f"{socket.gethostname()} {processes.pid_space()}"
