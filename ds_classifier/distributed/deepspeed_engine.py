"""The DeepSpeed engine: creating it, and reading and setting its state.

DeepSpeed's private attributes are used in this file only.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from ds_classifier import distributed
from ds_classifier.common.text import count
from ds_classifier.distributed.deepspeed_versions import (
    accumulation_problem,
    skip_steps_that_are_not_finite,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
NORM_ROW = 1 << 14  # numbers that are summed in fp32; rows are summed in fp64
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def precision_problem(ds_config: dict[str, Any], device: torch.device) -> str | None:
    """Return why this device or DeepSpeed cannot compute in the JSON's precisions, or None."""
    from deepspeed.accelerator import get_accelerator

    if ds_config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        name = "zero2_bf16.json" if has_fast_bf16(device) else "zero1_fp32.json"
        return (
            f"fp16.enabled: got true on {describe_device(device)}, which has no fp16 arithmetic "
            f"(a CPU needs AVX512-FP16); do: use ds_configs/{name}"
        )
    return accumulation_problem(ds_config)


def has_fast_bf16(device: torch.device) -> bool:
    """Return True if bf16 is faster than fp32 on the device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def describe_device(device: torch.device) -> str:
    """Return the GPU's name, or the CPU with the number of threads per rank."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"this CPU ({count(torch.get_num_threads(), 'thread')} per rank)"


def linear_anneal(steps: int) -> Callable[[int], float]:
    """Return the reference's anneal_lr: step k, from 0, runs at lr * (1 - k / steps)."""
    return lambda k: max(0.0, 1.0 - k / steps)


def create_engine(
    module: nn.Module, ds_config: dict[str, Any], lr_factor: Callable[[int], float] | None
):
    """Wrap the module in a DeepSpeed engine. Every rank must call it.

    Rank 0's parameters are broadcast to all ranks.
    ds_config: the JSON, final: `Resolved.ds_config` after `with_parameters`.
    lr_factor: returns the learning rate of step k as a share of the peak; None: the JSON's
    scheduler sets it.
    """
    import deepspeed
    from torch.optim.lr_scheduler import LambdaLR

    torch.backends.cudnn.benchmark = (
        True  # all batches have one shape, so it finds the fastest kernels
    )
    parameters = [p for p in module.parameters() if p.requires_grad]
    schedule = {}
    if lr_factor is not None:
        schedule["lr_scheduler"] = lambda optimizer: LambdaLR(optimizer, lr_factor)
    with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory in use
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=parameters, config=ds_config, **schedule
        )
    skip_steps_that_are_not_finite(engine)
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        # DeepSpeed would raise at the first overflow at the smallest scale. skipped_steps.py counts
        # them instead.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def precision(engine) -> str:
    """Return the name in DTYPES of the precision that the model computes in."""
    return next(name for name, dtype in DTYPES.items() if dtype == engine.get_data_types()[0])


def loss_scale(engine) -> float:
    """Return the current loss scale of fp16; 1 in the other precisions."""
    return float(getattr(engine.optimizer, "cur_scale", 1.0)) if engine.fp16_enabled() else 1.0


def loss_scale_floor(engine) -> float | None:
    """Return the smallest dynamic loss scale of fp16; None without dynamic loss scaling."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not engine.fp16_enabled() or not engine.dynamic_loss_scale():
        return None
    return float(scaler.min_scale)


def grad_norm(engine) -> float:
    """Return the norm of the last step's gradient over all ranks, before clipping.

    It waits for the device.
    """
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def param_norm(engine) -> float:
    """Return the norm of all fp32 master weights. Every rank must call it.

    It waits for the device.
    """
    squares = torch.zeros((), dtype=torch.float64, device=engine.device)
    for group in engine.optimizer.optimizer.param_groups:
        for partition in group["params"]:
            # Row by row, because the sum of a million squares is inexact in fp32.
            whole = partition.numel() // NORM_ROW * NORM_ROW
            rows, rest = partition.detach()[:whole], partition.detach()[whole:]
            norms = torch.linalg.vector_norm(rows.view(-1, NORM_ROW), dim=1)
            squares += norms.double().square().sum() + rest.double().square().sum()
    return float(distributed.all_reduce_sum(squares).sqrt())


def learning_rate(engine) -> float:
    """Return the learning rate of the next step."""
    return float(engine.optimizer.optimizer.param_groups[0]["lr"])


def ensure_adam_state(engine) -> list[dict[str, Any]]:
    """Return Adam's state of this rank's flat partitions, one dict per parameter group.

    Before the first applied step the state is made here, of zeros. Adam makes the same zeros at
    its first step, but DeepSpeed's access to full tensors needs them earlier.
    """
    optimizer = engine.optimizer.optimizer
    states = []
    for group in optimizer.param_groups:
        for partition in group["params"]:
            state = optimizer.state[partition]
            if not state:
                # On the device that Adam uses itself: fused Adam keeps the step on the GPU.
                device = partition.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for moment in ADAM_MOMENTS:
                    state[moment] = torch.zeros_like(partition)
            states.append(state)
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    return states


def optimizer_share(engine) -> Iterator[torch.Tensor]:
    """Yield this rank's flat partitions of the fp32 master weights and of the Adam moments."""
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for partition in group["params"]:
            yield partition.detach()
            state = optimizer.state.get(partition, {})
            yield from (state[moment] for moment in ADAM_MOMENTS if moment in state)


def set_schedule(engine, applied_steps: int) -> None:
    """Set the learning rate to that after a number of applied steps."""
    scheduler = engine.lr_scheduler
    if scheduler is None or applied_steps == 0:
        return
    if hasattr(scheduler, "lr_lambdas"):
        scheduler.last_epoch = applied_steps
        rates = [
            base * factor(applied_steps)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(engine.optimizer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
    else:
        scheduler.step(applied_steps - 1)  # DeepSpeed's schedulers start at -1


def loss_scaler_state(engine) -> dict[str, float]:
    """Return the state of fp16's dynamic loss scaling; {} without it."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not engine.fp16_enabled() or not engine.dynamic_loss_scale() or scaler is None:
        return {}
    return {name: getattr(scaler, name) for name in LOSS_SCALER_FIELDS if hasattr(scaler, name)}


def set_loss_scaler_state(engine, state: dict[str, float]) -> None:
    """Restore the state of dynamic loss scaling.

    Does nothing if this run has none (a fixed scale comes from the JSON), or if the state is from a
    run that had none.
    """
    if not engine.fp16_enabled() or not engine.dynamic_loss_scale() or "cur_iter" not in state:
        return
    for name in LOSS_SCALER_FIELDS:
        if name in state:
            setattr(engine.optimizer.loss_scaler, name, state[name])
