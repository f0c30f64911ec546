"""Hangs and deaths: every rank knows where it is, and the first trouble of one ends all of them.

Each rank watches its own progress against a time-out, the processes of its host, and what others
post (`peers.py`). Nothing is done in a step but noting the phase; the rest is a thread's.
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

DATA, COMPUTING, COLLECTIVE = "data", "forward/backward", "collective"
_END = object()  # of the batches
_TICK_SECONDS = 1.0
_CONFIRM_SECONDS = 2.0  # a rank that is leaving in peace is gone for no longer than this
_CAUSE_SECONDS = 5.0  # for the cause of a broken collective to show


@dataclass(frozen=True)
class Place:
    """Where a rank is. activity: what the time-out is for: start, step, save or validation."""

    activity: str
    phase: str
    step: int
    began: float  # the activity, by time.monotonic
    since: float  # the phase


class Watchdog:
    """A context around a rank's work; an error that leaves it ends all ranks.

    minutes: the time-out of each activity. The first step has that of the start: kernels are
    compiled in it. advice: what else to say of an error, or None.
    """

    def __init__(self, run_dir: Path, *, minutes: dict[str, float]):
        self.advice: Callable[[BaseException], str | None] = lambda error: None
        self._minutes = minutes
        # Until the ranks meet, those of a host have only their launcher in common.
        launcher = os.getppid()
        self._errors = run_dir / "errors" / f"{launcher}-{processes.started(launcher)}"
        self._main = threading.get_ident()
        self._details = ""  # of this rank's own error
        now = time.monotonic()
        self._place = Place("start", "start", 0, now, now)
        self._waiting_since: float | None = None  # the main thread, in a collective
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
        """Meet the other ranks; every rank calls it when the process group stands."""
        self._peers = Peers(self._status)
        self._errors = self._errors.with_name(self._peers.attempt)

    def release_at_end(self, release: Callable[[], None]) -> None:
        """Call this when the run ends, well or badly."""
        self._releases.append(release)

    def leave(self) -> None:
        """All ranks are through; every rank must call it before the process group ends."""
        from torch.distributed import barrier

        barrier()
        self.close()

    def close(self) -> None:
        """Watch no more, and release what was held."""
        self._closed.set()
        self._thread.join()
        if self._peers is not None:
            self._peers.close()
        while self._releases:
            self._releases.pop()()

    def stepping(self, step: int) -> None:
        """A step begins."""
        self._first_step = self._first_step or step
        self._go("step", COMPUTING, step)

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Within a step, something with a time-out of its own: save or validation."""
        before = self._place
        self._go(activity, activity, before.step)
        yield
        self._go(before.activity, before.phase, before.step)

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; waiting for one is the phase data."""
        batches = iter(batches)
        while True:
            before = self._place
            self._place = replace(before, phase=DATA, since=time.monotonic())
            batch = next(batches, _END)  # an error leaves the phase as it is: it happened there
            self._place = replace(before, since=time.monotonic())
            if batch is _END:
                return
            yield batch

    def _go(self, activity: str, phase: str, step: int) -> None:
        now = time.monotonic()
        self._place = Place(activity, phase, step, now, now)

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        last = awake = time.monotonic()
        gone_since: float | None = None
        while not self._closed.wait(_TICK_SECONDS):
            now = time.monotonic()
            if now - last > 10 * _TICK_SECONDS:  # stopped itself, and nobody's fault
                awake = now
            last = now
            place, frame = self._place, sys._current_frames().get(self._main)
            if not failures.is_waiting(frame):
                self._waiting_since = None
            elif self._waiting_since is None or self._waiting_since < place.began:
                self._waiting_since = now
            if self._peers is not None:
                if self._peers.verdict is not None:
                    self._end(self._peers.verdict, "ended, as another rank failed")
                gone = self._peers.gone()
                gone_since = (gone_since or now) if gone else None
                if gone_since is not None and now - gone_since > _CONFIRM_SECONDS:
                    self._end_for_gone(gone)
                if self._peers.lost is not None and now - self._peers.lost > _CAUSE_SECONDS:
                    self._end(self._verdict(self._lost()), self._lost())
            limit = 60 * self._limit(place)
            if now - max(place.began, awake) > limit:
                self._end_overdue(place, now - place.began)

    def _limit(self, place: Place) -> float:
        """Minutes that the activity may take."""
        compiling = place.activity == "step" and place.step == self._first_step
        return self._minutes["start" if compiling else place.activity]

    def _status(self) -> dict[str, Any]:
        place, now = self._place, time.monotonic()
        phase, since = place.phase, place.since
        if failures.is_waiting(sys._current_frames().get(self._main)):
            phase, since = COLLECTIVE, self._waiting_since or now
        return {"phase": phase, "step": place.step, "seconds": round(now - since)}

    # ---------------------------------------------------------------- ends

    def _fail(self, error: BaseException) -> None:
        """End all ranks for an error of this one, unless it only followed from another's."""
        self._details = details = "".join(traceback.format_exception(error))
        if failures.broke_in_collective(error):
            self._place = replace(self._place, phase=COLLECTIVE)
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
                    f"{names} fell silent, and the connection broke; do: see what its host says; "
                    "the same command continues from the last checkpoint"
                )
        self._end(self._verdict(text, failures.exit_code(error), shown))

    def _await_cause(self) -> None:
        """A collective broke: the rank that died, or that failed first, shows in a moment."""
        deadline = time.monotonic() + _CAUSE_SECONDS
        while time.monotonic() < deadline:
            gone = self._peers.gone()
            verdict = failures.claimed(self._errors) or self._peers.verdict
            if verdict is not None:
                self._end(verdict)
            if gone:
                time.sleep(0.5)  # several may be dying
                self._end_for_gone(self._peers.gone())
            if self._peers.lost is not None:
                self._end(self._verdict(self._lost()))
            time.sleep(0.1)

    def _end_for_gone(self, gone: list[int]) -> None:
        verdict = failures.claimed(self._errors)
        if verdict is None:
            names = ", ".join(map(self._name, gone))
            verdict = self._verdict(
                f"{names} died without a word, killed or out of memory (dmesg may tell); do: run "
                "the same command again, it continues from the last checkpoint"
            )
        self._end(verdict, "ended, as another rank died")

    def _end_overdue(self, place: Place, seconds: float) -> None:
        statuses = self._statuses()
        flag = "start" if self._limit(place) == self._minutes["start"] else place.activity
        text = (
            f"no progress within --{flag}_timeout ({seconds:.0f} s): {self._blame(statuses)}; do: "
            "look at its stacks; if it was only slow, raise the time-out"
        )
        self._end(self._verdict(text, failures.HUNG), f"overdue for {seconds:.0f} s")

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
        """Who keeps the others waiting, and where it is."""
        silent = self._silent(statuses)
        at_data = [rank for rank, status in statuses.items() if status.get("phase") == DATA]
        working = [rank for rank, status in statuses.items() if status.get("phase") != COLLECTIVE]
        culprits = silent or at_data or working
        if not culprits:
            return (
                "all ranks wait in a collective: the network between them is slow, or they do not "
                "wait for the same one"
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
        """shown: a traceback to stand above the message."""
        status, rank = self._status(), distributed.rank()
        where = f"rank {rank} at step {status['step']}, {status['phase']}; tracebacks in "
        return {"message": f"{shown}{where}{self._errors}/\nerror: {text}", "code": code}

    def _end(self, verdict: dict[str, Any], why: str = "") -> None:
        """End this rank: its file, the word to the others, the screen if it is the first here."""
        self._ending.acquire()  # and never release: another thread's error comes too late
        try:
            self._tell(verdict, why)
        finally:  # whatever the disk or the screen did
            os._exit(verdict["code"])

    def _tell(self, verdict: dict[str, Any], why: str) -> None:
        status = self._status()
        failures.record(
            self._errors,
            f"{self._name(distributed.rank())}, step {status['step']}, phase {status['phase']} "
            f"since {status['seconds']} s\n\n{self._details or why}\n\n{failures.stacks()}",
        )
        speaks = failures.claim(self._errors, verdict)
        if self._peers is not None:
            self._peers.post(verdict)
        for release in self._releases:
            release()
        with suppress(OSError):  # a full disk under a redirected screen
            sys.stdout.flush()
        if distributed.world_size() > 1 and (speaks or distributed.rank() == 0):
            # The others read the verdict in rank 0's store, and fall silent: this stands last.
            time.sleep(2.5 * _TICK_SECONDS)
        if speaks:
            distributed.show(verdict["message"], error=True)
