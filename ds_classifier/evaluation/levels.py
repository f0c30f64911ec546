"""Exact sums of a classifier's results at each noise level, and the numbers computed from them.

Only whole numbers are summed, so a sum does not depend on the order: it is the same for any number
of ranks and any distribution of the samples over them.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.evaluation.average_precision import ScoreHistograms, mean_over_classes
from ds_classifier.evaluation.meter import bin_values
from ds_classifier.evaluation.metrics import ECE_BINS, Answers, likeliest, metrics_of

FRACTION = 1 << 31  # the fraction of a summed number is rounded to a multiple of 1 / FRACTION
LARGEST = 1e9  # the largest number that is summed: 2^31 samples of it fit into 64 bits


class Names(NamedTuple):
    """The names of the sums.

    counts: by metric, the key of its count of right answers. means: what else is averaged.
    """

    counts: dict[str, str]
    means: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the counts of samples."""
        return ("samples", *self.counts.values(), "not_finite")


class _Sums:
    """The counts and sums at `levels` noise levels, on the device.

    They are kept per level and class; those of the calibration bins per level and bin. They are of
    this rank until they are read.
    """

    def __init__(self, levels: int, num_classes: int, device: torch.device | str, names: Names):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.levels, self.num_classes, self.names = levels, num_classes, names
        self._counts = zeros(levels * num_classes, len(names.columns))
        # A number v is summed as the whole numbers floor(v) and FRACTION * (v - floor(v)), rounded.
        self._values = zeros(levels * num_classes, len(names.means), 2)
        self._bins = zeros(levels * ECE_BINS)
        self._bin_sums = zeros(levels * ECE_BINS, 2, 2)  # right, confidence

    def _add(
        self,
        level: int,
        *,
        classes: Tensor,
        seen: Tensor,
        finite: Tensor,
        hits: list[Tensor],
        values: list[Tensor],
        right: Tensor,
        confidence: Tensor,
    ) -> None:
        """Add answers at a level.

        classes: [n] int64. seen, finite: [n] bool, whether they are counted, and in means. hits:
        per count of right answers, [n] bool. values: per mean, [n] fp64. right: [n], the
        probability that the answer is right, 0 or 1 for labels. confidence: [n] fp64.
        """
        counts = torch.stack([seen, *hits, ~finite], dim=1) & seen[:, None]
        row = level * self.num_classes + classes
        self._counts.index_add_(0, row, counts.long())
        summed = seen & finite
        stacked = torch.stack(values, dim=1)
        self._values.index_add_(0, row, _whole(stacked.where(summed[:, None], 0.0)))

        confidence = confidence.where(summed, 0.0)
        bins = (confidence * ECE_BINS).ceil().long() - 1  # bin b holds (b/B, (b + 1)/B]
        row = level * ECE_BINS + bins.clamp(0, ECE_BINS - 1)
        self._bins.index_add_(0, row, summed.long())
        sums = torch.stack([right.double().where(summed, 0.0), confidence], dim=1)
        self._bin_sums.index_add_(0, row, _whole(sums))

    def read(self) -> LevelNumbers:
        """Return the numbers of all ranks' sums, on every rank. Waits for the device."""
        tensors = (self._counts, self._values, self._bins, self._bin_sums)
        counts, values, bins, bin_sums = (
            distributed.all_reduce_sum(tensor.clone()).cpu() for tensor in tensors
        )
        levels, classes, names = self.levels, self.num_classes, self.names
        return LevelNumbers(
            names,
            counts.view(levels, classes, len(names.columns)),
            values.view(levels, classes, len(names.means), 2),
            bins.view(levels, ECE_BINS),
            bin_sums.view(levels, ECE_BINS, 2, 2),
        )


