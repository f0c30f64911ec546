"""Checkpoints: what is in one, how it becomes final, how it is found and loaded.

    checkpoints/step-00010000/
      model.safetensors      fp32 master weights under the reference's parameter names
      optimizer.safetensors  Adam's exp_avg.NAME and exp_avg_sq.NAME, fp32; schedule_sampler.* if
      any state.json             step, skipped steps, schedule, loss scaler, settings, classes, data
      manifest.json          size and sha256 of each file; written last
    checkpoints/latest       the name of the newest, for people and scripts

It depends neither on the number of ranks nor on ZeRO stage or precision, and holds no pickle.
Rank 0 alone touches the disk; the other ranks send and receive, so no shared file system is needed.
A checkpoint appears under its name by one rename, complete: what has no valid manifest is none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_classifier import distributed, files
from ds_classifier import engine as engines

FORMAT = "ds_classifier checkpoint"
VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
PREFIX = "classifier."  # the engine's module is the NoisedClassifier
SAMPLER = "schedule_sampler."


def step_name(step: int) -> str:
    return f"step-{step:08d}"


# -------------------------------------------------------------------------------------- saving


def save(
    checkpoints: Path,
    *,
    engine,
    sampler,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Commit the engine's state at a step boundary; every rank must call it.

    state: JSON-able facts of the caller, kept under their names in state.json.
    Raises ValueError on all ranks if rank 0 cannot write; what was there before stays.
    """
    model, optimizer = _gather(engine)
    optimizer |= {SAMPLER + name: value.cpu() for name, value in sampler.state().items()}
    adam_step = float(engines.ensure_adam_state(engine)[0]["step"])
    state = {
        "format": FORMAT,
        "version": VERSION,
        "step": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "adam_step": adam_step,
        "loss_scaler": engines.loss_scaler_state(engine),
        **state,
    }
    final = checkpoints / step_name(engine.global_steps)

    def write() -> None:
        _commit(final, model=model, optimizer=optimizer, state=state)
        _set_later_aside(final)
        _prune(checkpoints, keep_last)

    distributed.on_rank_0(write, engine.device)
    return final


