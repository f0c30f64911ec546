"""Hangs and deaths: the first failure of one rank ends all ranks, with a message that names it.

Each rank compares its own progress with a time-out, and watches the processes of its host and the
statuses that other ranks post (`peers.py`). A step only records its phase; a thread does the rest.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_classifier import distributed
from ds_classifier.distributed import failures, processes
from ds_classifier.distributed.peers import Peers
from ds_classifier.distributed.stopping import STOPPED

DATA, COMPUTING, COLLECTIVE = "data", "forward/backward", "collective"
_END = object()  # after the last batch
_TICK_SECONDS = 1.0
_CONFIRM_SECONDS = 2.0  # when a run ends normally, ranks end within less than this of each other
_CAUSE_SECONDS = 5.0  # for the cause of a broken collective to become known
_STOP_SECONDS = 15.0  # for data to come after a request to stop; schedulers kill after about 30 s


@dataclass(frozen=True)
class Activity:
    """The activity of a rank, and the phase that it is in.

    name: start, step, save or validation; each has a time-out.
    phase: a part of the activity.
    began, since: when the activity and the phase began, by time.monotonic.
    """

    name: str
    phase: str
    step: int
    began: float
    since: float


class Watchdog:
    """A context around a rank's work. An error that leaves it ends all ranks.

    minutes: the time-out of each activity. The first step has that of the start, because kernels
    are compiled in it.
    advice: set by others; returns a better message for an error, or None.
    stop_asked: set by others; returns what asked the run to stop, or "". A rank that then still
        waits for data after _STOP_SECONDS ends all ranks, since no step will end soon.
    """

    def __init__(self, run_dir: Path, *, minutes: dict[str, float]):
        self.advice: Callable[[BaseException], str | None] = lambda error: None
        self.stop_asked: Callable[[], str] = lambda: ""
        self._minutes = minutes
        # Before the ranks meet, those of a host have only their launcher in common.
        launcher = os.getppid()
        self._errors = run_dir / "errors" / f"{launcher}-{processes.started(launcher)}"
        self._main = threading.get_ident()
        self._details = ""  # traceback of this rank's own error
        now = time.monotonic()
        self._activity = Activity("start", "start", 0, now, now)
        self._waiting_since: float | None = None  # since when the main thread is in a collective
        self._first_step: int | None = None
        self._peers: Peers | None = None
        self._releases: list[Callable[[], None]] = []
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # ---------------------------------------------------------------- what the main thread calls

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        on_all = isinstance(error, distributed.AgreedError) or not isinstance(error, Exception)
        if self._peers is not None and not on_all:
            self._fail(error)
        self.close()

    def join(self) -> None:
        """Connect to the other ranks. Every rank must call it after the process group is made."""
        self._peers = Peers(self._status)
        self._errors = self._errors.with_name(self._peers.attempt)

    def release_at_end(self, release: Callable[[], None]) -> None:
        """Register a function to call when the run ends, with or without an error."""
        self._releases.append(release)

    def leave(self) -> None:
        """Wait until all ranks are done; every rank must call it before the process group ends."""
        from torch.distributed import barrier

        barrier()
        self.close()

    def close(self) -> None:
        """Stop watching, and call the registered functions."""
        self._closed.set()
        self._thread.join()
        if self._peers is not None:
            self._peers.close()
        while self._releases:
            self._releases.pop()()

    def stepping(self, step: int) -> None:
        """Record that a step begins."""
        self._first_step = self._first_step or step
        self._go("step", COMPUTING, step)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Record an activity with a time-out of its own within a step: save or validation."""
        before = self._activity
        self._go(name, name, before.step)
        yield
        self._go(before.name, before.phase, before.step)

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; the wait for each is recorded as the phase data."""
        batches = iter(batches)
        while True:
            before = self._activity
            self._activity = replace(before, phase=DATA, since=time.monotonic())
            batch = next(batches, _END)  # an error keeps the phase in which it happened
            self._activity = replace(before, since=time.monotonic())
            if batch is _END:
                return
            yield batch

    def _go(self, name: str, phase: str, step: int) -> None:
        now = time.monotonic()
        self._activity = Activity(name, phase, step, now, now)

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        """Look once per second for every reason to end this rank."""
        last = awake = time.monotonic()
        gone_since: float | None = None
        asked_since: float | None = None
        while not self._closed.wait(_TICK_SECONDS):
            now = time.monotonic()
            if now - last > 10 * _TICK_SECONDS:  # this process itself was stopped (SIGSTOP)
                awake = now
            last = now
            activity, frame = self._activity, sys._current_frames().get(self._main)
            if not failures.is_waiting(frame):
                self._waiting_since = None
            elif self._waiting_since is None or self._waiting_since < activity.began:
                self._waiting_since = now
            if self._peers is not None:
                if self._peers.verdict is not None:
                    self._end(self._peers.verdict, "ended because another rank failed")
                gone = self._peers.gone()
                gone_since = (gone_since or now) if gone else None
                if gone_since is not None and now - gone_since > _CONFIRM_SECONDS:
                    self._end_for_gone(gone)
                if self._peers.lost is not None and now - self._peers.lost > _CAUSE_SECONDS:
                    self._end(self._verdict(self._lost()), self._lost())
            if reason := self.stop_asked():
                asked_since = asked_since or now
                if (
                    activity.phase == DATA
                    and now - max(asked_since, activity.since) > _STOP_SECONDS
                ):
                    self._end_stopped(reason)
            limit = 60 * self._limit(activity)
            if now - max(activity.began, awake) > limit:
                self._end_overdue(activity, now - activity.began)

    def _limit(self, activity: Activity) -> float:
        """Return the minutes that the activity may take."""
        compiling = activity.name == "step" and activity.step == self._first_step
        return self._minutes["start" if compiling else activity.name]

    def _status(self) -> dict[str, Any]:
        """Return phase, step and seconds in this phase, for the other ranks."""
        activity, now = self._activity, time.monotonic()
        phase, since = activity.phase, activity.since
        if failures.is_waiting(sys._current_frames().get(self._main)):
            phase, since = COLLECTIVE, self._waiting_since or now
        return {"phase": phase, "step": activity.step, "seconds": round(now - since)}

    # ---------------------------------------------------------------- ends

    def _fail(self, error: BaseException) -> None:
        """End all ranks for an error of this one, or for its cause on another rank."""
        self._details = details = "".join(traceback.format_exception(error))
        if failures.broke_in_collective(error):
            self._activity = replace(self._activity, phase=COLLECTIVE)
            self._await_cause()
        advice = self.advice(error)
        text = advice or failures.summary(error)
        known = advice or isinstance(error, (ValueError, OSError, FloatingPointError))
        shown = "" if known else details
        if failures.broke_in_collective(error):
            shown, silent = "", self._silent(self._statuses())
            if silent:
                names = ", ".join(map(self._name, silent))
                text = (
                    f"{names} fell silent, and the connection broke; do: check its host; the same "
                    "command continues from the last checkpoint"
                )
        self._end(self._verdict(text, failures.exit_code(error), shown))

    def _await_cause(self) -> None:
        """Wait for the cause of a broken collective: the rank that died or failed first."""
        deadline = time.monotonic() + _CAUSE_SECONDS
        while time.monotonic() < deadline:
            gone = self._peers.gone()
            verdict = failures.claimed(self._errors) or self._peers.verdict
            if verdict is not None:
                self._end(verdict)
            if gone:
                time.sleep(0.5)  # others may be dying too
                self._end_for_gone(self._peers.gone())
            if self._peers.lost is not None:
                self._end(self._verdict(self._lost()))
            time.sleep(0.1)

    def _end_for_gone(self, gone: list[int]) -> None:
        verdict = failures.claimed(self._errors)
        if verdict is None:
            names = ", ".join(map(self._name, gone))
            verdict = self._verdict(
                f"{names} died without a message, killed or out of memory (see dmesg); do: run the "
                "same command again, it continues from the last checkpoint"
            )
        self._end(verdict, "ended because another rank died")

    def _end_overdue(self, activity: Activity, seconds: float) -> None:
        statuses = self._statuses()
        flag = "start" if self._limit(activity) == self._minutes["start"] else activity.name
        text = (
            f"no progress within --{flag}_timeout ({seconds:.0f} s): {self._blame(statuses)}; do: "
            "look at its stacks; if it was only slow, raise the time-out"
        )
        self._end(self._verdict(text, failures.HUNG), f"overdue for {seconds:.0f} s")

    def _end_stopped(self, reason: str) -> None:
        who = self._describe(distributed.rank(), self._status())
        text = (
            f"stopped by {reason} before the step ended: {who}; do: look why no data comes; the "
            "same command continues from the last checkpoint"
        )
        self._end(self._verdict(text, STOPPED), f"stopped by {reason}")

    def _lost(self) -> str:
        return f"{self._name(0)} died or is cut off: its store does not answer"

    def _statuses(self) -> dict[int, dict[str, Any]]:
        if self._peers is None or distributed.world_size() == 1:
            return {distributed.rank(): self._status()}
        mine = {distributed.rank(): self._status()}
        return self._peers.statuses() or {0: {"silent": True}} | mine

    def _silent(self, statuses: dict[int, dict[str, Any]]) -> list[int]:
        return [rank for rank, status in statuses.items() if status.get("silent")]

    def _blame(self, statuses: dict[int, dict[str, Any]]) -> str:
        """Return which ranks keep the others waiting, and what they are doing."""
        silent = self._silent(statuses)
        at_data = [rank for rank, status in statuses.items() if status.get("phase") == DATA]
        working = [rank for rank, status in statuses.items() if status.get("phase") != COLLECTIVE]
        culprits = silent or at_data or working
        if not culprits:
            return (
                "all ranks wait in a collective: the network between them is slow, or they are in "
                "different collectives"
            )
        waiting = [rank for rank in statuses if rank not in culprits]
        text = ", ".join(self._describe(rank, statuses[rank]) for rank in culprits)
        if waiting:
            others = ", ".join(map(str, waiting))
            text += f"; rank {others} waits" if len(waiting) == 1 else f"; ranks {others} wait"
        return text

    def _describe(self, rank: int, status: dict[str, Any]) -> str:
        if "phase" not in status:
            return f"{self._name(rank)} does not answer"
        where = f"{status['phase']} at step {status['step']}"
        if status.get("silent"):
            return f"{self._name(rank)} does not answer, last heard in {where}"
        return f"{self._name(rank)} has been in {where} for {status['seconds']} s"

    def _name(self, rank: int) -> str:
        return self._peers.name(rank) if self._peers is not None else f"rank {rank}"

    def _verdict(self, text: str, code: int = failures.FAILED, shown: str = "") -> dict[str, Any]:
        """Return the message and the exit code. shown: a traceback to print above the message."""
        status, rank = self._status(), distributed.rank()
        where = f"rank {rank} at step {status['step']}, {status['phase']}; tracebacks in "
        return {"message": f"{shown}{where}{self._errors}/\nerror: {text}", "code": code}

    def _end(self, verdict: dict[str, Any], why: str = "") -> None:
        """End this process with the code of the verdict, after `_report`."""
        self._ending.acquire()  # never released: only the first error of this process counts
        try:
            self._report(verdict, why)
        finally:  # even if the disk or the screen fails
            os._exit(verdict["code"])

    def _report(self, verdict: dict[str, Any], why: str) -> None:
        """Write this rank's file, post the verdict, and print it if this host has not yet.

        why: goes into the file of a rank that has no error of its own.
        """
        status = self._status()
        failures.record(
            self._errors,
            f"{self._name(distributed.rank())}, step {status['step']}, phase {status['phase']} "
            f"since {status['seconds']} s\n\n{self._details or why}\n\n{failures.stacks()}",
        )
        prints = failures.claim(self._errors, verdict)
        if self._peers is not None:
            self._peers.post(verdict)
        for release in self._releases:
            release()
        with suppress(OSError):  # a full disk under a redirected output
            sys.stdout.flush()
        if distributed.world_size() > 1 and (prints or distributed.rank() == 0):
            # Let the other ranks read the verdict in rank 0's store and end, so that the message is
            # the last line on the screen.
            time.sleep(2.5 * _TICK_SECONDS)
        if prints:
            distributed.show(verdict["message"], error=True)
