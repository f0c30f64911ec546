"""Stopping on request: what can ask for it, and how all ranks agree on the step to stop after.

These ask to stop: SIGTERM, Ctrl-C, SIGUSR1, SIGHUP (a closed terminal, unless nohup ignores it),
--max_minutes, the file STOP in the run directory, and the death of the launcher. This module
imports torch only for a vote, so that a program can listen from its start.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.distributed import processes

STOPPED = 75  # exit code: stopped; run the same command again (EX_TEMPFAIL of sysexits.h)
STOP_FILE = "STOP"
TWICE_SECONDS = 5.0  # a second SIGTERM within this time belongs to the first

REASONS = (
    "",
    "SIGTERM",
    "Ctrl-C",
    "SIGUSR1",
    "--max_minutes",
    "the file STOP",
    "the launcher's death",
    "SIGHUP",
)
_CLOSE = b"\0"  # ends the listening; no signal has this number
_SIGNALS = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGHUP: "SIGHUP",
}


class StopRequests:
    """Listens for requests to stop in a thread, which receives signals while a step is in C++ too.

    Before `defer` a request ends the process at once with exit code 75, because there is nothing to
    save. After it, a request waits in `reason` for the vote. A second Ctrl-C ends the process at
    once, and so does a second SIGTERM after 5 s. Within 5 s it belongs to the same request: a
    scheduler signals all processes, and the launcher then signals its children.
    """

    def __init__(self):
        self.reason = ""
        self._deferred = False
        self._first: dict[str, float] = {}  # reason -> time of its first request
        self._deadline = float("inf")
        self._stop_file: Path | None = None
        self._chain = processes.launcher_chain()
        self._began = time.monotonic()
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(1.0)
        self._sender.setblocking(False)
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _ignore)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._thread.start()

    def __enter__(self) -> StopRequests:
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop listening, so that the interpreter ends without threads. Signals are now ignored."""
        signal.set_wakeup_fd(-1)
        self._sender.send(_CLOSE)
        self._thread.join()

    def watch_also(self, *, max_minutes: float, run_dir: Path) -> None:
        """Stop also at a time limit, and for the file run_dir/STOP; rank 0 watches both.

        max_minutes: from the start of the process; 0: no limit.
        """
        if distributed.rank() == 0:
            self._stop_file = run_dir / STOP_FILE
            if max_minutes:
                self._deadline = self._began + 60 * max_minutes

    def defer(self) -> None:
        """Let requests wait for the vote from now on."""
        self._deferred = True

    def clear_stop_file(self) -> None:
        """Remove the stop file once the stop is agreed on, so that the next start trains."""
        if self._stop_file is not None:
            try:
                self._stop_file.unlink(missing_ok=True)
            except OSError as error:
                distributed.warn(
                    f"{files.problem(error)}: the stop file cannot be removed, and would stop the "
                    "next start too; do: remove it"
                )

    def _listen(self) -> None:
        """Turn what asks to stop into requests, until closed."""
        while True:
            try:
                received = self._receiver.recv(64)
            except TimeoutError:
                received = b""
            if _CLOSE in received:
                return
            for number in received:
                if number in _SIGNALS:
                    self._ask(_SIGNALS[number])
            if processes.broken(self._chain):
                self._chain = []
                self._ask("the launcher's death")
            if time.monotonic() > self._deadline:
                self._ask("--max_minutes")
            # Path.exists would raise if the disk is away, and this thread must go on listening.
            if self._stop_file is not None and os.path.exists(self._stop_file):
                self._ask("the file STOP")

    def _ask(self, reason: str) -> None:
        """Take a request to stop."""
        now = time.monotonic()
        since = now - self._first.setdefault(reason, now)
        second = (reason == "Ctrl-C" and since > 0) or (
            reason == "SIGTERM" and since > TWICE_SECONDS
        )
        if second:
            distributed.complain(
                f"ended at once by a second {reason}; the last checkpoint is intact"
            )
            os._exit(130 if reason == "Ctrl-C" else 143)
        first = not self.reason
        self.reason = self.reason or reason
        distributed.live("")  # the launcher, which Ctrl-C reaches too, prints a traceback
        if not self._deferred:
            self.leave()
        elif first and reason in ("Ctrl-C", "SIGTERM"):
            distributed.say(f"{reason}: this step is finished and saved; a second one ends at once")

    def leave(self) -> None:
        """End the process before its first step, with nothing to save."""
        if distributed.local_rank() == 0:
            distributed.show(f"stopped by {self.reason} before the first step")
        self.clear_stop_file()
        os._exit(STOPPED)


def _ignore(number: int, frame: Any) -> None:
    """Ignore a signal: Python also writes its number to the listening thread."""


class Stopped(Exception):
    """The end of a task that need not be finished, because all ranks agreed to stop."""


class StopVote:
    """A vote by which all ranks learn at the same call that one of them was asked to stop.

    The vote is a reduction on the CPU whose result is read at the next call, so no step waits for
    it. reason: what all ranks agreed to stop for; "" until then.
    """

    def __init__(self, requests: StopRequests):
        self._requests = requests
        self._group = distributed.cpu_group()
        self._pending: Any = None  # the running vote: (handle, tensor)
        self.reason = ""

    def decide(self, *, now: bool = False) -> bool:
        """Vote; return True on all ranks from the same call on. Every rank must call it.

        now: wait for the result of this vote, where speed does not matter.
        """
        if not self.reason and self._pending is not None:
            self._count()
        if not self.reason:
            self._cast()
            if now:
                self._count()
        return bool(self.reason)

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches, of which every rank must have the same number.

        Raises Stopped on all ranks after the same batch.
        """
        for batch in batches:
            yield batch
            if self.decide():
                raise Stopped

    def _cast(self) -> None:
        """Start a vote."""
        import torch.distributed

        vote = torch.tensor([REASONS.index(self._requests.reason)])
        work = torch.distributed.all_reduce(
            vote, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._pending = (work, vote)

    def _count(self) -> None:
        """Wait for the running vote; `failures` knows this function by its name."""
        work, vote = self._pending
        work.wait()
        self._pending = None
        self.reason = REASONS[int(vote)]
        if self.reason:
            self._requests.clear_stop_file()
