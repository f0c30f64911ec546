"""The optimizer: which one DeepSpeed makes of the section, and what it takes."""

from __future__ import annotations

import inspect
import os
import shutil
from typing import Any

from ds_classifier.config.batch_sizes import AUTO
from ds_classifier.config.deepspeed_json.draft import (
    BOOL,
    NUMBER,
    Draft,
    has_type,
    shown,
    type_of,
)
from ds_classifier.config.deepspeed_json.known import COMMON, nearest, refuse_name, version

SECTION = ("optimizer", "params")
# Of DeepSpeed's own optimizers, those that need something that this program has not -> what.
_NOT_HERE = {
    "onebitadam": "it cannot run under ZeRO, which this program needs",
    "zerooneadam": "it cannot run under ZeRO, which this program needs",
    "onebitlamb": "it cannot run under ZeRO, which this program needs",
    "muadam": "it needs a model made with mup",
    "muadamw": "it needs a model made with mup",
    "musgd": "it needs a model made with mup",
    "lamb": "its norms would be those of ZeRO's flat shares, and so depend on the number of ranks",
}
# torch's optimizers that cannot work on flat shares of the parameters -> why.
_NOT_FLAT = {
    "LBFGS": "it needs to compute the loss several times per step",
    "SparseAdam": "it needs sparse gradients",
    "Adafactor": "it needs whole matrices, of which ZeRO keeps flat shares",
}
ADVICE = f"do: use AdamW, with {', '.join(COMMON)} alone"
# Parameters that DeepSpeed takes out itself before it makes an optimizer.
_OF_ADAM = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True}


def settle_optimizer(draft: Draft) -> None:
    """Check the optimizer's type and parameters, and complete them."""
    if draft.settings.muon_lr_scale > 0:
        _take_muon(draft)
    _settle_type(draft)
    kind = draft.get("optimizer", "type")
    if not isinstance(draft.get(*SECTION, default={}), dict):
        draft.refuse(SECTION, f"got {shown(draft.get(*SECTION))}; need a section {{...}}")
    params = draft.ds["optimizer"].setdefault("params", {})
    if "max_grad_norm" in params:
        draft.refuse(
            (*SECTION, "max_grad_norm"),
            "DeepSpeed refuses it; need gradient_clipping instead",
            advice="do: remove it",
        )
    offload = "offload_optimizer" in draft.section("zero_optimization")
    if kind.lower() in ("adam", "adamw", "muon"):  # Muon has an Adam for some parameters
        _choose_adam(draft, params, offload)
    if draft.has_muon:
        clips = draft.get("gradient_clipping", default=1) != 0
        draft.notes.append(
            "Muon: DeepSpeed makes gradients of matrices orthogonal before it takes their norm, "
            "so the norm in the log is large"
            + (", and gradient_clipping shortens every step" if clips else "")
        )
    make, takes = _made(kind, params, offload)
    _check_params(draft, params, takes, muon=draft.has_muon)
    if make is not None:
        _try(draft, make, params)
    if missing := _missing_kernel(kind, params, offload):
        what, advice = missing
        draft.refuse(("optimizer", "type"), f"got {kind!r}; {what}", "AdamW", advice=advice)
        _keep_common(draft)
    draft.takes_decay = "weight_decay" in takes


