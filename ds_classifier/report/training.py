"""The report's headline, and its section on training: the curves."""

from __future__ import annotations

import math
from typing import Any

from ds_classifier.common.text import percent, short
from ds_classifier.config.settings import DiffusionSettings
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.evaluation.meter import describe_quartiles
from ds_classifier.evaluation.metrics import accuracy_of, headline_of, metrics_of
from ds_classifier.report import plots
from ds_classifier.report.data import Columns, RunData, thin
from ds_classifier.report.plots import Axis, Line

TOP_5_FROM = 20  # classes; with fewer, top-5 accuracy says little


# ------------------------------------------------------------------------------ headline


def headline(run: RunData) -> list[dict[str, str]]:
    """Return the last numbers, which the page shows in large figures: value, text, more.

    Accuracy and loss are those of the evaluation, if it is of the last validated step or later.
    """
    loss, accuracy, clean = _held_out(run)
    figures = [
        (accuracy[0], f"{accuracy[1]}, all noise levels", accuracy[2]),
        clean,
        (_loss(loss), *_meaning(run)),
        (f"{run.step:,}", f"of {run.iterations:,} steps", _samples(run)),
        (_speed(run), "images per second", _wait(run)),
        best_checkpoint(run),
    ]
    return [dict(value=value, text=text, more=more) for value, text, more in figures]


def evaluation_of_the_end(run: RunData) -> dict[str, Any] | None:
    """Return the newest evaluation if training validated no later step."""
    record = run.evaluations[-1] if run.evaluations else None
    validated = run.validation.last("step") or 0
    return record if record and (record["step"] or 0) >= max(validated, 1) else None


def _held_out(run: RunData) -> tuple[float | None, tuple, tuple]:
    """Return the loss; then accuracy, what it is and where it is measured, for all noise levels and
    for the least noise. It is what headline_of names, if that is measured.
    """
    record, validated = evaluation_of_the_end(run), run.validation
    best, accuracy = headline_of(run.targets), accuracy_of(run.targets)
    key, what = best.name, best.words
    if record:
        numbers = record["classifier"]
        overall, first = numbers["uniform_t"], numbers["levels"][0]
        where = f"held out, evaluated in {record['precision']}"
        clean = best.said(first[key]), f"{what} at t = {first['t']}", where
        return overall["loss"], (best.said(overall[key]), what, where), clean
    if validated.rows:
        where = f"held out, while training{_in_precision(run)}"
        clean = best.said(validated.last(f"val_{key}_t0")), f"{what} at t = 0", where
        overall = best.said(validated.last(f"val_{key}"))
        return validated.last("val_loss"), (overall, what, where), clean
    trained, where = run.training, "training, no validation"
    key, what = f"train_{accuracy.name}", accuracy.words
    clean = accuracy.said(trained.last(f"{key}_q0")), f"{what}, least noise", "first quarter of t"
    overall = accuracy.said(trained.last(key))
    return trained.last("train_loss"), (overall, what, where), clean


def _in_precision(run: RunData) -> str:
    """Return " in bf16" or " in fp16"; "" for fp32."""
    enabled = (name for name in ("bf16", "fp16") if run.deepspeed.get(name, {}).get("enabled"))
    return next((f" in {name}" for name in enabled), "")


def best_checkpoint(run: RunData) -> tuple[str, str, str]:
    """Return the step of checkpoints/best, what it is, and its validation loss."""
    loss = run.best.partition(" val_loss ")[2]
    if run.best_step is None or not loss:
        return "-", "best checkpoint", "none is validated yet"
    return f"{run.best_step:,}", "best checkpoint (step)", f"validation loss {float(loss):.4g}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _meaning(run: RunData) -> tuple[str, str]:
    """Return what the loss of the headline is, and that of guessing."""
    if own_loss(run) and not evaluation_of_the_end(run):
        return "loss", ""
    return f"{metrics_of(run.targets)['loss'].words}, nats", _chance(run)