def _gather(engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Full fp32 weights and Adam moments, on rank 0's CPU; empty dicts elsewhere."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engines.ensure_adam_state(engine)
    model: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        name = name.removeprefix(PREFIX)
        full = {name: safe_get_full_fp32_param(parameter)}
        moments = {
            f"{moment}.{name}": safe_get_full_optimizer_state(parameter, moment)
            for moment in engines.ADAM_MOMENTS
        }
        if distributed.rank() == 0:
            model |= {key: value.cpu().contiguous() for key, value in full.items()}
            optimizer |= {key: value.cpu().contiguous() for key, value in moments.items()}
    return model, optimizer


def _commit(final: Path, *, model, optimizer, state) -> None:
    bad = [name for name, value in model.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"weights are not finite ({bad[0]} and {len(bad) - 1} more at step {state['step']}): "
            "not saved; do: run the same command again, it continues from the last good checkpoint"
        )
    staging = final.parent / f".{final.name}.staging"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed at this very step
    staging.mkdir(parents=True)
    _save_tensors(model, staging / MODEL)
    _save_tensors(optimizer, staging / OPTIMIZER)
    (staging / STATE).write_text(json.dumps(state, indent=1))
    described = {}
    for name in (MODEL, OPTIMIZER, STATE):
        files.fsync(staging / name)
        described[name] = {
            "bytes": (staging / name).stat().st_size,
            "sha256": files.sha256(staging / name),
        }
    (staging / MANIFEST).write_text(json.dumps({"files": described}, indent=1))
    files.fsync(staging / MANIFEST)
    files.fsync(staging)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one, or of a run continued from before it
    os.rename(staging, final)
    files.fsync(final.parent)
    files.replace_text(final.parent / "latest", final.name + "\n")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        needed = sum(value.numel() * value.element_size() for value in tensors.values())
        free = shutil.disk_usage(path.parent).free
        shutil.rmtree(path.parent, ignore_errors=True)
        raise ValueError(
            f"{path}: cannot write: {error}; need {needed:,} bytes, {free:,} are free; the "
            "checkpoints before it stand; do: make room and run the same command again"
        ) from None


def _set_later_aside(final: Path) -> None:
    """Rename checkpoints of later steps: damaged ones that were passed over, or of a run that was
    taken up again from before them. They are not this run's any more, and must not be found."""
    for checkpoint in list_checkpoints(final.parent):
        if _step(checkpoint) > _step(final):
            aside = final.parent / f"abandoned-{checkpoint.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint, aside)


def _prune(checkpoints: Path, keep_last: int) -> None:
    """Delete what is older than the keep_last newest checkpoints that look whole."""
    kept = 0
    for checkpoint in list_checkpoints(checkpoints):
        if kept >= keep_last:
            shutil.rmtree(checkpoint, ignore_errors=True)
        elif damage(checkpoint, hashes=False) is None:
            kept += 1


# ------------------------------------------------------------------------------------- finding


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Directories named as checkpoints, newest step first, whole or not."""
    if not checkpoints.is_dir():
        return []
    named = [p for p in checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(named, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def damage(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, or None if every byte is as it was written.

    hashes: False compares sizes alone.
    """
    try:
        described = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name in (MODEL, OPTIMIZER, STATE):
            size = (checkpoint / name).stat().st_size
            if size != described[name]["bytes"]:
                return f"{name} has {size} bytes of {described[name]['bytes']}"
            if hashes and files.sha256(checkpoint / name) != described[name]["sha256"]:
                return f"{name} is damaged: its sha256 is not the manifest's"
    except OSError as error:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def newest_valid(checkpoints: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    Says why newer ones were passed over. Raises ValueError if there are some and all are damaged:
    starting anew in silence would throw the run away.
    """
    reasons = []
    for checkpoint in list_checkpoints(checkpoints):
        problem = damage(checkpoint)
        if problem is None:
            for reason in reasons:
                say(f"passed over {reason}")
            return checkpoint
        reasons.append(f"{checkpoint}: {problem}")
    if reasons:
        raise ValueError(
            "no checkpoint is whole: "
            + "; ".join(reasons)
            + "; do: restore one, or start afresh in "
            "another --run_dir"
        )
    return None


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint directory from what a user names: it, its run directory, or its checkpoints/."""
    path = path.resolve()
    if path.is_file():
        raise ValueError(
            f"got {path}, a file; need a run directory or a checkpoint in it; do: give "
            "weights alone, such as guided-diffusion's .pt, to --init_from"
        )
    for candidate in (path, path / "checkpoints"):
        if (candidate / MANIFEST).is_file() and (candidate / MODEL).is_file():
            problem = damage(candidate)
            if problem:
                raise ValueError(f"{candidate}: {problem}")
            return candidate
        newest = newest_valid(candidate, lambda reason: None)
        if newest is not None:
            return newest
    raise ValueError(
        f"got {path}, which holds no checkpoint; need a run directory, or one of its "
        "checkpoints/step-NNNNNNNN"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / STATE).read_text())
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"{checkpoint}: got {state.get('format')} version {state.get('version')}; need "
            f"{FORMAT} "
            f"version {VERSION}"
        )
    return state


def read_model(checkpoint: Path) -> dict[str, Tensor]:
    """The classifier's fp32 weights by the reference's names."""
    from safetensors.torch import load_file

    return load_file(checkpoint / MODEL)


# ------------------------------------------------------------------------------------- loading


def load(checkpoint: Path | None, state: dict[str, Any], *, engine, sampler) -> None:
    """Put a checkpoint into a fresh engine; every rank must call it.

    checkpoint: read on rank 0 alone, may be None elsewhere. state: its `read_state`, on all ranks.
    The steps that follow are bit-equal to those of the run that wrote it, on as many ranks.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from safetensors import safe_open

    opened = []
    if distributed.rank() == 0:
        opened = [safe_open(checkpoint / name, framework="pt") for name in (MODEL, OPTIMIZER)]

    def tensor(file: int, name: str, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        full = torch.empty(like.shape, dtype=dtype, device=engine.device)
        if distributed.rank() == 0:
            full.copy_(opened[file].get_tensor(name))
        return distributed.broadcast(full)

    for adam_state in engines.ensure_adam_state(engine):
        adam_state["step"] = torch.tensor(float(state["adam_step"]))
    for name, parameter in engine.module.named_parameters():
        name = name.removeprefix(PREFIX)
        safe_set_full_fp32_param(parameter, tensor(0, name, parameter))
        for moment in engines.ADAM_MOMENTS:
            value = tensor(1, f"{moment}.{name}", parameter)
            safe_set_full_optimizer_state(parameter, value, moment)
    engine.optimizer.update_lp_params()
    sampler.load_state(
        {
            name: tensor(1, SAMPLER + name, value, value.dtype)
            for name, value in sampler.state().items()
        }
    )
    engine.global_steps = state["step"]
    engine.skipped_steps = state["skipped_steps"]
    engine.global_samples = state["step"] * engine.train_batch_size()
    engines.set_schedule(engine, state["step"] - state["skipped_steps"])
    engines.set_loss_scaler_state(engine, state["loss_scaler"])
