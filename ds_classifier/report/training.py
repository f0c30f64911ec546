"""The report's parts on training: the headline, what the numbers say, the curves."""

from __future__ import annotations

import math
from html import escape

from ds_classifier.common.text import percent, short
from ds_classifier.report import plots
from ds_classifier.report.data import Columns, RunData, attempts_of, thin
from ds_classifier.report.plots import Axis, Line
from ds_classifier.training import sanity

GOOD, NOTE, BAD = "good", "note", "bad"
SIGNS = {GOOD: "✓", NOTE: "i", BAD: "!"}
WAITING = 0.2  # share of time waiting for data that is worth a word
WORSE = 1.1  # times the best validation loss: past its best
TOP_5_FROM = 20  # classes: of fewer it says little
RECENT = 5  # rows of the log whose mean stands for now


# ------------------------------------------------------------------------------ headline


def headline(run: RunData) -> str:
    """The last numbers in large figures."""
    held_out = run.validation.rows > 0
    source, prefix = (run.validation, "val") if held_out else (run.training, "train")
    where = "held out" if held_out else "training, no validation"
    figures = [
        (_percent(source.last(f"{prefix}_acc@1")), "top-1, all noise levels", where),
        (_percent(source.last(f"{prefix}_acc@1_t0")), "top-1 at t = 0", where)
        if held_out
        else (_percent(source.last("train_acc@1_q0")), "top-1, least noise", "first quarter of t"),
        (_number(source.last(f"{prefix}_loss")), "cross-entropy, nats", _chance(run)),
        (f"{run.step:,}", f"of {run.iterations:,} steps", _samples(run)),
        (_speed(run), "images a second", _wait(run)),
        best_checkpoint(run),
    ]
    cells = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(what)}</span>'
        f"<small>{escape(more)}</small></div>"
        for value, what, more in figures
    )
    return f'<div class="figures">{cells}</div>'


def best_checkpoint(run: RunData) -> tuple[str, str, str]:
    """Its step, and its validation loss; of checkpoints/best."""
    name, _, loss = run.best.partition(" val_loss ")
    step = name.removeprefix("step-").lstrip("0")
    if not name or not (step.isdigit() and loss):
        return "-", "best checkpoint", "none is validated yet"
    return f"{int(step):,}", "best checkpoint's step", f"validation loss {float(loss):.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _chance(run: RunData) -> str:
    classes = run.num_classes
    return f"guessing: ln {classes:,} = {math.log(classes):.3f}" if classes else ""


def _samples(run: RunData) -> str:
    samples = run.training.last("samples")
    return f"{short(samples)} images seen" if samples else ""


def _speed(run: RunData) -> str:
    speed = _recent(run.training, "images_per_sec")
    return "-" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _wait(run: RunData) -> str:
    wait = _recent(run.training, "data_wait_frac")
    return "" if wait is None else f"waiting for data {100 * wait:.0f} %"


def _recent(columns: Columns, key: str) -> float | None:
    """The mean of its last rows."""
    known = [value for value in columns[key][-RECENT:] if math.isfinite(value)]
    return sum(known) / len(known) if known else None


# ------------------------------------------------------------------------------ checks


def checks(run: RunData) -> str:
    """What the numbers say, a line each."""
    found = [*_learning(run), *_validating(run), *_losses(run)]
    if not found:
        found = [(NOTE, "No step is logged yet; the first line comes after --log_interval steps.")]
    rows = "".join(
        f'<li class="{kind}"><i>{SIGNS[kind]}</i><span>{escape(words)}</span></li>'
        for kind, words in found
    )
    return f'<ul class="checks">{rows}</ul>'