def own_loss(run: RunData) -> bool:
    """Return whether a loss of the user's was trained on, which has no known unit."""
    return bool(run.settings.get("loss"))


def _chance(run: RunData) -> str:
    guessing, classes = run.guessing, run.num_classes
    if guessing is None or guessing.loss is None:
        return ""
    if classes and abs(guessing.loss - math.log(classes)) < 0.02:
        return f"guessing: ln {classes:,} = {math.log(classes):.3f}"
    return f"guessing: {guessing.loss:.3f}"


def _samples(run: RunData) -> str:
    samples = run.training.last("samples")
    return f"{short(samples)} images seen" if samples else ""


def _speed(run: RunData) -> str:
    speed = run.training.recent("images_per_sec")
    return "-" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _wait(run: RunData) -> str:
    wait = run.training.recent("data_wait_frac")
    return "" if wait is None else f"waiting for data {percent(wait, 0)}"


# ------------------------------------------------------------------------------ curves


def curves(run: RunData) -> dict[str, Any] | str:
    """Return charts over steps as SVG, and a text on their validation."""
    train, val = run.training, run.validation
    if not train.rows and not val.rows:
        return "No step is logged yet."
    classes, guessing = run.num_classes, run.guessing
    chance = None if guessing is None else (guessing.accuracy, "chance")
    guess = None if guessing is None or guessing.loss is None else (guessing.loss, "guessing")
    share, nats = plots.SHARE, Axis() if own_loss(run) else Axis(0)
    metrics, accuracy = metrics_of(run.targets), accuracy_of(run.targets)
    name, what = accuracy.name, accuracy.words
    titles = metrics["loss"].titled, "Training loss by quartile of t, nats"
    if own_loss(run):
        titles = "Loss", "Training loss by quartile of t"
    charts = [
        (titles[0], _train_and_val(run, "loss"), nats, guess),
        (accuracy.title, _train_and_val(run, name), share, chance),
        (titles[1], _quartiles(train, "train_loss"), nats, None),
        (f"Training {what} by quartile of t", _quartiles(train, f"train_{name}"), share, None),
    ]
    if val.rows:
        lines = _quartiles(val, f"val_{name}")
        charts.append((f"Validation {what} by quartile of t", lines, share, None))
    if classes > TOP_5_FROM and "acc@5" in metrics:
        charts.append((metrics["acc@5"].title, _train_and_val(run, "acc@5"), share, None))
    guessed = {} if guessing is None else {"mae": guessing.mae, "mAP": guessing.mean_ap}
    for title, key, axis in plots.other_metrics(run.targets):
        lines = _train_and_val(run, key)
        level = None if guessed.get(key) is None else (guessed[key], "guessing")
        if key in metrics:
            charts.append((title, lines, axis, level))
            lines = _quartiles(train, f"train_{key}")
            charts.append((f"{title}, by quartile of t", lines, axis, None))
        elif val.rows:  # no mean over samples: training does not measure it
            charts.append((title, lines[1:], axis, level))
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
    text = _quartile_text(run)
    if val.rows and evaluation_of_the_end(run):
        text += (
            f"Validation is computed here while training{_in_precision(run)}. The numbers at the "
            "top and by noise level are those of the evaluation, so the last digits may differ."
        )
    svgs = [
        plots.curves_svg(title, lines, axis, last_step=run.step, level=level)
        for title, lines, axis, level in charts
    ]
    return {"text": text, "charts": svgs}


def _quartile_text(run: RunData) -> str:
    """Return the noise levels of the quartiles of t; "" for a run without its settings."""
    names = DiffusionSettings().diffusion_kwargs()
    if not names.keys() <= run.settings.keys():
        return ""
    diffusion = create_gaussian_diffusion(**{name: run.settings[name] for name in names})
    return f"Quartiles of t: {describe_quartiles(diffusion)}. "


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
