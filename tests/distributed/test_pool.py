"""Work in forked processes: results, errors, and a worker that dies."""

import os
import signal

import pytest

from ds_classifier.distributed.pool import in_processes, shared


def add(number):
    return shared() + number


def fail(number):
    raise ValueError(f"got {number}")


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_in_order_or_as_they_are_finished(workers):
    assert list(in_processes(workers, add, range(50), shared=7)) == [7 + n for n in range(50)]
    loose = in_processes(workers, add, range(50), shared=1, ordered=False)
    assert sorted(loose) == [1 + n for n in range(50)]


@pytest.mark.parametrize("ordered", [True, False])
def test_errors_and_deaths_reach_the_caller(ordered):
    with pytest.raises(ValueError, match="got"):
        list(in_processes(2, fail, range(9), shared=None, ordered=ordered))
    with pytest.raises(OSError, match="a worker process died"):
        list(in_processes(2, die, range(9), shared=None, ordered=ordered))