class LevelSums(_Sums):
    """The sums over samples of one class; the class of a soft vector is its most probable one.

    targets: of the data. `AnswerSums` is for several classes.
    """

    def __init__(
        self,
        levels: int,
        num_classes: int,
        device: torch.device | str,
        targets: Targets = ONE_CLASS,
    ):
        metrics = metrics_of(targets).values()
        self._counted = [metric for metric in metrics if metric.count]  # values of 0 or 1
        self._averaged = [metric for metric in metrics if not metric.count]
        self._bin_values = bin_values(targets, device)
        counts = {metric.name: metric.count for metric in self._counted}
        means = (*(metric.name for metric in self._averaged), "grad_norm")
        super().__init__(levels, num_classes, device, Names(counts, means))

    @torch.no_grad()
    def add(
        self,
        level: int,
        log_p: Tensor,
        *,
        labels: Tensor,
        grad_norms: Tensor,
        weights: Tensor,
    ) -> None:
        """Add a batch at a level.

        log_p: log-probabilities [N, K]. labels: [N] int64, or soft vectors [N, K]. grad_norms: [N],
        norms of the gradient of log p(class | x_t) with respect to x_t. weights: [N]; a sample of
        weight 0 is not counted. A sample with a number that is not finite counts as wrong and is in
        no mean.
        """
        log_p, grad_norms = log_p.double(), grad_norms.double()
        soft = labels.dim() == 2
        losses = -(labels * log_p).sum(1) if soft else -log_p.gather(1, labels[:, None])[:, 0]
        answers = Answers(losses, log_p, labels, self._bin_values)
        values = [*(metric.per_sample(answers) for metric in self._averaged), grad_norms]
        finite = (torch.stack(values, dim=1).abs() <= LARGEST).all(dim=1)  # False for nan too
        hits = {m.name: finite & (m.per_sample(answers) > 0) for m in self._counted}
        self._add(
            level,
            classes=answers.classes,
            seen=weights > 0,
            finite=finite,
            hits=list(hits.values()),
            values=values,
            # A soft vector says how probable it is that the likeliest class is right.
            right=labels.gather(1, answers.top[:, :1])[:, 0] if soft else hits["acc@1"],
            confidence=log_p.amax(dim=1).exp(),
        )


