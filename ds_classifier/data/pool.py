"""The same task on many things in forked processes, which inherit what they work on.

They end with their parent, however it ends, and leave Ctrl-C to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ds_classifier.distributed import processes

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
        others = set(multiprocessing.active_children())
        executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), _start, (os.getpid(),)
        )
        try:
            futures = [executor.submit(task, job) for job in jobs]
            for future in futures if ordered else as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise OSError(
                "a worker process died, perhaps for want of memory; do: run the same command "
                "again, with fewer --workers"
            ) from None
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()  # nobody waits for the rest
            raise
        finally:
            executor.shutdown()
    else:
        yield from map(task, jobs)


def _start(parent: int) -> None:
    processes.die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # cleaning up is the parent's
