"""The training loop: step s trains on positions [sB, (s+1)B) of the stream, on all ranks together.

Nothing inside a step waits for the device on our account (DeepSpeed asks it once for overflow);
sums are read when a log line is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_classifier import checkpoint, distributed
from ds_classifier import engine as engines
from ds_classifier.data.loader import BadSample, Batch
from ds_classifier.diffusion import keyed_noise, keyed_uniform
from ds_classifier.logger import CONSOLE_HEADER, RunLogger, console_line, validation_line
from ds_classifier.metrics import Meter
from ds_classifier.shutdown import StopVote


def train_step(
    engine,
    batches: Iterator[Batch],
    *,
    accumulation: int,
    sampler,
    meter: Meter,
    seed: int,
    noised: bool,
) -> tuple[list[BadSample], float]:
    """One optimizer step. Returns the bad samples met, and the seconds spent waiting for data."""
    seen, bad, waited = [], [], 0.0
    for _ in range(accumulation):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        bad += batch.bad
        batch = batch.to(engine.device)
        t, noise = torch.zeros_like(batch.positions), None
        importance = torch.ones_like(batch.weights)
        if noised:
            t, importance = sampler.sample(keyed_uniform(seed, "t", batch.positions))
            noise = keyed_noise(seed, "noise", batch.positions, tuple(batch.images.shape[1:]))
        losses, logits = engine(batch.images, batch.labels, t, noise)
        # A bad sample adds nothing; dividing by all keeps the step the same on any number of ranks.
        loss = torch.where(batch.weights > 0, importance * losses, 0.0).mean()
        engine.backward(loss)
        engine.step()
        losses = losses.detach()
        meter.add(losses=losses, logits=logits, labels=batch.labels, t=t, weights=batch.weights)
        seen.append(torch.stack([t.float(), losses.masked_fill(batch.weights == 0, math.nan)]))
    sampler_update(sampler, seen)
    return bad, waited


def sampler_update(sampler, seen: list[torch.Tensor]) -> None:
    """Show the timestep sampler a step's (t, loss) of all ranks, by position."""
    if not sampler.needs_losses:
        return
    everyone = distributed.all_gather(torch.stack(seen))  # [W, accumulation, 2, micro-batch]
    t, losses = everyone.permute(2, 1, 3, 0).flatten(1)  # position = step, micro-step, place, rank
    sampler.update(t.long(), losses)


@dataclass(frozen=True)
class Cadence:
    """Steps between log lines, checkpoints and validations, and the last step of all."""

    iterations: int
    log: int
    save: int
    evaluate: int


