"""Run a part of a measurement in a process of its own, and end it when its time is up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from ds_classifier.distributed import processes

LEAVING = 20.0  # seconds for a part to end after its last row, as it frees the GPU

Row = dict[str, Any]
Part = Callable[..., Iterator[Row]]


def rows_of(part: Part, arguments: tuple, seconds: float) -> Iterator[Row]:
    """Yield the rows of a part one by one, until it ends or its time is up.

    A part that fails or is stopped has a last row {"note": why}. part: a function of a module.
    """
    if seconds < 1:
        yield {"note": "not measured: the time is up"}
        return
    context, ends = multiprocessing.get_context("spawn"), time.monotonic() + seconds
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(part, arguments, theirs))
    process.start()
    theirs.close()
    try:
        while answers.poll(max(0.0, ends - time.monotonic())):
            yield answers.recv()
        yield {"note": f"stopped after {seconds:.0f} s"}
    except EOFError:  # the part has ended
        process.join(LEAVING)
        if process.exitcode:
            yield {"note": f"ended with code {process.exitcode}"}
    finally:
        if process.is_alive():
            with suppress(ProcessLookupError):  # while it imports, it has no group of its own yet
                os.killpg(process.pid, signal.SIGKILL)  # with the programs that it has started
            process.kill()
            process.join()


def _serve(part: Part, arguments: tuple, answers: Any) -> None:
    os.setpgid(0, 0)
    processes.die_with(multiprocessing.parent_process().pid)
    try:
        for row in part(*arguments):
            answers.send(row)
    except Exception as error:  # whatever it is, the other parts are measured
        traceback.print_exc()
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        answers.send({"note": f"failed: {last}"})
    answers.close()
