"""The whole validation set, every sample exactly once, with fixed timesteps and noise.

So two checkpoints, or two numbers of ranks, are compared on the same images at the same noise: a
sample's noise is keyed by (VALIDATION_SEED, "validation", its position in the set), and is the same
at every noise level; t under uniform t is `spread_timesteps` of the position.

`evaluate` is the validation during training, `evaluate_levels` that of launch/evaluate.py: their
numbers under uniform t and at t = 0 agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier import distributed
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.loader import Loader
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.evaluation.levels import Confusion, LevelNumbers, LevelSums
from ds_classifier.evaluation.meter import Meter
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.loss import NoisedClassifier, to_x_start

VALIDATION_SEED = 0  # of the noise; the same in every run, so that runs compare
GOLDEN_RATIO = 0.6180339887498949


def spread_timesteps(positions: Tensor, num_timesteps: int) -> Tensor:
    """A fixed t for each validation sample, [N] int64: multiples of the golden ratio mod 1.

    Any run of samples, such as a class, covers all noise levels evenly (Weyl's sequence); a set of
    a few hundred gives a steadier number than independent draws.
    """
    share = ((positions + 0.5).double() * GOLDEN_RATIO) % 1.0
    return (share * num_timesteps).long().clamp_max(num_timesteps - 1)


@torch.no_grad()
def evaluate(
    module: NoisedClassifier,
    loader: Loader,
    *,
    samples: int,
    device: torch.device,
    noised: bool = True,
    t: int | None = None,
) -> tuple[dict[str, float], int]:
    """Loss and accuracy over a validation set, and how many of its images could not be decoded.

    loader: batches at `ValidationPositions`, on every rank. samples: in the whole set.
    noised: False shows clean images at t = 0. t: one noise level, 0 .. T-1, for all; None spreads
    them. Raises RuntimeError unless every sample was counted once, ValueError if none decodes.
    """
    num_timesteps = module.diffusion.num_timesteps
    meter = Meter(num_timesteps, device)
    bad = 0
    training = module.training
    module.eval()
    for batch in loader:
        bad += len(batch.bad)
        batch = batch.to(device)
        noise = None
        steps = torch.zeros_like(batch.positions)
        if noised:
            steps = spread_timesteps(batch.positions, num_timesteps)
            steps = steps if t is None else torch.full_like(steps, t)
            shape = tuple(batch.images.shape[1:])
            noise = keyed_noise(VALIDATION_SEED, "validation", batch.positions, shape)
        losses, logits = module(batch.images, batch.labels, steps, noise)
        meter.add(losses=losses, logits=logits, labels=batch.labels, t=steps, weights=batch.weights)
    module.train(training)
    means, weight, _ = meter.read()
    bad_samples = int(distributed.all_reduce_sum(torch.tensor(bad, device=device)))
    _check_counted(int(weight), bad_samples, samples)
    return means, bad_samples


def _check_counted(counted: int, bad: int, samples: int) -> None:
    """Raise RuntimeError unless every sample was counted once, ValueError if none decodes."""
    if counted + bad != samples:
        raise RuntimeError(f"validation counted {counted} of {samples} samples, and {bad} bad ones")
    if counted == 0:
        raise ValueError(
            f"validation: none of its {samples} images decodes; do: make_shards.py verify "
            "--decode names them"
        )


# ---------------------------------------------------------------------- at a grid of noise levels


def log_snr(diffusion: GaussianDiffusion) -> np.ndarray:
    """log(alpha_bar_t / (1 - alpha_bar_t)) of every t, [T] float64, falling."""
    return np.log(diffusion.alphas_cumprod) - np.log1p(-diffusion.alphas_cumprod)


def level_grid(diffusion: GaussianDiffusion, count: int) -> list[int]:
    """t = 0 and `count` more timesteps, nearest to values evenly spaced in log-SNR down to T - 1's.

    Ascending, each once. Where timesteps lie farther apart than the values, such as at the cosine
    schedule's end, several values share one; then as many more values are taken as it needs.
    All timesteps, if there are no more than count + 1.
    """
    snr = log_snr(diffusion)
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
    """The one of some timesteps whose signal is nearest to its noise: log-SNR 0."""
    return min(levels, key=lambda t: abs(log_snr(diffusion)[t]))


class Posterior(Protocol):
    """Another answer to the same images: x_t [N, C, S, S], t [N], labels [N] -> log p(y | x_t)
    [N, K] and the norms [N] of its gradient at the labels."""

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...


def classifier_posterior(classifier: nn.Module, diffusion: GaussianDiffusion) -> Posterior:
    """What the classifier says: log-probabilities, and the gradient that guidance would follow."""

    def answer(x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            log_p = classifier(x_t, diffusion.model_timesteps(t)).log_softmax(dim=1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), x_t)
        return log_p.detach(), gradient.flatten(1).norm(dim=1)

    return answer


def bayes_posterior(denoiser: ExactDenoiser, diffusion: GaussianDiffusion) -> Posterior:
    """What the training set says, in closed form: the best any classifier could know of its x_t."""
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)  # [T] float64

    def answer(x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = denoiser.posterior(x_t, alpha_bar.to(t.device)[t], labels)
        return found.log_class, found.gradient.flatten(1).norm(dim=1)

    return answer


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
    confusion: Confusion | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[LevelNumbers], int]:
    """What each posterior makes of the whole set: under uniform t, then at each of `levels`.

    loader: batches at `ValidationPositions` of a fixed size, on every rank. samples: in the set.
    confusion: filled with what the first posterior makes of the first level.
    progress: called on each rank after each batch, with the number of positions it has done.
    Returns the numbers of each posterior, row 0 under uniform t and row 1 + i at levels[i], the
    same on every rank and for any number of ranks; and how many images could not be decoded.
    Raises RuntimeError unless every sample was counted once, ValueError if none decodes.
    """
    sums = [LevelSums(1 + len(levels), num_classes, device) for _ in posteriors]
    bad = done = 0
    for batch in loader:
        bad += len(batch.bad)
        inside = int((batch.positions >= 0).sum())
        if not inside:
            continue  # the padding of a rank that has less to do
        batch = batch.to(device)
        x_start = to_x_start(batch.images)  # [N, S, S, C]
        shape = tuple(batch.images.shape[1:])
        noise = keyed_noise(VALIDATION_SEED, "validation", batch.positions, shape)
        rows = [spread_timesteps(batch.positions, diffusion.num_timesteps)]
        rows += [torch.full_like(batch.positions, t) for t in levels]
        for row, t in enumerate(rows):
            x_t = diffusion.q_sample(x_start, t, noise).permute(0, 3, 1, 2)  # [N, C, S, S]
            for posterior, its_sums in zip(posteriors, sums, strict=True):
                log_p, grad_norms = posterior(x_t, t, batch.labels)
                its_sums.add(
                    row,
                    log_p=log_p,
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
    numbers = [its_sums.read() for its_sums in sums]
    for its_numbers in numbers:
        for row in range(1 + len(levels)):
            _check_counted(its_numbers.samples(row), bad_samples, samples)
    return numbers, bad_samples


def describe_levels(
    numbers: LevelNumbers,
    diffusion: GaussianDiffusion,
    levels: Sequence[int],
    *,
    chosen: Sequence[int],
) -> dict[str, Any]:
    """The numbers of one posterior as JSON: under uniform t, at every level, and in detail.

    chosen: those of `levels` that get numbers per class and calibration bins, as uniform t does.
    A level is named by t; timestep is what the network is shown, log_snr the natural logarithm.
    """
    shown = diffusion.model_timesteps(torch.tensor(list(levels))).tolist()
    snr = log_snr(diffusion)
    rows = [
        {"t": t, "timestep": timestep, "log_snr": float(snr[t]), **numbers.overall(1 + i)}
        for i, (t, timestep) in enumerate(zip(levels, shown, strict=True))
    ]
    detailed = [(None, 0), *((t, 1 + list(levels).index(t)) for t in chosen)]
    return {
        "uniform_t": numbers.overall(0),
        "levels": rows,
        "per_class": [{"t": t, **numbers.per_class(row)} for t, row in detailed],
        "reliability": [{"t": t, "bins": numbers.reliability(row)} for t, row in detailed],
    }
