"""The DeepSpeed engine: creating it, its rates and norms, and the state of its loss scaling.

deepspeed_state.py has the weights and the optimizer's state. DeepSpeed's private attributes are
used in this directory only.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ds_classifier import distributed
from ds_classifier.common.text import count
from ds_classifier.distributed.engine.deepspeed_state import weight_share, whole_shape
from ds_classifier.distributed.engine.deepspeed_versions import (
    skip_steps_that_are_not_finite,
    version_problem,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORM_ROW = 1 << 14  # numbers that are summed in fp32; rows are summed in fp64
EMULATED_FP16 = 4  # CPU seconds of a step by those in fp32: 0.37 / 0.09 (32 px, width 32)
# Layers that read timesteps, and the reference's head, by the begin of their names.
OF_TIME = ("classifier.time_embed.", "classifier.scale_shift.")
HEAD = "classifier.out."
# Muon is for matrices; other weights of several dimensions, such as a ViT's token, are vectors.
HAS_MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def precision_problem(ds_config: dict[str, Any], device: torch.device) -> str | None:
    """Return why the device or DeepSpeed cannot compute in the JSON's way, or None.

    A CPU without fp16 arithmetic emulates it, see `emulate_fp16`.
    """
    from deepspeed.accelerator import get_accelerator

    supported = {"fp16": get_accelerator().is_fp16_supported() or device.type == "cpu"}
    supported["bf16"] = get_accelerator().is_bf16_supported()
    for name, has_it in supported.items():
        if ds_config.get(name, {}).get("enabled") and not has_it:
            other = "zero2_fp16" if supported["fp16"] and name == "bf16" else "zero1_fp32"
            return (
                f"{name}.enabled: got true on {describe_device(device)}, which has no {name} "
                f"arithmetic; do: use ds_configs/{other}.json"
            )
    return version_problem(ds_config)


def emulate_fp16(ds_config: dict[str, Any], device: torch.device) -> str:
    """Let DeepSpeed train in fp16 on a CPU without fp16 arithmetic, and return what to expect.

    Returns "" where nothing is emulated.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if not ds_config.get("fp16", {}).get("enabled") or accelerator.is_fp16_supported():
        return ""
    accelerator.is_fp16_supported = lambda: True  # DeepSpeed asks it before it builds an engine
    name = "zero2_bf16" if has_fast_bf16(device) else "zero1_fp32"
    return (
        f"fp16 is emulated on {describe_device(device)}, which has no AVX512-FP16: a step takes "
        f"about {EMULATED_FP16} times that of fp32; ds_configs/{name}.json is faster"
    )


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