class AnswerSums(_Sums):
    """The sums over the yes/no answers to samples of several classes, one answer per class."""

    def __init__(self, levels: int, num_classes: int, device: torch.device | str):
        super().__init__(
            levels, num_classes, device, Names({"acc": "correct"}, ("loss", "grad_norm"))
        )
        self._scores = ScoreHistograms(levels, num_classes, device)
        self._positive = torch.zeros(levels, num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(
        self,
        level: int,
        logits: Tensor,
        *,
        labels: Tensor,
        grad_norms: Tensor,
        weights: Tensor,
    ) -> None:
        """Add a batch at a level.

        logits: [N, K]. labels: [N, K], 0 or 1. grad_norms: [N], norms of the gradient with respect
        to x_t of the sum of log p(class | x_t) over the sample's classes. weights: as in LevelSums.
        The confidence of an answer is the probability that it gives to itself.
        """
        (samples, classes), logits = logits.shape, logits.double()
        losses = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
        values = torch.stack([losses, grad_norms.double()[:, None].expand_as(losses)])
        finite, seen = (values.abs() <= LARGEST).all(dim=0).all(dim=1), weights > 0
        right = (logits > 0) == (labels > 0.5)
        each = seen.repeat_interleave(classes), finite.repeat_interleave(classes)
        self._add(
            level,
            classes=torch.arange(classes, device=logits.device).repeat(samples),
            seen=each[0],
            finite=each[1],
            hits=[each[1] & right.flatten()],
            values=list(values.flatten(1)),
            right=right.flatten(),
            confidence=logits.abs().sigmoid().flatten(),
        )
        self._scores.add(level, logits=logits, labels=labels, counted=seen & finite)
        self._positive[level] += (labels * seen[:, None]).sum(dim=0).long()

    def read(self) -> AnswerNumbers:
        """Return the numbers of all ranks' sums, on every rank. Waits for the device."""
        positive = distributed.all_reduce_sum(self._positive.clone()).cpu()
        return AnswerNumbers(super().read(), self._scores.read(), positive)


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

    def __init__(
        self, names: Names, counts: Tensor, values: Tensor, bins: Tensor, bin_sums: Tensor
    ):
        self._names = names
        self._counts = counts  # [levels, K, columns]
        self._values = values  # [levels, K, means, 2]
        self._bins = bins  # [levels, ECE_BINS]
        self._bin_sums = bin_sums  # [levels, ECE_BINS, 2, 2]

    def samples(self, level: int) -> int:
        """Return the number of samples counted at a level."""
        return int(self._counts[level, :, 0].sum())

    def overall(self, level: int) -> dict[str, Any]:
        """Return the counts at a level, and the means over all classes."""
        names = self._names
        counts = dict(zip(names.columns, self._counts[level].sum(dim=0).tolist(), strict=True))
        samples, finite = counts["samples"], counts["samples"] - counts["not_finite"]
        means = {
            name: _mean(_total(self._values[level, :, i]), finite)
            for i, name in enumerate(names.means)
        }
        return {
            **counts,
            **{n: _mean(Fraction(counts[key]), samples) for n, key in names.counts.items()},
            "ece": self.calibration_error(level),
            **means,
        }

    def per_class(self, level: int) -> dict[str, list]:
        """Return lists [K] with a number per class: the counts, and the means."""
        counts = self._counts[level]  # [K, columns]
        numbers = {name: counts[:, i].tolist() for i, name in enumerate(self._names.columns)}
        finite = (counts[:, 0] - counts[:, -1]).tolist()
        for i, name in enumerate(self._names.means):
            totals = [_total(pair) for pair in self._values[level, :, i]]
            numbers[name] = [_mean(*of_class) for of_class in zip(totals, finite, strict=True)]
        return numbers

    def reliability(self, level: int) -> list[dict[str, Any]]:
        """Return the calibration bins that hold answers: samples, correct, mean confidence."""
        rows = []
        for b, samples in enumerate(self._bins[level].tolist()):
            if samples:
                right, total = map(_total, self._bin_sums[level, b])
                correct = right.numerator if right.denominator == 1 else float(right)
                confidence = _mean(total, samples)
                rows.append(dict(bin=b, samples=samples, correct=correct, confidence=confidence))
        return rows

    def calibration_error(self, level: int) -> float | None:
        """Return the expected calibration error (Guo et al. 2017, Eq. 3).

        It is the mean over answers of |accuracy - confidence| of their bin. They are binned by
        their largest probability, into 15 bins of equal width.
        """
        gaps = Fraction(0)
        for right, confidence in self._bin_sums[level]:
            gaps += abs(_total(right) - _total(confidence))
        return _mean(gaps, int(self._bins[level].sum()))


class AnswerNumbers:
    """The numbers of samples of several classes: means over the classes of those of each.

    average_precision: [levels, K] fp64, nan for a class that no sample has. positive: [levels, K].
    """

    def __init__(self, answers: LevelNumbers, average_precision: np.ndarray, positive: Tensor):
        self._answers, self._precision, self._positive = answers, average_precision, positive

    def samples(self, level: int) -> int:
        """Return the number of samples counted at a level."""
        return self._answers.samples(level) // self._positive.shape[1]

    def overall(self, level: int) -> dict[str, Any]:
        """Return the counts of samples at a level, and the means over classes.

        mAP is over the classes that a sample has; None if there is none.
        """
        numbers, classes = self._answers.overall(level), self._positive.shape[1]
        counts = {name: numbers[name] // classes for name in ("samples", "not_finite")}
        mean = mean_over_classes(self._precision[level])
        return numbers | counts | {"mAP": None if math.isnan(mean) else mean}

    def per_class(self, level: int) -> dict[str, list]:
        """Return lists [K] with a number per class.

        samples: those that have the class. answers, correct: for all samples. ap: average
        precision, None for a class that no sample has.
        """
        numbers = self._answers.per_class(level)
        del numbers["grad_norm"]
        precision = [None if math.isnan(value) else value for value in self._precision[level]]
        samples = {"samples": self._positive[level].tolist(), "answers": numbers["samples"]}
        return numbers | samples | {"ap": precision}

    def reliability(self, level: int) -> list[dict[str, Any]]:
        """Return the calibration bins that hold answers; see LevelNumbers.reliability."""
        return self._answers.reliability(level)


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

        log_p: log-probabilities [N, K]. labels: [N] int64, or soft vectors [N, K], whose most
        probable class counts. positions: [N] int64. weights: [N]. Samples of weight 0 and samples
        whose numbers are not finite are not counted.
        """
        counted = (weights > 0) & (positions >= 0) & log_p.amax(dim=1).isfinite()
        classes = labels if labels.dim() == 1 else labels.argmax(dim=1)
        pair = torch.stack([classes, likeliest(log_p)[:, 0]])
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
