"""The report's sections on training: the headline, what the numbers say, the curves."""

from __future__ import annotations

import math

from ds_classifier.common.text import count, percent, short
from ds_classifier.report import plots
from ds_classifier.report.data import Columns, RunData, attempts_of, thin
from ds_classifier.report.plots import Axis, Line
from ds_classifier.training import sanity

GOOD, NOTE, BAD = "good", "note", "bad"
SIGNS = {GOOD: "✓", NOTE: "i", BAD: "!"}
WAITING = 0.2  # the share of time waiting for data from which on it is reported
WORSE = 1.1  # times the best validation loss: training is past its best
TOP_5_FROM = 20  # classes; with fewer, top-5 accuracy says little
RECENT = 5  # rows of the log whose mean stands for the present


# ------------------------------------------------------------------------------ headline


def headline(run: RunData) -> list[dict[str, str]]:
    """Return the last numbers, which the page shows in large figures: value, text, more."""
    held_out = run.validation.rows > 0
    source, prefix = (run.validation, "val") if held_out else (run.training, "train")
    where = "held out" if held_out else "training, no validation"
    clean = (
        (percent(source.last("val_acc@1_t0")), "top-1 at t = 0", where)
        if held_out
        else (percent(source.last("train_acc@1_q0")), "top-1, least noise", "first quarter of t")
    )
    figures = [
        (percent(source.last(f"{prefix}_acc@1")), "top-1, all noise levels", where),
        clean,
        (_loss(source.last(f"{prefix}_loss")), "cross-entropy, nats", _chance(run)),
        (f"{run.step:,}", f"of {run.iterations:,} steps", _samples(run)),
        (_speed(run), "images per second", _wait(run)),
        best_checkpoint(run),
    ]
    return [dict(value=value, text=text, more=more) for value, text, more in figures]


def best_checkpoint(run: RunData) -> tuple[str, str, str]:
    """Return the step of checkpoints/best, what it is, and its validation loss."""
    name, _, loss = run.best.partition(" val_loss ")
    step = name.removeprefix("step-").lstrip("0")
    if not name or not (step.isdigit() and loss):
        return "-", "best checkpoint", "none is validated yet"
    return f"{int(step):,}", "best checkpoint (step)", f"validation loss {float(loss):.4g}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _chance(run: RunData) -> str:
    guessing, classes = run.guessing, run.num_classes
    if guessing is None:
        return ""
    equal = classes and abs(guessing.loss - math.log(classes)) < 0.02
    return f"guessing: {f'ln {classes:,} = ' if equal else ''}{guessing.loss:.3f}"


def _samples(run: RunData) -> str:
    samples = run.training.last("samples")
    return f"{short(samples)} images seen" if samples else ""


def _speed(run: RunData) -> str:
    speed = _recent(run.training, "images_per_sec")
    return "-" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _wait(run: RunData) -> str:
    wait = _recent(run.training, "data_wait_frac")
    return "" if wait is None else f"waiting for data {percent(wait, 0)}"


def _recent(columns: Columns, key: str) -> float | None:
    """Return the mean over the last rows, or None if no value in them is finite."""
    known = [value for value in columns[key][-RECENT:] if math.isfinite(value)]
    return sum(known) / len(known) if known else None


# ------------------------------------------------------------------------------ checks


def checks(run: RunData) -> list[dict[str, str]]:
    """Return what the numbers say, one line each: kind, sign, text."""
    found = [*_learning(run), *_validating(run), *_losses(run)]
    if not found:
        found = [(NOTE, "No step is logged yet; the first line comes after --log_interval steps.")]
    return [dict(kind=kind, sign=SIGNS[kind], text=text) for kind, text in found]


def _learning(run: RunData) -> list[tuple[str, str]]:
    """Return what sanity.py says about the last rows, the same as in the log."""
    loss, guessing = _recent(run.training, "train_loss"), run.guessing
    if not run.training.rows:
        return []
    if loss is None:
        return [(BAD, "The last training losses are not finite: lower --lr, or use a bf16 config.")]
    if guessing is None:
        return [(NOTE, f"Training loss {loss:.3f}; the number of classes is not known.")]
    reached, text = sanity.phase(run.recent, guessing)
    losses = f"Training loss {loss:.3f}, that of guessing {guessing.loss:.3f}"
    if reached == sanity.UNKNOWN:
        found = [(NOTE, f"{losses}: not enough images yet to say whether it learns.")]
    elif reached == sanity.NOTHING:
        advice = "This is usual early in a run; later, try another --lr."
        found = [(BAD, f"{_sentence(text)} {advice}")]
    else:
        found = [(GOOD, f"{_sentence(text)} {losses}.")]
    wrong = sanity.alarms(run.recent, guessing, val_samples=run.val_samples)
    return found + [(BAD, _sentence(alarm)) for alarm in wrong.values()]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _validating(run: RunData) -> list[tuple[str, str]]:
    """Return the last validation loss and the best one."""
    points = [p for p in run.validation.points("val_loss") if math.isfinite(p[1])]
    if not points:
        text = "No validation: the numbers are those of the training images."
        return [(NOTE, text)] * bool(run.training.rows)
    best_step, best = min(points, key=lambda point: point[1])
    step, last = points[-1]
    text = f"Validation loss {last:.3f} at step {step:,.0f}; its best is {best:.3f}"
    if last > WORSE * best:
        return [(NOTE, f"{text}, at step {best_step:,.0f}: take checkpoints/best.")]
    return [(GOOD, f"{text}, at step {best_step:,.0f}.")]