def _learning(run: RunData) -> list[tuple[str, str]]:
    """What sanity.py says of the last rows, as it did in the log."""
    loss, guessing = _recent(run.training, "train_loss"), run.guessing
    if not run.training.rows:
        return []
    if loss is None:
        return [(BAD, "The last training losses are not finite: lower --lr, or use a bf16 config.")]
    if guessing is None:
        return [(NOTE, f"Training loss {loss:.3f}; the number of classes is not known.")]
    reached, words = sanity.phase(run.recent, guessing)
    losses = f"Training loss {loss:.3f}, that of guessing {guessing.loss:.3f}"
    if reached == sanity.UNKNOWN:
        found = [(NOTE, f"{losses}: too little evidence yet to say whether it learns.")]
    elif reached == sanity.NOTHING:
        found = [
            (BAD, f"{_sentence(words)} Early in a run that is usual; later, try another --lr.")
        ]
    else:
        found = [(GOOD, f"{_sentence(words)} {losses}.")]
    wrong = sanity.alarms(run.recent, guessing, val_samples=run.val_samples)
    return found + [(BAD, _sentence(words)) for words in wrong.values()]


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _validating(run: RunData) -> list[tuple[str, str]]:
    points = [p for p in run.validation.points("val_loss") if math.isfinite(p[1])]
    if not points:
        return [(NOTE, "No validation: what stands here is of the training images.")] * bool(
            run.training.rows
        )
    best_step, best = min(points, key=lambda point: point[1])
    step, last = points[-1]
    words = f"Validation loss {last:.3f} at step {step:,.0f}; its best is {best:.3f}"
    if last > WORSE * best:
        return [(NOTE, f"{words}, at step {best_step:,.0f}: take checkpoints/best.")]
    return [(GOOD, f"{words}, at step {best_step:,.0f}.")]


def _losses(run: RunData) -> list[tuple[str, str]]:
    """What went lost, and what was waited for."""
    found = []
    wait = _recent(run.training, "data_wait_frac")
    if wait is not None and wait > WAITING:
        found.append(
            (BAD, f"{100 * wait:.0f} % of the time goes on waiting for data: more --workers, "
             "smaller stored images (make_shards.py --image_size), or --resize fast.")
        )  # fmt: skip
    skipped = int(run.training.last("skipped_steps") or len(run.skipped))
    if skipped:
        usual = run.deepspeed.get("fp16", {}).get("enabled") and skipped <= 0.01 * run.step + 20
        why = "; fp16's loss scale finds its size so" if usual else ""
        found.append(
            (NOTE if usual else BAD, f"{_count(skipped, 'step')} without a finite gradient were "
             f"skipped{why}.")
        )  # fmt: skip
    bad = int(run.training.last("bad_samples") or len(run.bad_samples))
    if bad:
        found.append(
            (NOTE, f"{_count(bad, 'image')} could not be decoded; bad_samples.rank*.jsonl lists "
             "them.")
        )  # fmt: skip
    failed = sum(event["event"] == "save failed" for event in run.events)
    if failed:
        found.append((BAD, f"{_count(failed, 'checkpoint')} could not be written."))
    ends = [attempt.end for attempt in attempts_of(run)]
    unplanned = sum(end in ("killed", "failed") for end in ends)
    if unplanned:
        found.append(
            (NOTE, f"{unplanned} of {_count(len(ends), 'attempt')} ended by a fault or a kill; the "
             "time line tells.")
        )  # fmt: skip
    if run.training.rows and not (skipped or bad or failed or unplanned):
        found.append((GOOD, "No step skipped, no image lost, every checkpoint written."))
    return found


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


# ------------------------------------------------------------------------------ curves


def curves(run: RunData) -> str:
    """Return small charts over steps."""
    train, val = run.training, run.validation
    if not train.rows and not val.rows:
        return '<div class="empty">No step is logged yet.</div>'
    classes = run.num_classes
    chance = (1 / classes, "chance") if classes else None
    guess = (math.log(classes), "guessing") if classes else None
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
    svgs = [
        plots.curves_svg(title, lines, axis, last_step=run.step, level=level)
        for title, lines, axis, level in charts
    ]
    figures = "".join(f'<figure class="chart">{svg}</figure>' for svg in svgs)
    return f'<div class="charts">{figures}</div>'


def _train_and_val(run: RunData, name: str) -> list[Line]:
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