def load_kernel(builder: str, device: torch.device) -> None:
    """Load the kernel of DeepSpeed's that the optimizer needs, compiled if it has to be.

    Every rank must call it; the first one of each host compiles, and the others wait.
    builder: the name of DeepSpeed's builder, such as "CPUAdamBuilder".
    Raises ValueError on all ranks if it cannot be compiled.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from torch.utils import cpp_extension

    def load() -> None:
        try:
            made.load(verbose=False)
        except (RuntimeError, ImportError, OSError) as error:
            raise ValueError(
                f"optimizer.type: DeepSpeed's kernel {made.name} cannot be compiled: "
                f"{str(error).strip().splitlines()[-1]}; do: use AdamW"
            ) from None

    made = get_accelerator().create_op_builder(builder)
    folder = Path(cpp_extension._get_build_directory(made.name, False))
    if not (installed_ops.get(made.name) or (folder / f"{made.name}.so").exists()):
        distributed.say(f"{'kernel':12}DeepSpeed compiles {made.name}, once; this takes minutes")
    # Older versions of torch wait as long as this file exists; newer ones lock it, and let it lie.
    if hasattr(cpp_extension, "FileBaton") and (folder / "lock").exists():
        distributed.say(
            f"{'':12}and waits for {folder}/lock: another process compiles; if there is none, "
            "delete this file"
        )
    distributed.together(lambda: load() if distributed.local_rank() == 0 else None, device)
    distributed.together(load, device)


class Group(NamedTuple):
    """A group of parameters that are trained alike.

    lr_scale: what their learning rate is multiplied by. decayed: False: without weight decay.
    """

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    decayed: bool = True

    def of_optimizer(self) -> dict[str, Any]:
        """Return the group as an optimizer takes it."""
        decay = {} if self.decayed else {"weight_decay": 0.0}
        return {"params": self.parameters, "lr_scale": self.lr_scale} | decay


def create_engine(
    module: nn.Module,
    ds_config: dict[str, Any],
    lr_factor: Callable[[int], float] | None,
    groups: Sequence[Group] | None = None,
    *,
    muon_lr_scale: float = 0.0,
):
    """Wrap the module in a DeepSpeed engine. Every rank must call it.

    Rank 0's parameters are broadcast to all ranks.
    ds_config: the JSON, final: `Resolved.ds_config` after `with_parameters`.
    lr_factor: returns the learning rate of step k as a share of the peak; None: the JSON's
    scheduler sets it.
    groups: the parameters that are trained; None: all that have requires_grad, alike.
    muon_lr_scale: what the learning rate is multiplied by for the weights that Muon trains; 0: the
    JSON says their rate.
    """
    import deepspeed
    from torch.optim.lr_scheduler import LambdaLR

    torch.backends.cudnn.benchmark = (
        True  # all batches have one shape, so it finds the fastest kernels
    )
    if ds_config["optimizer"]["type"].lower() == "muon":
        _adapt_muon()
    deepspeed.DeepSpeedEngine._broadcast_model = _broadcast_model
    trained = _parameters(module) if groups is None else [g.of_optimizer() for g in groups]
    with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory in use
        engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=ds_config)
    for buffer in module.buffers():  # newer versions of DeepSpeed cast the parameters alone
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(next(module.parameters()).dtype)
    if lr_factor is not None:  # not given to initialize: ZeRO replaces some optimizers
        engine.lr_scheduler = LambdaLR(engine.optimizer.optimizer, lr_factor)
    if muon_lr_scale:
        for group in engine.optimizer.optimizer.param_groups:
            group["lr_scale"] = muon_lr_scale if group["use_muon"] else 1.0
    if groups is not None or muon_lr_scale:
        _scale_after_each_step(engine)
    if getattr(engine.optimizer, "cpu_offload", False):
        _forget_gradients_of_skipped_steps(engine.optimizer)
    skip_steps_that_are_not_finite(engine)
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        # DeepSpeed would raise at the first overflow at the smallest scale. skipped_steps.py counts
        # them instead.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def refuse_single_numbers(classifier: nn.Module, name: str, ds_config: dict[str, Any]) -> None:
    """Raise ValueError if ZeRO 3 is to cut a parameter of the shape [], which it cannot.

    name: the --classifier.
    """
    if ds_config["zero_optimization"]["stage"] != 3:
        return
    for key, parameter in classifier.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(
                f"--classifier: got {name}, whose {key} has the shape [], with ZeRO 3, which cuts "
                "parameters; need [1], or another stage of ZeRO"
            )


def _broadcast_model(engine) -> None:
    """Give all ranks rank 0's parameters, as DeepSpeed does when it creates an engine.

    DeepSpeed 0.19.8 fails for a single number, []. What ZeRO 3 has cut into parts is left out.
    """
    for parameter in engine.module.parameters():
        if parameter.shape == whole_shape(parameter):
            distributed.broadcast_bytes(parameter.data)


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are trained, tagged for the Muon optimizer.

    DeepSpeed reads them after it has tagged them itself, by the names of language models.
    """
    inside = _weights_inside(module)
    for parameter in module.parameters():
        if getattr(parameter, "use_muon", False):
            parameter.use_muon = parameter in inside
        if parameter.requires_grad:
            yield parameter


def trained_by_muon(engine) -> int:
    """Return the number of parameters that Muon trains, of an engine that has Muon."""
    return sum(
        whole_shape(parameter).numel()
        for parameter in engine.module.parameters()
        if parameter.requires_grad and getattr(parameter, "use_muon", False)
    )


