"""Differences between versions of DeepSpeed: what older ones lack, and which ones are untested."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

NEWEST_TESTED = (0, 19)
COMPLETE_SINCE = (0, 19, 8)  # it lacks nothing of this; 0.19.4 still did
QUIET_SINCE = (0, 17, 6)
TINY = 1e-18  # its square is not 0 in fp32


def lacks_nothing() -> bool:
    """Return True if this DeepSpeed has all that this program uses, and needs no correction."""
    return _installed() >= COMPLETE_SINCE


def quiet_flag() -> list[str]:
    """Return the launcher's --quiet, as a list of words; [] if this DeepSpeed does not know it."""
    return ["--quiet"] if _installed() >= QUIET_SINCE else []


def newer_than_tested() -> str:
    """Return a warning if no release of this DeepSpeed's series was tested; else ""."""
    if _installed()[:2] <= NEWEST_TESTED:
        return ""
    got, tested = version("deepspeed"), ".".join(map(str, NEWEST_TESTED))
    return (
        f"warning: got deepspeed {got}; the newest tested is {tested}; if this run fails, do: "
        f'python -m pip install "deepspeed=={tested}.*"'
    )


def version_problem(ds_config: dict[str, Any]) -> str | None:
    """Return why this DeepSpeed would train wrongly or was never tried in this way, or None.

    Older versions err where ZeRO 1 sums gradients in another precision than it computes in. For
    bf16 summed in fp32 they have an optimizer of its own, which is right. ZeRO 3 and offload were
    tried with recent versions alone.
    """
    if lacks_nothing():
        return None
    got, zero = f"deepspeed {version('deepspeed')}", ds_config["zero_optimization"]
    newer = f"deepspeed {'.'.join(map(str, COMPLETE_SINCE))} or newer"
    if zero["stage"] == 3 or "offload_optimizer" in zero:
        what = "stage: got 3" if zero["stage"] == 3 else "offload_optimizer: got it"
        return (
            f"zero_optimization.{what} with {got}, whose steps without a finite gradient were not "
            f"tried there; do: use stage 1 or 2 without offload, or {newer}"
        )
    enabled = (name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled"))
    precision = next(enabled, "fp32")
    summed = ds_config.get("data_types", {}).get("grad_accum_dtype") or precision
    if zero["stage"] != 1 or (precision, summed) in ((precision, precision), ("bf16", "fp32")):
        return None
    return (
        f"zero_optimization.stage: got 1 with {precision} and gradients summed in {summed}, which "
        f"{got} computes wrongly; do: use stage 2, no gradient accumulation, or {newer}"
    )


def skip_steps_that_are_not_finite(engine) -> None:
    """Make DeepSpeed skip each step whose gradient is not finite, on all ranks together.

    Recent versions do so themselves. Older ones apply such a step in bf16 and fp32, and with fp16
    and ZeRO 1 some of them let each rank decide on its own.
    """
    optimizer = engine.optimizer
    if lacks_nothing():
        checks = hasattr(optimizer, "check_overflow")  # an optimizer of bf16 does not
        if checks and engine.zero_optimization_stage() < 3 and not optimizer.cpu_offload:
            _check_by_the_norm(optimizer)
        return
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        _check_bf16_optimizer(optimizer)
    else:
        checks_fp16 = engine.fp16_enabled() and not hasattr(optimizer, "check_grad_overflow")
        _check_zero_optimizer(optimizer, checked=checks_fp16)


def _check_by_the_norm(optimizer) -> None:
    """Find gradients that are not finite by their norm alone, computed in a few kernels.

    DeepSpeed 0.19.8 first looks at the extremes of each parameter's gradient, with 13 kernels per
    parameter in bf16 and fp16, waits for the result, and then computes the norm with 2 more per
    parameter; a GPU idles meanwhile. Its look at the norm skips the same steps, on all ranks.
    """
    import torch

    norm_of = optimizer.get_grad_norm_direct

    def norm(gradients, params, norm_type=2):
        # The norm of the norms is that of all. Padding, which is zero, changes nothing.
        norms = torch._foreach_norm(gradients, norm_type, dtype=torch.float32)
        return norm_of([torch.stack(norms)], params[:1], norm_type)

    optimizer.get_grad_norm_direct = norm
    if optimizer.compute_grad_norm:
        optimizer.check_overflow = lambda partition_gradients=True: None


def _check_zero_optimizer(optimizer, *, checked: bool) -> None:
    """Check the gradients where a step updates the loss scale, which it does in every precision.

    checked: DeepSpeed itself has checked them there, on all ranks.
    """
    update_scale = optimizer._update_scale

    def check_and_update(_) -> None:
        if not checked:
            optimizer.check_overflow()
        if optimizer.overflow:
            optimizer._global_grad_norm = float("inf")
        update_scale(optimizer.overflow)

    optimizer._update_scale = check_and_update
    optimizer.check_grad_overflow = False  # its own check, which would be a second one


def _check_bf16_optimizer(optimizer) -> None:
    """Check the gradients before a step of bf16, ZeRO 1, accumulation in fp32.

    Every rank has the whole gradient here, so all of them decide the same.
    """
    import torch

    step = optimizer.step

    def checked_step() -> None:
        gradients = optimizer.fp32_groups_gradients_flat
        norm = float(torch.stack([torch.linalg.vector_norm(g) for g in gradients]).max())
        optimizer.overflow = not norm < float("inf")
        if optimizer.overflow:
            optimizer._global_grad_norm = float("inf")
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
            return
        if norm == 0:  # no sample of the batch decoded; DeepSpeed asserts that this does not happen
            gradients[0][0] = TINY
        step()

    optimizer.step = checked_step


def _installed() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version("deepspeed"))[:3]))
