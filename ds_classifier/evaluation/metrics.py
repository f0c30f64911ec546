"""The table of metrics: the function that computes each per sample, and how its mean is shown.

To add a metric that is a mean over samples, add an entry to METRICS. The meter, the validation, the
evaluation at noise levels, the screen, the log, the tables and the report walk this table; a model
card has fixed columns.

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

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = 4
TOP = 5
ECE_BINS = 15  # of the calibration error, as in Guo et al. 2017
DETAILED = "acc@1"  # the metric whose quartiles and t = 0 the screen of a training shows


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The way a number is shown.

    title: heads its chart. label: heads its column; "": its name.
    unit: of its axis; "%" is for shares in [0, 1], which are shown as percentages.
    digits: decimals on the screen.
    """

    name: str
    title: str
    label: str = ""
    unit: str = ""
    digits: int = 3

    @property
    def factor(self) -> int:
        """The factor from a mean to what is shown."""
        return 100 if self.unit == "%" else 1

    @property
    def head(self) -> str:
        """The head of its column, with the unit if that is "%"."""
        return (self.label or self.name) + " %" * (self.unit == "%")

    def text(self, value: float | None) -> str:
        """Return a mean as it is shown, without its unit; "-" for None."""
        return "-" if value is None else f"{self.factor * value:.{self.digits}f}"


def likeliest(logits: Tensor) -> Tensor:
    """Return the TOP likeliest classes, [N, 5] or [N, K] if K < 5, best first.

    Among equally likely classes, common in 16 bits, the order that torch gives depends on how many
    are asked for. Everything that counts hits calls this function, so that all counts agree.
    """
    return logits.topk(min(TOP, logits.shape[1]), dim=1).indices


@dataclass(frozen=True)
class Answers:
    """A batch that was classified, from which the metrics are computed.

    losses: [N]. logits: logits or log-probabilities [N, K]. labels: [N] int64.
    """

    losses: Tensor
    logits: Tensor
    labels: Tensor

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
    classes: the least number of classes for which the metric says anything.
    """

    per_sample: Callable[[Answers], Tensor]
    count: str = ""
    classes: int = 2


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
        count="correct@1",
        per_sample=lambda answers: answers.top[:, 0] == answers.labels,
    ),
    Metric(
        name="acc@5",
        title="Top-5 accuracy",
        unit="%",
        digits=1,
        count="correct@5",
        classes=TOP + 1,
        per_sample=lambda answers: (answers.top == answers.labels[:, None]).any(dim=1),
    ),
)
METRICS = {metric.name: metric for metric in _METRICS}

# The columns of an evaluation at noise levels: shares first; then the numbers that are no means of
# a metric, which levels.py computes.
LEVEL_COLUMNS: tuple[Shown, ...] = (
    *sorted(METRICS.values(), key=lambda metric: metric.unit != "%"),
    Shown(name="ece", title="Calibration error", label="ECE", unit="%", digits=1),
    Shown(name="grad_norm", title="Gradient norm", label="|grad|"),
)


def scores_of_guessing(labels: np.ndarray) -> dict[str, float]:
    """Return the scores of guessing by the class frequencies in a set, without looking at images.

    labels: [N] int. Classes without images in the set are left out of it: the accuracy is the share
    of the most frequent class, the loss the entropy of the labels in nats.
    """
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return {"acc@1": float(share.max()), "loss": float(-(share * np.log(share)).sum())}
