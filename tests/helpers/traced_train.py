"""launch/train.py with faults and traces for tests, chosen by variables of the environment.

TRACE: a directory. Each rank appends one row per sample of every micro-batch: step, position,
    label, t, and hashes of its pixels and noise.
EMULATE_FP16: let DeepSpeed run fp16 on a CPU that has no instructions for it.
KILL_AT, TERM_AT "STEP:RANK": when the step begins, that rank gets SIGKILL, or SIGTERM twice, as
    from a scheduler and a launcher; a checkpoint that is being written is waited for before a
    SIGKILL. KILL_WORKERS_AT: its loader workers get SIGKILL.
NAN_AT, INF_AT "STEP:RANK", or "STEP+:RANK" from that step on: that rank's loss is multiplied by
    nan; or infinity is added to it, which leaves the gradient as it is.
SNAPSHOT_AT "STEP:RANK:DO": when the step's checkpoint is due, that rank is killed (DO: kill), waits
    (DO: seconds), or has a bit of a parameter flipped (DO: flip).
FILE_FAULTS: a JSON list of [CALL, PATH, DO, TIMES]. The first TIMES times that os.CALL (fsync,
    rename, replace) gets a path that contains PATH, this process is killed (DO: kill), sleeps (DO:
    seconds), or gets an OSError (DO: EIO and such).
FIRED: a file that gets a line for each SNAPSHOT_AT or FILE_FAULTS that happened.
CHDIR "RANK:PATH": that rank works in another directory.
PACE: seconds added to every step.
FAULT "STEP:RANK:KIND", with KIND one of: stop (SIGSTOP), raise, raise-validation, memory (an
    allocation that cannot succeed), or one that sleeps: data SECONDS (global batch 16), forward
    SECONDS, save SECONDS, validation SECONDS (every batch). The last two and raise-validation
    happen at any step. RANK may be all.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint import writer as checkpoint_writer
from ds_classifier.data.loader import ShardDataset
from ds_classifier.evaluation import evaluate
from ds_classifier.training import step as steps
from launch import train as program


def digest(rows) -> list[str]:
    """Return a short hash of each row."""
    return [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()[:16] for row in rows]


def due(name: str, step: int) -> bool:
    """Return whether a variable "STEP:RANK" or "STEP+:RANK" names this step and rank."""
    when, _, rank = os.environ.get(name, "").partition(":")
    reached = step >= int(when[:-1]) if when.endswith("+") else when == str(step)
    return reached and rank == str(distributed.rank())


def happen(what: str, do: str) -> None:
    """Cause a fault, and record it in FIRED."""
    with open(os.environ["FIRED"], "a") as file:
        file.write(f"{what} {do}\n")
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do in vars(errno):
        raise OSError(getattr(errno, do), os.strerror(getattr(errno, do)))
    elif do != "flip":
        time.sleep(float(do))


def fault(kind: str, step: int | None = None) -> float:
    """Return the seconds of FAULT if it names this kind, step and rank, else 0."""
    when, rank, what = os.environ.get("FAULT", "::").split(":")
    what, _, seconds = what.partition(" ")
    here = (step is None or when == str(step)) and rank in ("all", str(distributed.rank()))
    return float(seconds or 1) if here and what == kind else 0.0


def trace(step, positions, labels, t, pixels, noise) -> None:
    """Append a micro-batch to this rank's file in TRACE."""
    folder = Path(os.environ["TRACE"])
    folder.mkdir(parents=True, exist_ok=True)
    noises = digest(noise) if noise is not None else [None] * len(labels)
    with open(folder / f"rank{distributed.rank()}.jsonl", "a") as file:
        for row in zip(positions, labels.tolist(), t.tolist(), digest(pixels), noises, strict=True):
            file.write(json.dumps([step, *row]) + "\n")


