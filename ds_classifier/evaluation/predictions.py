"""Predict the classes of a few validation images at several noise levels."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from ds_classifier.common.false_colours import FalseColours
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.shards import ShardSet
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.evaluation.evaluate import VALIDATION_SEED
from ds_classifier.evaluation.image_grid import ImageGrid, Predictions
from ds_classifier.loss import from_x_start, to_x_start

ROWS, LEVELS = 10, 8
TILE_SIDE = 128  # pixels; larger images are shrunk by an integer factor


def choose_positions(shards: ShardSet, rows: int = ROWS) -> np.ndarray:
    """Return the position of the first image of up to `rows` classes, [R] int64.

    The classes are evenly spaced among those of the set. Of shards behind a URL only the first is
    considered, so that no other has to be fetched.
    """
    labels = shards.index["label"]
    if shards.store.remote:
        labels = labels[: shards.manifest.shards[0].samples]
    classes, first = np.unique(labels, return_index=True)
    chosen = np.linspace(0, len(classes) - 1, min(rows, len(classes))).round().astype(int)
    return first[chosen].astype(np.int64)


@torch.no_grad()
def predict_grid(
    classifier: nn.Module,
    diffusion: GaussianDiffusion,
    shards: ShardSet,
    *,
    image_size: int,
    channels: int,
    device: torch.device,
    step: int | None = None,
) -> ImageGrid | None:
    """Classify a few images on this rank only, with the noise of the evaluation.

    step: the optimizer step of the weights; None if it is not known. Returns None if no image
    decodes.
    """
    training = classifier.training
    dataset = ShardDataset(shards, image_size=image_size, channels=channels)
    batch = dataset[choose_positions(shards)]
    decoded = batch.weights > 0
    if not decoded.any():
        return None
    images, positions, labels = (
        tensor[decoded] for tensor in (batch.images, batch.positions, batch.labels)
    )
    several = shards.manifest.targets.kind == "classes"
    noise = keyed_noise(
        VALIDATION_SEED, "validation", positions.to(device), tuple(images.shape[1:])
    )
    x_start = to_x_start(images.to(device))  # [R, S, S, C]
    # Evenly spaced in t, as training draws it. Evenly spaced in log-SNR, half of the levels would
    # show nothing but noise.
    last = diffusion.num_timesteps - 1
    levels = sorted({round(i * last / (LEVELS - 1)) for i in range(LEVELS)})
    factor = max(1, math.ceil(image_size / TILE_SIDE))
    colours = None if dataset.arrays is None else FalseColours(x_start.cpu().numpy())
    tiles, predicted, confidence = [], [], []
    classifier.eval()
    for level in levels:
        t = torch.full((len(positions),), level, device=device)
        x_t = diffusion.q_sample(x_start, t, noise)
        rows = []
        for part, part_t in zip(x_t.permute(0, 3, 1, 2).split(4), t.split(4), strict=True):
            logits = classifier(part, diffusion.model_timesteps(part_t)).float()
            rows.append(logits.sigmoid() if several else logits.softmax(dim=1))
        best = torch.cat(rows).max(dim=1)
        tiles.append(_as_pixels(x_t, factor, colours))
        predicted.append(best.indices.tolist())
        confidence.append([v if math.isfinite(v) else None for v in best.values.tolist()])
    classifier.train(training)
    return ImageGrid(
        np.stack(tiles, axis=1),
        Predictions(
            step=step,
            t=levels,
            log_snr=[float(diffusion.log_snr[t]) for t in levels],
            shrunk=factor,
            positions=positions.tolist(),
            labels=shards.index["label"][positions.numpy()].tolist(),
            predicted=[list(row) for row in zip(*predicted, strict=True)],
            confidence=[list(row) for row in zip(*confidence, strict=True)],
            colours="" if colours is None else colours.words,
            several=[row.nonzero()[:, 0].tolist() for row in labels] if several else None,
        ),
    )


def _as_pixels(x_t: torch.Tensor, factor: int, colours: FalseColours | None) -> np.ndarray:
    """Return x_t [R, S, S, C] as uint8 [R, S/factor, S/factor, 3], clipped to [-1, 1].

    With one or two channels, the first is shown in grey; with four, the first three in colour.
    colours: of arrays; None for images.
    """
    if colours is not None:
        small = torch.nn.functional.avg_pool2d(x_t.permute(0, 3, 1, 2), factor)
        return colours(small.permute(0, 2, 3, 1).cpu().numpy())
    x = x_t[..., :3] if x_t.shape[-1] >= 3 else x_t[..., :1].expand(*x_t.shape[:-1], 3)
    pixels = from_x_start(x).permute(0, 3, 1, 2)
    pixels = torch.nn.functional.avg_pool2d(pixels, factor).permute(0, 2, 3, 1)
    return pixels.round().byte().cpu().numpy()
