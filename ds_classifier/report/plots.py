"""An evaluation's record as images: numbers against noise, calibration, classes; a series."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

OURS, OPTIMUM, QUIET = "#1f5fa8", "#d9822b", "#8a8f98"
LEVEL_COLORS = ("#222222", "#1f5fa8", "#2a9d6f", "#b5487c", "#8d6cc9", "#d9822b")
CLASSES_NAMED = 20  # with more, classes are sorted by accuracy and have no names


def plot_evaluation(record: Record, path: Path) -> None:
    """Write one evaluation as a PNG of six panels."""
    figure, panels = _panels(2, 3, width=14.5, height=8.2)
    ours, bayes = record["classifier"], record.get("bayes")
    classes = len(record["classes"])
    accuracy, loss, grad_norm, ece, reliability, per_class = panels

    _against_noise(accuracy, ours, "accuracy, %")
    _line(accuracy, ours, "acc@1", OURS, "top 1", scale=100)
    if classes > 5:
        _line(accuracy, ours, "acc@5", OURS, "top 5", scale=100, dashed=True)
    if bayes:
        _line(accuracy, bayes, "acc@1", OPTIMUM, "top 1, Bayes of the training set", scale=100)
    accuracy.axhline(100 / classes, color=QUIET, linewidth=1, linestyle=":", label="chance")
    accuracy.set_ylim(0, 102)
    accuracy.legend(loc="best")

    _against_noise(loss, ours, "cross-entropy, nats")
    _line(loss, ours, "loss", OURS, "classifier")
    if bayes:
        _line(loss, bayes, "loss", OPTIMUM, "Bayes of the training set")
    loss.axhline(math.log(classes), color=QUIET, linewidth=1, linestyle=":", label="chance")
    largest = max([math.log(classes), *_known(ours, "loss")])
    loss.set_ylim(0, 1.15 * largest)  # the posterior of few images is far too sure of itself
    loss.legend(loc="best")

    _against_noise(grad_norm, ours, "mean |gradient of log p(y | x_t)|")
    _line(grad_norm, ours, "grad_norm", OURS, "classifier")
    if bayes:
        _line(grad_norm, bayes, "grad_norm", OPTIMUM, "Bayes of the training set")
        grad_norm.legend(loc="best")
    if all(value > 0 for value in _known(ours, "grad_norm")):
        grad_norm.set_yscale("log")
        _plain_numbers(grad_norm.yaxis)

    _against_noise(ece, ours, "expected calibration error, %")
    _line(ece, ours, "ece", OURS, "classifier", scale=100)
    ece.set_ylim(bottom=0)

    _reliability(reliability, ours)
    _per_class(per_class, record)
    overall = ours["uniform_t"]
    figure.suptitle(
        f"{record['name']}: {record['data']['samples']:,} images, uniform t: "
        f"top 1 {100 * overall['acc@1']:.1f} %, cross-entropy {_shown(overall['loss'])}, "
        f"calibration error {_shown(overall['ece'], 100)} %",
        fontsize=12,
    )
    _write(figure, path)


def plot_series(records: Sequence[Record], path: Path) -> None:
    """Write several checkpoints as a PNG: over training, and at every noise level."""
    figure, (over_time, loss, curves) = _panels(1, 3, width=14.5, height=4.6)
    names = [record["name"] for record in records]
    steps = [record["step"] for record in records]
    in_steps = None not in steps and len(set(steps)) == len(steps)
    places = steps if in_steps else list(range(len(records)))

    def series(read: Callable[[Record], float | None]) -> list[float]:
        return [math.nan if (value := read(record)) is None else value for record in records]

    def accuracy_at(t: int) -> list[float]:
        at = [{row["t"]: row["acc@1"] for row in r["classifier"]["levels"]} for r in records]
        return [math.nan if row.get(t) is None else 100 * row[t] for row in at]

    chosen = [level["t"] for level in records[0]["classifier"]["per_class"][1:]]
    uniform = series(lambda record: record["classifier"]["uniform_t"]["acc@1"])
    over_time.plot(
        places, [100 * v for v in uniform], "o-", color=LEVEL_COLORS[0], label="uniform t"
    )
    for t, color in zip(chosen, LEVEL_COLORS[1:], strict=False):
        over_time.plot(places, accuracy_at(t), "o-", color=color, label=f"t = {t}")
    over_time.set_ylabel("top-1 accuracy, %")
    over_time.legend()
    values = series(lambda record: record["classifier"]["uniform_t"]["loss"])
    loss.plot(places, values, "o-", color=OURS)
    loss.set_ylabel("cross-entropy under uniform t, nats")
    for panel in (over_time, loss):
        if in_steps:
            panel.set_xlabel("step")
        else:
            panel.set_xticks(places, names, rotation=30, ha="right")

    import matplotlib

    shades = matplotlib.colormaps["viridis_r"]
    _against_noise(curves, records[-1]["classifier"], "top-1 accuracy, %")
    for i, record in enumerate(records):
        color = shades(0.1 + 0.9 * i / max(1, len(records) - 1))
        named = i in (0, len(records) - 1) or len(records) <= 8
        _line(
            curves,
            record["classifier"],
            "acc@1",
            color,
            record["name"] if named else None,
            scale=100,
        )
    curves.legend(loc="best")
    _write(figure, path)


def _panels(rows: int, columns: int, *, width: float, height: float):
    """A figure and its panels in reading order, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(color="#e4e6ea", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _plain_numbers(axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, also between powers of ten on a short one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _against_noise(panel, numbers: dict[str, Any], label: str) -> None:
    """log-SNR along x, from clean to noise, with some t above."""
    rows = numbers["levels"]
    panel.set_xlabel("log-SNR: clean to noise")
    panel.set_ylabel(label)
    clean, noise = rows[0]["log_snr"], rows[-1]["log_snr"]
    margin = 0.03 * (clean - noise) or 1.0
    panel.set_xlim(clean + margin, noise - margin)
    above = panel.secondary_xaxis("top")
    few: list[dict] = []
    for row in rows:  # ticks far enough apart to be read
        if not few or few[-1]["log_snr"] - row["log_snr"] > 0.085 * (clean - noise):
            few.append(row)
    above.set_xticks([row["log_snr"] for row in few], [str(row["t"]) for row in few])
    above.tick_params(labelsize=7, length=2, colors=QUIET)
    above.spines["top"].set_visible(False)
    above.set_xlabel("t", fontsize=8, color=QUIET)


def _line(panel, numbers, key: str, color, label, *, scale: float = 1, dashed: bool = False):
    rows = [row for row in numbers["levels"] if row[key] is not None]
    x, y = [row["log_snr"] for row in rows], [scale * row[key] for row in rows]
    style = "o--" if dashed else "o-"
    panel.plot(x, y, style, color=color, label=label, markersize=3, linewidth=1.5)


def _reliability(panel, numbers: dict[str, Any]) -> None:
    """Accuracy against confidence by calibration bin; a dot's area is its share of the samples."""
    panel.plot([0, 100], [0, 100], color=QUIET, linewidth=1, linestyle=":")
    for level, color in zip(numbers["reliability"], LEVEL_COLORS, strict=False):
        bins = level["bins"]
        total = sum(row["samples"] for row in bins)
        x = [100 * row["confidence"] for row in bins]
        y = [100 * row["correct"] / row["samples"] for row in bins]
        area = [6 + 300 * row["samples"] / total for row in bins]
        panel.plot(x, y, color=color, linewidth=0.8, alpha=0.25)
        panel.scatter(x, y, s=area, color=color, alpha=0.6, linewidth=0)
        panel.plot([], [], "o", color=color, label=_level_name(level))
    panel.set_xlim(0, 104)
    panel.set_ylim(0, 104)
    panel.set_xlabel("confidence, %")
    panel.set_ylabel("accuracy, %")
    panel.legend(loc="best")


def _per_class(panel, record: Record) -> None:
    """Accuracy of each class at the chosen levels; of many classes, sorted."""
    for level, color in zip(record["classifier"]["per_class"], LEVEL_COLORS, strict=False):
        counts = zip(level["correct@1"], level["samples"], strict=True)
        values = [100 * hit / count if count else math.nan for hit, count in counts]
        if len(values) > CLASSES_NAMED:
            values = sorted(value for value in values if not math.isnan(value))
            panel.plot(range(len(values)), values, color=color, label=_level_name(level))
        else:
            places = range(len(values))
            panel.plot(
                places,
                values,
                "o:",
                color=color,
                label=_level_name(level),
                linewidth=0.8,
                markersize=4,
            )
    names = record["classes"]
    if len(names) > CLASSES_NAMED:
        panel.set_xlabel("classes, from the worst to the best of a level")
    else:
        short = [name if len(name) <= 14 else name[:12] + "..." for name in names]
        slanted = max(map(len, short)) > 3
        panel.set_xticks(range(len(names)), short, rotation=45 if slanted else 0)
        panel.set_xlabel("class")
    panel.set_ylim(0, 104)
    panel.set_ylabel("top-1 accuracy, %")
    panel.legend(loc="best")


def _level_name(level: dict[str, Any]) -> str:
    return "uniform t" if level["t"] is None else f"t = {level['t']}"


def _known(numbers: dict[str, Any], key: str) -> list[float]:
    return [row[key] for row in numbers["levels"] if row[key] is not None]


def _shown(value: float | None, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:.3g}"


def _write(figure, path: Path) -> None:
    for panel in figure.axes:
        legend = panel.get_legend()
        if legend is not None:
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set_fontsize(8)
    figure.savefig(path, dpi=110)
