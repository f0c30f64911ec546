"""Bytes and seconds of a step on many GPUs, against counts by hand and what the wire carried."""

import pytest

from ds_classifier.scaling import Job, bytes_sent, step
from launch.scaling import main

JOB = Job(
    parameters=10**6, forward_flops=1e9, global_batch=1024, peak_flops=1e12, mfu=0.5, wire=1e9
)


@pytest.mark.parametrize(
    ("width", "stage", "accumulation", "counted"),
    # tests/traffic.py on two hosts: bytes a step and parameter, protocol headers included.
    [(4, 1, 1, 6.22), (4, 1, 4, 6.02), (2, 1, 4, 3.02), (2, 2, 1, 3.02), (2, 2, 4, 9.04)],
)
def test_bytes_are_those_counted_on_a_wire(width, stage, accumulation, counted):
    assert bytes_sent(width, 2, stage, accumulation) == pytest.approx(counted, rel=0.04)


def test_a_ring_of_four_by_hand():
    """Each of 4 ranks passes 3 quarters around twice to sum, and once to gather."""
    assert bytes_sent(100, 4, 0, 1) == 150
    assert bytes_sent(100, 4, 1, 8) == 225
    assert bytes_sent(100, 4, 2, 8) == 8 * 150 + 75
    assert bytes_sent(100, 1, 1, 1) == 0


def test_micro_batch_and_accumulation_make_the_share():
    found = step(JOB, 8, stage=1, largest_micro_batch=48)
    assert (found.micro_batch, found.accumulation) == (32, 4)
    assert found.compute == pytest.approx(128 * 3 * 1e9 / 0.5e12)


def test_more_gpus_than_pictures_do_not_fit():
    assert step(JOB, 4096, stage=1, largest_micro_batch=64) is None
    assert step(JOB, 3, stage=1, largest_micro_batch=64) is None


@pytest.mark.parametrize(
    "words",
    [
        ["--peak", "inf"],
        ["--mfu", "2"],
        ["--images_a_core", "-5"],
        ["--num_classes", "1"],
        ["--recipe", "reference"],
    ],
)
def test_odd_arguments_are_refused_in_a_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "; need " in capsys.readouterr().err.splitlines()[-1]
