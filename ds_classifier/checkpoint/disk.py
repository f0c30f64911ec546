"""Write, verify, find, prune and load checkpoints.

    checkpoints/step-00010000/
      model.safetensors      fp32 master weights, and what training does not change in its own
                             dtypes (see fixed_state.py), by the names of the state dict, which
                             are the reference's
      optimizer.safetensors  what the optimizer keeps of each weight, STATE.NAME, fp32, such as
                             Adam's exp_avg.NAME; schedule_sampler.NAME
      state.json             step, skipped steps, loss scaler, settings, classes, data; optimizer:
                             its kind, such as Adam, and its numbers, such as its count of steps;
                             part_ends: the steps at which the parts of the run end, of which
                             --extend adds one; skipped_before_part: the steps skipped before the
                             last part
      manifest.json          size and sha256 of each file; written last
    checkpoints/latest       the name of the newest checkpoint, for people and scripts
    checkpoints/best         the name of the one with the lowest val_loss, and that loss

A checkpoint does not depend on the number of ranks, the ZeRO stage, the precision or the
implementation of the optimizer, and holds no pickle. Only rank 0 touches the disk; the other ranks
send and receive, so no shared file system is needed. A checkpoint gets its name by one rename when
it is complete. A directory without a valid manifest is not a checkpoint. `writer.py` takes the
state from the engine and calls `commit`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.distributed.engine import deepspeed_engine, deepspeed_state

FORMAT = "ds_classifier checkpoint"
VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
PREFIX = "classifier."  # the engine's module is the NoisedClassifier
NAME = re.compile(r"step-\d{8,}")  # the name of a checkpoint's directory
SAMPLER = "schedule_sampler."
SAFETENSORS_DTYPE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


# ---------------------------------------------------------------------------------- committing


def commit(
    final: Path, *, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Write a checkpoint and give it its name, `final`, by one rename; then name it in `latest`.

    model, optimizer: contiguous CPU tensors of SAFETENSORS_DTYPE. state: the content of state.json.
    Raises OSError, which names the file, if something cannot be written. The checkpoints before it
    are then unchanged.
    """
    staging = final.parent / f".{final.name}.staging"
    try:
        _write_files(staging, model, optimizer, state)
        _set_later_aside(final)
        replaced = final.parent / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():  # damaged, or written before the run was resumed from an earlier step
            os.rename(final, replaced)
        os.rename(staging, final)
        files.fsync(final.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # makes room if the disk is full
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    files.replace_text(final.parent / "latest", final.name + "\n")


def _write_files(staging: Path, model, optimizer, state) -> None:
    """Write and sync all files of a checkpoint, the manifest last."""
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed in this function
    staging.mkdir(parents=True)
    contents = {
        MODEL: _tensor_file(model),
        OPTIMIZER: _tensor_file(optimizer),
        STATE: [json.dumps(state, indent=1).encode()],
    }
    described = {}
    for name, chunks in contents.items():
        size, digest = files.write_hashed(staging / name, chunks)
        described[name] = {"bytes": size, "sha256": digest}
    manifest = json.dumps({"files": described}, indent=1).encode()
    files.write_hashed(staging / MANIFEST, [manifest])
    files.fsync(staging)


def _tensor_file(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in pieces, without copying the tensors' memory.

    Format: the header's length, 8 bytes little-endian; the header, JSON with dtype, shape and
    offsets of each tensor, padded with spaces to a multiple of 8 bytes; the tensors' bytes.
    """
    header, end = {}, 0
    for name, value in tensors.items():
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPE[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for value in tensors.values():
        yield memoryview(value.reshape(-1).view(torch.uint8).numpy())


def _set_later_aside(final: Path) -> None:
    """Rename checkpoints of later steps to abandoned-NAME, so that they are not found any more.

    They are damaged and were skipped, or the run was resumed from an earlier step.
    """
    for checkpoint in list_checkpoints(final.parent):
        if _step(checkpoint) > _step(final):
            aside = final.parent / f"abandoned-{checkpoint.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint, aside)


def prune(checkpoints: Path, *, keep_last: int, keep_every: int) -> list[str]:
    """Delete old checkpoints; return an error message for each that could not be deleted.

    It keeps the keep_last newest checkpoints that look whole, those of every keep_every-th step (0:
    none), and the best one.
    """
    whole = 0
    best = best_checkpoint(checkpoints)
    problems = []
    for checkpoint in list_checkpoints(checkpoints):
        looks_whole = damage(checkpoint, hashes=False) is None
        if whole < keep_last or checkpoint == best:
            whole += looks_whole
        elif not (keep_every and looks_whole and _step(checkpoint) % keep_every == 0):
            try:
                # Renamed first: a kill in rmtree leaves no half checkpoint under its name.
                doomed = checkpoints / f".{checkpoint.name}.pruned"
                os.rename(checkpoint, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                problems.append(str(error))
    return problems


def name_best(checkpoints: Path) -> None:
    """Write the name of the checkpoint with the lowest val_loss, and that loss, into `best`."""
    best = best_checkpoint(checkpoints)
    if best is not None:
        text = f"{best.name} val_loss {_val_loss(best):.6g}\n"
        files.replace_text(checkpoints / "best", text)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what killed saves and prunings left. No other process may be writing here."""
    for suffix in ("staging", "replaced", "pruned"):
        for leftover in checkpoints.glob(f".step-*.{suffix}"):
            shutil.rmtree(leftover, ignore_errors=True)


# ------------------------------------------------------------------------------------- finding


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the directories named like checkpoints, newest step first, whole or damaged."""
    if not checkpoints.is_dir():
        return []
    named = [p for p in checkpoints.iterdir() if NAME.fullmatch(p.name)]
    return sorted(named, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def best_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint with the lowest val_loss; None if none looks whole and has one."""
    losses = {
        checkpoint: _val_loss(checkpoint)
        for checkpoint in list_checkpoints(checkpoints)
        if damage(checkpoint, hashes=False) is None
    }
    validated = [checkpoint for checkpoint, loss in losses.items() if loss is not None]
    return min(validated, key=losses.__getitem__, default=None)


def _val_loss(checkpoint: Path) -> float | None:
    """Return a checkpoint's val_loss; None if it has none, or none that is finite."""
    try:
        loss = float(_json(checkpoint / STATE)["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if math.isfinite(loss) else None


def _json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError if it is not JSON, or nested too deep."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deep") from None


def _is_object(path: Path) -> bool:
    """Return whether a file holds a JSON object."""
    try:
        return isinstance(_json(path), dict)
    except ValueError:
        return False


def damage(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """Return what is wrong with a checkpoint's files; None if each byte is as it was written.

    hashes: False compares sizes only, and reads no tensors.
    """
    try:
        described = _json(checkpoint / MANIFEST)["files"]
        for name in (MODEL, OPTIMIZER, STATE):
            size = (checkpoint / name).stat().st_size
            if size != described[name]["bytes"]:
                return f"{name} has {size} bytes of {described[name]['bytes']}"
            if hashes:
                with files.naming(checkpoint / name):
                    digest = files.sha256(checkpoint / name)
                if digest != described[name]["sha256"]:
                    return f"{name} is damaged: its sha256 is not the manifest's"
        if hashes:
            _names(checkpoint)
            if not _is_object(checkpoint / STATE):
                return f"{STATE} is not a JSON object"
    except SafetensorError as error:
        return f"a file of tensors is not a safetensors file: {error}"
    except OSError as error:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def newest_valid(checkpoints: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that verifies; None if there are no checkpoints at all.

    say: called with the reason for each newer one that is skipped.
    Raises ValueError if all are damaged, since starting afresh would silently discard the run.
    """
    reasons = []
    for checkpoint in list_checkpoints(checkpoints):
        problem = damage(checkpoint)
        if problem is None:
            for reason in reasons:
                say(f"skipped {reason}")
            return checkpoint
        reasons.append(f"{checkpoint}: {problem}")
    if reasons:
        raise ValueError(
            f"no checkpoint is whole: {'; '.join(reasons)}; do: restore one, or start afresh in "
            "another --run_dir"
        )
    return None


def named_by(path: Path) -> Path:
    """Return the checkpoint that a file `best` or `latest` names; any other path unchanged."""
    if path.name in ("best", "latest") and path.is_file():
        name = path.read_text(errors="replace", encoding="utf-8").partition(" ")[0].strip()
        if NAME.fullmatch(name):
            return path.with_name(name)
    return path


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user means by a path.

    path: a checkpoint, a run directory or its checkpoints/ (the newest that verifies), or `best` or
    `latest` in them.
    Raises ValueError if there is none, or if the one named is damaged.
    """
    path = named_by(path.resolve())
    if path.is_file():
        raise ValueError(
            f"got {path}, a file; need a run directory or a checkpoint in it; do: give "
            "a file of weights, such as guided-diffusion's .pt, to --init_from"
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
    """Read state.json. Raises ValueError for another format or version."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"{checkpoint}: got {state.get('format')} version {state.get('version')}; need "
            f"{FORMAT} version {VERSION}"
        )
    return state


def optimizer_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the kind of the optimizer that made a checkpoint, and its numbers by name."""
    # Up to version 0.1 there was only Adam.
    return state.get("optimizer") or {"kind": "Adam", "scalars": {"step": state["adam_step"]}}


def part_ends(state: dict[str, Any]) -> list[int]:
    """Return the steps at which the parts of a run end; a run that was never extended has one."""
    return state.get("part_ends") or [state["settings"]["iterations"]]


def _applied_in_part(state: dict[str, Any]) -> int:
    """Return the number of steps since the begin of the last part, without those skipped."""
    begin = [0, *state.get("part_ends", [0])][-2]
    skipped = state["skipped_steps"] - state.get("skipped_before_part", 0)
    return state["step"] - begin - skipped


def read_model(checkpoint: Path) -> dict[str, Tensor]:
    """Read the classifier's state dict: fp32 weights, and fixed tensors in their dtypes."""
    return load_file(checkpoint / MODEL)


def _names(checkpoint: Path) -> list[dict[str, list[int]]]:
    """Return name -> shape of the tensors, for MODEL and OPTIMIZER. Raises SafetensorError."""
    shapes = []
    for file in (MODEL, OPTIMIZER):
        with safe_open(checkpoint / file, framework="pt") as tensors:
            names = list(tensors.keys())
            shapes.append({name: tensors.get_slice(name).get_shape() for name in names})
    return shapes


# ------------------------------------------------------------------------------------- loading


def load(checkpoint: Path | None, state: dict[str, Any], *, engine, sampler) -> None:
    """Load a checkpoint into a fresh engine; every rank must call it.

    checkpoint: read on rank 0 only; may be None on other ranks.
    state: its `read_state`, on all ranks.
    On the same number of ranks, the following steps are bit-equal to those of the run that wrote
    it; if not, a note says so.
    What training does not change is not read here: see fixed_state.py.
    Raises ValueError on all ranks if tensors are missing or have other shapes.
    """
    optimizer = deepspeed_state.OptimizerState(engine)
    saved = optimizer_of(state)
    kept = distributed.on_rank_0(lambda: _check_tensors(checkpoint, engine, sampler), engine.device)
    opened = []
    if distributed.rank() == 0:
        opened = [safe_open(checkpoint / name, framework="pt") for name in (MODEL, OPTIMIZER)]

    def tensor(
        file: int, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return a tensor of MODEL (file 0) or OPTIMIZER (file 1) on all ranks."""
        full = torch.empty(shape, dtype=dtype, device=engine.device)
        if distributed.rank() == 0:
            full.copy_(opened[file].get_tensor(name))
        return distributed.broadcast(full)

    trained = deepspeed_state.trained(engine.module)
    parameters = {name.removeprefix(PREFIX): p for name, p in trained.items()}
    if saved["kind"] == optimizer.kind:
        optimizer.begin({parameters[name]: kept[name] for name in kept}, saved["scalars"])
    else:
        kept = {}
        distributed.say(
            f"note: the optimizer is {optimizer.kind} now, and was {saved['kind']} in the "
            "checkpoint: what it keeps of the gradients starts anew"
        )
    if not deepspeed_state.resumes_exactly(engine):
        distributed.say(
            "note: with ZeRO 3 and torch_autocast the steps that follow equal those of a run "
            "without an interruption within rounding only; do: write bf16 for equal bits"
        )
    for name, parameter in parameters.items():
        shape = deepspeed_state.whole_shape(parameter)
        deepspeed_state.set_whole_weight(parameter, tensor(0, name, shape))
        for part in kept.get(name, []):
            optimizer.set_whole(parameter, part, tensor(1, f"{part}.{name}", shape))
    deepspeed_state.update_copies(engine)
    sampler.load_state(
        {
            name: tensor(1, SAMPLER + name, value.shape, value.dtype)
            for name, value in sampler.state().items()
        }
    )
    engine.global_steps = state["step"]
    engine.skipped_steps = state["skipped_steps"]
    engine.global_samples = state["step"] * engine.train_batch_size()
    deepspeed_engine.set_schedule(engine, _applied_in_part(state))
    deepspeed_engine.set_loss_scaler_state(engine, state["loss_scaler"])


def _check_tensors(checkpoint: Path, engine, sampler) -> dict[str, list[str]]:
    """Return, for each parameter, the names of what the optimizer had kept of it.

    Raises ValueError unless the files hold each tensor that `load` reads, in its shape.
    """
    model, optimizer = _names(checkpoint)
    shapes = {
        name.removeprefix(PREFIX): deepspeed_state.whole_shape(parameter)
        for name, parameter in deepspeed_state.trained(engine.module).items()
    }
    kept: dict[str, list[str]] = {name: [] for name in shapes}
    own = {name.removeprefix(PREFIX) for name in engine.module.state_dict()}
    others = [f"{name}, which the classifier lacks" for name in model if name not in own]
    for full in optimizer:
        part, _, name = full.partition(".")
        if full.startswith(SAMPLER):
            continue
        if name in shapes:
            kept[name].append(part)
        elif name in own:
            others.append(f"{full}, of a parameter that is frozen now")
    if others:
        raise ValueError(
            f"{checkpoint}: got {others[0]}; need a checkpoint of this classifier; do: undo the "
            "change of its code, or choose another --run_dir"
        )
    usual = max(kept.values(), key=len)  # all the same, but for Muon's matrices
    wanted = {
        f"{part}.{name}": shapes[name]
        for name, parts in kept.items()
        for part in (parts if parts == ["momentum_buffer"] else usual)
    }
    wanted |= {SAMPLER + name: v.shape for name, v in sampler.state().items()}
    check_shapes(checkpoint / MODEL, shapes, model)
    check_shapes(checkpoint / OPTIMIZER, wanted, optimizer)
    return kept


def check_shapes(file: Path, need: dict[str, torch.Size], got: dict[str, list[int]]) -> None:
    """Raise ValueError if a file lacks a tensor, or has it in another shape."""
    for name, shape in need.items():
        if got.get(name) != list(shape):
            raise ValueError(
                f"{file}: got {got.get(name, 'nothing')} for {name}; need the shape {list(shape)}; "
                "do: continue from a checkpoint of this classifier, whose code did not change"
            )
