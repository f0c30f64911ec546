"""deepspeed.initialize and what it needs: a device that can do the precision, the lr schedule.

The rest of the program asks this module for what DeepSpeed keeps in places of its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from ds_classifier import distributed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
NORM_ROW = 1 << 14  # numbers whose norm is taken at a time
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def precision_problem(ds_config: dict[str, Any], device: torch.device) -> str | None:
    """Why the device cannot compute in the precision that the JSON asks for, or None."""
    from deepspeed.accelerator import get_accelerator

    if ds_config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        instead = "zero2_bf16.json" if has_fast_bf16(device) else "zero1_fp32.json"
        return (
            f"fp16.enabled: got true on {describe_device(device)}, which has no fp16 arithmetic "
            f"(a CPU needs AVX512-FP16); do: use ds_configs/{instead}"
        )
    return None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is quicker than fp32 here."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"this CPU ({threads} {'thread' if threads == 1 else 'threads'} a rank)"


def linear_anneal(iterations: int) -> Callable[[int], float]:
    """The reference's anneal_lr: step k from 0 runs at lr * (1 - k / iterations)."""
    return lambda k: max(0.0, 1.0 - k / iterations)


def create_engine(
    module: nn.Module, ds_config: dict[str, Any], lr_factor: Callable[[int], float] | None
):
    """Wrap the module in a DeepSpeed engine.

    ds_config: completed by `ds_config.resolve` and `fill_bucket_sizes`.
    lr_factor: the learning rate of step k as a share of the peak, or None where the JSON's
    scheduler decides.
    Every rank must call it; rank 0's parameters are broadcast.
    """
    import deepspeed
    from torch.optim.lr_scheduler import LambdaLR

    torch.backends.cudnn.benchmark = True  # batches have one shape: its quickest convolutions
    parameters = [p for p in module.parameters() if p.requires_grad]
    schedule = {}
    if lr_factor is not None:
        schedule["lr_scheduler"] = lambda optimizer: LambdaLR(optimizer, lr_factor)
    with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints where memory stands
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=parameters, config=ds_config, **schedule
        )
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        # At its floor DeepSpeed would raise at once, of one step too; see skipped_steps.py.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def precision(engine) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == engine.get_data_types()[0])


def loss_scale(engine) -> float:
    """fp16's current loss scale; 1 in the other precisions."""
    return float(getattr(engine.optimizer, "cur_scale", 1.0)) if engine.fp16_enabled() else 1.0


def loss_scale_floor(engine) -> float | None:
    """The least that fp16's dynamic loss scale may become; None where there is none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not engine.fp16_enabled() or not engine.dynamic_loss_scale():
        return None
    return float(scaler.min_scale)


def grad_norm(engine) -> float:
    """Norm of the last step's gradient over all ranks, before clipping. Waits for the device."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def param_norm(engine) -> float:
    """Norm of all fp32 master weights. Waits for the device; every rank must call it."""
    squares = torch.zeros((), dtype=torch.float64, device=engine.device)
    for group in engine.optimizer.optimizer.param_groups:
        for partition in group["params"]:
            # Row by row, for a sum of very many fp32 squares is inexact.
            whole = partition.numel() // NORM_ROW * NORM_ROW
            rows, rest = partition.detach()[:whole], partition.detach()[whole:]
            norms = torch.linalg.vector_norm(rows.view(-1, NORM_ROW), dim=1)
            squares += norms.double().square().sum() + rest.double().square().sum()
    return float(distributed.all_reduce_sum(squares).sqrt())


def learning_rate(engine) -> float:
    """The rate that the next step will use."""
    return float(engine.optimizer.optimizer.param_groups[0]["lr"])


def ensure_adam_state(engine) -> list[dict[str, Any]]:
    """Adam's state of this rank's flat partitions, made of zeros before the first applied step.

    Adam makes the same zeros itself at its first step; made earlier, DeepSpeed's access to full
    tensors works from the start. Returns the state dicts, one a parameter group.
    """
    optimizer = engine.optimizer.optimizer
    states = []
    for group in optimizer.param_groups:
        for partition in group["params"]:
            state = optimizer.state[partition]
            if not state:
                # Where Adam's own would lie: a fused one counts on the device.
                device = partition.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for moment in ADAM_MOMENTS:
                    state[moment] = torch.zeros_like(partition)
            states.append(state)
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    return states


def optimizer_share(engine) -> Iterator[torch.Tensor]:
    """This rank's flat partitions of the fp32 master weights and of the Adam moments."""
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for partition in group["params"]:
            yield partition.detach()
            state = optimizer.state.get(partition, {})
            yield from (state[moment] for moment in ADAM_MOMENTS if moment in state)


def set_schedule(engine, applied_steps: int) -> None:
    """Put the learning rate where it stands after so many applied steps."""
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
        scheduler.step(applied_steps - 1)  # DeepSpeed's count from -1 before the first step


def loss_scaler_state(engine) -> dict[str, float]:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not engine.fp16_enabled() or not engine.dynamic_loss_scale() or scaler is None:
        return {}
    return {name: getattr(scaler, name) for name in LOSS_SCALER_FIELDS if hasattr(scaler, name)}


def set_loss_scaler_state(engine, state: dict[str, float]) -> None:
    """Continue dynamic loss scaling where it stood; a run that did without it starts it. A fixed
    scale is the JSON's."""
    if not engine.fp16_enabled() or not engine.dynamic_loss_scale() or "cur_iter" not in state:
        return
    for name in LOSS_SCALER_FIELDS:
        if name in state:
            setattr(engine.optimizer.loss_scaler, name, state[name])
