"""Test which JSON may continue a run; test_extend.py tests its length."""

import pytest
from running import ROOT

from ds_classifier.config import parse_training_command
from ds_classifier.config.deepspeed_json import read_ds_config, resolve
from ds_classifier.training.start import refuse_changes

JSON = ROOT / "ds_configs" / "zero1_fp32.json"
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "torch_adam": True}}


def continue_with(optimizer):
    """Continue a checkpoint of ADAMW with another section `optimizer` in the JSON."""
    command = parse_training_command(["--deepspeed_config", str(JSON)])
    resolved = resolve(command, read_ds_config(JSON), world_size=1)
    facts = dict(deepspeed={"optimizer": optimizer}, classes=[], data="")
    state = dict(step=5, settings=resolved.settings.recorded(), part_ends=[9])
    refuse_changes(state | facts | {"deepspeed": {"optimizer": ADAMW}}, resolved, facts)


@pytest.mark.parametrize(
    "changed",
    [
        {"params": {"lr": "auto", "betas": [0.9, 0.999], "torch_adam": False}},
        {"params": {"lr": "auto", "betas": [0.9, 0.999], "fused": False}},
        {"type": "adamw"},
        {"type": "Adam"},  # DeepSpeed's means AdamW
        {"type": "Lion", "params": {"lr": "auto"}},
        {"type": "Adagrad", "params": {"lr": 1e-2, "eps": 1e-10}},
    ],
)
def test_another_optimizer_or_implementation_continues_a_run(changed):
    continue_with(ADAMW | changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"params": {"lr": "auto", "betas": [0.9, 0.99], "torch_adam": True}},
        {"params": {"lr": "auto", "torch_adam": True}},
        {"type": "Adam", "params": ADAMW["params"] | {"adam_w_mode": False}},
    ],
)
def test_other_parameters_of_the_same_optimizer_are_refused(changed):
    with pytest.raises(ValueError, match=r"optimizer of the JSON: .* in the checkpoint, .* now"):
        continue_with(ADAMW | changed)


def test_more_iterations_do_not_change_a_warm_up_under_way():
    """ "auto" would be another number of steps; the one before, given as a flag, is taken."""
    raw = read_ds_config(JSON)
    raw["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}

    def settled(*flags):
        command = parse_training_command(["--deepspeed_config", str(JSON), *flags])
        return resolve(command, raw, world_size=1)

    facts = dict(deepspeed={}, classes=[], data="")
    began = settled("--iterations", "100")
    state = dict(step=5, settings=began.settings.recorded(), part_ends=[100]) | facts
    refuse_changes(state, began, facts)
    refuse_changes(state, settled("--iterations", "120"), facts)  # 2 steps, as in 100
    with pytest.raises(ValueError, match="warmup_steps: 2 in the checkpoint, 20 now"):
        refuse_changes(state, settled("--iterations", "1000"), facts)
    longer = settled("--iterations", "1000", "--warmup_steps", "2")
    refuse_changes(state, longer, facts)
    assert longer.ds_config["scheduler"] == began.ds_config["scheduler"]