def _weights_inside(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the linear layers and convolutions that Muon is for.

    These are not those that read pixels or timesteps, nor the head (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon): in any network the first and the last that it holds.
    """
    layers = {n: m for n, m in module.named_modules() if isinstance(m, HAS_MATRICES)}
    names = [name for name in layers if not f"{name}.".startswith(OF_TIME)]
    inside = [layers[name] for name in names[1:-1] if not name.startswith(HEAD)]
    return {parameter for layer in inside for parameter in layer.parameters(recurse=False)}


def _scale_after_each_step(engine) -> None:
    """Multiply the rate of each group by its factor, now and after each step of the scheduler.

    All of DeepSpeed's schedulers, and LambdaLR, set rates that do not depend on those before.
    """
    _scale_rates(engine)
    if (scheduler := engine.lr_scheduler) is None:
        return
    step = scheduler.step

    def step_and_scale(*args, **kwargs) -> None:
        step(*args, **kwargs)
        _scale_rates(engine)

    scheduler.step = step_and_scale


def _scale_rates(engine) -> None:
    """Multiply the rates that the scheduler has just set by the factors of the groups."""
    for group in engine.optimizer.optimizer.param_groups:
        if "lr_scale" in group:
            group["unscaled_lr"] = group["lr"]
            group["lr"] *= group["lr_scale"]


def _forget_gradients_of_skipped_steps(zero) -> None:
    """Drop the gradients of a step that was skipped, under ZeRO 1 and 2 with offload.

    DeepSpeed 0.19.8 goes on adding to them in bf16, so that it would skip all steps that follow.
    """
    step = zero.step

    def step_and_forget(*args, **kwargs) -> None:
        step(*args, **kwargs)
        if zero.overflow:
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)

    zero.step = step_and_forget


def _adapt_muon() -> None:
    """Make DeepSpeed's Muon take convolutions, and compute the same in every process.

    DeepSpeed 0.19.8 fails on 4 dimensions, and takes 3, those of attention, for many matrices:
    a weight is seen as the matrix [out, in * kernel]. It compiles the functions at their first
    call, for minutes on a CPU, and which of the compiled forms a matrix gets depends on those
    before it, so that the first step after a resume would round in another way.
    """
    from deepspeed.runtime.zero.muon import original_muon

    def update(grad, momentum, *args, **kwargs):
        matrix, kept = (value.view(len(grad), -1) for value in (grad, momentum))
        return of_matrix(matrix, kept, *args, **kwargs).view_as(grad)

    for name, function in list(vars(original_muon).items()):
        if eager := getattr(function, "_torchdynamo_orig_callable", None):
            setattr(original_muon, name, eager)
    of_matrix = original_muon.muon_update
    if not hasattr(of_matrix, "takes_convolutions"):
        update.takes_convolutions = True
        original_muon.muon_update = update


def precision_of(ds_config: dict[str, Any]) -> str:
    """Return the name in DTYPES of the precision of the weights that a JSON computes with."""
    enabled = (name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled"))
    return next(enabled, "fp32")


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
    """Return the norm of all trained weights, in fp32. Every rank must call it.

    It waits for the device.
    """
    squares = torch.zeros((), dtype=torch.float64, device=engine.device)
    for piece in weight_share(engine):
        # Row by row, because the sum of a million squares is inexact in fp32.
        whole = piece.numel() // NORM_ROW * NORM_ROW
        rows, rest = piece[:whole], piece[whole:]
        norms = torch.linalg.vector_norm(rows.view(-1, NORM_ROW), dim=1)
        squares += norms.double().square().sum() + rest.double().square().sum()
    return float(distributed.all_reduce_sum(squares).sqrt())


def learning_rate(engine) -> float:
    """Return the learning rate of the next step, before the factors of groups of parameters."""
    group = engine.optimizer.optimizer.param_groups[0]
    return float(group.get("unscaled_lr", group["lr"]))


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
        _scale_rates(engine)
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
