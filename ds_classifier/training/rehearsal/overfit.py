"""--overfit_batch: train on one fixed batch until its loss is near 0.

This is the accepted first test of a training set-up (Karpathy, "A Recipe for Training Neural
Networks", 2019, "overfit one batch"): labels, noise, precision, gradients between ranks and the
learning rate must all work for a network to learn a handful of samples by heart. Images, crops,
flips, timesteps and noise stay fixed: with fresh noise at every step, heavily noised images could
not be distinguished, and no loss near 0 would be reachable. The timesteps are uniform and the
learning rate is constant; weight decay and clipping are those of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from ds_classifier import distributed
from ds_classifier.data.loader import Batch
from ds_classifier.diffusion import UniformSampler
from ds_classifier.distributed import failures
from ds_classifier.distributed.stopping import STOPPED
from ds_classifier.evaluation.meter import Meter
from ds_classifier.evaluation.metrics import accuracy_of
from ds_classifier.training.setup import Setup
from ds_classifier.training.step import Objective, train_step

NEAR_ZERO = 0.01  # as a share of the loss of guessing: ln K, or ln 2 for a yes/no answer


@dataclass(frozen=True)
class Overfit:
    """The outcome: the batch's loss and accuracy before the last of `steps` steps.

    need: the loss that counts as near `least`, the least possible one. stopped: whether a request
    to stop ended it first.
    """

    loss: float
    accuracy: float
    steps: int
    need: float
    least: float = 0.0
    stopped: bool = False

    @property
    def learnt(self) -> bool:
        """The verdict: whether the loss is near the least possible one."""
        return self.loss <= self.need

    def __str__(self) -> str:
        got = (
            f"loss {self.loss:.4f} after {self.steps} steps, near {self.least:.4g} is "
            f"{self.need:.4f} or less; "
            f"accuracy {100 * self.accuracy:.1f} %"
        )
        if self.learnt:
            return f"overfitted: {got}"
        return (
            f"not overfitted: {got}; do: if the loss still falls, give --overfit_batch more steps; "
            "else try another --lr, and look at the labels and the loss scale"
        )


def overfit(setup: Setup, *, steps: int) -> int:
    """Train on one batch for `steps` steps at most; return the exit code, 0 if it was learnt."""
    loader, _ = setup.loaders(0)
    batches = list(islice(iter(loader), setup.resolved.batch.accumulation))
    result = overfit_batch(setup, batches, steps=steps)
    if result.stopped:
        distributed.say(f"stopped by {setup.stop.reason} after step {result.steps}")
        return STOPPED
    distributed.say(str(result))
    return 0 if result.learnt else failures.FAILED


def overfit_batch(setup: Setup, batches: Sequence[Batch], *, steps: int) -> Overfit:
    """Train on the same global batch until its loss is near the least possible one.

    That is 0, or the mean entropy of soft vectors; near is NEAR_ZERO * ln K above it.
    batches: this rank's micro-batches of one step. steps: the most to take. A loss that is not
    finite ends it too. Every rank must call it; all return the same.
    """
    settings, engine = setup.resolved.settings, setup.engine
    targets = setup.targets
    num_timesteps = engine.module.diffusion.num_timesteps
    meter = Meter(num_timesteps, engine.device, targets)
    sampler = UniformSampler(num_timesteps, levels=setup.sampler.levels)
    objective = Objective(sampler, settings.seed, settings.noised)
    choices = 2 if targets.kind == "classes" else settings.num_classes
    least = mean_entropy(batches, engine.device) if targets.kind == "soft" else 0.0
    need = least + NEAR_ZERO * math.log(choices)
    result = Overfit(math.nan, 0.0, 0, need, least)
    for step in range(1, steps + 1):
        setup.watch.stepping(step)
        train_step(engine, setup.watch.batches(batches), objective, meter)
        means, weight, _ = meter.read()
        if not weight:
            raise distributed.AgreedError(
                "--overfit_batch: none of the batch's images decodes; do: ds-classifier verify "
                "--decode names them"
            )
        result = Overfit(means["loss"], means[accuracy_of(targets).name], step, need, least)
        done = result.learnt or not math.isfinite(result.loss) or step == steps
        if done or step == 1 or step % settings.log_interval == 0:
            distributed.say(
                f"{step:>6} loss {result.loss:.4f}, accuracy {100 * result.accuracy:.1f} %"
            )
        if done:
            break
        if setup.stop.decide(now=True):
            return Overfit(result.loss, result.accuracy, step, need, least, stopped=True)
    return result


def mean_entropy(batches: Sequence[Batch], device: torch.device) -> float:
    """Return the mean entropy of the soft vectors of all ranks' batches, nats.

    Samples that did not decode are left out. batches: this rank's. Every rank must call it.
    """
    targets = torch.cat([batch.labels[batch.weights > 0] for batch in batches]).double()
    entropies = torch.special.entr(targets).sum(dim=1)
    sums = torch.stack([entropies.sum(), torch.ones_like(entropies).sum()]).to(device)
    entropy, samples = distributed.all_reduce_sum(sums).tolist()
    return entropy / max(samples, 1)
