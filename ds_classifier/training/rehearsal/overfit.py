"""Can it learn at all? One fixed batch, until its loss is near 0.

The accepted first test of a training set-up (Karpathy, "A Recipe for Training Neural Networks",
2019, "overfit one batch"): whatever is between the images and the weights, labels, noise,
precision, gradients between ranks, learning rate, must work for a network to learn a handful of
samples by heart. Images, crops, flips, timesteps and noise stay fixed: with fresh noise at every
step, heavily noised images could not be told apart, and no loss near 0 would be reachable. The
timesteps are uniform, the learning rate is constant, weight decay and clipping are the run's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ds_classifier import distributed
from ds_classifier.data.loader import Batch
from ds_classifier.diffusion import UniformSampler
from ds_classifier.distributed.stopping import StopVote
from ds_classifier.distributed.watchdog import Watchdog
from ds_classifier.evaluation.metrics import Meter
from ds_classifier.training.loop import train_step

NEAR_ZERO = 0.01  # as a share of the loss of guessing, ln K


@dataclass(frozen=True)
class Overfit:
    """How it went: the batch's loss and accuracy before the last of `steps` steps.

    need: the loss that counts as near 0. stopped: on request, before it was decided.
    """

    loss: float
    accuracy: float
    steps: int
    need: float
    stopped: bool = False

    @property
    def learnt(self) -> bool:
        return self.loss <= self.need

    def __str__(self) -> str:
        got = (
            f"loss {self.loss:.4f} after {self.steps} steps, near 0 is {self.need:.4f} or less; "
            f"accuracy {100 * self.accuracy:.1f} %"
        )
        if self.learnt:
            return f"overfitted: {got}"
        return (
            f"not overfitted: {got}; do: if the loss still falls, give --overfit_batch more steps; "
            "else try another --lr, and look at the labels and the loss scale"
        )


def overfit_batch(
    engine,
    batches: Sequence[Batch],
    *,
    steps: int,
    log_interval: int,
    num_classes: int,
    num_timesteps: int,
    seed: int,
    noised: bool,
    stop: StopVote,
    watch: Watchdog,
) -> Overfit:
    """Train on the same global batch until its loss is at most NEAR_ZERO * ln K, or so many steps.

    batches: this rank's micro-batches of one step. A loss that is not finite ends it too.
    Every rank must call it; all return the same.
    """
    meter = Meter(num_timesteps, engine.device)
    sampler = UniformSampler(num_timesteps)
    need = NEAR_ZERO * math.log(num_classes)
    result = Overfit(math.nan, 0.0, 0, need)
    for step in range(1, steps + 1):
        watch.stepping(step)
        train_step(
            engine,
            watch.batches(batches),
            accumulation=len(batches),
            sampler=sampler,
            meter=meter,
            seed=seed,
            noised=noised,
        )
        means, weight, _ = meter.read()
        if not weight:
            raise distributed.AgreedError(
                "--overfit_batch: none of the batch's images decodes; do: make_shards.py verify "
                "--decode names them"
            )
        result = Overfit(means["loss"], means["acc@1"], step, need)
        done = result.learnt or not math.isfinite(result.loss) or step == steps
        if done or step == 1 or step % log_interval == 0:
            distributed.say(
                f"{step:>6} loss {result.loss:.4f}, accuracy {100 * result.accuracy:.1f} %"
            )
        if done:
            break
        if stop.decide(now=True):
            return Overfit(result.loss, result.accuracy, step, need, stopped=True)
    return result
