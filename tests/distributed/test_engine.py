"""The state of DeepSpeed's loss scaling, and what a step in its engine waits for."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from own_networks import write_module
from running import ROOT, run_python
from small_models import SMALL
from torch import nn
from versions import complete_deepspeed

from ds_classifier.config import Settings
from ds_classifier.distributed.engine import deepspeed_engine, deepspeed_versions
from ds_classifier.loss import noised_classifier
from ds_classifier.model import create_classifier

LEARNT = {"cur_scale": 64.0, "cur_iter": 30, "last_overflow_iter": 12, "cur_hysteresis": 1}


def fresh(*, dynamic):
    """Return a new fp16 engine, with a fixed loss scale of 128 or a dynamic one from 65536."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    scaler = DynamicLossScaler(65536, 1000, 1, 2, False) if dynamic else LossScaler(128)
    return SimpleNamespace(
        optimizer=SimpleNamespace(loss_scaler=scaler),
        fp16_enabled=lambda: True,
        dynamic_loss_scale=lambda: dynamic,
    )


def test_a_dynamic_loss_scale_continues():
    before, after = fresh(dynamic=True), fresh(dynamic=True)
    deepspeed_engine.set_loss_scaler_state(before, LEARNT)
    deepspeed_engine.set_loss_scaler_state(after, deepspeed_engine.loss_scaler_state(before))
    assert deepspeed_engine.loss_scaler_state(after) == LEARNT


@pytest.mark.parametrize(("dynamic", "scale"), [(False, 128), (True, 65536)])
@pytest.mark.parametrize("state", [{}, {"cur_scale": 4.0}, {"cur_scale": 1.0}])
def test_a_fixed_scale_of_a_checkpoint_is_ignored(dynamic, scale, state):
    """The JSON of this run sets the scale; a checkpoint with a fixed scale has no step count."""
    engine = fresh(dynamic=dynamic)
    deepspeed_engine.set_loss_scaler_state(engine, state)
    assert engine.optimizer.loss_scaler.cur_scale == scale


def test_a_fixed_scale_comes_from_the_json():
    engine = fresh(dynamic=False)
    deepspeed_engine.set_loss_scaler_state(engine, LEARNT)
    assert engine.optimizer.loss_scaler.cur_scale == 128
    assert deepspeed_engine.loss_scaler_state(engine) == {}


def test_only_fields_of_the_loss_scaler_are_set():
    engine = fresh(dynamic=True)
    deepspeed_engine.set_loss_scaler_state(engine, LEARNT | {"update_scale": 3})
    assert callable(engine.optimizer.loss_scaler.update_scale)


SCHEDULES = {
    "WarmupLR": {"warmup_max_lr": 3e-4, "warmup_num_steps": 100},
    "WarmupDecayLR": {"warmup_max_lr": 3e-4, "warmup_num_steps": 100, "total_num_steps": 250},
    "WarmupCosineLR": {"warmup_num_steps": 100, "total_num_steps": 280, "cos_min_ratio": 0.1},
    "OneCycle": {
        "cycle_min_lr": 1e-5,
        "cycle_max_lr": 1e-3,
        "cycle_first_step_size": 80,
        "cycle_second_step_size": 60,
        "decay_step_size": 20,
        "decay_lr_rate": 0.1,
        "decay_mom_rate": 0.01,
        "cycle_min_mom": 0.85,
        "cycle_max_mom": 0.99,
    },
    "LRRangeTest": {"lr_range_test_step_size": 50, "lr_range_test_staircase": True},
    "LambdaLR": {"lr_lambda": deepspeed_engine.linear_anneal(290)},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_has_the_rates_of_the_uninterrupted_one(name):
    """Compare each of 300 steps with DeepSpeed's own scheduler, stepped without interruption."""
    import torch
    from deepspeed.runtime import lr_schedules

    def fresh():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=5e-4)
        kind = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name)
        scheduler = kind(optimizer, **SCHEDULES[name])
        engine = SimpleNamespace(
            optimizer=SimpleNamespace(optimizer=optimizer), lr_scheduler=scheduler
        )
        return engine, optimizer.param_groups[0]

    engine, group = fresh()
    rates = []
    for applied in range(300):
        resumed, resumed_group = fresh()
        deepspeed_engine.set_schedule(resumed, applied)
        rates.append(deepspeed_engine.learning_rate(engine))
        assert resumed_group["lr"] == group["lr"], applied
        assert resumed_group["betas"] == group["betas"], applied
        for one in (engine, resumed):
            one.optimizer.optimizer.step()
            one.lr_scheduler.step()
        assert resumed_group["lr"] == group["lr"], applied
    assert len(set(rates)) > (5 if name == "LRRangeTest" else 90)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_group_has_its_share_of_the_rate(name):
    """Compare each of 300 steps, and those after a resume, with a schedule without groups."""
    from deepspeed.runtime import lr_schedules

    def fresh(*groups):
        parameters = [{"params": [torch.nn.Parameter(torch.ones(1))]} | group for group in groups]
        optimizer = torch.optim.AdamW(parameters, lr=5e-4)
        kind = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name)
        scheduler = kind(optimizer, **SCHEDULES[name])
        return SimpleNamespace(
            optimizer=SimpleNamespace(optimizer=optimizer), lr_scheduler=scheduler
        )

    def rates(engine):
        return [group["lr"] for group in engine.optimizer.optimizer.param_groups]

    def scaled():
        engine = fresh({"lr_scale": 0.3}, {"lr_scale": 1.0})
        deepspeed_engine._scale_after_each_step(engine)
        return engine

    plain, engine = fresh({}), scaled()
    for applied in range(300):
        resumed = scaled()
        deepspeed_engine.set_schedule(resumed, applied)
        (rate,) = rates(plain)
        assert rates(engine) == rates(resumed) == [rate * 0.3, rate]
        assert deepspeed_engine.learning_rate(engine) == rate
        for one in (plain, engine):
            one.optimizer.optimizer.step()
            one.lr_scheduler.step()


