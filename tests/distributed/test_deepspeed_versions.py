"""Older versions of DeepSpeed get what they lack; untested newer ones are named."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ds_classifier.distributed.engine import deepspeed_versions
from ds_classifier.distributed.engine.deepspeed_versions import skip_steps_that_are_not_finite

BAD = (float("nan"), float("inf"), -float("inf"))


class OldZero:
    """An optimizer that steps as ZeRO 1 and 2 of DeepSpeed 0.16 do: only fp16 is checked."""

    def __init__(self, gradient, fp16=False):
        self.gradient, self.fp16, self.overflow = torch.tensor(gradient), fp16, False
        self.applied, self.checks, self._global_grad_norm = False, 0, 1.0

    def check_overflow(self):
        self.checks += 1
        self.overflow = not bool(self.gradient.isfinite().all())

    def _update_scale(self, overflow):
        self.scale_saw = overflow

    def step(self):
        if self.fp16 or getattr(self, "check_grad_overflow", False):
            self.check_overflow()
        self._update_scale(self.overflow)
        self.applied = not self.overflow


class OldBf16:
    """An optimizer that steps as BF16_Optimizer of DeepSpeed 0.16 does: no check, a norm over 0."""

    def __init__(self, gradient):
        self.fp32_groups_gradients_flat = [torch.ones(3), torch.tensor(gradient)]
        self.applied, self._global_grad_norm = False, 1.0

    def clear_hp_grads(self):
        for gradient in self.fp32_groups_gradients_flat:
            gradient.zero_()

    def clear_lp_grads(self):
        pass

    def step(self):
        assert sum(float(g.norm()) for g in self.fp32_groups_gradients_flat) > 0
        self.applied = True


@pytest.fixture(autouse=True)
def install(monkeypatch):
    """Return a function that makes a version the installed one; at first 0.16.9."""

    def install(number):
        monkeypatch.setattr(deepspeed_versions, "version", lambda _: number)

    install("0.16.9")
    return install


def stepped(optimizer, *, fp16=False):
    """Return the optimizer after a step."""
    engine = SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: fp16)
    skip_steps_that_are_not_finite(engine)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", [OldZero, OldBf16])
def test_a_gradient_that_is_not_finite_is_skipped(kind, value):
    optimizer = stepped(kind([0.0, value]))
    assert optimizer.overflow
    assert not optimizer.applied
    assert optimizer._global_grad_norm == float("inf")


@pytest.mark.parametrize("kind", [OldZero, OldBf16])
def test_a_finite_gradient_is_applied(kind):
    optimizer = stepped(kind([0.0, 1.0]))
    assert optimizer.applied
    assert not optimizer.overflow
    assert optimizer._global_grad_norm == 1.0


def test_a_gradient_of_zero_is_applied():
    """No sample of the batch decoded."""
    optimizer = OldBf16([0.0])
    optimizer.clear_hp_grads()
    assert stepped(optimizer).applied


def test_fp16_is_checked_once():
    """DeepSpeed's own check of fp16 stays, or ours takes its place: from 0.17 on it is a choice."""
    assert stepped(OldZero([1.0], fp16=True), fp16=True).checks == 1
    newer = OldZero([float("nan")])
    newer.check_grad_overflow = True
    assert stepped(newer, fp16=True).checks == 1
    assert newer.scale_saw
    assert newer._global_grad_norm == float("inf")
    old = stepped(OldZero([float("nan")], fp16=True), fp16=True)
    assert (old.checks, old._global_grad_norm) == (1, float("inf"))


class NewZero:
    """A ZeRO optimizer of 0.19.8, which looks at each gradient and then at their norm."""

    cpu_offload, compute_grad_norm = False, True

    def check_overflow(self, partition_gradients):
        raise AssertionError("the norm, which follows, shows it")

    def get_grad_norm_direct(self, gradients, params, norm_type):
        assert len(gradients) == len(params) == 1, "a kernel or two for each of them"
        return torch.linalg.vector_norm(gradients[0], norm_type)


@pytest.mark.parametrize("value", [*BAD, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_deepspeed_that_checks_does_so_by_the_norm(install, dtype, value):
    install("0.19.8")
    zero = NewZero()
    skip_steps_that_are_not_finite(
        SimpleNamespace(optimizer=zero, zero_optimization_stage=lambda: 1)
    )
    zero.check_overflow(partition_gradients=True)
    gradients = [torch.full((count,), 0.5, dtype=dtype) for count in (3, 100_000, 7)]
    gradients[1][77] = value
    norm = zero.get_grad_norm_direct(gradients, ["weights"] * 3, 2)
    exact = np.linalg.norm(np.concatenate([g.double().numpy() for g in gradients]))
    np.testing.assert_allclose(float(norm), exact, rtol=1e-6)


@pytest.mark.parametrize(("stage", "offload"), [(3, False), (2, True)])
def test_a_deepspeed_that_checks_otherwise_is_left_alone(install, stage, offload):
    install("0.19.8")
    zero = SimpleNamespace(cpu_offload=offload)
    skip_steps_that_are_not_finite(
        SimpleNamespace(optimizer=zero, zero_optimization_stage=lambda: stage)
    )
    assert vars(zero) == {"cpu_offload": offload}


def summing(precision, summed, stage=1):
    """Return a config that computes in one precision and sums gradients in another."""
    ds = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": summed}}
    return ds | ({precision: {"enabled": True}} if precision != "fp32" else {})


def test_sums_that_an_older_deepspeed_gets_wrong_are_refused(install):
    """Compared by hand with torch's AdamW: norm 0.43 in place of 0.25 with 0.16.9 to 0.19.4."""
    assert "stage: got 1 with fp16" in deepspeed_versions.version_problem(summing("fp16", "fp32"))
    for right in (("fp16", None), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "fp32")):
        assert deepspeed_versions.version_problem(summing(*right)) is None
    assert deepspeed_versions.version_problem(summing("fp16", "fp32", stage=2)) is None
    install("0.19.8")
    assert deepspeed_versions.version_problem(summing("fp16", "fp32")) is None


@pytest.mark.parametrize(
    ("installed", "quiet", "warned"),
    [
        ("0.16.9", [], False),
        ("0.17.6", ["--quiet"], False),
        ("0.19.12+cu130", ["--quiet"], False),
        ("0.20.0", ["--quiet"], True),
        ("1.0.0rc1", ["--quiet"], True),
    ],
)
def test_versions(install, installed, quiet, warned):
    install(installed)
    assert deepspeed_versions.quiet_flag() == quiet
    warning = deepspeed_versions.newer_than_tested()
    assert (installed in warning and 'install "deepspeed==0.19.*"' in warning) == warned
    assert bool(warning) == warned


def test_stage_3_and_offload_need_a_version_that_was_tried(install):
    bf16 = {"bf16": {"enabled": True}}
    parts = {
        "stage: got 3": {"stage": 3},
        "offload_optimizer: got it": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    for words, zero in parts.items():
        assert words in deepspeed_versions.version_problem(bf16 | {"zero_optimization": zero})
    assert deepspeed_versions.version_problem(bf16 | {"zero_optimization": {"stage": 2}}) is None
    install("0.19.8")
    for zero in parts.values():
        assert deepspeed_versions.version_problem(bf16 | {"zero_optimization": zero}) is None
