"""Limits of the machine that stop a program: of open files, and of room for semaphores."""

from __future__ import annotations

import errno
import os
import resource
import traceback

ENOUGH_FILES = 1024  # the usual limit
_SEMAPHORES = "multiprocessing/synchronize.py"
_TOO_MANY_FILES = os.strerror(errno.EMFILE)


def open_files_problem(more: int) -> str | None:
    """Return why this process cannot open this many more files and sockets, or None if it can.

    A soft limit that is too low is raised, as far as the hard limit permits.
    """
    try:
        opened = len(os.listdir("/proc/self/fd"))
    except OSError:  # the list takes a file itself
        opened = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = opened + more
    if soft >= need or soft == resource.RLIM_INFINITY:
        return None
    if hard >= need or hard == resource.RLIM_INFINITY:
        enough = max(ENOUGH_FILES, need)
        if hard != resource.RLIM_INFINITY:
            enough = min(enough, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
        return None
    return (
        f"got a limit of {hard} open files per process, with {opened} open; need {need}; do: "
        f"ulimit -n {max(ENOUGH_FILES, need)}"
    )


def advice(error: BaseException, text: str) -> str:
    """Return words in brackets on the limit that caused an error; "" for any other error.

    text: of the error; one that has such words already gets no more.
    """
    if _TOO_MANY_FILES.lower() in text.lower() and "ulimit -n" not in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f" (the limit is {limit}; to raise it: ulimit -n {max(ENOUGH_FILES, 2 * limit)})"
    places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, OSError) and any(place.endswith(_SEMAPHORES) for place in places):
        return " (a semaphore in /dev/shm; to give it room: docker run --shm-size 1g)"
    return ""
