"""The table of metrics: the function that computes each per sample, and how its mean is shown.

To add a metric that is a mean over samples, add an entry to METRICS, or to ANSWER_METRICS if images
have several classes. The meter, the validation, the evaluation at noise levels, the screen, the
log, the tables and the report walk the table of the data's targets, `metrics_of`; a model card has
fixed columns.

The keys of the means are the reference's: train_NAME and val_NAME. NAME_q0 .. NAME_q3 are over a
quarter of the timesteps, from nearly clean (q0) to nearly pure noise (q3). val_NAME_t0 is at t = 0.

This module imports no torch: the report reads it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ds_classifier.common.text import percent, short, significant
from ds_classifier.data.labels.targets import ONE_CLASS, Targets

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = 4
TOP = 5
ANY_WIDTH = 6  # characters of a number of any size
ECE_BINS = 15  # of the calibration error, as in Guo et al. 2017


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The way a number is shown.

    title: heads its chart. label: heads its column; "": its name.
    unit: of its axis; "%" is for shares in [0, 1], which are shown as percentages.
    digits: decimals on the screen; None: three digits that count, of a number of any size.
    word: names it in a sentence; "": the title in small letters.
    classes: the least number of classes for which it says anything.
    """

    name: str
    title: str
    label: str = ""
    unit: str = ""
    digits: int | None = 3
    word: str = ""
    classes: int = 2

    @property
    def factor(self) -> int:
        """The factor from a mean to what is shown."""
        return 100 if self.unit == "%" else 1

    @property
    def head(self) -> str:
        """The head of its column, with the unit if that is "%"."""
        return (self.label or self.name) + " %" * (self.unit == "%")

    @property
    def words(self) -> str:
        """The name in a sentence."""
        return self.word or self.title.lower()

    def said(self, value: float | None) -> str:
        """Return a mean in a sentence: "18.9 %", or the number alone."""
        return percent(value) if self.unit == "%" else short(value)

    @property
    def titled(self) -> str:
        """The title of a chart, with the unit unless its axis shows per cents."""
        return self.title + f", {self.unit}" * (self.unit not in ("", "%"))

    def text(self, value: float | None) -> str:
        """Return a mean as it is shown, without its unit; "-" for None."""
        if value is None or self.digits is None:
            return significant(value, ANY_WIDTH)
        return f"{self.factor * value:.{self.digits}f}"


def likeliest(logits: Tensor) -> Tensor:
    """Return the TOP likeliest classes, [N, 5] or [N, K] if K < 5, best first.

    Among equally likely classes, common in 16 bits, the order that torch gives depends on how many
    are asked for. Everything that counts hits calls this function, so that all counts agree.
    """
    return logits.topk(min(TOP, logits.shape[1]), dim=1).indices


@dataclass(frozen=True)
class Answers:
    """A batch that was classified, from which the metrics are computed.

    losses: [N]. logits: logits or log-probabilities [N, K]. labels: [N] int64; [N, K] fp32, 0 or 1
    for several classes and probabilities for soft vectors. values: of the bins, less any constant,
    [K] fp32; None unless the classes are bins of a value.
    """

    losses: Tensor
    logits: Tensor
    labels: Tensor
    values: Tensor | None = None

    @cached_property
    def classes(self) -> Tensor:
        """The class of each sample, [N] int64; of a soft vector the most probable one."""
        return self.labels if self.labels.dim() == 1 else self.labels.argmax(dim=1)

    @cached_property
    def yes(self) -> Tensor:
        """The classes that are found, with a probability above 0.5, [N, K] bool."""
        return self.logits > 0

    @cached_property
    def top(self) -> Tensor:
        """The likeliest classes, [N, 5] or fewer; computed once for all metrics of a batch."""
        return likeliest(self.logits)


@dataclass(frozen=True, kw_only=True)
class Metric(Shown):
    """A mean over samples.

    per_sample: takes the Answers for N samples; returns [N].
    count: only where values are 0 or 1: the key of their sum in an evaluation. A sample without
    finite numbers counts as 0 there; metrics without a count leave it out of their mean.
    """

    per_sample: Callable[[Answers], Tensor]
    count: str = ""


_METRICS = (
    Metric(
        name="loss",
        title="Cross-entropy",
        unit="nats",
        per_sample=lambda answers: answers.losses,
    ),
    Metric(
        name="acc@1",
        title="Top-1 accuracy",
        unit="%",
        digits=1,
        word="top-1",
        count="correct@1",
        per_sample=lambda answers: answers.top[:, 0] == answers.classes,
    ),
    Metric(
        name="acc@5",
        title="Top-5 accuracy",
        unit="%",
        digits=1,
        word="top-5",
        count="correct@5",
        classes=TOP + 1,
        per_sample=lambda answers: (answers.top == answers.classes[:, None]).any(dim=1),
    ),
)
METRICS = {metric.name: metric for metric in _METRICS}

