"""Features of DeepSpeed that this trainer does not have, or has in its own way."""

from __future__ import annotations

import os
from typing import Any

from ds_classifier.config.batch_sizes import AUTO
from ds_classifier.config.deepspeed_json.draft import INT, STR, Draft, shown

# What is refused where it is on -> reason. A key with dots is in a section.
NOT_HERE = {
    "amp": "there is no apex; use fp16 or bf16",
    "autotuning": "it ends the program after a few steps; --dry_run measures memory and time",
    "compression_training": "the classifier is trained as it is, without compression",
    "curriculum_learning": "all images have one size, so there is no sequence to shorten",
    "data_efficiency": "this program has its own order of images, and no layer drops tokens",
    "eigenvalue": "it serves quantization, which this program does not do",
    "elasticity": "the global batch is the same on any number of ranks already",
    "expert_parallel": "the classifier has no experts",
    "graph_harvesting": "it is of DeepSpeed's inference",
    "hybrid_engine": "it is for models that generate text",
    "nebula": "this program writes its own checkpoints",
    "pipeline.stages": "the classifier is one module, without pipeline stages",
    "progressive_layer_drop": "the classifier has no layers that can be left out",
    "quantize_training": "the classifier is trained without quantization",
    "sequence_parallel_size": "images are no sequences to divide",
    "sparse_attention": "the classifier's attention is dense",
    "sparse_gradients": "the classifier has no embedding of words",
    "tensor_parallel": "each rank holds whole layers",
    "weight_quantization": "it is of DeepSpeed's inference",
    "compile.deepcompile": "DeepCompile needs hooks that this program does not set; --compile True "
    "compiles the classifier",
    "zero_optimization.zenflow": "it updates weights out of step, so no resume could be exact",
    "zero_optimization.mics_shard_size": "MiCS is not supported; use stage 3",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS is not supported; use stage 3",
    "zero_optimization.zero_quantized_weights": "the classifier is trained without quantization",
    "zero_optimization.zero_quantized_gradients": "the classifier is trained without quantization",
    "zero_optimization.zero_quantized_nontrainable_weights": "the classifier is trained without "
    "quantization",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.zeropp_loco_param": "its error feedback is kept in no checkpoint",
    "fp16.fp16_master_weights_and_grads": "checkpoints hold fp32 master weights",
    "bf16.bf16_master_weights_and_grads": "checkpoints hold fp32 master weights",
    "bf16.bf16_optimizer_states": "checkpoints hold the optimizer's state in fp32",
}

# Sections that DeepSpeed leaves off where they have no `enabled`.
NEED_ENABLED = ("curriculum_learning", "elasticity", "progressive_layer_drop", "eigenvalue")

# Sections of DeepSpeed's monitors -> where the same numbers are.
MONITORS = {
    "tensorboard": "the run directory's tb/ has it all",
    "wandb": "--wandb PROJECT logs there",
    "csv_monitor": "the run directory's progress.csv has it all",
    "comet": "the run directory's log.jsonl has it all",
}

_OFF = (
    "",
    "none",
    "false",
    "f",
    "no",
    "n",
    "off",
    "0",
    "0.0",
    AUTO,
)  # as strings, as DeepSpeed reads them
NEVER = 2**31  # steps_per_print of a run in which DeepSpeed prints nothing

# Values that would break a promise of this program: key -> (the value needed, reason).
NEEDED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (True, "DeepSpeed counts the micro-batches of a step here"),
    "gradient_allreduce_op": ("mean", "a sum would grow with the number of ranks"),
    "bf16.check_grad_overflow": (True, "else a non-finite gradient would reach the weights"),
    "zero_optimization.compute_grad_norm": (True, "the log shows the gradient's norm"),
}


