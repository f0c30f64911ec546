"""The training loop: step s trains on positions [sB, (s+1)B) of the stream, on all ranks together.

Nothing inside a step waits for the device on our account, but for the loss-second-moment sampler
(DeepSpeed asks it for overflow); sums are read when a log line is due.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.common.keyed_noise import keyed_noise, keyed_uniform
from ds_classifier.data.loader import BadSample, Batch
from ds_classifier.distributed import deepspeed_engine
from ds_classifier.distributed.memory import memory_in_use
from ds_classifier.distributed.stopping import Stopped, StopVote
from ds_classifier.distributed.watchdog import Watchdog
from ds_classifier.evaluation.metrics import LOSS_EDGES, Meter, Reading, by_position
from ds_classifier.training import events
from ds_classifier.training.flops import Arithmetic
from ds_classifier.training.log import (
    CONSOLE_HEADER,
    RunLogger,
    console_line,
    counts_line,
    validation_line,
)
from ds_classifier.training.sanity import SanityWatch
from ds_classifier.training.skipped_steps import SkippedSteps


def train_step(
    engine,
    batches: Iterator[Batch],
    *,
    accumulation: int,
    sampler,
    meter: Meter,
    seed: int,
    noised: bool,
) -> tuple[list[BadSample], float, torch.Tensor]:
    """One optimizer step. Returns the bad samples met, the seconds spent waiting for data, and what
    this rank trained on: [accumulation, 3, micro-batch] fp64, position (-1: bad), t and loss."""
    trained, bad, waited = [], [], 0.0
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
        # Times 1; if the loss is not finite, times nan, so that its gradient is seen not to be.
        engine.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
        engine.step()
        losses = losses.detach()
        meter.add(losses=losses, logits=logits, labels=batch.labels, t=t, weights=batch.weights)
        positions = batch.positions.masked_fill(batch.weights == 0, -1)
        trained.append(torch.stack([v.double() for v in (positions, t, losses)]))
    trained = torch.stack(trained)
    if sampler.needs_losses:
        _, t, losses = by_position(trained)
        sampler.update(t.long(), losses.float())
    return bad, waited, trained


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
    sampler,
    num_timesteps: int,
    seed: int,
    noised: bool,
    compiled: bool,
    skipped: SkippedSteps,
    bad_samples: BadSamples,
    save: Callable[[float | None], None],
    check_saves: Callable[[], None],
    validate: Callable[[], dict[str, float]] | None,
    validate_first: bool = False,
    stop: StopVote,
    watch: Watchdog,
    logger: RunLogger,
    arithmetic: Arithmetic,
    sanity: SanityWatch,
) -> bool:
    """Train from the engine's step to the last; returns whether it got there (else: stopped).

    batches: this rank's micro-batches from the engine's step on.
    save: takes a checkpoint, given the step's validation loss if there is one; it may be written
    behind the following steps. check_saves: after every step, whether that went well.
    validate: means over the validation set; None: there is none; it may raise Stopped on all ranks.
    validate_first: before the first step too, as weights from elsewhere deserve.
    compiled: whether the first step compiles the classifier, whose time is told.
    Raises FloatingPointError after too many steps without a finite gradient, TooManyBadSamples,
    OSError when checkpoints cannot be written.
    sanity: says when the rows tell that something begins or ceases to work.
    """
    meter, clock = Meter(num_timesteps, engine.device), Clock()
    told = (0, 0)  # bad samples and skipped steps; a resumed run tells those before it
    if stop.decide(now=True):
        return False
    distributed.say(CONSOLE_HEADER)
    if validate is not None and validate_first:
        validation(engine.global_steps, validate, watch, logger, sanity)
        if stop.decide(now=True):
            return False
    batches = watch.batches(batches)
    while engine.global_steps < cadence.iterations:
        watch.stepping(engine.global_steps + 1)
        lr = deepspeed_engine.learning_rate(engine)
        bad, waited, trained = train_step(
            engine,
            batches,
            accumulation=engine.gradient_accumulation_steps(),
            sampler=sampler,
            meter=meter,
            seed=seed,
            noised=noised,
        )
        clock.stepped(waited)
        if compiled:
            distributed.say(compiled_line(clock.seconds()))
            compiled = False
        bad_samples.add(bad)
        skipped.check(trained)
        check_saves()
        step = engine.global_steps
        last = step == cadence.iterations
        if last or step % cadence.log == 0:
            reading = meter.read()
            following = clock.ended()
            row = {
                **training_row(engine, reading=reading, clock=clock, arithmetic=arithmetic),
                "lr": lr,
                "bad_samples": bad_samples.total(),
            }
            logger.write(row)
            for q, counts in enumerate(reading.losses.tolist()):
                logger.histogram(f"train_losses_q{q}", counts, LOSS_EDGES, step)
            eta = (cadence.iterations - step) * clock.seconds() / clock.steps
            distributed.say(console_line(row, eta_seconds=eta))
            say_news(row, sanity)
            counts = (row["bad_samples"], row["skipped_steps"])
            if counts != told:
                distributed.say(counts_line(row, skipped.news()))
            told = counts
            if bad_samples.too_many(row["samples"]):
                with watch.during("save"):  # what was learnt from the others is sound
                    save(None)
                bad_samples.refuse(row["samples"])
            clock = following
        val_loss = None
        with clock.paused():
            if validate is not None and (last or step % cadence.evaluate == 0):
                val_loss = validation(step, validate, watch, logger, sanity)
            saved = last or step % cadence.save == 0
            if saved:
                with watch.during("save"):
                    save(val_loss)
        if not last and stop.decide():
            if not saved:
                with watch.during("save"):
                    save(val_loss)
            return False
    return True


def validation(
    step: int,
    validate: Callable[[], dict[str, float]],
    watch: Watchdog,
    logger: RunLogger,
    sanity: SanityWatch,
) -> float | None:
    """Validate after a step, and log and show it; returns the loss, None if it was stopped."""
    began = time.perf_counter()
    with watch.during("validation"), suppress(Stopped):
        row = {f"val_{name}": value for name, value in validate().items()}
        row = {"step": step, **row, "val_seconds": time.perf_counter() - began}
        logger.write(row)
        distributed.say(validation_line(row))
        say_news(row, sanity)
        return row["val_loss"]
    return None


def compiled_line(seconds: float) -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return f"{'':>6} first step, which compiles: {seconds:.1f} s; cached in {cache_dir()}"


def say_news(row: dict[str, Any], sanity: SanityWatch) -> None:
    """What the row changes in the answer to: is it working?"""
    for line in sanity.add(row):
        distributed.say(f"{row['step']:>6} {line}")


def training_row(
    engine, *, reading: Reading, clock: Clock, arithmetic: Arithmetic
) -> dict[str, Any]:
    """The numbers of the steps since the last row, over all ranks; memory and GFLOP/s are a rank's.

    window_samples: images that its means rest on; by quartile of t too.
    """
    samples = engine.train_batch_size()
    images_per_sec = clock.steps * samples / clock.seconds()
    return {
        "step": engine.global_steps,
        "samples": engine.global_steps * samples,
        "window_samples": int(reading.weight),
        **{f"window_samples_q{q}": int(n) for q, n in enumerate(reading.losses.sum(dim=1))},
        **{f"train_{name}": value for name, value in reading.means.items()},
        "grad_norm": deepspeed_engine.grad_norm(engine),
        "param_norm": deepspeed_engine.param_norm(engine),
        "lg_loss_scale": math.log2(deepspeed_engine.loss_scale(engine)),
        "images_per_sec": images_per_sec,
        "data_wait_frac": clock.waited / clock.seconds(),
        **arithmetic.achieved(images_per_sec / distributed.world_size()),
        "memory_gib": memory_in_use(engine.device) / 2**30,
        "skipped_steps": engine.skipped_steps,
    }


class TooManyBadSamples(distributed.AgreedError):
    """Of an epoch; a checkpoint of what was trained until then is being written."""


class BadSamples:
    """Undecodable samples of a run: listed by the rank that met them, counted over all ranks.

    known: those met before this start. limit: how many an epoch of epoch_samples may hold; a bad
    image is met again in every epoch.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        device: torch.device,
        known: int,
        limit: int,
        epoch_samples: int,
    ):
        self._run_dir, self._device, self._limit = run_dir, device, limit
        self._epoch_samples = epoch_samples
        self._known, self._new = known, 0

    def add(self, bad: list[BadSample]) -> None:
        """Append this rank's bad samples to its list: position, key and the decoder's words."""
        self._new += len(bad)
        if bad:
            path = self._run_dir / f"bad_samples.rank{distributed.rank()}.jsonl"
            lines = "".join(json.dumps(sample._asdict()) + "\n" for sample in bad)
            try:
                self._run_dir.mkdir(parents=True, exist_ok=True)
                files.append(path, lines)
            except OSError as error:  # they are counted all the same
                distributed.warn(f"{path}: not written: {error.strerror}: {lines.rstrip()}")

    def total(self) -> int:
        """All ranks' so far; every rank must call it."""
        new = int(distributed.all_reduce_sum(torch.tensor(self._new, device=self._device)))
        self._known, self._new = self._known + new, 0
        return self._known

    def too_many(self, samples: int) -> bool:
        """Whether the last total is over the limit; samples: trained on so far."""
        return self._known > self._limit * self._epochs(samples)

    def refuse(self, samples: int) -> None:
        """Raises TooManyBadSamples, which every rank must."""
        problem = (
            f"{self._known} samples could not be decoded in {self._epochs(samples)} epochs, more "
            f"than --max_bad_samples {self._limit} each; they stand in "
            f"{self._run_dir}/bad_samples.rank*.jsonl; do: repair the data, or raise the limit; "
            "then the same command goes on"
        )
        events.append(self._run_dir, "failed", samples=samples, message=problem)
        raise TooManyBadSamples(problem)

    def _epochs(self, samples: int) -> int:
        """Begun by so many samples."""
        return max(1, -(-samples // self._epoch_samples))


class Clock:
    """Seconds spent training since a moment, now if none is given, less the pauses for validation
    and saving."""

    def __init__(self, began: float | None = None):
        self._began = time.perf_counter() if began is None else began
        self._end: float | None = None
        self._paused = 0.0
        self.steps, self.waited = 0, 0.0

    def stepped(self, waited: float) -> None:
        self.steps += 1
        self.waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def ended(self) -> Clock:
        """Stop; the clock that goes on from there, so that what is done between counts too."""
        self._end = time.perf_counter()
        return Clock(self._end)

    def seconds(self) -> float:
        return (self._end or time.perf_counter()) - self._began - self._paused
