"""ZeRO and precision: the sections zero_optimization, fp16, bf16, torch_autocast, data_types."""

from __future__ import annotations

import importlib
from typing import Any

from ds_classifier.config.batch_sizes import AUTO
from ds_classifier.config.deepspeed_json.draft import INT, NUMBER, Draft, shown
from ds_classifier.config.deepspeed_json.known import silent
from ds_classifier.config.shipped import fast_precisions

BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")
BUCKET_MULTIPLE = 2  # DeepSpeed asserts that the all-gather bucket has an even size
SCALE_POWER = 62  # of 2, the most: the scale is a signed integer of 64 bits
USUAL_SCALE_POWER = 16
HF_CLIPPING = 1.0  # what "auto" means in Hugging Face's Trainer, if nothing else is asked for
# The smallest values with which DeepSpeed neither fails later nor does something else.
LEAST = {
    ("fp16", "loss_scale"): (NUMBER, 0),
    ("fp16", "initial_scale_power"): (INT, 0),
    ("fp16", "loss_scale_window"): (INT, 1),
    ("fp16", "hysteresis"): (INT, 1),
    ("fp16", "min_loss_scale"): (NUMBER, 0),
    ("gradient_clipping",): (NUMBER, 0),
    ("gradient_predivide_factor",): (NUMBER, 1),
}


def rename_old_keys(draft: Draft) -> None:
    """Give the old forms of sections, which DeepSpeed still reads, their new names."""
    if isinstance(zero := draft.ds.get("zero_optimization"), bool):
        draft.ds["zero_optimization"] = {"stage": int(zero)}
        if zero and "allgather_size" in draft.ds:
            draft.set("zero_optimization", "allgather_bucket_size", draft.drop("allgather_size"))
    old = draft.drop("bfloat16")
    if old is not None and "bf16" not in draft.ds:
        draft.ds["bf16"] = old
        draft.spelt["bf16"] = "bfloat16"


def zero_config(draft: Draft) -> Any:
    """Return DeepSpeed's own reading of the section zero_optimization."""
    from deepspeed.runtime.zero.config import get_zero_config

    with silent():
        return get_zero_config({"zero_optimization": draft.section("zero_optimization")})


def settle_zero(draft: Draft) -> None:
    """Run stage 0 as 1, and remove what has no effect in the stage."""
    section = draft.ds.setdefault("zero_optimization", {})
    if section.get("stage") == AUTO:
        draft.refuse(("zero_optimization", "stage"), 'got "auto"; need 0, 1, 2 or 3', 1)
    zero = zero_config(draft)
    for name, field in type(zero).model_fields.items():
        extra = field.json_schema_extra or {}
        if name in section and extra.get("deprecated"):
            value, new = section.pop(name), extra.get("new_param", "")
            if new in type(zero).model_fields:  # offload_optimizer for cpu_offload, for example
                setting = getattr(zero, new)
                section[new] = {"device": "cpu"} if hasattr(setting, "device") else setting
            if not value:
                section.pop(new, None)
    stage = int(zero.stage)
    # Not as strings, which DeepSpeed also takes.
    read = [key for key in (*BUCKETS, "reduce_scatter") if section.get(key, AUTO) != AUTO]
    section |= {key: getattr(zero, key) for key in read} | {"stage": stage}
    if "ratio" in draft.section("zero_optimization", "offload_optimizer"):
        section["offload_optimizer"]["ratio"] = zero.offload_optimizer.ratio
    for key in ("offload_optimizer", "offload_param"):
        if draft.get("zero_optimization", key, "device", default="none") == "none":
            section.pop(key, None)  # so a section that is there is one that offloads
    if stage < 3:
        section.pop("offload_param", None)
    if stage == 0:
        section.pop("offload_optimizer", None)
        section["stage"] = 1
        draft.set("zero_allow_untested_optimizer", True)  # stage 0 takes any optimizer
        draft.notes.append("ZeRO stage 0: run as stage 1, which divides the optimizer's state")
    gathered = section.get("allgather_bucket_size", AUTO)
    if gathered != AUTO and gathered % BUCKET_MULTIPLE:
        draft.refuse(
            ("zero_optimization", "allgather_bucket_size"),
            f"got {gathered}; need an even number",
        )


def check_numbers(draft: Draft) -> None:
    """Refuse numbers that are too small or too large; DeepSpeed would name the section alone."""
    for path, (kind, least) in LEAST.items():
        draft.check_type(path, kind, least)
    power = draft.get("fp16", "initial_scale_power", default=0)
    if power != AUTO and power > SCALE_POWER:
        draft.refuse(
            ("fp16", "initial_scale_power"),
            f"got {power}; need at most {SCALE_POWER}, since the loss scale is 2 to this power",
            USUAL_SCALE_POWER,
        )


