"""Exact sums of what a classifier does at each noise level, and the numbers they give.

Everything summed is a whole number, so the sums are the same in any order: for any number of ranks,
and for any way the samples are shared among them.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.evaluation.metrics import METRICS, likeliest

ECE_BINS = 15  # as in Guo et al. 2017
FRACTION = 1 << 31  # parts of 1 that the fraction of a summed number is rounded to
LARGEST = 1e9  # of a number summed: 2^31 samples of it fit into 64 bits

COUNTED = [metric for metric in METRICS.values() if metric.count]  # values of 0 or 1
AVERAGED = [metric for metric in METRICS.values() if not metric.count]
# What is counted of a sample, and what is summed of it.
COUNTS = ("samples", *(metric.count for metric in COUNTED), "not_finite")
VALUES = (*(metric.name for metric in AVERAGED), "grad_norm")


class LevelSums:
    """Counts and sums of samples at `levels` noise levels; all ranks' together when read.

    On the device: counts per level and class, sums per level and class, and per level the counts
    and confidences of the calibration bins.
    """

    def __init__(self, levels: int, num_classes: int, device: torch.device | str):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.levels, self.num_classes = levels, num_classes
        self._counts = zeros(levels * num_classes, len(COUNTS))
        # A number v is summed as (floor v, FRACTION * the rest): no rounding hangs on the order.
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
        """Count a batch at a level.

        log_p: log-probabilities [N, K]. labels [N] int64. grad_norms [N]: of the gradient of
        log p(label | x_t) with respect to x_t. weights [N]: a sample of weight 0 is not counted.
        A sample whose loss or gradient is not finite is wrong, and in no mean.
        """
        log_p, grad_norms = log_p.double(), grad_norms.double()
        losses = -log_p.gather(1, labels[:, None])[:, 0]
        confidence = log_p.amax(dim=1).exp()
        seen = weights > 0
        values = [metric.per_sample(losses, log_p, labels) for metric in AVERAGED]
        values = torch.stack([*values, grad_norms], dim=1)
        finite = (values.abs() <= LARGEST).all(dim=1)  # false of not-a-number too
        hits = {m.name: finite & (m.per_sample(losses, log_p, labels) > 0) for m in COUNTED}
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
        """All ranks' sums, on every rank. Waits for the device."""
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
    """Float64 [...] as whole numbers [..., 2]: the floor, and the rest in parts of FRACTION."""
    floor = values.floor()
    return torch.stack([floor, ((values - floor) * FRACTION).round()], dim=-1).long()


def _total(pairs: Tensor) -> Fraction:
    """The exact sum of whole numbers [..., 2] as `_whole` makes them."""
    floor, rest = pairs.reshape(-1, 2).sum(dim=0).tolist()
    return Fraction(floor) + Fraction(rest, FRACTION)


def _mean(total: Fraction, count: int) -> float | None:
    return float(total / count) if count else None


class LevelNumbers:
    """What the sums say; a mean over no samples is None."""

    def __init__(self, counts: Tensor, values: Tensor, bins: Tensor, bin_confidence: Tensor):
        self._counts = counts  # [levels, K, COUNTS]
        self._values = values  # [levels, K, VALUES, 2]
        self._bins = bins  # [levels, ECE_BINS, 2]
        self._bin_confidence = bin_confidence  # [levels, ECE_BINS, 2]

    def samples(self, level: int) -> int:
        return int(self._counts[level, :, COUNTS.index("samples")].sum())

    def overall(self, level: int) -> dict[str, Any]:
        """The counts at a level, and the means they give over all classes."""
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
        """By class, a list [K] each: the counts, and the means of loss and grad_norm."""
        counts = self._counts[level]  # [K, COUNTS]
        numbers = {name: counts[:, i].tolist() for i, name in enumerate(COUNTS)}
        finite = (counts[:, 0] - counts[:, COUNTS.index("not_finite")]).tolist()
        for i, name in enumerate(VALUES):
            totals = [_total(pair) for pair in self._values[level, :, i]]
            numbers[name] = [_mean(*of_class) for of_class in zip(totals, finite, strict=True)]
        return numbers

    def reliability(self, level: int) -> list[dict[str, Any]]:
        """The calibration bins that hold samples: samples, correct, mean confidence."""
        rows = []
        for b, (samples, correct) in enumerate(self._bins[level].tolist()):
            if samples:
                confidence = _mean(_total(self._bin_confidence[level, b]), samples)
                rows.append(dict(bin=b, samples=samples, correct=correct, confidence=confidence))
        return rows

    def calibration_error(self, level: int) -> float | None:
        """Expected calibration error: the mean over samples of |accuracy - confidence| of their
        bin, of 15 equal bins of the largest probability (Guo et al. 2017, Eq. 3)."""
        gaps, binned = Fraction(0), 0
        for b, (samples, correct) in enumerate(self._bins[level].tolist()):
            gaps += abs(correct - _total(self._bin_confidence[level, b]))
            binned += samples
        return _mean(gaps, binned)


class Confusion:
    """Which class each sample of a set was taken for, at one noise level; all ranks' when read.

    Kept by sample and not by pair of classes: thousands of classes make millions of pairs.
    """

    def __init__(self, samples: int, device: torch.device | str):
        # [2, samples]: 1 + its class, 1 + the one it was taken for; 0: not counted.
        self._seen = torch.zeros(2, samples, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, *, log_p: Tensor, labels: Tensor, positions: Tensor, weights: Tensor) -> None:
        """Count a batch. log_p [N, K]; labels, positions [N] int64; weights [N]: 0 is not counted,
        nor is a sample whose numbers are not finite."""
        counted = (weights > 0) & (positions >= 0) & log_p.amax(dim=1).isfinite()
        pair = torch.stack([labels, likeliest(log_p)[:, 0]])
        self._seen[:, positions[counted]] = 1 + pair[:, counted]

    def read(self) -> dict[str, list[int]]:
        """The pairs that occur, as lists: label, predicted, samples. Waits for the device."""
        seen = distributed.all_reduce_sum(self._seen.clone()).cpu()
        seen = seen[:, seen[0] > 0] - 1
        pairs, counts = torch.unique(seen, dim=1, return_counts=True)
        label, predicted = pairs.tolist()
        return {"label": label, "predicted": predicted, "samples": counts.tolist()}
