"""Stopping on request: who may ask, and how all ranks agree on the step to stop after.

SIGTERM, Ctrl-C, SIGUSR1, SIGHUP (a closed terminal, unless nohup has it ignored), --max_minutes,
the file STOP in the run directory and the death of the launcher ask. This module imports torch only
when it votes, so that it listens from the start.
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

STOPPED = 75  # exit code: stopped, run the same command again (EX_TEMPFAIL of sysexits.h)
STOP_FILE = "STOP"
TWICE_SECONDS = 5.0

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
_CLOSE = b"\0"  # no signal has this number
_SIGNALS = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGHUP: "SIGHUP",
}


class StopRequests:
    """Listens in a thread of its own, which hears signals while a step waits in C++ too.

    Until `defer` a request ends the process at once with code 75: there is nothing to save yet.
    After it, a request waits in `reason` for the vote. A second Ctrl-C ends the process at once; so
    does a second SIGTERM, unless it comes within 5 s: the scheduler's, to all processes, and the
    launcher's, to its children, are one request.
    """

    def __init__(self):
        self.reason = ""
        self._deferred = False
        self._first: dict[str, float] = {}  # when each kind was first asked for
        self._deadline = float("inf")
        self._stop_file: Path | None = None
        self._chain = processes.launcher_chain()
        self._began = time.monotonic()
        self._ears, self._mouth = socket.socketpair()
        self._ears.settimeout(1.0)
        self._mouth.setblocking(False)
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _heard)
        signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._thread.start()

    def __enter__(self) -> StopRequests:
        return self

    def __exit__(self, *error: Any) -> None:
        """Listen no more: requests change nothing now, and the interpreter ends without threads."""
        signal.set_wakeup_fd(-1)
        self._mouth.send(_CLOSE)
        self._thread.join()

    def also_by(self, *, max_minutes: float, run_dir: Path) -> None:
        """Heed a time limit, in minutes from the start (0: none), and the stop file, on rank 0."""
        if distributed.rank() == 0:
            self._stop_file = run_dir / STOP_FILE
            if max_minutes:
                self._deadline = self._began + 60 * max_minutes

    def defer(self) -> None:
        """From here on requests wait for the vote."""
        self._deferred = True

    def honoured(self) -> None:
        """The stop has been agreed on: remove the stop file, so that the next start goes on."""
        if self._stop_file is not None:
            try:
                self._stop_file.unlink(missing_ok=True)
            except OSError as error:
                distributed.warn(
                    f"{files.problem(error)}: the stop file stays, and would stop the next start "
                    "too; do: remove it"
                )

    def _listen(self) -> None:
        while True:
            try:
                heard = self._ears.recv(64)
            except TimeoutError:
                heard = b""
            if _CLOSE in heard:
                return
            for number in heard:
                if number in _SIGNALS:
                    self._ask(_SIGNALS[number])
            if processes.broken(self._chain):
                self._chain = []
                self._ask("the launcher's death")
            if time.monotonic() > self._deadline:
                self._ask("--max_minutes")
            # Not Path.exists, which raises when the disk is away: this thread must go on listening.
            if self._stop_file is not None and os.path.exists(self._stop_file):
                self._ask("the file STOP")

    def _ask(self, reason: str) -> None:
        now = time.monotonic()
        since = now - self._first.setdefault(reason, now)
        second = (reason == "Ctrl-C" and since > 0) or (
            reason == "SIGTERM" and since > TWICE_SECONDS
        )
        if second:
            distributed.complain(f"ended at once by a second {reason}; the last checkpoint stands")
            os._exit(130 if reason == "Ctrl-C" else 143)
        self.reason = self.reason or reason
        if not self._deferred:
            self.leave()

    def leave(self) -> None:
        """End the process before its first step: nothing is there to save."""
        if distributed.local_rank() == 0:
            distributed.show(f"stopped by {self.reason} before the first step")
        self.honoured()
        os._exit(STOPPED)


def _heard(number: int, frame: Any) -> None:
    """Python's own handler has nothing to do: the number went to the listening thread."""


class Stopped(Exception):
    """All ranks agreed to stop in the middle of something that need not be finished."""


class StopVote:
    """Whether any rank was asked to stop, known to all ranks at the same call.

    The vote is a reduction on the CPU that is waited for at the next call, so no step waits for it.
    """

    def __init__(self, requests: StopRequests):

        self._requests = requests
        self._group = distributed.cpu_group()
        self._pending: Any = None  # the vote under way: (its handle, its tensor)
        self.reason = ""  # what all ranks agreed to stop for

    def decide(self, *, now: bool = False) -> bool:
        """Call on every rank at the same places; True on all ranks from the same call on.

        now: wait for this very vote, where speed does not matter.
        """
        if not self.reason and self._pending is not None:
            self._count()
        if not self.reason:
            self._cast()
            if now:
                self._count()
        return bool(self.reason)

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Equally many batches on every rank; raises Stopped on all after the same one."""
        for batch in batches:
            yield batch
            if self.decide():
                raise Stopped

    def _cast(self) -> None:
        import torch.distributed

        vote = torch.tensor([REASONS.index(self._requests.reason)])
        work = torch.distributed.all_reduce(
            vote, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._pending = (work, vote)

    def _count(self) -> None:
        work, vote = self._pending
        work.wait()
        self._pending = None
        self.reason = REASONS[int(vote)]
        if self.reason:
            self._requests.honoured()
