"""launch/train.py with seams for tests, all set by the environment; the product reads none of it.

TRACE: a directory; each rank appends what every micro-batch trained on: position, label, t, and
hashes of its pixels and noise. EMULATE_FP16: let DeepSpeed run fp16 on a CPU without its
instructions. KILL_AT, TERM_AT "STEP:RANK": that rank gets SIGKILL, or SIGTERM twice, as from a
scheduler and a launcher, when the step begins. KILL_WORKERS_AT: that rank's loader workers get it.
NAN_AT "STEP:RANK": that rank's loss of the step is not a number.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_classifier import distributed, training
from launch import train as program


def digest(rows) -> list[str]:
    return [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()[:16] for row in rows]


def due(name: str, step: int) -> bool:
    return os.environ.get(name) == f"{step}:{distributed.rank()}"


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
    if due("KILL_WORKERS_AT", step):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            print("killed a worker", flush=True)
    if due("TERM_AT", step):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    module, forward = engine.module, engine.module.forward
    positions = []

    def watched_batches():
        for batch in batches:
            positions[:] = batch.positions.tolist()
            yield batch

    def watched_forward(images, labels, t, noise):
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

if os.environ.get("EMULATE_FP16"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True

if __name__ == "__main__":
    sys.exit(program.main())
