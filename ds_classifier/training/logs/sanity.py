"""Answers "is it working?" from the rows of a run's log, in a line whenever the answer changes.

Accuracies are compared with chance, by the number of images that they rest on, and losses with
their own scatter. Nothing is said that a few noisy rows cannot show.

Images of one class, or soft vectors, are judged by the top-1 accuracy. Of several classes, most
answers to rare ones are right whatever is learnt, so the loss is compared with that of guessing.
Of values it is the mean absolute error.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ds_classifier.common.text import significant
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.evaluation.metrics import ANY_WIDTH, accuracy_of, scores_of_guessing

Row = dict[str, Any]

IMAGES = 4000  # a judgement rests on this number of images, if there are as many
MAX_ROWS, MIN_ROWS = 20, 5  # rows of a judgement; the fewest for one that needs their scatter
LEAST_IMAGES = 64  # nothing is said before
KEPT = 500  # training rows that are remembered; of validation rows, the same number
# An accuracy counts as above chance if luck would explain it with a probability of at most
# exp(-12) = 6e-6 (Chernoff's bound), whatever the number of images.
EVIDENCE = 12.0
DEVIATIONS = 4.0  # the standard errors that a difference must have
LITTLE = 0.01  # of the loss or the error of guessing: a smaller gain is none
QUARTILES = range(4)


@dataclass(frozen=True)
class Guessing:
    """The score of a classifier that knows the class frequencies and does not look at the image.

    loss: the entropy of the labels, nats; ln K if classes are equally frequent; None if training
    has a loss of the user's, whose value for guessing is not known. accuracy: the share of the most
    frequent class. metric: the accuracy's name. least: the least possible loss, which is above 0
    for soft vectors. mae: of values in bins, the mean absolute error of guessing their mean.
    mean_ap: of several classes, the mean average precision.
    """

    num_classes: int
    loss: float | None
    accuracy: float
    metric: str = "acc@1"
    least: float = 0.0
    mae: float | None = None
    mean_ap: float | None = None

    @classmethod
    def of(cls, labels: np.ndarray, num_classes: int, targets: Targets = ONE_CLASS) -> Guessing:
        """Return the score for labels of the training set, or of enough of it.

        labels, targets: see scores_of_guessing.
        """
        return cls.from_scores(scores_of_guessing(labels, targets), num_classes, targets)

    @classmethod
    def from_scores(
        cls, scores: dict[str, float], num_classes: int, targets: Targets = ONE_CLASS
    ) -> Guessing:
        """Return what scores_of_guessing returned for these targets, or an evaluation recorded."""
        metric = accuracy_of(targets).name
        more = scores.get("least", 0.0), scores.get("mae"), scores.get("mAP")
        return cls(num_classes, scores["loss"], scores[metric], metric, *more)

    @property
    def judged(self) -> str:
        """The name of the mean by which learning is told from guessing."""
        if self.mae is not None:
            return "mae"
        return "loss" if self.metric == "acc" else self.metric

    @property
    def chance(self) -> float | None:
        """The value of that mean; None if it is not known."""
        return {"mae": self.mae, "loss": self.loss}.get(self.judged, self.accuracy)

    @property
    def falls(self) -> bool:
        """The direction: True if that mean falls while the classifier learns; an accuracy rises."""
        return self.judged != self.metric

    def said(self, value: float) -> str:
        """Return a value of that mean in a sentence."""
        return significant(value, ANY_WIDTH) if self.falls else _percent(value)

    def name(self) -> str:
        """Return 'ln 1000 = 6.91', or other words if classes are not equally frequent."""
        if abs(self.loss - math.log(self.num_classes)) < 0.02:
            return f"ln {self.num_classes} = {math.log(self.num_classes):.2f}"
        return f"{_nats(self.loss)}, that of guessing by class frequency"


class RecentRows:
    """The last training rows and the last validation rows, which are many steps apart."""

    def __init__(self):
        self._kinds: dict[bool, deque[Row]] = {k: deque(maxlen=KEPT) for k in (False, True)}

    def add(self, row: Row) -> None:
        """Remember a row."""
        self._kinds["val_loss" in row].append(row)

    def together(self) -> list[Row]:
        """Return all rows in the order of their steps."""
        return sorted((row for rows in self._kinds.values() for row in rows), key=_step)


def _step(row: Row) -> int:
    return row["step"]


class SanityWatch:
    """Watches the log rows, and reports when the run starts or stops looking healthy.

    val_samples: the number of images in the validation set.
    """

    def __init__(self, guessing: Guessing, *, val_samples: int):
        self._guessing, self._val_samples = guessing, val_samples
        self._rows = RecentRows()
        self._phase = 0  # a phase is announced once
        self._last_seen: dict[str, int] = {}  # by alarm: number of the last row that raised it
        self._count = 0

    def recall(self, rows: Iterable[Row]) -> None:
        """Take in the rows logged before a resume, without reporting on them again."""
        for row in rows:
            self._rows.add(row)
        known = self._rows.together()
        self._phase, _ = phase(known, self._guessing)
        for kind in alarms(known, self._guessing, val_samples=self._val_samples):
            self._last_seen[kind] = self._count

    def add(self, row: Row) -> list[str]:
        """Take in a row of log.jsonl; return lines that say what has changed, mostly none."""
        self._rows.add(row)
        rows = self._rows.together()
        news = []
        if "train_loss" in row:
            reached, text = phase(rows, self._guessing)
            if reached > self._phase:
                self._phase = reached
                news.append(text)
        self._count += 1
        for kind, text in alarms(rows, self._guessing, val_samples=self._val_samples).items():
            if self._count - self._last_seen.get(kind, -MAX_ROWS) >= MAX_ROWS:
                news.append(text)
            self._last_seen[kind] = self._count
        return news


# ------------------------------------------------------------------------- how far it has come

UNKNOWN, NOTHING, FIRST, EVERYWHERE = range(4)


def phase(rows: Sequence[Row], guessing: Guessing) -> tuple[int, str]:
    """Return how far the training is, UNKNOWN to EVERYWHERE, and that in words."""
    now = recent(rows)
    images = _images(now)
    if images < LEAST_IMAGES:
        return UNKNOWN, ""
    scores = _scores(now, guessing)
    learnt = [q for q, score in scores.items() if score.learnt]
    name, floor = ("accuracy", "chance") if not guessing.falls else (guessing.judged, "guessing")
    window = f" over {len(now)} lines" if len(now) > 1 else ""
    if learnt:
        known = f"{window}, {floor} {guessing.said(guessing.chance)}: learning"
    if learnt and len(learnt) == len(scores):
        shown = " ".join(f"{100 * mean:.0f}" for mean, *_ in scores.values()) + " %"
        if guessing.falls:
            shown = " ".join(guessing.said(mean) for mean, *_ in scores.values())
        if len(scores) == 1:
            return EVERYWHERE, f"{name} {shown}{known}"
        return EVERYWHERE, f"{name} {shown} by quartile of t{known} at every noise level"
    if learnt:
        first = learnt[0]
        text = f"q{first} {name} {guessing.said(scores[first].mean)}{known}"
        if first == 0:
            text += ", nearly clean images first, as it should be"
        elif 0 in scores and _apart(scores[first], scores[0], guessing):
            text += ", but not in q0"
        return FIRST, text
    loss, error = _mean(now, "train_loss"), _mean_and_error(now)[1]
    if None not in (loss, guessing.loss) and loss > guessing.loss - max(
        LITTLE * (guessing.loss - guessing.least), DEVIATIONS * error
    ):
        relation = "near" if loss < 1.05 * guessing.loss else "above"
        known = guessing.name() if relation == "above" else guessing.name().split(" = ")[0]
        return NOTHING, f"loss {_nats(loss)}, {relation} {known}: nothing learnt yet"
    return UNKNOWN, ""


class Score(NamedTuple):
    """The mean that is judged, in a quartile of t, its standard error, and whether it is learnt."""

    mean: float
    error: float
    learnt: bool


def _scores(rows: Sequence[Row], guessing: Guessing) -> dict[int, Score]:
    """Return what is judged, by quartile of t; quartiles without images are left out.

    Empty if it is not known for guessing. Of a loss or an error, whose scatter among images is not
    known, it takes MIN_ROWS rows with the quartile.
    """
    scores: dict[int, Score] = {}
    if guessing.chance is None:
        return scores
    for q in QUARTILES:
        key = f"train_{guessing.judged}_q{q}"
        if not guessing.falls:
            mean, images = _mean(rows, key), _images(rows, q)
            if mean is not None:
                learnt = above_chance(mean, guessing.chance, images)
                scores[q] = Score(mean, _error(mean, images), learnt)
            continue
        mean, error = _mean_and_error(rows, key)
        if mean is not None:
            margin = max(LITTLE * guessing.chance, DEVIATIONS * error)
            scores[q] = Score(mean, error, mean < guessing.chance - margin)
    return scores


def above_chance(accuracy: float, chance: float, images: float) -> bool:
    """Return whether an accuracy over a number of images is more than luck.

    P(accuracy or more by chance) <= exp(-n KL(accuracy || chance)) (Chernoff 1952).
    """
    if accuracy <= chance:
        return False
    rest = (1 - accuracy) * math.log((1 - accuracy) / (1 - chance)) if accuracy < 1 else 0.0
    return images * (accuracy * math.log(accuracy / chance) + rest) > EVIDENCE


# ------------------------------------------------------------------------- what is wrong


def alarms(rows: Sequence[Row], guessing: Guessing, *, val_samples: int) -> dict[str, str]:
    """Return what is wrong, by kind; empty if nothing is seen to be."""
    found = {
        "worse than guessing": worse_than_guessing(rows, guessing),
        "diverging": diverging(rows, guessing),
        "overfitting": overfitting(rows, guessing, val_samples),
        "loss scale": falling_loss_scale(rows),
        "upside down": noisier_is_easier(rows, guessing),
    }
    return {kind: text for kind, text in found.items() if text}


def worse_than_guessing(rows: Sequence[Row], guessing: Guessing) -> str | None:
    """Return a line if the loss has been above that of guessing for long."""
    now = recent(rows)
    loss, error = _mean_and_error(now)
    if None in (loss, guessing.loss) or loss - DEVIATIONS * error < 1.1 * guessing.loss:
        return None
    return (
        f"loss {_nats(loss)} over {len(now)} lines, above {guessing.name()}: worse than guessing; "
        "do: lower --lr"
    )


def diverging(rows: Sequence[Row], guessing: Guessing) -> str | None:
    """Return a line if the loss is well above its lowest value so far."""
    now, *before = windows(rows)
    loss, error = _mean_and_error(now)
    lowest = min(((*_mean_and_error(w), w) for w in before), default=None, key=lambda w: w[0])
    if None in (loss, lowest, guessing.loss):
        return None
    then, its_error, window = lowest
    if loss - then < 0.1 * guessing.loss + DEVIATIONS * math.hypot(error, its_error):
        return None
    return (
        f"loss {_nats(loss)}, up from {_nats(then)} at step {window[-1]['step']}: diverging; do: "
        "if it continues, lower --lr"
    )


def overfitting(rows: Sequence[Row], guessing: Guessing, val_samples: int) -> str | None:
    """Return a line if training is far ahead of validation, or ahead while its loss rises.

    Of a loss or an error, the distance is a share of that of guessing.
    """
    key = f"val_{guessing.judged}"
    needed = ("val_loss", key)
    validations = [row for row in rows if all(_is_number(row.get(name)) for name in needed)]
    trained = recent(
        [row for row in rows if validations and row["step"] <= validations[-1]["step"]]
    )
    score = _uniform_score(trained, guessing)
    if score is None or not val_samples:
        return None
    last = validations[-1]
    best = min(validations, key=lambda row: row["val_loss"])
    held_out = last[key]
    if guessing.falls:  # its scatter among images is about as large as the error of guessing
        scatter = guessing.chance / math.sqrt(val_samples)
    else:
        scatter = _error(held_out, val_samples)
    gap = abs(score.mean - held_out) - DEVIATIONS * math.hypot(score.error, scatter)
    ahead = score.mean < held_out if guessing.falls else score.mean > held_out
    rising = last["val_loss"] > 1.05 * best["val_loss"]
    unit = guessing.chance if guessing.falls else 1.0
    if not ahead or gap < (0.05 if rising else 0.2) * unit:
        return None
    name = guessing.judged if guessing.falls else "accuracy"
    text = f"training {name} {guessing.said(score.mean)}, validation {guessing.said(held_out)}"
    if rising:
        text += f", loss up from {_nats(best['val_loss'])} at step {best['step']}"
    better = "; take checkpoints/best" if best["step"] != last["step"] else ""
    return f"{text}: overfitting{better}"


def falling_loss_scale(rows: Sequence[Row]) -> str | None:
    """Return a line if fp16's loss scale fell by 2^5 in three steps or more, and never rose.

    Its fall to 2^16, where DeepSpeed begins by default, is none: JSONs may begin far above.
    """
    trained = [
        row | {"lg_loss_scale": min(row["lg_loss_scale"], 16)}
        for row in rows
        if row.get("lg_loss_scale") is not None
    ]
    falls, top = 0, None
    for before, row in pairwise(trained):
        change = row["lg_loss_scale"] - before["lg_loss_scale"]
        if change > 0:
            falls, top = 0, None
        elif change < 0:
            falls, top = falls + 1, top or before
    if falls < 3 or top["lg_loss_scale"] - trained[-1]["lg_loss_scale"] < 5:
        return None
    return (
        f"loss scale down from 2^{top['lg_loss_scale']:g} at step {top['step']} to "
        f"2^{trained[-1]['lg_loss_scale']:g}, never up: gradients overflow; do: use bf16, or lower "
        "--lr"
    )


def noisier_is_easier(rows: Sequence[Row], guessing: Guessing) -> str | None:
    """Return a line if more noise is easier: then something is mixed up."""
    now = recent(rows)
    scores = _scores(now, guessing)
    if not {0, 3} <= scores.keys() or len(now) < MIN_ROWS:
        return None
    clean, noisy = scores[0], scores[3]
    if not _apart(noisy, clean, guessing):
        return None
    name, side = (guessing.judged, "below") if guessing.falls else ("accuracy", "above")
    return (
        f"{name} {guessing.said(noisy.mean)} in q3, most noise, {side} "
        f"{guessing.said(clean.mean)} in q0, least: odd, since noise hides what an image shows"
    )


# ------------------------------------------------------------------------- rows together


def recent(rows: Sequence[Row]) -> list[Row]:
    """Return the last training rows: as few as hold IMAGES, at least MIN_ROWS and at most MAX_ROWS,
    but as many as hold LEAST_IMAGES."""
    return next(windows(rows), [])


def windows(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the training rows in parts like that of `recent`, the newest first; a rest that is too
    small for a part is left out, except the newest one."""
    trained = [row for row in rows if _is_number(row.get("train_loss"))]
    part: list[Row] = []
    first = True
    for row in reversed(trained):
        part.insert(0, row)
        images = _images(part)
        enough = images >= IMAGES and len(part) >= MIN_ROWS
        if enough or (len(part) >= MAX_ROWS and images >= LEAST_IMAGES):
            yield part
            part, first = [], False
    if first:
        yield part


