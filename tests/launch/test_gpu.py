"""The parts of `benchmark.py gpu`, with a CPU or a made-up device in the GPU's place."""

import time
import weakref

import parts_to_run
import pytest
import torch

from launch.benchmarks import gpu, measuring
from launch.benchmarks.parts import rows_of


def test_fp16_is_compared_with_weights_that_bf16_has_not_rounded():
    """fp16 has three bits more than bf16, so its error is an eighth."""
    rows = {row["way"]: row for row in gpu.fidelity(gpu.REHEARSAL, [])}
    assert rows["fp16"]["error of logits"] < rows["bf16"]["error of logits"] / 3
    assert rows["fp16"]["of gradients"] < rows["bf16"]["of gradients"] / 3


@pytest.mark.parametrize(
    ("room", "measured"), [(1, [2, 4, 4, 4, 4]), (0.5, [2, 4, 2, 2, 2]), (0, [2])]
)
def test_a_step_that_does_not_fit_ends_the_search_and_is_forgotten(monkeypatch, room, measured):
    """room: 1: both micro-batches fit; 0.5: the smaller one; 0: none."""
    held = []

    def step_row(plan, px, micro, **how):
        activations = torch.zeros(micro)
        held.append(weakref.ref(activations))
        if micro > 4 * room:
            raise torch.OutOfMemoryError
        return {"micro-batch": micro, "images/s": float(micro), **how}

    monkeypatch.setattr(gpu, "step_row", step_row)
    rows = []
    for row in gpu.eager(gpu.REHEARSAL, [], 8):
        assert held[-1]() is None
        rows.append(row)
    assert [row["micro-batch"] for row in rows] == measured
    assert [row["micro-batch"] for row in rows if "note" in row] == [4] * (room == 0.5) + [2] * (
        room == 0
    )


def test_no_engine_outlives_its_row():
    """The weights and moments of an engine would be in the GiB of all rows after it."""
    rows = list(rows_of(parts_to_run.engines_held, (gpu.REHEARSAL,), 600))
    assert rows == [{"engines": 0}, {"engines": 0}]


def test_a_call_that_returns_early_is_waited_for_and_the_first_is_not_timed(monkeypatch):
    """A call only starts its work on a GPU."""
    started = []

    def synchronize(device):
        time.sleep(0.2 * len(started))
        started.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    seconds = measuring.seconds_of(lambda: started.append(1), torch.device("cuda"), 0)
    assert 0.2 <= seconds < 0.35
