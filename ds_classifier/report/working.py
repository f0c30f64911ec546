"""The report's section "Is it working?": fitness to guide, and how the training went.

Each line has one of three signs: GOOD, nothing to do; DOUBTFUL, read it; BAD, act on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ds_classifier.common.text import count, percent
from ds_classifier.report.data import RunData, attempts_of
from ds_classifier.report.fitness import BAD, DOUBTFUL, GOOD, KNOWS_LITTLE, Line, fitness
from ds_classifier.training.logs import sanity

SIGNS = {GOOD: "✓", DOUBTFUL: "?", BAD: "!"}
WAITING = 0.2  # the share of time waiting for data from which on it is reported
WORSE = 1.1  # times the best validation loss: training is past its best


def checks(run: RunData) -> list[dict]:
    """Return what the numbers say, in groups of lines with a sign."""
    groups = [("Fit to guide?", fitness), ("Training", training)]
    return [{"name": name, "lines": _lines(judge, run)} for name, judge in groups]


def _lines(judge: Callable[[RunData], list[Line]], run: RunData) -> list[dict[str, str]]:
    """Return a group's lines; one that says so if a damaged file cannot be judged."""
    try:
        found = judge(run)
    except Exception as error:  # a file is damaged, or of another version
        found = [(DOUBTFUL, f"This cannot be judged: {type(error).__name__}: {error}")]
    return [dict(kind=kind, sign=SIGNS[kind], text=text) for kind, text in found]


def training(run: RunData) -> list[Line]:
    """Return what the log says about the training."""
    found = [*_learning(run), *_validating(run), *_losses(run)]
    if found:
        return found
    return [(DOUBTFUL, "No step is logged yet; the first line comes after --log_interval steps.")]


def _learning(run: RunData) -> list[Line]:
    """Return what sanity.py says about the last rows, the same as in the log."""
    loss, guessing = run.training.recent("train_loss"), run.guessing
    if not run.training.rows:
        return []
    if loss is None:
        return [(BAD, "The last training losses are not finite: lower --lr, or use a bf16 config.")]
    if guessing is None:
        return [(DOUBTFUL, f"Training loss {loss:.3f}; the number of classes is not known.")]
    reached, text = sanity.phase(run.recent, guessing)
    losses = f"Training loss {loss:.3f}"
    if guessing.loss is not None:
        losses += f", that of guessing {guessing.loss:.3f}"
    if reached == sanity.UNKNOWN:
        found = [(DOUBTFUL, f"{losses}: not enough images yet to say whether it learns.")]
    elif reached == sanity.NOTHING:
        advice = "This is usual early in a run; later, try another --lr."
        found = [(BAD, f"{_sentence(text)} {advice}")]
    else:
        sign = GOOD if reached == sanity.EVERYWHERE else DOUBTFUL
        found = [(sign, f"{_sentence(text)} {losses}.")]
    wrong = sanity.alarms(run.recent, guessing, val_samples=run.val_samples)
    return found + [(BAD, _sentence(alarm)) for alarm in wrong.values()]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _validating(run: RunData) -> list[Line]:
    """Return the last validation loss and the best one."""
    points = [p for p in run.validation.points("val_loss") if math.isfinite(p[1])]
    if not points:
        text = "No validation: the numbers are those of the training images."
        return [(DOUBTFUL, text)] * bool(run.training.rows)
    best_step, best = min(points, key=lambda point: point[1])
    step, last = points[-1]
    text = f"Validation loss {last:.3f} at step {step:,.0f}; its best is {best:.3f}"
    text += f", at step {best_step:,.0f}"
    if last > WORSE * best:
        return [(DOUBTFUL, f"{text}: take checkpoints/best.")]
    guess = run.guessing
    known = guess is not None and guess.loss is not None
    if known and last - guess.least > (1 - KNOWS_LITTLE) * (guess.loss - guess.least):
        return [(DOUBTFUL, f"{text}. Guessing has {guess.loss:.3f}: train longer.")]
    return [(GOOD, f"{text}.")]


def _losses(run: RunData) -> list[Line]:
    """Return what was lost (steps, images, checkpoints, attempts) and the time spent waiting."""
    found = []
    wait = run.training.recent("data_wait_frac")
    if wait is not None and wait > WAITING:
        found.append(
            (BAD, f"{percent(wait, 0)} of the time is spent waiting for data: use more --workers, "
             "smaller stored images (ds-classifier convert --image_size), or --resize fast.")
        )  # fmt: skip
    skipped = int(run.training.last("skipped_steps") or len(run.skipped))
    if skipped:
        usual = run.deepspeed.get("fp16", {}).get("enabled") and skipped <= 0.01 * run.step + 20
        why = "; fp16 finds its loss scale this way" if usual else ""
        found.append(
            (GOOD if usual else BAD, f"{count(skipped, 'step')} skipped because a gradient was "
             f"not finite{why}.")
        )  # fmt: skip
    bad = int(run.training.last("bad_samples") or len(run.bad_samples))
    if bad:
        found.append(
            (
                DOUBTFUL,
                f"{count(bad, 'image')} could not be decoded; bad_samples.rank*.jsonl lists them.",
            )
        )
    failed = sum(event["event"] == "save failed" for event in run.events)
    if failed:
        found.append((BAD, f"{count(failed, 'checkpoint')} could not be written."))
    ends = [attempt.end for attempt in attempts_of(run)]
    unplanned = sum(end in ("killed", "failed") for end in ends)
    if unplanned:
        found.append(
            (
                DOUBTFUL,
                f"{unplanned} of {count(len(ends), 'attempt')} ended by a fault or a kill; see the "
                "timeline.",
            )
        )
    if run.training.rows and not (skipped or bad or failed or unplanned):
        found.append((GOOD, "No step was skipped, no image lost, every checkpoint written."))
    return found