def check_features(draft: Draft) -> None:
    """Refuse what is on and not to be had here; map or drop what this program does itself.

    Whatever is off is removed in silence.
    """
    _without_null(draft.ds)
    for name, reason in NOT_HERE.items():
        path = tuple(name.split("."))
        value = draft.get(*path)
        if name in NEED_ENABLED and isinstance(value, dict):
            value = {"enabled": value.get("enabled")}
        if _is_on(value):
            draft.refuse(path, f"not supported here: {reason}", advice="do: remove it")
        elif path[0] != "compile":
            draft.drop(*path)
    for name, where in MONITORS.items():
        if _is_on(draft.drop(name)):
            draft.notes.append(f"{name}: switched off; {where}")
    for name, (needed, reason) in NEEDED.items():
        path = tuple(name.split("."))
        if draft.get(*path, default=needed) not in (needed, AUTO):
            got = shown(draft.get(*path))
            draft.refuse(path, f"got {got}; need {shown(needed)}: {reason}", needed)
    if draft.drop("checkpoint"):
        draft.notes.append("checkpoint: ignored, since this program writes its own checkpoints")
    _map_compile(draft)
    _note_activation_checkpointing(draft)
    _profile(draft)


def _without_null(values: dict[str, Any]) -> None:
    """Remove the keys that are null, which stand for DeepSpeed's defaults."""
    for key, value in list(values.items()):
        if value is None:
            del values[key]
        elif isinstance(value, dict):
            _without_null(value)


def _is_on(value: Any) -> bool:
    """Return True if a section or a key switches something on."""
    if isinstance(value, dict):
        if "enabled" in value:
            return str(value["enabled"]).lower() not in _OFF
        return any(_is_on(inner) for inner in value.values())
    if isinstance(value, bool) or value is None:
        return bool(value)
    # Of sizes, 1 is the size of what is not divided; of names, "none" is no device or kind.
    return value > 1 if isinstance(value, (int, float)) else str(value).lower() not in _OFF


def _map_compile(draft: Draft) -> None:
    """Compile the classifier where the section `compile` of older versions says so."""
    section, advice = draft.drop("compile"), "--compile True compiles the classifier"
    if not isinstance(section, dict):
        if section:
            draft.notes.append(f"compile: {shown(section)} has no effect; {advice}")
        return
    on = section.get("enabled") is True or section.get("disable") is False
    if on and "compile" not in draft.command.given:
        draft.settings = draft.settings.replace(compile=True)
        draft.notes.append("compile: the classifier is compiled, as with --compile True")
    if on or not section.keys() & {"enabled", "disable"}:
        own = [key for key, value in section.items() if _is_on(value) and value != "inductor"]
        if left := [f"compile.{key}" for key in own if key not in ("enabled", "disable")]:
            draft.notes.append(f"{', '.join(left)}: no effect; {advice}, by inductor")


def _note_activation_checkpointing(draft: Draft) -> None:
    """Note that DeepSpeed's way to store activations is not used."""
    if (
        _is_on(draft.get("activation_checkpointing"))
        and not draft.settings.activation_checkpointing
    ):
        draft.notes.append(
            "activation_checkpointing: it says how DeepSpeed's own function stores activations, "
            "which the classifier does not call; --activation_checkpointing True recomputes them"
        )
    draft.drop("activation_checkpointing")


def _profile(draft: Draft) -> None:
    """Send what DeepSpeed measures to a file of the run, and measure nothing in a rehearsal."""
    draft.check_type(("steps_per_print",), INT, 1)
    if draft.get("steps_per_print") == AUTO:
        draft.drop("steps_per_print")
    if draft.command.skips_training:
        for key in ("flops_profiler", "comms_logger", "wall_clock_breakdown", "memory_breakdown"):
            draft.drop(key)
        draft.drop("steps_per_print")
    if _is_on(draft.section("flops_profiler")):
        path = ("flops_profiler", "output_file")
        draft.check_type(path, STR)
        name = draft.get(*path) or "flops_profiler.txt"
        draft.set(*path, os.path.join(draft.settings.run_dir, name))  # unless it is absolute


def reports(ds_config: dict[str, Any]) -> list[str]:
    """Return the keys with which DeepSpeed's logger reports on the run."""
    return [
        key
        for key in ("flops_profiler", "comms_logger", "wall_clock_breakdown", "memory_breakdown")
        if _is_on(ds_config.get(key))
    ] + ["steps_per_print"] * (ds_config["steps_per_print"] < NEVER)