def train(
    engine,
    batches: Iterator[Batch],
    *,
    cadence: Cadence,
    run_dir: Path,
    seed: int,
    noised: bool,
    sampler,
    num_timesteps: int,
    keep_last: int,
    max_bad_samples: int,
    max_skipped_steps: int,
    bad_samples: int,
    checkpoint_state: Callable[[int], dict[str, Any]],
    validate: Callable[[], dict[str, float]] | None,
    stop: StopVote,
    logger: RunLogger,
) -> bool:
    """Train from the engine's step to the last; returns whether it got there (else: stopped).

    batches: this rank's micro-batches from the engine's step on.
    bad_samples: undecodable ones met so far, over all ranks.
    checkpoint_state: the caller's facts for a checkpoint, given the bad samples so far.
    validate: means over the validation set, or None where there is none.
    Raises FloatingPointError after max_skipped_steps steps without a finite gradient, ValueError
    after more than max_bad_samples bad samples, or when a checkpoint cannot be written.
    """
    device, global_batch = engine.device, engine.train_batch_size()
    accumulation = engine.gradient_accumulation_steps()
    meter = Meter(num_timesteps, device)
    clock = _Clock()
    skipped_in_a_row, skipped_before = 0, engine.skipped_steps
    new_bad, saved_at = 0, engine.global_steps
    distributed.say(CONSOLE_HEADER)

    def save() -> None:
        nonlocal saved_at
        if saved_at != engine.global_steps:
            checkpoint.save(
                run_dir / "checkpoints",
                engine=engine,
                sampler=sampler,
                state=checkpoint_state(bad_samples),
                keep_last=keep_last,
            )
            saved_at = engine.global_steps

    while engine.global_steps < cadence.iterations:
        lr = engines.learning_rate(engine)
        bad, waited = train_step(
            engine,
            batches,
            accumulation=accumulation,
            sampler=sampler,
            meter=meter,
            seed=seed,
            noised=noised,
        )
        clock.stepped(waited)
        step = engine.global_steps
        report_bad_samples(run_dir, bad)
        new_bad += len(bad)
        skipped_in_a_row = 0 if engine.was_step_applied() else skipped_in_a_row + 1
        if skipped_in_a_row >= max_skipped_steps:
            raise FloatingPointError(
                f"the gradients of {skipped_in_a_row} steps in a row, up to step {step}, are not "
                "finite; the last good checkpoint stays; do: lower --lr, or use a bf16 config"
            )
        last = step == cadence.iterations
        if last or step % cadence.log == 0:
            bad_samples += int(distributed.all_reduce_sum(torch.tensor(new_bad, device=device)))
            new_bad = 0
            means, _ = meter.read()
            row = {
                "step": step,
                "samples": step * global_batch,
                **{f"train_{name}": value for name, value in means.items()},
                "grad_norm": engines.grad_norm(engine),
                "lr": lr,
                "lg_loss_scale": math.log2(engines.loss_scale(engine)),
                "images_per_sec": clock.steps * global_batch / clock.seconds(),
                "data_wait_frac": clock.waited / clock.seconds(),
                "skipped_steps": engine.skipped_steps,
                "bad_samples": bad_samples,
            }
            logger.write(row)
            eta = (cadence.iterations - step) * clock.seconds() / clock.steps
            distributed.say(console_line(row, eta_seconds=eta, memory_bytes=memory_in_use(device)))
            if engine.skipped_steps > skipped_before:
                report_skipped(engine, engine.skipped_steps - skipped_before)
            skipped_before = engine.skipped_steps
            clock = _Clock()
            if bad_samples > max_bad_samples:
                raise ValueError(
                    f"{bad_samples} samples could not be decoded, more than --max_bad_samples "
                    f"{max_bad_samples}; they stand in {run_dir}/bad_samples.rank*.jsonl; do: "
                    "repair the data, or raise the limit"
                )
        if validate is not None and (last or step % cadence.evaluate == 0):
            began = time.perf_counter()
            row = {"step": step, **{f"val_{name}": value for name, value in validate().items()}}
            row["val_seconds"] = time.perf_counter() - began
            logger.write(row)
            distributed.say(validation_line(row))
            clock.exclude(time.perf_counter() - began)
        if last or step % cadence.save == 0:
            began = time.perf_counter()
            save()
            clock.exclude(time.perf_counter() - began)
        if not last and stop.decide():
            save()
            return False
    return True


def report_skipped(engine, count: int) -> None:
    """Say that steps were skipped; in fp16 it is how the loss scale finds its place."""
    scale = f"; loss scale now {engines.loss_scale(engine):g}" if engine.fp16_enabled() else ""
    steps = "1 step" if count == 1 else f"{count} steps"
    distributed.say(f"{'':>7} {steps} skipped: the gradient was not finite{scale}")


class _Clock:
    """Time spent training since it was made: validation and saving are excluded."""

    def __init__(self):
        self._began, self._excluded = time.perf_counter(), 0.0
        self.steps, self.waited = 0, 0.0

    def stepped(self, waited: float) -> None:
        self.steps += 1
        self.waited += waited

    def exclude(self, seconds: float) -> None:
        self._excluded += seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._began - self._excluded


def memory_in_use(device: torch.device) -> int:
    """Peak bytes of this rank: allocated on the GPU, or resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report_bad_samples(run_dir: Path, bad: list[BadSample]) -> None:
    """Append undecodable samples to this rank's list: position, key and the decoder's words."""
    if not bad:
        return
    import json

    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / f"bad_samples.rank{distributed.rank()}.jsonl", "a") as file:
        for sample in bad:
            file.write(json.dumps(sample._asdict()) + "\n")