def settle_precision(draft: Draft) -> None:
    """Check fp16, bf16 and clipping, and give those that are "auto" a value."""
    _choose_precision(draft)
    fp16, bf16 = (draft.get(name, "enabled", default=False) for name in ("fp16", "bf16"))
    if fp16 and bf16:
        draft.refuse(("fp16", "enabled"), "got true, and bf16.enabled; need one at most", False)
        fp16 = False
    asked = draft.command.classifier_use_fp16
    if asked is not None and asked != fp16:
        draft.problems.append(
            f"--classifier_use_fp16: got {asked}, but {draft.command.deepspeed_config} has fp16 "
            f"{'on' if fp16 else 'off'}; do: drop the flag, since the JSON owns the precision"
        )
    if draft.get("torch_autocast", "enabled"):
        _check_autocast(draft, fp16)
    _check_data_types(draft, "fp16" if fp16 else "bf16" if bf16 else "fp32")
    clips = "gradient_clipping" in draft.ds
    draft.fill_auto(("gradient_clipping",), 0.0 if _as_reference(draft) else HF_CLIPPING)
    if not clips:
        default = draft.known["gradient_clipping"]
        draft.ds["gradient_clipping"] = default
        if default:
            draft.notes.append(f"gradient_clipping: {default}, DeepSpeed's default; 0.0 is none")
    if _as_reference(draft):
        _check_reference(draft, fp16)


def _choose_precision(draft: Draft) -> None:
    """Give fp16.enabled and bf16.enabled a value where they are "auto": one of the device's."""
    auto = [name for name in ("bf16", "fp16") if draft.get(name, "enabled") == AUTO]
    if not auto:
        return
    asked = draft.command.classifier_use_fp16
    on = any(draft.get(name, "enabled") is True for name in ("bf16", "fp16"))
    chosen = next((name for name in fast_precisions() if name in auto and not on), None)
    if asked is not None and "fp16" in auto:
        chosen = "fp16" if asked else chosen if chosen == "bf16" else None
    for name in auto:
        draft.fill_auto((name, "enabled"), name == chosen)


def _check_autocast(draft: Draft, fp16: bool) -> None:
    modules = draft.get("torch_autocast", "lower_precision_safe_modules")
    for name in modules if isinstance(modules, list) else []:
        package, _, kind = name.rpartition(".")
        try:  # as DeepSpeed does
            getattr(importlib.import_module(package), kind)
        except (ImportError, AttributeError, ValueError):
            draft.refuse(
                ("torch_autocast", "lower_precision_safe_modules"),
                f"got {shown(name)}; need classes that can be imported, like torch.nn.Linear",
            )
            break
    dtype = str(draft.get("torch_autocast", "dtype", default="none")).removeprefix("torch.")
    if dtype not in ("bf16", "bfloat16"):
        draft.refuse(
            ("torch_autocast", "dtype"),
            f"got {dtype}; need bfloat16: DeepSpeed does not scale the loss of fp16 under ZeRO",
            "bfloat16",
        )
    if fp16:
        draft.refuse(
            ("torch_autocast", "enabled"),
            "got true, and fp16.enabled; need one at most",
            False,
        )


def _check_data_types(draft: Draft, precision: str) -> None:
    from deepspeed.runtime.config import DtypeEnum

    for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        value = draft.get("data_types", key, default=AUTO)
        if value == AUTO:
            draft.drop("data_types", key)
            continue
        try:
            name = DtypeEnum(value).name
        except (ValueError, KeyError, TypeError):
            name = ""
        need = {"param_dtype": [precision], "buffer_dtype": ["fp32"]}.get(
            key, ["fp32", "bf16", "fp16"]
        )
        if name not in need:
            draft.refuse(
                ("data_types", key), f"got {shown(value)}; need {' or '.join(need)}", need[0]
            )


def _as_reference(draft: Draft) -> bool:
    return draft.command.recipe == "reference"


def _check_reference(draft: Draft, fp16: bool) -> None:
    """Refuse what would make the recipe `reference` another training than the reference's."""
    needed = {("gradient_clipping",): 0}
    if fp16:
        needed["fp16", "hysteresis"] = 1
    for path, need in needed.items():
        got = draft.get(*path, default=2)  # DeepSpeed's default of the hysteresis
        if got != need:
            draft.refuse(path, f"got {got}; need {need} with --recipe reference", need)