def _losses(run: RunData) -> list[tuple[str, str]]:
    """Return what was lost (steps, images, checkpoints, attempts) and the time spent waiting."""
    found = []
    wait = _recent(run.training, "data_wait_frac")
    if wait is not None and wait > WAITING:
        found.append(
            (BAD, f"{percent(wait, 0)} of the time is spent waiting for data: use more --workers, "
             "smaller stored images (make_shards.py --image_size), or --resize fast.")
        )  # fmt: skip
    skipped = int(run.training.last("skipped_steps") or len(run.skipped))
    if skipped:
        usual = run.deepspeed.get("fp16", {}).get("enabled") and skipped <= 0.01 * run.step + 20
        why = "; fp16 finds its loss scale this way" if usual else ""
        found.append(
            (NOTE if usual else BAD, f"{count(skipped, 'step')} skipped because a gradient was "
             f"not finite{why}.")
        )  # fmt: skip
    bad = int(run.training.last("bad_samples") or len(run.bad_samples))
    if bad:
        found.append(
            (NOTE, f"{count(bad, 'image')} could not be decoded; bad_samples.rank*.jsonl lists "
             "them.")
        )  # fmt: skip
    failed = sum(event["event"] == "save failed" for event in run.events)
    if failed:
        found.append((BAD, f"{count(failed, 'checkpoint')} could not be written."))
    ends = [attempt.end for attempt in attempts_of(run)]
    unplanned = sum(end in ("killed", "failed") for end in ends)
    if unplanned:
        found.append(
            (NOTE, f"{unplanned} of {count(len(ends), 'attempt')} ended by a fault or a kill; see "
             "the timeline.")
        )  # fmt: skip
    if run.training.rows and not (skipped or bad or failed or unplanned):
        found.append((GOOD, "No step was skipped, no image lost, every checkpoint written."))
    return found


# ------------------------------------------------------------------------------ curves


def curves(run: RunData) -> list[str] | str:
    """Return charts over steps as SVG."""
    train, val = run.training, run.validation
    if not train.rows and not val.rows:
        return "No step is logged yet."
    classes, guessing = run.num_classes, run.guessing
    chance = None if guessing is None else (guessing.accuracy, "chance")
    guess = None if guessing is None else (guessing.loss, "guessing")
    nats, share = Axis(0), plots.SHARE
    charts = [
        ("Cross-entropy, nats", _train_and_val(run, "loss"), nats, guess),
        ("Top-1 accuracy", _train_and_val(run, "acc@1"), share, chance),
        ("Training loss by quartile of t, nats", _quartiles(train, "train_loss"), nats, None),
        ("Training top-1 by quartile of t", _quartiles(train, "train_acc@1"), share, None),
    ]
    if val.rows:
        lines = _quartiles(val, "val_acc@1")
        charts.append(("Validation top-1 by quartile of t", lines, share, None))
    if classes > TOP_5_FROM:
        charts.append(("Top-5 accuracy", _train_and_val(run, "acc@5"), share, None))
    for title, key, axis in plots.other_metrics():
        charts.append((title, _train_and_val(run, key), axis, None))
        charts.append((f"{title}, by quartile of t", _quartiles(train, f"train_{key}"), axis, None))
    of_machine = [
        ("Gradient norm", "grad_norm", Axis(0)),
        ("Learning rate", "lr", Axis(0)),
        ("Loss scale", "lg_loss_scale", Axis(text=plots.power_of_two)),
        ("Images per second", "images_per_sec", Axis(0)),
        ("Share of the time waiting for data", "data_wait_frac", Axis(0, text=percent)),
    ]
    for title, key, axis in of_machine:
        if key != "lg_loss_scale" or any(value > 0 for value in train[key]):
            charts.append((title, [_line(train, key, "", plots.SLATE)], axis, None))
    return [
        plots.curves_svg(title, lines, axis, last_step=run.step, level=level)
        for title, lines, axis, level in charts
    ]


def _train_and_val(run: RunData, name: str) -> list[Line]:
    """Return a number's curves: training, validation, validation at t = 0."""
    lines = [_line(run.training, f"train_{name}", "training", plots.BLUE)]
    if run.validation.rows:
        clean = _line(run.validation, f"val_{name}_t0", "at t = 0", plots.GREEN, dashed=True)
        lines += [_line(run.validation, f"val_{name}", "validation", plots.VERMILION), clean]
    return lines


def _quartiles(columns: Columns, name: str) -> list[Line]:
    return [
        _line(columns, f"{name}_q{q}", f"q{q}", color)
        for q, color in enumerate(plots.QUARTILE_COLORS)
    ]


def _line(columns: Columns, key: str, name: str, color: str, *, dashed: bool = False) -> Line:
    thinned = thin(columns.points(key))
    return Line(name, thinned.points, color, band=thinned.band, dashed=dashed)
