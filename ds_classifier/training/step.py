"""One optimizer step: draw timesteps and noise, classify, step.

Nothing here waits for the device, except what DeepSpeed does to look for an overflow, and the
loss-second-moment sampler, which gathers the losses of all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function as span

from ds_classifier import distributed
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.loader import BadSample, Batch
from ds_classifier.diffusion import stratified
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.evaluation.meter import Meter, by_position
from ds_classifier.loss import EMPTY, RecentImages
from ds_classifier.training.balance import Balance


@dataclass(frozen=True)
class Objective:
    """The choices that a step's loss depends on.

    sampler: draws the timesteps, one of diffusion.SCHEDULE_SAMPLERS.
    seed: keys the timesteps and the noise, together with the position of a sample.
    noised: False trains on clean images, which the network sees at t = 0.
    recent: the images over which targets are posteriors; None: the labels are the targets.
    level_weights: [T] fp32, how much the loss at each timestep counts; None: all count the same.
    balance: how much each image counts; None: all count the same.
    """

    sampler: Any
    seed: int
    noised: bool
    recent: RecentImages | None = None
    level_weights: torch.Tensor | None = None
    balance: Balance | None = None


class Trained(NamedTuple):
    """The record of a step on this rank.

    samples: [accumulation, 3, micro-batch] fp64; position (-1 if it did not decode), t and loss.
    bad: the samples that did not decode. waited: seconds spent waiting for data.
    lr: the learning rate of the step.
    """

    samples: torch.Tensor
    bad: list[BadSample]
    waited: float
    lr: float


def train_step(engine, batches: Iterator[Batch], objective: Objective, meter: Meter) -> Trained:
    """Take one optimizer step on this rank's next micro-batches; every rank must call it."""
    lr = deepspeed_engine.learning_rate(engine)
    sampler, seed = objective.sampler, objective.seed
    samples, bad, waited = [], [], 0.0
    seen = []  # for posterior targets; else no batch is kept
    for _ in range(engine.gradient_accumulation_steps()):
        began = time.perf_counter()
        with span("step: data"):
            batch = next(batches)
        waited += time.perf_counter() - began
        bad += batch.bad
        with span("step: noise"):
            batch = batch.to(engine.device)
            if objective.noised:
                t, importance = sampler.sample(
                    stratified(seed, batch.positions, engine.train_batch_size())
                )
                noise = keyed_noise(seed, "noise", batch.positions, tuple(batch.images.shape[1:]))
            else:
                t, noise = torch.zeros_like(batch.positions), None
                importance = torch.ones_like(batch.weights)
        with span("step: forward"):
            losses, logits = engine(batch.images, batch.labels, t, noise, objective.recent)
        if objective.level_weights is not None:
            importance = importance * objective.level_weights[t]
        if objective.balance is not None:
            importance = importance * objective.balance.weights(batch)
        # A bad sample adds nothing; dividing by all keeps the step the same on any number of ranks.
        loss = torch.where(batch.weights > 0, importance * losses, 0.0).mean()
        # A non-finite loss can have finite gradients. Multiplying by nan makes them nan too, so
        # that DeepSpeed's overflow check skips the step.
        with span("step: backward"):
            engine.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
        with span("step: update"):
            engine.step()
        with span("step: bookkeeping"):
            losses = losses.detach()
            meter.add(losses=losses, logits=logits, labels=batch.labels, t=t, weights=batch.weights)
            positions = batch.positions.masked_fill(batch.weights == 0, -1)
            samples.append(torch.stack([v.double() for v in (positions, t, losses)]))
        if objective.recent is not None:
            seen.append(batch)
    if objective.recent is not None:
        remember(objective.recent, seen)
    samples = torch.stack(samples)
    if sampler.needs_losses:
        _, t, losses = by_position(samples)
        sampler.update(t.long(), losses.float())
    return Trained(samples, bad, waited, lr)


def remember(recent: RecentImages, batches: Sequence[Batch]) -> None:
    """Add the images of a step, of all ranks and in order of position; every rank must call it.

    batches: this rank's micro-batches of the step, on the device.
    """
    labels = [
        # Of vectors of targets, every number becomes EMPTY.
        b.labels.masked_fill((b.weights == 0).view(-1, *[1] * (b.labels.dim() - 1)), EMPTY)
        for b in batches
    ]
    positions, images, labels = (
        distributed.all_gather(torch.cat(parts)).flatten(0, 1)
        for parts in ([b.positions for b in batches], [b.images for b in batches], labels)
    )
    order = positions.argsort()
    recent.add(images[order], labels[order], positions[order])