@pytest.mark.parametrize(
    ("config", "backwards"), [("zero1_fp32", 1), ("zero1_bf16", 0), ("zero2_bf16", 2)]
)
def test_only_deepspeed_waits_for_the_device_in_a_step(config, backwards, tmp_path):
    """DeepSpeed waits for the gradient's norm: for a constant to compare with, and the answer.

    With overlap_comm it also waits for backwards: ZeRO 2 for that of each micro-batch, and ZeRO 1
    for the last one.
    A CPU shows waits for numbers and masks, and calls that copy. The update must not launch work
    for each of the 75 parameters, nor drawing noise more than it does: a GPU would idle. With
    accumulation in fp32, bf16 has an optimizer of its own in DeepSpeed, which does so once for each
    of them.
    """
    flags = "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --batch_size 4"
    flags += " --classifier_depth 1 --classifier_attention_resolutions 4 --microbatch 2"
    done = run_python(
        *(ROOT / "tests" / "helpers" / "watched_step.py", *flags.split()),
        *("--deepspeed_config", ROOT / "ds_configs" / f"{config}.json"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.output
    seen = json.loads(done.output.splitlines()[-1])
    assert seen["waits"], "DeepSpeed's own are seen, so others would be"
    theirs = (
        "deepspeed/",
        "ds_classifier/distributed/engine/deepspeed_versions.py",
    )
    assert [w for w in seen["waits"] if not w[0].startswith(theirs)] == []
    assert seen["launches"]["step: noise"] <= 2 * 83  # micro-batches
    if deepspeed_versions._installed() >= deepspeed_versions.COMPLETE_SINCE:
        assert Counter(what for _, what in seen["waits"]) == Counter(
            {"synchronize": backwards, "tensor": 1, "aten._local_scalar_dense.default": 1}
        )
        assert config == "zero1_bf16" or seen["launches"]["step: update"] < 75


@complete_deepspeed
def test_muon_is_not_compiled():
    """Compiled forms depend on the matrices before, and would differ in the first step resumed."""
    from deepspeed.runtime.zero.muon import original_muon

    deepspeed_engine._adapt_muon()
    deepspeed_engine._adapt_muon()
    names = [
        name for name, made in vars(original_muon).items() if hasattr(made, "get_compiler_config")
    ]
    assert not names
    grad = torch.randn(6, 2, 3, 3)
    update = original_muon.muon_update(grad.clone(), torch.zeros_like(grad), ns_method="standard")
    assert update.shape == grad.shape


def turned_by_muon(**flags) -> list[str]:
    """Return the names of the weights that Muon trains, as DeepSpeed asks for them."""
    settings = Settings(**(SMALL | flags))
    module = noised_classifier(create_classifier(**settings.model_kwargs()), settings)
    for name, parameter in module.named_parameters():
        parameter.use_muon = parameter.dim() > 1 and "embed" not in name  # as DeepSpeed tags them
    list(deepspeed_engine._parameters(module))
    named = module.classifier.named_parameters()
    return [name for name, parameter in named if parameter.use_muon]


def test_muon_trains_neither_the_first_layer_nor_the_head_of_any_network(tmp_path, monkeypatch):
    assert turned_by_muon(classifier="torchvision:resnet18") == [
        *(f"network.layer1.{block}.conv{n}.weight" for block in (0, 1) for n in (1, 2)),
        *(
            f"network.layer{stage}.{name}.weight"
            for stage in (2, 3, 4)
            for name in ("0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2")
        ),
    ]
    write_module(tmp_path, "muons_net")
    monkeypatch.syspath_prepend(tmp_path)
    assert turned_by_muon(classifier="muons_net:build") == ["time.weight"]
    of_reference = turned_by_muon()
    tops = {name.partition(".")[0] for name in of_reference}
    assert tops == {"input_blocks", "middle_block"}
    assert not any(name.startswith("input_blocks.0.") for name in of_reference)


def test_muon_trains_matrices_not_tokens_and_scales():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.LayerNorm([8, 8]))
            self.attention = nn.MultiheadAttention(8, 1)
            self.head = nn.Linear(8, 2)

    block = Block()
    inside = deepspeed_engine._weights_inside(block)
    names = {n for n, p in block.named_parameters() if p in inside and p.dim() > 1}
    of_attention = {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert names == {"layers.1.weight"} | of_attention


class Builder:
    """A builder of a kernel that cannot be compiled, for load_kernel."""

    name = "cpu_adam"

    def load(self, verbose):
        raise RuntimeError("Error building extension\nninja: build stopped")


def test_a_kernel_is_announced_and_its_failure_is_a_message(monkeypatch, tmp_path, capsys):
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: Builder())
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    monkeypatch.setattr(deepspeed_engine.distributed, "together", lambda task, device: task())
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    with pytest.raises(ValueError, match="cpu_adam cannot be compiled: ninja: build stopped; do"):
        deepspeed_engine.load_kernel("CPUAdamBuilder", torch.device("cpu"))
    said = capsys.readouterr().out
    assert "DeepSpeed compiles cpu_adam, once; this takes minutes" in said
    assert f"waits for {tmp_path}/cpu_adam/lock" in said
