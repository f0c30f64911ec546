"""The same task on many things in forked processes, which inherit what they work on.

They end with their parent, however it ends, and leave Ctrl-C to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ds_classifier import processes

_shared: Any = None


def shared() -> Any:
    """What was given to `in_processes`, in its tasks."""
    return _shared


def in_processes(
    workers: int,
    task: Callable[[Any], Any],
    jobs: Sequence[Any],
    *,
    shared: Any,
    ordered: bool = True,
) -> Iterator[Any]:
    """The results of a task on jobs, in their order or as they come; only jobs and results travel.

    One worker, or one job, is done in this process.
    """
    global _shared
    _shared = shared
    if workers > 1 and len(jobs) > 1:
        with multiprocessing.get_context("fork").Pool(
            workers, initializer=_start, initargs=(os.getpid(),)
        ) as pool:
            yield from (pool.imap if ordered else pool.imap_unordered)(task, jobs)
    else:
        yield from map(task, jobs)


def _start(parent: int) -> None:
    processes.die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
