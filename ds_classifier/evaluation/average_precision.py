"""Average precision of each class over a whole set, from histograms of its scores.

It is the area under precision against recall, without interpolation: the sum over thresholds of
(R_n - R_(n-1)) P_n, as scikit-learn's average_precision_score computes it. A threshold is the edge
of a bin of the logit, the log-odds of "yes". The bins are 1/128 wide from -12 to 12: they resolve a
probability to 0.8 % of itself, also near 0, where rare classes lie. Scores in one bin are ties, and
so are those beyond the ends, of probabilities below 6e-6 or above 1 - 6e-6. Only whole numbers are
summed: any number of ranks gives the same result.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ds_classifier import distributed

BINS_PER_NAT = 128
LARGEST_LOGIT = 12.0  # larger ones count as this one
BINS = int(2 * LARGEST_LOGIT * BINS_PER_NAT)


class ScoreHistograms:
    """The scores of the images with and without each class, at `levels` noise levels.

    They are on the device, and of this rank until they are read: 24 KiB per level and class.
    """

    def __init__(self, levels: int, num_classes: int, device: torch.device | str):
        self._shape = (levels, num_classes, 2, BINS)
        self._counts = torch.zeros(
            levels * num_classes * 2 * BINS, dtype=torch.int32, device=device
        )
        self._classes = torch.arange(num_classes, device=device)

    @torch.no_grad()
    def add(self, level: int, *, logits: Tensor, labels: Tensor, counted: Tensor) -> None:
        """Add a batch at a level.

        logits: [N, K], finite where they are counted. labels: [N, K], 0 or 1. counted: [N] bool.
        """
        bins = ((logits + LARGEST_LOGIT) * BINS_PER_NAT).nan_to_num().clamp(0, BINS - 1).long()
        row = (level * self._shape[1] + self._classes) * 2 + (labels > 0.5)  # [N, K]
        ones = counted[:, None].expand_as(bins).flatten().int()
        self._counts.index_add_(0, (row * BINS + bins).flatten(), ones)

    def read(self) -> np.ndarray:
        """Return the average precision of each class at each level over all ranks, [levels, K].

        It is nan for a class that no image shows. Waits for the device.
        """
        counts = distributed.all_reduce_sum(self._counts.clone()).cpu().view(self._shape).numpy()
        return average_precision(counts[:, :, 1], counts[:, :, 0])


def average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return the average precision for numbers of images by score, [...]; nan without a positive.

    positive, negative: [..., bins] int, images with and without the class, by ascending score.
    """
    gained = positive[..., ::-1]
    found = gained.cumsum(axis=-1, dtype=np.int64)  # above each threshold, the highest first
    taken = found + negative[..., ::-1].cumsum(axis=-1, dtype=np.int64)
    precision = found / np.maximum(taken, 1)
    all_positive = found[..., -1]
    area = (gained * precision).sum(axis=-1) / np.maximum(all_positive, 1)
    return np.where(all_positive > 0, area, np.nan)


def mean_over_classes(precision: np.ndarray) -> float:
    """Return the mean average precision, of [K], over the classes that images have; or nan."""
    known = precision[~np.isnan(precision)]
    return float(known.mean()) if len(known) else math.nan