def _take_muon(draft: Draft) -> None:
    """Let Muon replace the JSON's AdamW, as --muon_lr_scale asks."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    kind = draft.get("optimizer", "type") or "AdamW"
    need = ""
    if "muon" not in DEEPSPEED_OPTIMIZERS:
        need = f"a newer DeepSpeed than {version()}, which has no Muon"
    elif str(kind).lower() not in ("adam", "adamw", AUTO):
        need = f"AdamW in the JSON, which Muon replaces, and not {shown(kind)}"
    if need:
        got = f"{draft.owners['muon_lr_scale']}: got {draft.settings.muon_lr_scale:g}"
        draft.problems.append(f"{got}; need {need}; do: give --muon_lr_scale 0")
        draft.settings = draft.settings.replace(muon_lr_scale=0.0)  # as advised, for later checks
        return
    draft.set("optimizer", "type", "Muon")
    for key in ("muon_lr", "adam_lr"):
        if (rate := draft.get(*SECTION, key)) is not None:
            why = f"got {shown(rate)}; need none with --muon_lr_scale, which sets both rates"
            draft.refuse((*SECTION, key), why, advice="do: remove it")


def _settle_type(draft: Draft) -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from torch import optim

    if not draft.get("optimizer", "type"):
        draft.set("optimizer", "type", "AdamW")
    elif draft.get("optimizer", "type") == AUTO:
        draft.fill_auto(("optimizer", "type"), "AdamW")
    kind = draft.get("optimizer", "type")
    own = [name for name in DEEPSPEED_OPTIMIZERS if name not in _NOT_HERE]
    of_torch = isinstance(getattr(optim, str(kind), None), type) and kind not in ("Optimizer",)
    name = kind.lower() if isinstance(kind, str) else ""
    if name in own or (of_torch and kind not in _NOT_FLAT):
        return
    reason = _NOT_FLAT.get(kind) if name else ""
    if name in DEEPSPEED_OPTIMIZERS:  # the installed version has it
        reason = _NOT_HERE[name]
    reason = reason or f"need one that DeepSpeed {version()} has: {', '.join(own)}, SGD"
    draft.refuse(("optimizer", "type"), f"got {shown(kind)}; {reason}", "AdamW", advice=ADVICE)
    _keep_common(draft)


def _keep_common(draft: Draft) -> None:
    """Remove what only the refused optimizer takes, as its message advises."""
    for values in (draft.ds, draft.advised):
        params = values["optimizer"].get("params")
        if isinstance(params, dict):
            values["optimizer"]["params"] = {k: params[k] for k in COMMON if k in params}


def _choose_adam(draft: Draft, params: dict[str, Any], offload: bool) -> None:
    """Take torch's Adam where the JSON leaves it open.

    It computes the same as DeepSpeed's, is as fast on ZeRO's flat shares, and needs no compiler.
    Parameters that only DeepSpeed's takes keep that one.
    """
    if params.get("bias_correction") is True and params.get("torch_adam") is not False:
        del params["bias_correction"]  # torch's Adam always corrects
    draft.check_type((*SECTION, "torch_adam"), BOOL)
    draft.check_type((*SECTION, "adam_w_mode"), BOOL)
    if params.get("torch_adam", AUTO) == AUTO:
        torchs = {*_parameters(_torch_adam(params)), *_OF_ADAM, AUTO}
        own = params.keys() & _parameters(_own_adam(offload)).keys() - torchs
        # A part of the state on the GPU needs DeepSpeed's.
        ratio = draft.get("zero_optimization", "offload_optimizer", "ratio", default=1)
        params["torch_adam"] = ratio == 1 and (
            draft.has_muon or not own
        )  # Muon hands none of those on
    if params["torch_adam"] and not draft.has_muon:
        params.pop("fp32_optimizer_states", None)
        if not params.get("foreach"):
            params.setdefault("fused", True)  # one pass over the flat tensors instead of eight


def _torch_adam(params: dict[str, Any]) -> type:
    from torch import optim

    return optim.AdamW if params.get("adam_w_mode", True) else optim.Adam


def _own_adam(offload: bool) -> type:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    return DeepSpeedCPUAdam if offload else FusedAdam


def _made(kind: str, params: dict[str, Any], offload: bool) -> tuple[type | None, dict[str, Any]]:
    """Return what DeepSpeed makes of an optimizer's name.

    Returns torch's class, or None for one of DeepSpeed; and the parameters, with their defaults.
    """
    from torch import optim

    name = kind.lower()
    if name in ("adam", "adamw"):
        if params.get("torch_adam"):
            return _torch_adam(params), _parameters(_torch_adam(params)) | _OF_ADAM
        return None, _parameters(_own_adam(offload)) | _OF_ADAM
    if name == "muon":
        adam = _parameters(_own_adam(offload))
        adams = {key: adam[key] for key in COMMON}
        own = dict(ns_method=None, momentum=0.95, muon_lr=1e-3, adam_lr=1e-3)
        return None, adams | _OF_ADAM | own
    if name == "adagrad" and not offload:
        return optim.Adagrad, _parameters(optim.Adagrad)
    if name == "adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return None, _parameters(DeepSpeedCPUAdagrad)
    if name == "lion":
        from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

        return None, _parameters(DeepSpeedCPULion if offload else FusedLion)
    made = getattr(optim, kind)
    return made, _parameters(made)


def _parameters(made: type) -> dict[str, Any]:
    """Return the parameters of an optimizer class, with their defaults, without the first."""
    signature = inspect.signature(made).parameters
    return {name: p.default for name, p in list(signature.items())[1:]}


def _check_params(
    draft: Draft, params: dict[str, Any], takes: dict[str, Any], *, muon: bool
) -> None:
    """Check names and types; "auto" stands for the optimizer's own default."""
    ignored = []
    for key in [key for key in params if key not in takes]:
        if muon and not nearest(key, takes):
            ignored.append(key)
            del params[key]
        else:
            refuse_name(draft, (*SECTION, key), "optimizer", takes)
    for key, value in list(params.items()):
        path = (*SECTION, key)
        if value == AUTO and key not in ("lr", "weight_decay"):
            default = takes[key]
            draft.fill_auto(path, list(default) if isinstance(default, tuple) else default)
        elif isinstance(default := takes[key], tuple):
            if not isinstance(value, list) or len(value) != len(default):
                draft.refuse(path, f"got {shown(value)}; need a list of {len(default)} numbers")
            elif not all(has_type(number, NUMBER) and 0 <= number < 1 for number in value):
                draft.refuse(path, f"got {shown(value)}; need numbers in [0, 1)")
        elif (wanted := type_of(default)) is not None:
            wanted = NUMBER if wanted == "a whole number" else wanted
            draft.check_type(path, wanted, 0 if key == "eps" else None)
        elif key == "lr":
            draft.check_type(path, NUMBER)
    if ignored:
        names = ", ".join(f"optimizer.params.{key}" for key in ignored)
        draft.notes.append(f"DeepSpeed {version()} ignores {names}")


