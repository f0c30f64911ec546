"""Weights of images in the loss, by the frequency of their class and by their own weight.

An image of class y, whose share of the training set is f_y, with its own weight s (1 unless the
data have weights) counts

    w = c s / f_y (equal),   w = c s / sqrt(f_y) (sqrt),   or   w = c s,

where c makes the mean of w over the training set 1. It is a constant of the run, and not of a
batch, so that what an image counts does not depend on the images beside it. Which images are read,
and in which order, stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ds_classifier.common.text import count
from ds_classifier.data.loader import Batch
from ds_classifier.data.shards import INDEX_ROWS, ShardSet

POWERS = {"equal": 1.0, "sqrt": 0.5, "": 0.0}  # w is in proportion to f_y to the minus this


@dataclass(frozen=True)
class Balance:
    """The weights of the images of a training set.

    by_class: what an image of each class counts for each unit of its own weight, [K] fp32.
    smallest, largest: of all weights. images: N.
    effective: (sum w)^2 / sum w^2, the number of equally weighted images whose mean would vary as
    much (Kish 1965, "Survey Sampling").
    """

    by_class: Tensor
    smallest: float
    largest: float
    effective: float
    images: int

    def weights(self, batch: Batch) -> Tensor:
        """Return the weights of a batch's images, [n] fp32, without waiting for the device."""
        if batch.labels.dim() > 1:  # vectors, for which all classes count the same
            return self.by_class[0] * batch.importance
        return self.by_class[batch.labels] * batch.importance

    def __str__(self) -> str:
        return (
            f"{self.smallest:.3g} to {self.largest:.3g} per image, 1 on average; they count like "
            f"{round(self.effective):,} of {count(self.images, 'image')} (Kish)"
        )


def measure(shards: ShardSet, class_balance: str) -> dict[str, Any]:
    """Return the fields of Balance as JSON, for a value of --class_balance; reads the whole index.

    A class without an image, which no batch holds, gets the weight 0.
    Raises ValueError if all weights are 0, or some are not finite.
    """
    classes, own = len(shards.manifest.classes), shards.sample_weights
    images, sums, squares = np.zeros((3, classes))  # of each class, and of its images' own weights
    least, most = np.full(classes, np.inf), np.zeros(classes)
    for first in range(0, len(shards.index), INDEX_ROWS):
        labels = shards.index["label"][first : first + INDEX_ROWS].astype(np.int64)
        s = np.ones(len(labels)) if own is None else own[first : first + INDEX_ROWS].astype(float)
        images += np.bincount(labels, minlength=classes)
        sums += np.bincount(labels, s, minlength=classes)
        squares += np.bincount(labels, s**2, minlength=classes)
        np.minimum.at(least, labels, s)
        np.maximum.at(most, labels, s)
    if not 0 < sums.sum() < np.inf or least.min() < 0:
        raise ValueError(
            f"weights of the data: got a sum of {sums.sum():g}, the least {least.min():g}; need 0 "
            "or more, and some above 0; do: convert the data again, with other weights"
        )
    seen, total = images > 0, images.sum()
    factors = np.zeros(classes)
    factors[seen] = (images[seen] / total) ** -POWERS[class_balance]
    factors *= total / (factors @ sums)
    return {
        "by_class": factors.tolist(),
        "smallest": float((factors[seen] * least[seen]).min()),
        "largest": float((factors[seen] * most[seen]).max()),
        "effective": float(total**2 / (factors**2 @ squares)),
        "images": int(total),
    }
