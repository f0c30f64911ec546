"""launch/train.py with seams for tests, all set by the environment; the product reads none of it.

TRACE: a directory; each rank appends what every micro-batch trained on: position, label, t, and
hashes of its pixels and noise. EMULATE_FP16: let DeepSpeed run fp16 on a CPU without its
instructions. KILL_AT, TERM_AT "STEP:RANK": that rank gets SIGKILL, or SIGTERM twice, as from a
scheduler and a launcher, when the step begins.
NAN_AT "STEP:RANK": that rank's loss of the step is not a number.
PACE: seconds that every step takes longer.
FAULT "STEP:RANK:KIND", with KIND one of: stop (SIGSTOP), raise, raise-validation, memory (an
allocation that cannot succeed), or one that sleeps: data SECONDS (global batch 16), forward
SECONDS, save SECONDS, validation SECONDS (every batch); the last two and raise-validation at any
step. RANK may be all.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ds_classifier import checkpoint, distributed, evaluation, training
from ds_classifier.data.loader import ShardDataset
from launch import train as program


def digest(rows) -> list[str]:
    return [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()[:16] for row in rows]


def due(name: str, step: int) -> bool:
    return os.environ.get(name) == f"{step}:{distributed.rank()}"


def fault(kind: str, step: int | None = None) -> float:
    """Seconds of the fault asked for, if it is this one: 0 for none, and any for a sudden one."""
    when, rank, what = os.environ.get("FAULT", "::").split(":")
    what, _, seconds = what.partition(" ")
    here = (step is None or when == str(step)) and rank in ("all", str(distributed.rank()))
    return float(seconds or 1) if here and what == kind else 0.0


def trace(step, positions, labels, t, pixels, noise) -> None:
    folder = Path(os.environ["TRACE"])
    folder.mkdir(parents=True, exist_ok=True)
    noises = digest(noise) if noise is not None else [None] * len(labels)
    with open(folder / f"rank{distributed.rank()}.jsonl", "a") as file:
        for row in zip(positions, labels.tolist(), t.tolist(), digest(pixels), noises, strict=True):
            file.write(json.dumps([step, *row]) + "\n")


def traced_step(engine, batches, **keywords):
    step = engine.global_steps + 1
    if due("KILL_AT", step):
        os.kill(os.getpid(), signal.SIGKILL)
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

    def watched_forward(images, labels, t, noise):
        time.sleep(fault("forward", step))
        if "TRACE" in os.environ:
            trace(step, list(positions), labels, t, images, noise)
        losses, logits = forward(images, labels, t, noise)
        return (losses * float("nan"), logits) if due("NAN_AT", step) else (losses, logits)

    module.forward = watched_forward
    try:
        return untouched_step(engine, watched_batches(), **keywords)
    finally:
        module.forward = forward


untouched_step = training.train_step
training.train_step = traced_step
untouched_commit, untouched_evaluate = checkpoint._commit, evaluation.evaluate
untouched_getitem = ShardDataset.__getitem__


def slow_commit(*arguments, **keywords):
    time.sleep(fault("save"))
    return untouched_commit(*arguments, **keywords)


def slow_getitem(dataset, positions):
    if dataset.order is not None:  # training's
        time.sleep(fault("data", int(positions[0]) // 16 + 1))
    return untouched_getitem(dataset, positions)


def slow_evaluate(module, loader, **keywords):
    if fault("raise-validation"):
        raise RuntimeError("a fault of the test")

    def batches():
        for batch in loader:
            time.sleep(fault("validation"))
            yield batch

    return untouched_evaluate(module, batches(), **keywords)


checkpoint._commit, evaluation.evaluate = slow_commit, slow_evaluate
ShardDataset.__getitem__ = slow_getitem

if os.environ.get("EMULATE_FP16"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True

if __name__ == "__main__":
    sys.exit(program.main())
