"""Do one task on many jobs in forked processes, which inherit the data that they work on.

The processes end with their parent, for whatever reason it ends, and leave Ctrl-C to it.
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
    """Return the argument `shared` of `in_processes`; for use in its tasks."""
    return _shared


def in_processes(
    workers: int,
    task: Callable[[Any], Any],
    jobs: Sequence[Any],
    *,
    shared: Any,
    ordered: bool = True,
) -> Iterator[Any]:
    """Yield the results of task(job) for all jobs.

    workers: number of processes; with one worker, or one job, the work is done in this process.
    shared: data that the forked processes inherit; only jobs and results are pickled.
    ordered: yield the results in the order of the jobs; if False, as they are finished.
    Raises the error of a task; OSError if a worker dies.
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
                "a worker process died, perhaps because memory ran out; do: run the same command "
                "again with fewer --workers"
            ) from None
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()  # nobody needs the other results
            raise
        finally:
            executor.shutdown()
    else:
        yield from map(task, jobs)


def _start(parent: int) -> None:
    """Set up a worker's signals and its end with the parent."""
    processes.die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent cleans up
