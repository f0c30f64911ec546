"""The progress of a long task: a bar while a person watches, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from ds_classifier.common.text import duration

LOG_SECONDS = 30.0  # between lines where stderr is no terminal


class Progress:
    """Shows how far a task is on stderr; use it as a context manager, and call it with numbers.

    unit: what is counted, in the plural, such as "images".
    shown: False on all ranks but the one that reports.
    """

    def __init__(self, unit: str = "images", *, shown: bool = True):
        self._unit, self._shown = unit, shown
        self._bar, self._phase = None, None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int | None, phase: str = "") -> None:
        """Show that `done` of `total` are done; total: None if it is not known yet.

        phase: what is being done now. A new phase starts a new bar, whose rate does not count
        what was done before its first call.
        """
        if not self._shown:
            return
        if self._bar is None or self._phase != phase:
            self._start(phase, done, total)
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._reported > LOG_SECONDS:
            self._reported = now
            print(self._line(done, total, now), file=sys.stderr, flush=True)

    def _start(self, phase: str, done: int, total: int | None) -> None:
        from tqdm import tqdm

        self.__exit__()
        self._phase, self._first = phase, done
        self._began = self._reported = time.monotonic()
        shape = dict(desc=phase or None, unit=f" {self._unit}", disable=None, leave=False)
        self._bar = tqdm(total=total, initial=done, **shape)  # disabled where there is no terminal

    def _line(self, done: int, total: int | None, now: float) -> str:
        rate = (done - self._first) / (now - self._began)
        left = f", {duration((total - done) / rate)} left" if total and rate else ""
        of = "" if total is None else f" of {total:,}"
        what = f"{self._phase}: " if self._phase else ""
        return f"{what}{done:,}{of} {self._unit}, {rate:,.1f}/s{left}"

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
