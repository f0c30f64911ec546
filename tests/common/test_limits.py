"""Limits of the machine: of open files, and of room for semaphores."""

import errno
import multiprocessing
import os
import resource
from multiprocessing import synchronize

import pytest
from running import ROOT, run_python

from ds_classifier.common import files, limits
from ds_classifier.distributed import failures


@pytest.fixture
def limited():
    """Return a function that sets the soft limit to so many more files than are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more: int) -> int:
        low = len(os.listdir("/proc/self/fd")) + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        return low

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_soft_limit_is_raised(limited):
    low = limited(10)
    assert limits.open_files_problem(5) is None
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == low
    assert limits.open_files_problem(2000) is None
    handles = [os.open(os.devnull, os.O_RDONLY) for _ in range(2000)]
    for handle in handles:
        os.close(handle)


HARD = """
import os, resource, sys
sys.path.insert(0, sys.argv[1])
from ds_classifier.common import limits
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
print(limits.open_files_problem(50))
print(len(os.listdir("/proc/self/fd")))
"""


def test_a_hard_limit_is_named_with_what_is_open_and_needed(tmp_path):
    message, counted = run_python("-c", HARD, ROOT, cwd=tmp_path).lines
    opened = int(counted)
    assert message == (
        f"got a limit of 24 open files per process, with {opened} open; need {opened + 50}; do: "
        "ulimit -n 1024"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE), "log.jsonl"),
        RuntimeError("[enforce fail at loop.cc:48] pipe: Too many open files"),
        ValueError("EMFILE, message: too many open files"),
    ],
)
def test_whoever_says_that_too_many_files_are_open_the_limit_is_named(error):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    text = failures.summary(error)
    assert text.endswith(f" (the limit is {limit}; to raise it: ulimit -n {2 * limit})")
    assert files.problem(ValueError(text)) == text  # once


def test_a_semaphore_that_cannot_be_made_names_its_place(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(synchronize._multiprocessing, "SemLock", refuse)
    with pytest.raises(OSError) as refused:
        multiprocessing.get_context("fork").Queue()
    monkeypatch.undo()
    assert files.problem(refused.value) == (
        "No space left on device (a semaphore in /dev/shm; to give it room: docker run --shm-size "
        "1g)"
    )
    with pytest.raises(OSError) as other:
        refuse()
    assert files.problem(other.value) == "No space left on device"
