"""The learning rate of every step: DeepSpeed's own schedulers, and the flags in their place."""

import math

import pytest
import torch
from test_config import changed, command, problems, resolved

from ds_classifier.config.deepspeed_json import resolve
from ds_classifier.training.setup import lr_factor

STEPS = 300
PEAK = 3e-4


def rates(kind: str, params: dict, lr: float) -> list[float]:
    """Return the rate of each step by DeepSpeed's own scheduler, as its engine steps it."""
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupLR", {}),
        ("WarmupLR", {"warmup_max_lr": 2e-3, "warmup_num_steps": 50}),
        ("WarmupLR", {"warmup_num_steps": 1, "warmup_type": "linear"}),
        ("WarmupDecayLR", {"total_num_steps": 200, "warmup_num_steps": 20}),
        ("WarmupDecayLR", {"total_num_steps": 300, "warmup_max_lr": PEAK, "warmup_num_steps": 100}),
        ("WarmupDecayLR", {"total_num_steps": 300, "warmup_min_lr": 1e-5, "warmup_type": "linear"}),
        ("WarmupCosineLR", {"total_num_steps": 300}),
        ("WarmupCosineLR", {"total_num_steps": 250, "warmup_num_steps": 30, "cos_min_ratio": 0.1}),
        ("WarmupCosineLR", {"total_num_steps": 250, "warmup_type": "linear"}),
        ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 40}),
        (
            "OneCycle",
            {
                "cycle_min_lr": 0.004,
                "cycle_max_lr": 0.015,
                "cycle_first_step_size": 100,
                "cycle_second_step_size": 50,
                "cycle_first_stair_count": 10,
                "cycle_second_stair_count": 5,
                "decay_step_size": 20,
                "decay_lr_rate": 0.01,
                "cycle_momentum": False,
            },
        ),
        ("LRRangeTest", {"lr_range_test_min_lr": 1e-7}),
        ("LRRangeTest", {"lr_range_test_step_size": 20, "lr_range_test_staircase": True}),
    ],
)
def test_each_rate_is_that_of_deepspeeds_own_scheduler(kind, params):
    """Check that DeepSpeed's default stands for what the JSON leaves out."""
    raw = changed(optimizer__params__lr=5e-4, scheduler={"type": kind, "params": dict(params)})
    ds = resolved(raw=raw).ds_config
    ours = rates(kind, ds["scheduler"]["params"], ds["optimizer"]["params"]["lr"])
    assert ours == rates(kind, params, 5e-4)
    assert max(ours) > 0


def test_a_missing_warm_up_type_is_log():
    """The rate of the third step, by the formula of DeepSpeed's documentation."""
    params = {"total_num_steps": 1000, "warmup_max_lr": PEAK, "warmup_num_steps": 100}
    raw = changed(optimizer__params__lr=PEAK, scheduler={"type": "WarmupDecayLR", "params": params})
    ds = resolved(raw=raw)
    found = rates("WarmupDecayLR", ds.ds_config["scheduler"]["params"], PEAK)
    assert found[2] == pytest.approx(PEAK * math.log(2) / math.log(100))  # 4.5e-5
    assert "warmup_type log" in "\n".join(ds.notes)


def test_the_length_is_the_runs_where_the_json_has_none():
    raw = changed(scheduler={"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}})
    for flags, steps in (((), 150000), (("--iterations", "77"), 77)):
        params = resolved(*flags, raw=raw).ds_config["scheduler"]["params"]
        assert params["total_num_steps"] == steps
    raw["scheduler"]["params"]["total_num_steps"] = 90
    assert resolved(raw=raw).settings.iterations == 90
    assert "total_num_steps: got 90" in problems("--iterations", "77", raw=raw)


@pytest.mark.parametrize("kind", ["WarmupLR", "OneCycle", "LRRangeTest"])
def test_schedules_without_a_length_go_on(kind):
    params = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3} if kind == "OneCycle" else {}
    raw = changed(scheduler={"type": kind, "params": params})
    result = resolved("--iterations", "600", raw=raw)
    assert result.open_ended
    assert result.with_part(17).ds_config == result.ds_config
    message = problems("--iterations", "600", "--extend", "900", raw=raw)
    assert f"need none with {kind}" in message
    assert "do: --iterations 900" in message


def test_a_part_of_the_run_has_a_cosine_of_its_own():
    raw = changed(scheduler={"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto"}})
    part = resolved("--iterations", "600", "--extend", "900", raw=raw).with_part(300)
    assert part.ds_config["scheduler"]["params"]["total_num_steps"] == 300
    assert part.ds_config["scheduler"]["params"]["warmup_num_steps"] == 6


def test_the_scheduler_sets_the_rate_whatever_the_optimizer_says():
    raw = changed(optimizer__params__lr=8e-4, scheduler__params__warmup_max_lr=1e-3)
    result = resolved(raw=raw)
    assert result.settings.lr == 1e-3
    assert "optimizer.params.lr: 0.0008 has no effect" in "\n".join(result.notes)
    assert "warmup_max_lr: got 0.001" in problems("--lr", "5e-4", raw=raw)


# -------------------------------------------------------------------------------- flags


def factors(*flags: str, raw=None) -> list[float]:
    """Return the share of the peak at each step of a run of STEPS steps."""
    raw = raw or changed()
    settings = resolve(command("--iterations", str(STEPS), *flags), raw, world_size=2).settings
    factor = lr_factor(settings, STEPS)
    return [factor(k) for k in range(STEPS)]


@pytest.mark.parametrize("warm_up", [0, 1, 30])
@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_a_schedule_by_flags_is_torchs(shape, warm_up):
    """torch's schedulers in sequence are the independent answer."""
    from torch.optim import lr_scheduler as of_torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    left = STEPS - warm_up
    main = {
        "linear": lambda: of_torch.LinearLR(optimizer, 1.0, 0.0, total_iters=left),
        "cosine": lambda: of_torch.CosineAnnealingLR(optimizer, left),
        "constant": lambda: of_torch.ConstantLR(optimizer, 1.0),
    }[shape]
    parts = [main()]
    if warm_up:
        rise = of_torch.LinearLR(optimizer, 1 / (warm_up + 1), 1.0, total_iters=warm_up)
        parts = [rise, *parts]
    scheduler = of_torch.SequentialLR(optimizer, parts, [warm_up] * (len(parts) - 1))
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = factors("--lr_schedule", shape, "--warmup_steps", str(warm_up))
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_flag_replaces_the_jsons_scheduler():
    result = resolved("--lr_schedule", "cosine")
    assert "scheduler" not in result.ds_config
    assert not result.open_ended
    assert resolved("--lr_schedule", "constant").constant_rate
    assert not resolved("--lr_schedule", "constant", "--warmup_steps", "9").constant_rate


def test_the_references_flag_says_the_same():
    assert factors("--anneal_lr", "True") == factors("--lr_schedule", "linear")
    assert "disagree" in problems("--anneal_lr", "True", "--lr_schedule", "cosine")
    assert "--lr_schedule: got 'step'" in problems("--lr_schedule", "step")


def test_a_warm_up_counts_where_the_json_has_no_scheduler():
    raw = changed()
    del raw["scheduler"]
    found = factors("--warmup_steps", "3", raw=raw)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    message = problems("--warmup_steps", "300", "--iterations", "300", raw=raw)
    assert "--warmup_steps: got 300; need fewer" in message
