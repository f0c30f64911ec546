"""Precisions that a device does not have: refused on a GPU, emulated on a CPU."""

import pytest
import torch

from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.distributed.engine.deepspeed_engine import emulate_fp16, precision_problem

CPU = torch.device("cpu")
FP16, BF16 = ({name: {"enabled": True}} for name in ("fp16", "bf16"))


@pytest.fixture
def accelerator(monkeypatch):
    """DeepSpeed's accelerator, without fp16 and bf16."""
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator()
    for name in ("fp16", "bf16"):
        monkeypatch.setattr(found, f"is_{name}_supported", lambda: None, raising=False)
    return found


def test_a_cpu_without_fp16_emulates_it_and_says_what_is_faster(accelerator, monkeypatch):
    assert precision_problem(FP16, CPU) is None
    for fast, name in ((True, "zero2_bf16"), (False, "zero1_fp32")):
        monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: None)
        monkeypatch.setattr(deepspeed_engine, "has_fast_bf16", lambda device, fast=fast: fast)
        line = emulate_fp16(FP16, CPU)
        assert "fp16 is emulated" in line
        assert f"ds_configs/{name}.json is faster" in line
        assert accelerator.is_fp16_supported()  # DeepSpeed's engine asks the same


def test_nothing_is_said_where_nothing_is_emulated(accelerator, monkeypatch):
    assert emulate_fp16(BF16, CPU) == ""
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: True)
    assert emulate_fp16(FP16, CPU) == ""


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_gpu_without_the_precision_is_refused(accelerator, monkeypatch, name):
    monkeypatch.setattr(deepspeed_engine, "describe_device", lambda device: "an old GPU")
    problem = precision_problem({name: {"enabled": True}}, torch.device("cuda"))
    assert f"{name}.enabled: got true on an old GPU" in problem
    assert "do: use ds_configs/zero1_fp32.json" in problem
    assert precision_problem({}, torch.device("cuda")) is None