def traced_step(engine, batches, objective, meter):
    """Train one step, with the faults and the trace that are asked for."""
    step = engine.global_steps + 1
    if os.environ.get("KILL_AT", "").startswith(f"{step}:"):
        for thread in threading.enumerate():
            if thread.name == "checkpoint writer":
                thread.join()
        distributed.gather_json(None, engine.device)  # until rank 0 has written it
    if due("KILL_AT", step):
        os.kill(os.getpid(), signal.SIGKILL)
    if due("KILL_WORKERS_AT", step):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            print("killed a worker", flush=True)
    if due("TERM_AT", step):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    if fault("stop", step):
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault("raise", step):
        raise RuntimeError("a fault of the test")
    if fault("memory", step):
        torch.empty(1 << 60, dtype=torch.uint8)
    time.sleep(float(os.environ.get("PACE", 0)))
    module, forward = engine.module, engine.module.forward
    positions = []

    def watched_batches():
        for batch in batches:
            positions[:] = batch.positions.tolist()
            yield batch

    def watched_forward(images, labels, t, noise, *more):
        time.sleep(fault("forward", step))
        if "TRACE" in os.environ:
            trace(step, list(positions), labels, t, images, noise)
        losses, logits = forward(images, labels, t, noise, *more)
        losses = losses * float("nan") if due("NAN_AT", step) else losses
        losses = losses + float("inf") if due("INF_AT", step) else losses
        return losses, logits

    module.forward = watched_forward
    try:
        return untouched_step(engine, watched_batches(), objective, meter)
    finally:
        module.forward = forward


untouched_step = steps.train_step
steps.train_step = traced_step  # before training.loop imports it
untouched_commit, untouched_evaluate = disk.commit, evaluate.evaluate
untouched_getitem = ShardDataset.__getitem__


def slow_commit(*arguments, **keywords):
    """Commit a checkpoint after a pause; not that of the check before the first step."""
    if arguments[0].parent.name != ".probe":
        time.sleep(fault("save"))
    return untouched_commit(*arguments, **keywords)


def slow_getitem(dataset, positions):
    """Read a training batch after a pause."""
    if dataset.order is not None:  # training's
        time.sleep(fault("data", int(positions[0]) // 16 + 1))
    return untouched_getitem(dataset, positions)


def slow_evaluate(module, loader, **keywords):
    """Evaluate with a pause before every batch."""
    if fault("raise-validation"):
        raise RuntimeError("a fault of the test")

    def batches():
        for batch in loader:
            time.sleep(fault("validation"))
            yield batch

    return untouched_evaluate(module, batches(), **keywords)


disk.commit, evaluate.evaluate = slow_commit, slow_evaluate
ShardDataset.__getitem__ = slow_getitem


def faulty_save(writer, *arguments, **keywords):
    """Save, after the fault of SNAPSHOT_AT."""
    engine = writer._engine
    step, rank, do = os.environ["SNAPSHOT_AT"].split(":")
    if (step, rank) == (str(engine.global_steps), str(distributed.rank())):
        happen(f"snapshot {step}", do)
        if do == "flip":
            next(iter(engine.module.parameters())).data.view(-1)[3:4].view(
                torch.int32
            ).bitwise_xor_(1)
    untouched_save(writer, *arguments, **keywords)


if "SNAPSHOT_AT" in os.environ:
    untouched_save = checkpoint_writer.CheckpointWriter.save
    checkpoint_writer.CheckpointWriter.save = faulty_save


def faulty(call: str, faults: list[list]):
    """Replace os.CALL by one with faults. Its last argument is the path, or a descriptor."""
    untouched = getattr(os, call)

    def wrapped(*arguments):
        path = arguments[-1]
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        for fault in faults:
            if fault[1] in path and fault[3] > 0 and "/.probe" not in path:  # not the check's
                fault[3] -= 1
                happen(f"{call} {path}", fault[2])
        return untouched(*arguments)

    setattr(os, call, wrapped)


if "FILE_FAULTS" in os.environ:
    checkpoint_writer.RETRY_SECONDS = (0.1, 0.2, 0.3)
    every = json.loads(os.environ["FILE_FAULTS"])
    for name in ("fsync", "rename", "replace"):
        faulty(name, [fault for fault in every if fault[0] == name])

if os.environ.get("CHDIR", "").partition(":")[0] == str(distributed.rank()):
    os.chdir(os.environ["CHDIR"].partition(":")[2])

if os.environ.get("EMULATE_FP16"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True

if __name__ == "__main__":
    sys.exit(program.main())
