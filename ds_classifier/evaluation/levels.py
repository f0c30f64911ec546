"""Exact sums of a classifier's results at each noise level, and the numbers computed from them.

Only whole numbers are summed, so a sum does not depend on the order: it is the same for any number
of ranks and any distribution of the samples over them.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.evaluation.metrics import ECE_BINS, METRICS, Answers, likeliest

FRACTION = 1 << 31  # the fraction of a summed number is rounded to a multiple of 1 / FRACTION
LARGEST = 1e9  # the largest number that is summed: 2^31 samples of it fit into 64 bits

COUNTED = [metric for metric in METRICS.values() if metric.count]  # values of 0 or 1
AVERAGED = [metric for metric in METRICS.values() if not metric.count]
# Columns of the sums: counts of samples, and sums over samples.
COUNTS = ("samples", *(metric.count for metric in COUNTED), "not_finite")
VALUES = (*(metric.name for metric in AVERAGED), "grad_norm")


class LevelSums:
    """The counts and sums over samples at `levels` noise levels, on the device.

    They are kept per level and class; those of the calibration bins per level and bin. They are of
    this rank until they are read.
    """

    def __init__(self, levels: int, num_classes: int, device: torch.device | str):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.levels, self.num_classes = levels, num_classes
        self._counts = zeros(levels * num_classes, len(COUNTS))
        # A number v is summed as the whole numbers floor(v) and FRACTION * (v - floor(v)), rounded.
        self._values = zeros(levels * num_classes, len(VALUES), 2)
        self._bins = zeros(levels * ECE_BINS, 2)  # samples, correct
        self._bin_confidence = zeros(levels * ECE_BINS, 2)

    @torch.no_grad()
    def add(
        self,
        level: int,
        *,
        log_p: Tensor,
        labels: Tensor,
        grad_norms: Tensor,
        weights: Tensor,
    ) -> None:
        """Add a batch at a level.

        log_p: log-probabilities [N, K]. labels: [N] int64. grad_norms: [N], norms of the gradient
        of log p(label | x_t) with respect to x_t. weights: [N]; a sample of weight 0 is not
        counted. A sample with a number that is not finite counts as wrong and is in no mean.
        """
        log_p, grad_norms = log_p.double(), grad_norms.double()
        losses = -log_p.gather(1, labels[:, None])[:, 0]
        confidence = log_p.amax(dim=1).exp()
        seen = weights > 0
        answers = Answers(losses, log_p, labels)
        values = [metric.per_sample(answers) for metric in AVERAGED]
        values = torch.stack([*values, grad_norms], dim=1)
        finite = (values.abs() <= LARGEST).all(dim=1)  # False for nan too
        hits = {m.name: finite & (m.per_sample(answers) > 0) for m in COUNTED}
        counts = torch.stack([seen, *hits.values(), ~finite], dim=1) & seen[:, None]
        row = level * self.num_classes + labels
        self._counts.index_add_(0, row, counts.long())
        summed = seen & finite
        self._values.index_add_(0, row, _whole(values.where(summed[:, None], 0.0)))

        confidence = confidence.where(summed, 0.0)
        bins = (confidence * ECE_BINS).ceil().long() - 1  # bin b holds (b/B, (b + 1)/B]
        row = level * ECE_BINS + bins.clamp(0, ECE_BINS - 1)
        self._bins.index_add_(0, row, torch.stack([summed, summed & hits["acc@1"]], dim=1).long())
        self._bin_confidence.index_add_(0, row, _whole(confidence))

    def read(self) -> LevelNumbers:
        """Return the numbers of all ranks' sums, on every rank. Waits for the device."""
        tensors = (self._counts, self._values, self._bins, self._bin_confidence)
        counts, values, bins, confidence = (
            distributed.all_reduce_sum(tensor.clone()).cpu() for tensor in tensors
        )
        levels, classes = self.levels, self.num_classes
        return LevelNumbers(
            counts.view(levels, classes, len(COUNTS)),
            values.view(levels, classes, len(VALUES), 2),
            bins.view(levels, ECE_BINS, 2),
            confidence.view(levels, ECE_BINS, 2),
        )


def _whole(values: Tensor) -> Tensor:
    """Return float64 [...] as whole numbers [..., 2]: the floor, and FRACTION times the rest."""
    floor = values.floor()
    return torch.stack([floor, ((values - floor) * FRACTION).round()], dim=-1).long()