def _images(rows: Sequence[Row], quartile: int | None = None) -> float:
    """Return the number of images behind these rows; for one quartile of t the logged count, or a
    quarter of all if none was logged."""
    if quartile is None:
        return sum(row.get("window_samples") or 0 for row in rows)
    counts = (row.get(f"window_samples_q{quartile}") for row in rows)
    counted = [count for count in counts if count is not None]
    if len(counted) < len(rows):
        # Rows of earlier versions, which knew only one class per image.
        return _images([row for row in rows if row.get(f"train_acc@1_q{quartile}") is not None]) / 4
    return sum(counted)


def _mean(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean over the images of all rows that have the key."""
    having = [row for row in rows if _is_number(row.get(key))]
    quartile = int(key[-1]) if key[-3:-1] == "_q" else None
    counts = [_images([row], quartile) for row in having]
    if not sum(counts):
        return None
    return sum(n * row[key] for n, row in zip(counts, having, strict=True)) / sum(counts)


def _uniform_score(rows: Sequence[Row], guessing: Guessing) -> Score | None:
    """Return what is judged under uniform t, as validation's is; None if it is not known.

    Every quartile has the same weight, however often a schedule sampler draws it.
    """
    scores = _scores(rows, guessing)
    if len(scores) == len(QUARTILES):
        mean = sum(score.mean for score in scores.values()) / len(scores)
        return Score(mean, math.hypot(*(s.error for s in scores.values())) / len(scores), False)
    key = f"train_{guessing.judged}"
    if guessing.falls:
        mean, error = _mean_and_error(rows, key) if guessing.chance is not None else (None, 0.0)
    else:
        mean = _mean(rows, key)
        error = 0.0 if mean is None else _error(mean, _images(rows))
    return None if mean is None else Score(mean, error, False)


def _apart(better: Score, worse: Score, guessing: Guessing) -> bool:
    """Return whether one score is better than another by more than luck."""
    gain = better.mean - worse.mean
    gain = -gain if guessing.falls else gain
    return gain >= DEVIATIONS * math.hypot(better.error, worse.error)


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _mean_and_error(rows: Sequence[Row], key: str = "train_loss") -> tuple[float | None, float]:
    """Return a mean and its standard error by the rows' scatter; (None, 0) for few rows."""
    values = [row[key] for row in rows if _is_number(row.get(key))]
    if len(values) < MIN_ROWS:
        return None, 0.0
    return _mean(rows, key), float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _error(share: float, images: float) -> float:
    """Return the standard error of a share of a number of images; never 0 (Agresti-Coull)."""
    share = (share * images + 2) / (images + 4)
    return math.sqrt(share * (1 - share) / images)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _nats(loss: float) -> str:
    """Return a loss with two decimals, or, if it is small, with two digits."""
    return f"{loss:.2f}" if abs(loss) >= 0.2 else f"{loss:.2g}"
