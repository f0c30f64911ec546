"""The losses of a run: samples that do not decode, and steps without a finite gradient.

DeepSpeed sees a gradient that is not finite in every precision here: fp16 and bf16 look for it
(bf16.check_grad_overflow, on by default), fp32 by the gradient's norm; the decision is reduced over
all ranks. step.train_step makes the gradient of a loss that is not finite nan.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.common.text import count
from ds_classifier.data.loader import BadSample
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.evaluation.meter import by_position
from ds_classifier.training.run_dir import append_event
from ds_classifier.training.step import Trained


class TooManyBadSamples(distributed.AgreedError):
    """The error for more undecodable samples per epoch than --max_bad_samples allows."""


class BadSamples:
    """Counts the samples that do not decode over all ranks; the rank that met one lists it.

    known: the number met before this start. limit: the most that an epoch of epoch_samples may
    hold; a bad image is met again in every epoch.
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
        """Append this rank's bad samples to its list: position, key and the decoder's message."""
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
        """Return the number over all ranks so far; every rank must call it."""
        new = int(distributed.all_reduce_sum(torch.tensor(self._new, device=self._device)))
        self._known, self._new = self._known + new, 0
        return self._known

    def refuse_too_many(self, samples: int) -> None:
        """Raise TooManyBadSamples, on every rank, if the last total is over the limit.

        samples: the number trained on so far.
        """
        epochs = max(1, -(-samples // self._epoch_samples))  # begun
        if self._known <= self._limit * epochs:
            return
        problem = (
            f"{self._known} samples could not be decoded in {epochs} epochs; need at most "
            f"--max_bad_samples {self._limit} per epoch; they are listed in "
            f"{self._run_dir}/bad_samples.rank*.jsonl; do: repair the data or raise the limit, and "
            "run the same command again"
        )
        append_event(self._run_dir, "failed", samples=samples, message=problem)
        raise TooManyBadSamples(problem)


class SkippedSteps:
    """Counts, reports and lists the skipped steps, and gives up after too many.

    Before the first step that is applied, those skipped while the dynamic loss scale is still
    above USUAL_SCALE do not count: some JSONs begin at 2^32, which falls by half in each.

    run_dir: rank 0 lists them there, in FILE. limit: steps skipped in a row, or at the floor of
    fp16's loss scale. key_of: returns the key of the sample at a position of the stream.
    """

    FILE = "skipped_steps.jsonl"
    USUAL_SCALE = 2.0**16  # at which DeepSpeed begins by default

    def __init__(self, engine, *, run_dir: Path, limit: int, key_of: Callable[[int], str]):
        self._engine, self._limit, self._key_of = engine, limit, key_of
        self._path = run_dir / self.FILE
        self._in_a_row, self._begun = 0, False
        self._at_floor, self._scale = 0, deepspeed_engine.loss_scale(engine)
        self._positions: list[int] = []  # of losses that were not finite, since the last news

    def check(self, samples: Tensor) -> None:
        """Look whether the last step was skipped; call it after every step, on every rank.

        samples: Trained.samples of the step.
        Raises FloatingPointError on all ranks after `limit` steps skipped in a row, or at the
        floor of the loss scale even with good steps between.
        """
        before, self._scale = self._scale, deepspeed_engine.loss_scale(self._engine)
        floor = deepspeed_engine.loss_scale_floor(self._engine)
        if floor is not None and self._scale > floor:
            self._at_floor = 0
        if self._engine.was_step_applied():
            self._in_a_row, self._begun = 0, True
            return
        falls = floor is not None and not self._begun and before > self.USUAL_SCALE
        self._in_a_row += not falls
        self._at_floor += floor is not None and before <= floor
        self._list(samples)
        step = self._engine.global_steps
        where = f"{self._path} lists them; the last good checkpoint is kept"
        skipped = max(self._in_a_row, self._at_floor)
        if skipped >= self._limit and floor is not None and self._scale <= floor:
            raise FloatingPointError(
                f"fp16's loss scale is at its floor, {floor:g} (fp16.min_loss_scale), and the "
                f"gradients are still not finite: {count(skipped, 'step')} skipped, the last one "
                f"is {step}; {where}; do: use a bf16 config, or lower --lr"
            )
        if self._in_a_row >= self._limit:
            raise FloatingPointError(
                f"the gradients of {count(self._in_a_row, 'step')} in a row, up to step {step}, "
                f"are not finite; {where}; do: lower --lr, or use a bf16 config"
            )

    def _list(self, samples: Tensor) -> None:
        """Write the skipped step, with the samples whose loss was not finite."""
        positions, _, losses = by_position(samples)
        positions = positions[~losses.isfinite()].long().tolist()
        self._positions += positions
        batch = self._engine.train_batch_size()
        first = (self._engine.global_steps - 1) * batch
        if distributed.rank() == 0:
            row = {
                "step": self._engine.global_steps,
                "positions": [first, first + batch],
                "not_finite": [{"position": q, "key": self._key_of(q)} for q in positions],
                "loss_scale": deepspeed_engine.loss_scale(self._engine),
            }
            try:
                files.append(self._path, json.dumps(row) + "\n")
            except OSError as error:  # no reason to end a run that may go on
                distributed.say(f"{'':>6} {self._path}: not written: {error.strerror}: {row}")

    def news(self) -> str:
        """Return why steps were skipped since the last call, for the screen."""
        known = ["gradient not finite"]
        if self._engine.fp16_enabled():
            known.append(f"loss scale {deepspeed_engine.loss_scale(self._engine):g}")
        if self._positions:
            shown = ", ".join(map(str, self._positions[:4]))
            more = f" and {len(self._positions) - 4} more" if len(self._positions) > 4 else ""
            known.append(f"loss not finite at {shown}{more}, see {self.FILE}")
            self._positions = []
        return "; ".join(known)


class Lost:
    """The bad samples and the skipped steps of a run."""

    def __init__(self, bad_samples: BadSamples, skipped_steps: SkippedSteps):
        self.bad_samples, self.skipped_steps = bad_samples, skipped_steps

    def check(self, trained: Trained) -> None:
        """Take in a step; see SkippedSteps.check for what it raises."""
        self.bad_samples.add(trained.bad)
        self.skipped_steps.check(trained.samples)
