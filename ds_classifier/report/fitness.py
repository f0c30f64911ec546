"""Judges from an evaluation at noise levels whether a classifier is fit to guide.

Each line has a sign, a fact, and what to do unless the sign is GOOD. The thresholds are those of
docs/evaluation.md, "Is it fit to guide?".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ds_classifier.common.text import count, percent, short
from ds_classifier.data.labels.targets import ONE_CLASS
from ds_classifier.evaluation.format import PRECISIONS, targets_of
from ds_classifier.evaluation.metrics import ECE_BINS, accuracy_of, metrics_of
from ds_classifier.report.data import RunData
from ds_classifier.training.logs.sanity import EVIDENCE, Guessing, above_chance

GOOD, DOUBTFUL, BAD = "good", "doubtful", "bad"
Line = tuple[str, str]  # GOOD, DOUBTFUL or BAD; a sentence
Row = dict[str, Any]  # an evaluation's numbers at a noise level

# The share of the labels' entropy that a classifier explains on clean images: 0.95 for digits32.
KNOWS, KNOWS_LITTLE = 0.5, 0.2
# At a lower log-SNR noise has hidden most of an image, and a sampler decides its class: digits32 is
# guided by what it knows at log-SNR -2 to -5 (docs/guidance.md, "Does it guide?").
DEEP_IN_NOISE = -2.0
WORSE = 0.01  # of the loss of guessing: by this excess a gradient misleads, and is not just weak
CALIBRATED, MISCALIBRATED = 0.05, 0.1  # expected calibration error
# A gradient is too long if it is TOO_LONG times that of the exact posterior (classifiers that guide
# well reach 1.9), and LOUD times the longest one that the exact posterior has: others do nothing.
TOO_LONG, LOUD = 2.0, 0.1
GUIDES = 0.75  # the share of samples of the class asked for: the best classifier gets all of them


def fitness(run: RunData) -> list[Line]:
    """Return what the newest evaluation and the measured samples say about guiding with a run."""
    measured = list(_shares(run))
    if not run.evaluations:
        text = (
            "It is not measured yet whether the classifier is fit to guide; do: "
            f"ds-classifier evaluate {run.named}"
        )
        return [*measured, (DOUBTFUL, text)]
    record = run.evaluations[-1]
    guessing = class_prior(record, run.guessing)
    rows = [row for row in record["classifier"]["levels"] if row["loss"] is not None]
    noisy = run.settings.get("schedule_sampler") != "noisy"
    train = "train longer" + ", or with --schedule_sampler noisy" * noisy
    train += ", or over a wider --t_range" * bool(run.settings.get("t_range"))
    better = ["take checkpoints/best"] if run.best_step not in (None, record["step"]) else []
    judged = [
        *_recorded(run, record),
        *_not_finite(record["classifier"]["levels"]),
        *_clean(record, rows, guessing, better),
        *_reach(record, rows, guessing, train),
        *_calibration(record, [row for row in rows if is_better(row, guessing)], better),
        *_worse(record, rows, guessing, train),
    ]
    return measured + judged


def class_prior(record: dict[str, Any], in_training: Guessing | None = None) -> Guessing:
    """Return the score of guessing the class of the evaluated images by class frequencies.

    A classifier knows the frequencies of the training images alone. Few held-out images may be less
    evenly spread over the classes than these; then the loss is that in training. It is exact if the
    classes of the training images are equally frequent, or as frequent as in the held-out ones.
    """
    images, targets = record["classifier"]["per_class"][0]["samples"], targets_of(record)
    if targets != ONE_CLASS:
        prior = Guessing.from_scores(record["data"]["guessing"], len(images), targets)
    else:
        prior = Guessing.of(np.repeat(np.arange(len(images)), images), len(images))
    if in_training is None or (in_training.loss or 0.0) <= prior.loss:
        return prior
    return dataclasses.replace(prior, loss=in_training.loss)


def is_better(row: Row, guessing: Guessing) -> bool:
    """Return whether a classifier is better than guessing by class frequency, by more than luck.

    If x_t said nothing about the class, the product over the n images of p(y | x_t) / p(y) would
    have the mean 1, so that P(product >= exp(a)) <= exp(-a) (Markov). Its logarithm is
    n (loss of guessing - loss). Of soft vectors and of yes/no answers the loss is a mean of such
    logarithms, to which the same bound applies (Jensen).
    """
    if guessing.mae is not None:  # of a value in bins; the likeliest bin may be right by luck alone
        right = row["mae"] < guessing.mae
    else:
        right = _accuracy(row) > guessing.accuracy
    return right and _gain(row, guessing) > EVIDENCE


def _accuracy(row: Row) -> float:
    """Return the accuracy at a noise level, of the class or of yes/no answers."""
    return row.get("acc@1", row.get("acc")) or 0.0


def _gain(row: Row, guessing: Guessing) -> float:
    """Return the log-likelihood, nats, by which the classifier is ahead of guessing."""
    return (row["samples"] - row["not_finite"]) * (guessing.loss - row["loss"])


# ------------------------------------------------------------------------------ the lines


def _recorded(run: RunData, record: dict[str, Any]) -> Iterator[Line]:
    """Yield lines if the evaluation is not of the newest checkpoint, or in 16 bits."""
    newest, again = run.latest_step, f"do: ds-classifier evaluate {run.named}"
    if newest is not None and record["step"] is not None and record["step"] < newest:
        yield (
            DOUBTFUL,
            f"The newest evaluation is of step {record['step']:,}, the newest checkpoint of step "
            f"{newest:,}; {again}",
        )
    elif record["precision"] != PRECISIONS[0]:
        yield (
            DOUBTFUL,
            f"The evaluation is in {record['precision']}, whose rounding it measures too; {again}",
        )


def _not_finite(rows: Sequence[Row]) -> Iterator[Line]:
    """Yield a line if answers or gradients are not finite."""
    broken = [row for row in rows if row["not_finite"]]
    if broken:
        most = max(row["not_finite"] for row in broken)
        yield (
            BAD,
            f"At {_ranges(rows, broken)} the answers to up to {count(most, 'image')} are not "
            "finite; do: guide in fp32, or lower --lr and train again.",
        )


def _clean(
    record: dict[str, Any], rows: Sequence[Row], guessing: Guessing, better: list[str]
) -> Iterator[Line]:
    """Yield a line on how much of the labels the least noisy images explain.

    better: advice on a better checkpoint than the one that is judged, if there is one.
    """
    if not rows:
        return
    row = rows[0]
    share = 0.0
    if guessing.loss > guessing.least:
        share = 1 - (row["loss"] - guessing.least) / (guessing.loss - guessing.least)
    targets = targets_of(record)
    accuracy, loss = accuracy_of(targets), metrics_of(targets)["loss"]
    labels = "evaluated" if guessing.loss == class_prior(record).loss else "training"
    text = (
        f"At t = {row['t']} its {loss.words} is {row['loss']:.3f}, where guessing by the "
        f"{targets.noun} frequencies of the {labels} images has {guessing.loss:.3f}; "
    )
    if guessing.mae is None:
        text += (
            f"{accuracy.words} {percent(row[accuracy.name])}, chance among the evaluated images "
            f"{percent(guessing.accuracy)}"
        )
    else:
        text += (
            f"mean absolute error of {targets.name} {short(row['mae'])}, that of guessing the mean "
            f"of the evaluated images {short(guessing.mae)}"
        )
    if guessing.least:
        text += f"; the labels themselves leave {guessing.least:.3f}"
    images = row["samples"] - row["not_finite"]
    if share < KNOWS_LITTLE and guessing.mae is not None and is_better(row, guessing):
        yield BAD, f"{text}: it knows little of the answer; do: train longer."
    elif share < KNOWS_LITTLE and above_chance(_accuracy(row), guessing.accuracy, images):
        advice = ", ".join([*better, "train on more images", "or longer"])
        yield (
            BAD,
            f"{text}: it tells classes apart, but its probabilities are hardly better than none; "
            f"do: {advice}.",
        )
    elif share < KNOWS_LITTLE:
        yield BAD, f"{text}: it knows next to nothing; do: train longer, or try another --lr."
    elif share < KNOWS:
        yield DOUBTFUL, f"{text}: it knows less than half of the answer; do: train longer."
    else:
        yield GOOD, f"{text}."


def _reach(
    record: dict[str, Any], rows: Sequence[Row], guessing: Guessing, train: str
) -> Iterator[Line]:
    """Yield a line on the noise levels at which the classifier is better than guessing."""
    noun = targets_of(record).noun
    better = [row for row in rows if is_better(row, guessing)]
    if not better:
        yield (
            BAD,
            f"At no noise level is it better than guessing by {noun} frequency, by more than luck; "
            f"do: {train}, and do not guide with it yet.",
        )
        return
    text = f"It is better than guessing by {noun} frequency at {_ranges(rows, better)}"
    bayes = record.get("bayes")
    known = [row for row in bayes["levels"] if row["loss"] is not None] if bayes else []
    known = [row["t"] for row in known if is_better(row, guessing)]
    if known:
        text += f" (the exact posterior of its training images up to t = {max(known)})"
    last = better[-1]
    if last["log_snr"] <= DEEP_IN_NOISE:
        yield GOOD, f"{text}."
    elif last is rows[-1]:
        yield DOUBTFUL, f"{text}; do: evaluate at more noise, which --timesteps left out."
    else:
        beyond = (f"{row['log_snr']:.1f}" for row in (rows[rows.index(last) + 1], rows[-1]))
        yield (
            DOUBTFUL,
            f"{text}, but not at log-SNR {' to '.join(dict.fromkeys(beyond))}, where a sampler "
            f"decides what an image will be; do: {train}.",
        )


def _worse(
    record: dict[str, Any], rows: Sequence[Row], guessing: Guessing, train: str
) -> Iterator[Line]:
    """Yield a line on the levels where the classifier is worse than guessing, or too sure."""

    def proven(row: Row) -> bool:
        return _gain(row, guessing) < -EVIDENCE

    def clear(row: Row) -> bool:
        return row["loss"] > (1 + WORSE) * guessing.loss

    groups = _groups(rows, lambda row: row["loss"] > guessing.loss)
    groups = [group for group in groups if any(proven(row) or clear(row) for row in group)]
    if not groups:
        yield from _too_long(record, rows, train)
        return
    worse = [row for group in groups for row in group]
    worst, targets = max(worse, key=lambda row: row["loss"]), targets_of(record)
    loss = metrics_of(targets)["loss"]
    text = (
        f"At {_ranges(rows, worse)} it is worse than guessing by {targets.noun} frequency: "
        f"{loss.words} {worst['loss']:.3f} at t = {worst['t']}, guessing {guessing.loss:.3f}"
    )
    best = _exact_gradients(record).get(worst["t"])
    if best is not None and worst["grad_norm"] is not None:
        text += (
            f"; its gradient there has the norm {short(worst['grad_norm'])}, that of the exact "
            f"posterior {short(best)}"
        )
    sign = BAD if proven(worst) and clear(worst) else DOUBTFUL
    if not proven(worst):
        text += f", though {count(worst['samples'], 'image')} are too few to be sure"
    first = groups[-1][0]["t"]
    below = f"guide only at t below {first}, or " if groups[-1][-1] is rows[-1] and first else ""
    yield sign, f"{text}; do: {below}{train}."


def _too_long(record: dict[str, Any], rows: Sequence[Row], train: str) -> Iterator[Line]:
    """Yield a line on the gradient at high noise, where the classifier is not worse than guessing.

    There it should vanish, as that of the exact posterior does.
    """
    exact = _exact_gradients(record)
    longest = max(exact.values(), default=0.0)
    known = [row for row in rows if row["t"] in exact and row["grad_norm"] is not None]
    long = [
        row for row in known if row["grad_norm"] > max(TOO_LONG * exact[row["t"]], LOUD * longest)
    ]
    if long:
        row = long[-1]
        yield (
            DOUBTFUL,
            f"It is nowhere worse than guessing, but at {_ranges(rows, long)} its gradient is too "
            f"long: its norm is {short(row['grad_norm'])} at t = {row['t']}, that of the exact "
            f"posterior {short(exact[row['t']])}; do: {train}.",
        )
    elif rows:
        yield GOOD, f"It is nowhere worse than guessing, up to t = {rows[-1]['t']}."


def _exact_gradients(record: dict[str, Any]) -> dict[int, float]:
    """Return by t the gradient norm of the exact posterior of the training images.

    Levels where that posterior predicts the evaluated images no better than the classifier are
    left out: at little noise it is overconfident, and so is its gradient.
    """
    ours = {row["t"]: row["loss"] for row in record["classifier"]["levels"]}
    return {
        row["t"]: row["grad_norm"]
        for row in (record.get("bayes") or {"levels": []})["levels"]
        if None not in (row["loss"], row["grad_norm"], ours.get(row["t"]))
        and row["loss"] <= ours[row["t"]]
    }


def _calibration(record: dict[str, Any], rows: Sequence[Row], better: list[str]) -> Iterator[Line]:
    """Yield a line on the calibration at the levels where the classifier is worth following.

    better: see `_clean`.
    """
    rows = [row for row in rows if row["ece"] is not None]
    if not rows:
        return
    low, high = min(row["ece"] for row in rows), max(rows, key=lambda row: row["ece"])
    text = f"Its calibration error is {percent(low)} to {percent(high['ece'])} at these levels"
    above = [row for row in rows if row["ece"] > max(CALIBRATED, luck_of_calibration(row))]
    luck, images = max(map(luck_of_calibration, rows)), high["samples"]
    if above:
        sure = _overconfidence(record)
        advice = "train longer, or guide at a larger scale"
        if sure > 0:
            cooler = (
                "sample with both temperatures below 1 (sample.py --joint_temperature 0.8 "
                "--marginal_temperature 0.8)"
            )
            advice = ", or ".join([*better, cooler])
        yield (
            BAD if max(row["ece"] for row in above) > MISCALIBRATED else DOUBTFUL,
            f"{text}, above {percent(CALIBRATED, 0)} at {_ranges(rows, above)}: it is too "
            f"{'sure' if sure > 0 else 'unsure'}; do: {advice}.",
        )
    elif luck > MISCALIBRATED:
        yield (
            DOUBTFUL,
            f"{text}, which says little: with {count(images, 'image')} luck alone makes up to "
            f"{percent(luck)}; do: evaluate on more images.",
        )
    elif high["ece"] > CALIBRATED:
        yield GOOD, f"{text}, no more than luck makes with {count(images, 'image')}."
    else:
        yield GOOD, f"{text}, at most {percent(CALIBRATED, 0)}."


def luck_of_calibration(row: Row) -> float:
    """Return a bound on the mean calibration error of a perfectly calibrated classifier.

    In a bin of n_b images of confidence c, |hits - n_b c| has a mean of about
    sqrt(2 / pi) sqrt(n_b c (1 - c)). By Cauchy and Schwarz the sum over B bins, divided by the
    number of images n, is at most sqrt(2 / pi) sqrt(B v / n), where v, the mean of c (1 - c), is
    at most that of the mean confidence: the accuracy.
    """
    accuracy = _accuracy(row)
    variance = accuracy * (1 - accuracy) / max(1, row["samples"] - row["not_finite"])
    return math.sqrt(2 / math.pi * ECE_BINS * variance)


def _overconfidence(record: dict[str, Any]) -> float:
    """Return by how many images of all, under uniform t, confidence exceeds accuracy."""
    bins = record["classifier"]["reliability"][0]["bins"]
    return sum(row["samples"] * row["confidence"] - row["correct"] for row in bins)


def _shares(run: RunData) -> Iterator[Line]:
    """Yield a line on the share of guided samples that show the class asked for."""
    samples = run.samples
    if samples is None or not any(scale for scale in samples.shares):
        return
    guided = {scale: share for scale, share in samples.shares.items() if scale}
    scale = max(guided, key=lambda scale: guided[scale])
    chance = samples.shares.get(0.0, 1 / max(1, len(samples.asked)))
    text = (
        f"Guided at scale {scale:g}, {percent(guided[scale], 0)} of "
        f"{count(samples.number, 'sample')} show the class asked for, unguided "
        f"{percent(chance, 0)}"
    )
    if guided[scale] >= GUIDES:
        yield GOOD, f"{text}."
    elif above_chance(guided[scale], chance, samples.number):
        yield DOUBTFUL, f"{text}; do: train longer, or try a larger --classifier_scale."
    else:
        yield BAD, f"{text}: it does not guide; do: train longer, or see the lines below."


# ------------------------------------------------------------------------------ levels in words


def _groups(rows: Sequence[Row], chosen: Callable[[Row], bool]) -> list[list[Row]]:
    """Return the chosen rows, in groups of neighbours."""
    groups: list[list[Row]] = [[]]
    for row in rows:
        if chosen(row):
            groups[-1].append(row)
        elif groups[-1]:
            groups.append([])
    return [group for group in groups if group]


def _ranges(rows: Sequence[Row], some: Iterable[Row]) -> str:
    """Return "t = 0 to 138 and 602 to 924" for some of the rows."""
    chosen = {row["t"] for row in some}
    groups = _groups(rows, lambda row: row["t"] in chosen)
    ends = [(group[0]["t"], group[-1]["t"]) for group in groups]
    return "t = " + " and ".join(f"{a} to {b}" if a != b else f"{a}" for a, b in ends)