# For several classes per image: each class is a yes/no question, answered by a probability.
_ANSWER_METRICS = (
    Metric(
        name="loss",
        title="Binary cross-entropy",
        unit="nats",
        per_sample=lambda answers: answers.losses,
    ),
    Metric(
        name="acc",
        title="Accuracy of the yes/no answers",
        unit="%",
        digits=1,
        word="right answers",
        per_sample=lambda answers: (answers.yes == (answers.labels > 0.5)).float().mean(dim=1),
    ),
)
ANSWER_METRICS = {metric.name: metric for metric in _ANSWER_METRICS}
# No mean over samples; average_precision.py computes it over a validation set.
MEAN_AP = Shown(name="mAP", title="Mean average precision", unit="%", digits=1)


def metrics_of(targets: Targets) -> dict[str, Metric]:
    """Return the metrics of data with these targets, by name."""
    if targets.kind == "classes":
        return ANSWER_METRICS
    if targets.kind == "values":
        return METRICS | {"mae": _value_error(targets.name)}
    return METRICS


def _value_error(name: str) -> Metric:
    """Return the metric |sum_k p_k v_k - v_y|, in the unit of the value of this name."""
    return Metric(
        name="mae",
        title=f"Mean absolute error of {name}",
        digits=None,
        per_sample=lambda answers: (
            (answers.logits.softmax(dim=1) * answers.values).sum(dim=1)
            - answers.values[answers.labels]
        ).abs(),
    )


def accuracy_of(targets: Targets) -> Metric:
    """Return the accuracy: top-1, or that of the yes/no answers."""
    metrics = metrics_of(targets)
    return metrics.get("acc@1") or metrics["acc"]


def judged_of(targets: Targets) -> Metric:
    """Return the mean of training that tells learning from guessing; see logs/sanity.py."""
    metrics = metrics_of(targets)
    return metrics.get("mae") or metrics.get("acc@1") or metrics["loss"]


def headline_of(targets: Targets) -> Shown:
    """Return the number that says best how good a classifier is."""
    if targets.kind == "classes":
        return MEAN_AP
    return metrics_of(targets).get("mae") or accuracy_of(targets)


def measured_of(targets: Targets) -> tuple[Shown, ...]:
    """Return what a validation measures: the metrics, and what is no mean over samples."""
    return (*metrics_of(targets).values(), *([MEAN_AP] if targets.kind == "classes" else []))


def level_columns(num_classes: int, targets: Targets = ONE_CLASS) -> tuple[Shown, ...]:
    """Return the columns of an evaluation at noise levels: shares first.

    Metrics that say nothing about so few classes are left out. The last two columns are no means of
    a metric; levels.py computes them.
    """
    measured = [shown for shown in measured_of(targets) if num_classes >= shown.classes]
    return (
        *sorted(measured, key=lambda shown: shown.unit != "%"),
        Shown(name="ece", title="Calibration error", label="ECE", unit="%", digits=1),
        Shown(name="grad_norm", title="Gradient norm", label="|grad|"),
    )


def scores_of_guessing(labels: np.ndarray, targets: Targets = ONE_CLASS) -> dict[str, float]:
    """Return the scores of guessing by the class frequencies in a set, without looking at images.

    labels: [N] int, or [N, K] for several classes and soft vectors. Classes without images in the
    set are left out of it: the accuracy is the share of the most frequent class, the loss the
    entropy of the labels in nats. For soft vectors the loss is the entropy of their mean, and
    "least" the mean of their entropies, below which no loss lies. For several classes both are
    means over the yes/no answers, and the average precision of a class is its frequency.
    """
    if targets.kind == "classes":
        share = labels.mean(axis=0, dtype=np.float64)  # [K]
        entropies = _entropy(np.stack([share, 1 - share], axis=1))
        return {
            "acc": float(np.maximum(share, 1 - share).mean()),
            "loss": float(entropies.mean()),
            "mAP": float(share[share > 0].mean()) if share.any() else 0.0,
        }
    if targets.kind == "soft":
        mean = labels.mean(axis=0, dtype=np.float64)
        likeliest_classes = np.bincount(labels.argmax(axis=1))
        return {
            "acc@1": float(likeliest_classes.max() / len(labels)),
            "loss": float(_entropy(mean / mean.sum())),
            "least": float(_entropy(labels.astype(np.float64)).mean()),
        }
    classes, counts = np.unique(labels, return_counts=True)
    share = counts / len(labels)
    scores = {"acc@1": float(share.max()), "loss": float(-(share * np.log(share)).sum())}
    if targets.kind == "values":
        values = np.asarray(targets.values)[classes]
        scores["mae"] = float(share @ np.abs(values - share @ values))
    return scores


def _entropy(p: np.ndarray) -> np.ndarray:
    """Return the entropy over the last axis, nats; 0 log 0 is 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
