"""The whole validation set, every sample exactly once, with fixed timesteps and noise.

So two checkpoints, or two numbers of ranks, are compared on the same pictures at the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.data.loader import Loader
from ds_classifier.diffusion import keyed_noise
from ds_classifier.metrics import Meter
from ds_classifier.noised_classifier import NoisedClassifier

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
    """Loss and accuracy over a validation set, and how many of its pictures could not be decoded.

    loader: batches at `ValidationPositions`, on every rank. samples: in the whole set.
    noised: False shows clean pictures at t = 0. t: one noise level, 0 .. T-1, for all; None spreads
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
    means, weight = meter.read()
    bad_samples = int(distributed.all_reduce_sum(torch.tensor(bad, device=device)))
    if weight + bad_samples != samples:
        raise RuntimeError(
            f"validation counted {weight:.0f} of {samples} samples, and {bad_samples} bad ones"
        )
    if weight == 0:
        raise ValueError(
            f"validation: none of its {samples} pictures decodes; do: make_shards.py verify "
            "--decode names them"
        )
    return means, bad_samples
