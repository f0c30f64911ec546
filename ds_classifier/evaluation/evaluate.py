"""Evaluate on the whole validation set, every sample exactly once, with fixed timesteps and noise.

Two checkpoints, or two numbers of ranks, are compared on the same images with the same noise. The
noise of a sample is keyed by (VALIDATION_SEED, "validation", its position in the set); it is the
same at every noise level. Under uniform t, a sample's t is `spread_timesteps` of its position.

Training validates with `evaluate`, launch/evaluate.py with `evaluate_levels`. Their numbers under
uniform t and at t = 0 agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_classifier import distributed
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.data.loader import Loader
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.evaluation.average_precision import ScoreHistograms, mean_over_classes
from ds_classifier.evaluation.levels import (
    AnswerNumbers,
    AnswerSums,
    Confusion,
    LevelNumbers,
    LevelSums,
)
from ds_classifier.evaluation.meter import Meter
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.gradient import exact_posterior
from ds_classifier.guidance.known_distribution import KnownDistribution
from ds_classifier.loss import NoisedClassifier, to_x_start

VALIDATION_SEED = 0  # of the noise; the same in every run, so that runs can be compared
GOLDEN_RATIO = 0.6180339887498949


def spread_timesteps(positions: Tensor, levels: range) -> Tensor:
    """Return a fixed t for each position, [N] int64: multiples of the golden ratio mod 1.

    levels: the timesteps that are given, without a gap.
    Consecutive samples, such as those of a class, cover all of them evenly (Weyl's sequence). The
    mean over a few hundred samples varies less than with independent draws.
    """
    share = ((positions + 0.5).double() * GOLDEN_RATIO) % 1.0
    return levels[0] + (share * len(levels)).long().clamp_max(len(levels) - 1)


@torch.no_grad()
def evaluate(
    module: NoisedClassifier,
    loader: Loader,
    *,
    samples: int,
    device: torch.device,
    noised: bool = True,
    levels: range | None = None,
    t: int | None = None,
    targets: Targets = ONE_CLASS,
) -> tuple[dict[str, float], int]:
    """Return the means of the metrics over a validation set, and the number of undecodable images.

    The means are also given by quartile of t, see Meter.read. For several classes per image, mAP is
    among them.

    loader: this rank's batches at `ValidationPositions`. samples: number in the whole set.
    noised: False shows clean images at t = 0. levels: the timesteps over which the samples are
    spread; None: all. t: one noise level, 0 .. T-1, for all samples instead. targets: of the data.
    Raises RuntimeError unless every sample was counted once, ValueError if none decodes.
    """
    num_timesteps = module.diffusion.num_timesteps
    meter, scores = Meter(num_timesteps, device, targets), None
    bad = 0
    training = module.training
    module.eval()
    for batch in loader:
        bad += len(batch.bad)
        batch = batch.to(device)
        noise = None
        steps = torch.zeros_like(batch.positions)
        if noised:
            steps = spread_timesteps(batch.positions, levels or range(num_timesteps))
            steps = steps if t is None else torch.full_like(steps, t)
            shape = tuple(batch.images.shape[1:])
            noise = keyed_noise(VALIDATION_SEED, "validation", batch.positions, shape)
        losses, logits = module(batch.images, batch.labels, steps, noise)
        meter.add(losses=losses, logits=logits, labels=batch.labels, t=steps, weights=batch.weights)
        if targets.kind == "classes":
            scores = scores or ScoreHistograms(1, logits.shape[1], device)
            counted = batch.weights > 0
            scores.add(0, logits=logits.float(), labels=batch.labels, counted=counted)
    module.train(training)
    means, weight, _ = meter.read()
    if scores is not None:
        means["mAP"] = mean_over_classes(scores.read()[0])
    bad_samples = int(distributed.all_reduce_sum(torch.tensor(bad, device=device)))
    _check_counted(int(weight), bad_samples, samples)
    return means, bad_samples


def _check_counted(counted: int, bad: int, samples: int) -> None:
    """Raise RuntimeError unless every sample was counted once, ValueError if none decodes."""
    if counted + bad != samples:
        raise RuntimeError(f"validation counted {counted} of {samples} samples, and {bad} bad ones")
    if counted == 0:
        raise ValueError(
            f"validation: none of its {samples} images decodes; do: ds-classifier verify "
            "--decode names them"
        )


# ---------------------------------------------------------------------- at a grid of noise levels


def level_grid(diffusion: GaussianDiffusion, count: int) -> list[int]:
    """Return t = 0 and `count` more timesteps, evenly spaced in log-SNR, ascending.

    They are the timesteps nearest to evenly spaced values, from the log-SNR of t = 0 to that of
    T - 1. If timesteps lie farther apart than these values, as at the end of the cosine schedule,
    several values share a timestep; then the values are spaced more closely until there are
    count + 1 timesteps. With at most count + 1 timesteps, all are returned.
    """
    snr = diffusion.log_snr
    if len(snr) <= count + 1:
        return list(range(len(snr)))
    spaces = count
    while True:
        wanted = np.linspace(snr[0], snr[-1], spaces + 1)
        levels = sorted({int(np.abs(snr - value).argmin()) for value in wanted})
        if len(levels) > count:
            return levels
        spaces += count + 1 - len(levels)


def middle_level(diffusion: GaussianDiffusion, levels: Sequence[int]) -> int:
    """Return the timestep whose signal is nearest to its noise in strength: log-SNR 0."""
    return min(levels, key=lambda t: abs(diffusion.log_snr[t]))


class Posterior(Protocol):
    """A source of p(y | x_t): the classifier, or the exact posterior of a training set."""

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(y | x_t), [N, K], and the norm of the gradient of log p(label | x_t), [N].

        x_t: [N, C, S, S]. t: [N]. labels: [N], or targets [N, K]. The label of a soft vector is its
        most probable class. For several classes, logits take the place of log p, and the gradient
        is that of the sum of log p(class | x_t) over the image's classes.
        """


def classifier_posterior(
    classifier: nn.Module, diffusion: GaussianDiffusion, kind: str = "class"
) -> Posterior:
    """Return the classifier's posterior; its gradient is the one that guidance follows.

    kind: of the targets, one of KINDS.
    """

    def evaluate_at(x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            scores = classifier(x_t, diffusion.model_timesteps(t))
            if kind == "classes":
                asked = F.logsigmoid(scores) * labels
            else:
                scores = scores.log_softmax(dim=1)
                label = labels if labels.dim() == 1 else labels.argmax(dim=1)
                asked = scores.gather(1, label[:, None])
            (gradient,) = torch.autograd.grad(asked.sum(), x_t)
        return scores.detach(), gradient.flatten(1).norm(dim=1)

    return evaluate_at


def bayes_posterior(
    denoiser: ExactDenoiser | KnownDistribution, diffusion: GaussianDiffusion
) -> Posterior:
    """Return the exact posterior given the training images, or their distribution, in closed form.

    No classifier does better on noised training images. On held-out images with little noise that
    of the training images is overconfident, so it is no bound there; that of the distribution is.
    """

    def evaluate_at(x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        exact = exact_posterior(denoiser, diffusion, x_t, t, labels)
        return exact.log_class, exact.gradient.flatten(1).norm(dim=1)

    return evaluate_at


@torch.no_grad()
def evaluate_levels(
    posteriors: Sequence[Posterior],
    diffusion: GaussianDiffusion,
    loader: Loader,
    *,
    levels: Sequence[int],
    num_classes: int,
    samples: int,
    device: torch.device,
    targets: Targets = ONE_CLASS,
    confusion: Confusion | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[LevelNumbers | AnswerNumbers], int]:
    """Evaluate each posterior on the whole set: under uniform t, then at each of `levels`.

    loader: this rank's batches at `ValidationPositions`, of a fixed size. samples: number in the
    set. targets: of the data. confusion: filled with the predictions of the first posterior at
    levels[0]; None where an image has several classes.
    progress: called on each rank after each batch, with the number of positions it has done.

    Returns the numbers of each posterior, and the number of undecodable images. Row 0 of the
    numbers is under uniform t, row 1 + i at levels[i]; they are the same on every rank and for any
    number of ranks.
    Raises RuntimeError unless every sample was counted once, ValueError if none decodes.
    """

    def empty_sums() -> LevelSums | AnswerSums:
        if targets.kind == "classes":
            return AnswerSums(1 + len(levels), num_classes, device)
        return LevelSums(1 + len(levels), num_classes, device, targets)

    sums = [empty_sums() for _ in posteriors]
    bad = done = 0
    for batch in loader:
        bad += len(batch.bad)
        inside = int((batch.positions >= 0).sum())
        if not inside:
            continue  # padding of a rank with fewer samples
        batch = batch.to(device)
        x_start = to_x_start(batch.images)  # [N, S, S, C]
        shape = tuple(batch.images.shape[1:])
        noise = keyed_noise(VALIDATION_SEED, "validation", batch.positions, shape)
        rows = [spread_timesteps(batch.positions, range(diffusion.num_timesteps))]
        rows += [torch.full_like(batch.positions, t) for t in levels]
        for row, t in enumerate(rows):
            x_t = diffusion.q_sample(x_start, t, noise).permute(0, 3, 1, 2)  # [N, C, S, S]
            for posterior, level_sums in zip(posteriors, sums, strict=True):
                log_p, grad_norms = posterior(x_t, t, batch.labels)
                level_sums.add(
                    row,
                    log_p,
                    labels=batch.labels,
                    grad_norms=grad_norms,
                    weights=batch.weights,
                )
                if confusion is not None and row == 1 and posterior is posteriors[0]:
                    confusion.add(
                        log_p=log_p,
                        labels=batch.labels,
                        positions=batch.positions,
                        weights=batch.weights,
                    )
        done += inside
        progress(done)
    bad_samples = int(distributed.all_reduce_sum(torch.tensor(bad, device=device)))
    numbers = [level_sums.read() for level_sums in sums]
    for level_numbers in numbers:
        for row in range(1 + len(levels)):
            _check_counted(level_numbers.samples(row), bad_samples, samples)
    return numbers, bad_samples


def describe_levels(
    numbers: LevelNumbers | AnswerNumbers,
    diffusion: GaussianDiffusion,
    levels: Sequence[int],
    *,
    chosen: Sequence[int],
) -> dict[str, Any]:
    """Return the numbers of one posterior as JSON: under uniform t, at every level, and in detail.

    A level is named by t; timestep is the network's input for it, log_snr a natural logarithm.
    chosen: those of `levels` that get numbers per class and calibration bins, as uniform t does.
    """
    shown = diffusion.model_timesteps(torch.tensor(list(levels))).tolist()
    rows = [
        {
            "t": t,
            "timestep": timestep,
            "log_snr": float(diffusion.log_snr[t]),
            **numbers.overall(1 + i),
        }
        for i, (t, timestep) in enumerate(zip(levels, shown, strict=True))
    ]
    detailed = [(None, 0), *((t, 1 + list(levels).index(t)) for t in chosen)]
    return {
        "uniform_t": numbers.overall(0),
        "levels": rows,
        "per_class": [{"t": t, **numbers.per_class(row)} for t, row in detailed],
        "reliability": [{"t": t, "bins": numbers.reliability(row)} for t, row in detailed],
    }