def _total(pairs: Tensor) -> Fraction:
    """Return the exact sum of numbers in the form [..., 2] that `_whole` returns."""
    floor, rest = pairs.reshape(-1, 2).sum(dim=0).tolist()
    return Fraction(floor) + Fraction(rest, FRACTION)


def _mean(total: Fraction, count: int) -> float | None:
    return float(total / count) if count else None


class LevelNumbers:
    """The numbers that the sums give; a mean over no samples is None."""

    def __init__(self, counts: Tensor, values: Tensor, bins: Tensor, bin_confidence: Tensor):
        self._counts = counts  # [levels, K, COUNTS]
        self._values = values  # [levels, K, VALUES, 2]
        self._bins = bins  # [levels, ECE_BINS, 2]
        self._bin_confidence = bin_confidence  # [levels, ECE_BINS, 2]

    def samples(self, level: int) -> int:
        """Return the number of samples counted at a level."""
        return int(self._counts[level, :, COUNTS.index("samples")].sum())

    def overall(self, level: int) -> dict[str, Any]:
        """Return the counts at a level, and the means over all classes."""
        counts = dict(zip(COUNTS, self._counts[level].sum(dim=0).tolist(), strict=True))
        samples, finite = counts["samples"], counts["samples"] - counts["not_finite"]
        means = {
            name: _mean(_total(self._values[level, :, i]), finite) for i, name in enumerate(VALUES)
        }
        return {
            **counts,
            **{m.name: _mean(Fraction(counts[m.count]), samples) for m in COUNTED},
            "ece": self.calibration_error(level),
            **means,
        }

    def per_class(self, level: int) -> dict[str, list]:
        """Return lists [K] with a number per class: the counts, and the means of VALUES."""
        counts = self._counts[level]  # [K, COUNTS]
        numbers = {name: counts[:, i].tolist() for i, name in enumerate(COUNTS)}
        finite = (counts[:, 0] - counts[:, COUNTS.index("not_finite")]).tolist()
        for i, name in enumerate(VALUES):
            totals = [_total(pair) for pair in self._values[level, :, i]]
            numbers[name] = [_mean(*of_class) for of_class in zip(totals, finite, strict=True)]
        return numbers

    def reliability(self, level: int) -> list[dict[str, Any]]:
        """Return the calibration bins that hold samples: samples, correct, mean confidence."""
        rows = []
        for b, (samples, correct) in enumerate(self._bins[level].tolist()):
            if samples:
                confidence = _mean(_total(self._bin_confidence[level, b]), samples)
                rows.append(dict(bin=b, samples=samples, correct=correct, confidence=confidence))
        return rows

    def calibration_error(self, level: int) -> float | None:
        """Return the expected calibration error (Guo et al. 2017, Eq. 3).

        It is the mean over samples of |accuracy - confidence| of their bin. Samples are binned by
        their largest probability, into 15 bins of equal width.
        """
        gaps, binned = Fraction(0), 0
        for b, (samples, correct) in enumerate(self._bins[level].tolist()):
            gaps += abs(correct - _total(self._bin_confidence[level, b]))
            binned += samples
        return _mean(gaps, binned)


class Confusion:
    """The predicted class of each sample of a set, at one noise level.

    It is kept per sample, not per pair of classes: thousands of classes have millions of pairs.
    """

    def __init__(self, samples: int, device: torch.device | str):
        # [2, samples]: 1 + label, 1 + predicted class; 0: not counted.
        self._seen = torch.zeros(2, samples, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, *, log_p: Tensor, labels: Tensor, positions: Tensor, weights: Tensor) -> None:
        """Add a batch.

        log_p: log-probabilities [N, K]. labels, positions: [N] int64. weights: [N]. Samples of
        weight 0 and samples whose numbers are not finite are not counted.
        """
        counted = (weights > 0) & (positions >= 0) & log_p.amax(dim=1).isfinite()
        pair = torch.stack([labels, likeliest(log_p)[:, 0]])
        self._seen[:, positions[counted]] = 1 + pair[:, counted]

    def read(self) -> dict[str, list[int]]:
        """Return the pairs that occur on any rank, as lists: label, predicted, samples.

        Waits for the device.
        """
        seen = distributed.all_reduce_sum(self._seen.clone()).cpu()
        seen = seen[:, seen[0] > 0] - 1
        pairs, counts = torch.unique(seen, dim=1, return_counts=True)
        label, predicted = pairs.tolist()
        return {"label": label, "predicted": predicted, "samples": counts.tolist()}
