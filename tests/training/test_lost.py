"""A run that gives up over gradients that are not finite; whole runs are in test_training.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from ds_classifier.data.loader import BadSample
from ds_classifier.training.logs.lost import BadSamples, SkippedSteps


@pytest.fixture
def engine(monkeypatch):
    """fp16 from a loss scale of 4, whose floor is 1."""
    monkeypatch.setattr("ds_classifier.distributed.all_gather", lambda tensor: tensor[None])
    engine = SimpleNamespace(global_steps=0, skipped_steps=0, applied=True)
    engine.optimizer = SimpleNamespace(cur_scale=4.0, loss_scaler=SimpleNamespace(min_scale=1.0))
    engine.fp16_enabled = engine.dynamic_loss_scale = lambda: True
    engine.was_step_applied = lambda: engine.applied
    engine.train_batch_size = lambda: 2
    return engine


def step(engine, skipped, *, finite, losses=(0.5, 0.5)):
    """One step as DeepSpeed does it: skipped and the scale halved, down to its floor."""
    engine.global_steps += 1
    engine.applied = finite
    if not finite:
        engine.skipped_steps += 1
        engine.optimizer.cur_scale = max(1.0, engine.optimizer.cur_scale / 2)
    first = 2 * (engine.global_steps - 1)
    skipped.check(torch.tensor([[[first, first + 1], [5, 5], losses]], dtype=torch.float64))


def watch(engine, folder, limit):
    return SkippedSteps(engine, run_dir=folder, limit=limit, key_of=lambda q: f"key {q}")


def test_the_floor_of_the_loss_scale_has_its_own_message(engine, tmp_path):
    """4 -> 2 -> 1 are skips that help; those that follow at 1 are not, good steps between or no."""
    skipped = watch(engine, tmp_path, 3)
    for finite in (False, False, True, False, True, False, True):
        step(engine, skipped, finite=finite)
    with pytest.raises(
        FloatingPointError, match=r"at its floor, 1 .*3 steps skipped, the last one is 8"
    ):
        step(engine, skipped, finite=False)


def test_a_scale_that_rises_again_starts_the_count_anew(engine, tmp_path):
    skipped = watch(engine, tmp_path, 3)
    for finite in (False, False, True, False, True, False, True):
        step(engine, skipped, finite=finite)
    engine.optimizer.cur_scale = 2.0
    for finite in (True, False, True, False, True, False, True):
        step(engine, skipped, finite=finite)


def test_too_many_in_a_row(engine, tmp_path):
    engine.optimizer.cur_scale = 2.0**20
    skipped = watch(engine, tmp_path, 3)
    for finite in (False, False, True, False, False):
        step(engine, skipped, finite=finite)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 6"):
        step(engine, skipped, finite=False)


def test_a_scale_that_falls_from_far_above_is_let_fall(engine, tmp_path):
    """4 steps bring it from 2^20 to 2^16; then, and after the first good step, all count."""
    engine.optimizer.cur_scale = 2.0**20
    skipped = watch(engine, tmp_path, 3)
    for finite in [False] * 6 + [True]:
        step(engine, skipped, finite=finite)
    assert len((tmp_path / SkippedSteps.FILE).read_text().splitlines()) == 6
    engine.optimizer.cur_scale = 2.0**20
    for _ in range(2):
        step(engine, skipped, finite=False)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 10"):
        step(engine, skipped, finite=False)


def test_nothing_but_skips_ends_where_the_scale_is_usual(engine, tmp_path):
    engine.optimizer.cur_scale = 2.0**20
    skipped = watch(engine, tmp_path, 3)
    for _ in range(6):
        step(engine, skipped, finite=False)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 7"):
        step(engine, skipped, finite=False)


def test_a_list_that_cannot_be_written_ends_no_run(engine, tmp_path, capsys):
    """/dev/full is a disk without room; what it cut short of a line does not swallow the next."""
    listed = tmp_path / SkippedSteps.FILE
    skipped = watch(engine, tmp_path, 5)
    listed.symlink_to("/dev/full")
    step(engine, skipped, finite=False)
    assert "No space left on device: {'step': 1, 'positions': [0, 2]" in capsys.readouterr().out
    listed.unlink()
    listed.write_text('{"step": 2, "posi')
    step(engine, skipped, finite=False)
    assert json.loads(listed.read_text().splitlines()[1])["step"] == 2


def test_bad_samples_are_counted_where_they_cannot_be_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ds_classifier.distributed.all_reduce_sum", lambda tensor: tensor)
    (tmp_path / "bad_samples.rank0.jsonl").symlink_to("/dev/full")
    device = torch.device("cpu")
    samples = BadSamples(tmp_path, device=device, known=1, limit=9, epoch_samples=9)
    samples.add([BadSample(7, "cat/7", "truncated")])
    assert samples.total() == 2
    assert "No space left on device: {" in capsys.readouterr().err


def test_each_is_listed_and_told_once(engine, tmp_path):
    skipped = watch(engine, tmp_path, 3)
    step(engine, skipped, finite=True)
    step(engine, skipped, finite=False, losses=(0.5, float("nan")))
    assert skipped.news() == (
        "gradient not finite; loss scale 2; loss not finite at 3, see skipped_steps.jsonl"
    )
    step(engine, skipped, finite=False)
    assert skipped.news() == "gradient not finite; loss scale 1"
    rows = [json.loads(line) for line in open(tmp_path / "skipped_steps.jsonl")]
    assert rows == [
        {
            "step": 2,
            "positions": [2, 4],
            "not_finite": [{"position": 3, "key": "key 3"}],
            "loss_scale": 2.0,
        },
        {"step": 3, "positions": [4, 6], "not_finite": [], "loss_scale": 1.0},
    ]