def _try(draft: Draft, made: type, params: dict[str, Any]) -> None:
    """Make one of torch's optimizers, which looks at its values, for a single number.

    The first one that a process makes imports torch's compiler, which takes 2 s, so none is made
    where all values are checked already.
    """
    checked = (*COMMON, "fused", *_OF_ADAM)
    values = {k: v for k, v in params.items() if k not in checked and v != AUTO}
    if not values:
        return
    values |= {key: params[key] for key in ("betas", "eps", "fused") if key in params}
    while error := _error(made, values):
        # The key without which the error is gone or another one.
        near = (key for key in values if _error(made, _without(values, key)) != error)
        path = (*SECTION, next(near, next(iter(values))))
        got = shown(params.get(path[-1]))
        draft.refuse(path, f"got {got}; need what {made.__name__} takes: {error}")
        values = _without(values, path[-1])


def _error(made: type, values: dict[str, Any]) -> str:
    """Return why an optimizer of torch cannot be made with some parameters, or ""."""
    import torch

    try:
        made([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, **values)
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return ""


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != key}


def kernel_of(kind: str, params: dict[str, Any], offload: bool) -> str:
    """Return the name of DeepSpeed's builder of the kernel that an optimizer needs, or ""."""
    if params.get("torch_adam"):
        return ""
    adam = "CPUAdamBuilder" if offload else "FusedAdamBuilder"
    return {
        "adam": adam,
        "adamw": adam,
        "muon": adam,
        "adagrad": "CPUAdagradBuilder" if offload else "",
        "lion": "CPULionBuilder" if offload else "FusedLionBuilder",
    }.get(kind.lower(), "")


def _missing_kernel(kind: str, params: dict[str, Any], offload: bool) -> tuple[str, str] | None:
    """Return why this machine cannot run a kernel of DeepSpeed, and what to do; else None."""
    from deepspeed.accelerator import get_accelerator

    if not (builder := kernel_of(kind, params, offload)):
        return None
    accelerator = get_accelerator()
    if (made := _builder(builder)) is None:
        advice = ADVICE
        if kind.lower() == "lion" and _builder("CPULionBuilder"):
            advice += ', or zero_optimization.offload_optimizer {"device": "cpu"}'
        return f"DeepSpeed has no kernel of it for {accelerator.device_name()}", advice
    if not made.is_compatible(False):
        return "DeepSpeed's kernel of it cannot be built here (see ds_report)", ADVICE
    if not _is_built(made) and (absent := _missing_tools()):
        advice = f"{ADVICE}, or install {absent}"
        return f"DeepSpeed compiles its kernel, and there is no {absent}", advice
    return None


def _builder(name: str) -> Any:
    """Return DeepSpeed's builder of a kernel, or None if it has none for this accelerator."""
    from deepspeed.accelerator import get_accelerator

    made = get_accelerator().create_op_builder(name)
    return None if type(made).__name__ == "NotImplementedBuilder" else made


def _is_built(builder: Any) -> bool:
    """Return True if a kernel was compiled when DeepSpeed was installed."""
    try:
        from deepspeed.git_version_info import installed_ops
    except ImportError:
        return False
    return bool(installed_ops.get(builder.name))


def _missing_tools() -> str:
    """Return the name of what is missing to compile a kernel, or ""."""
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler) or shutil.which("g++")):
        return "C++ compiler"
    return "" if shutil.which("ninja") else "ninja"
