"""All figures: the panels of an evaluation, a series of evaluations, curves, the timeline.

One function per panel draws it into a figure, or into a part of one. The page shows a panel as
SVG; a PNG file shows several panels. matplotlib is imported when a figure is drawn, and writes
through its SVG and Agg canvases, so that neither a screen nor pyplot is needed.
The colors are those of Okabe and Ito, which color-blind readers can distinguish.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ds_classifier.common.text import percent, short
from ds_classifier.data.labels.targets import Targets
from ds_classifier.evaluation.format import targets_of
from ds_classifier.evaluation.metrics import (
    accuracy_of,
    headline_of,
    measured_of,
    metrics_of,
)

BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#aa4499"
INK, GRAY, SLATE = "#1d2430", "#8a919c", "#4a5568"
QUARTILE_COLORS = ("#0b4f8a", "#2f9fd0", "#e69f00", "#b3470a")  # of t, from clean to noise
GRID = "#e7eaee"
# The page names these colors in its style, so that report.css can give them others in the dark.
NAMED = {"ink": INK, "gray": GRAY, "slate": SLATE, "grid": GRID, "blue": BLUE, "orange": ORANGE,
         "green": GREEN, "vermilion": VERMILION, "purple": PURPLE,
         **{f"q{q}": c for q, c in enumerate(QUARTILE_COLORS) if c != ORANGE}}  # fmt: skip
LEVEL_COLORS = (INK, BLUE, GREEN, VERMILION, PURPLE, ORANGE)
WIDTH, HEIGHT = 372, 240  # of a panel, in points: pixels where three stand side by side
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 26, 36  # margins of the axes, points
LEGEND_ROW, TICKS_ABOVE, SLANTED_NAMES = 15, 14, 70  # points that these take, where there are any
CLASSES_NAMED = 20  # with more classes, the accuracies are sorted and have no names
STRIP_ROW = 20  # of the timeline, points
STRIP, NARROW_STRIP = (1160, 92, 160), (WIDTH, 168, 20)  # its width, and left and right of the axes
PNG_DPI = 110
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page shows its own font
    "font.size": 11,
    "text.parse_math": False,  # a class may be named "$x$"
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": GRAY,
    "axes.labelcolor": SLATE,
    "axes.labelsize": 11,
    "axes.labelpad": 3,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": GRAY,
    "xtick.labelcolor": SLATE,
    "ytick.labelcolor": SLATE,
    "ytick.major.size": 0,
    "legend.fontsize": 11,
    "legend.labelcolor": SLATE,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # equal parts of two figures get equal ids
}
HINT = "hint:"  # begins the id of a part that has a tooltip; the tooltip's text follows
Point = tuple[float, float]
Draw = Callable[[Any], None]  # draws a panel into a Figure or SubFigure


@dataclass(frozen=True)
class Line:
    """A curve of a panel.

    name: "" keeps the line out of the legend.
    points: (x, y); y may be nan, which interrupts the line.
    band: (x, least, most), drawn faintly around the line.
    dots: draw a mark with a tooltip at each point.
    """

    name: str
    points: Sequence[Point]
    color: str
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False
    dots: bool = False
    opacity: float = 1.0
    width: float = 1.6


@dataclass(frozen=True)
class Axis:
    """The y axis of a panel.

    low, high: fixed ends; None: from the data.
    text: how values are written.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    text: Callable[[float], str] = short


SHARE = Axis(0.0, 1.03, text=percent)  # a dot at 100 % is whole


class Panel:
    """A title, a legend and axes, in a figure or in a part of one."""

    def __init__(self, figure, title: str, x_label: str, *, above: int = 0, bottom: int = BOTTOM):
        self.figure, self._above, self._bottom = figure, above, bottom
        self.axes = figure.add_axes(self._place())
        self.axes.set_xlabel(x_label)
        figure.text(0.008, 1 - 14 / HEIGHT, title, weight="bold", fontsize=12)
        figure.set_label(title)

    def _place(self, legend_rows: int = 0) -> tuple[float, float, float, float]:
        """Return left, bottom, width and height of the axes, as shares of the panel."""
        height = HEIGHT - TOP - LEGEND_ROW * legend_rows - self._above - self._bottom
        inside = WIDTH - LEFT - RIGHT
        return LEFT / WIDTH, self._bottom / HEIGHT, inside / WIDTH, height / HEIGHT

    def draw(
        self,
        lines: Sequence[Line],
        y: Axis,
        level: tuple[float, str] | None = None,
        *,
        last_values: bool = False,
    ) -> None:
        """Draw curves and the legend.

        level: the height of a dotted line across the axes, and its name.
        last_values: write the last value of each curve into the legend.
        """
        shown = [[p for p in line.points if _is_shown(p, y)] for line in lines]
        if not any(shown):
            self.axes.set_axis_off()
            self.figure.text(0.5, 0.5, "nothing to show yet", color=SLATE, ha="center")
            return
        for line, points in zip(lines, shown, strict=True):
            last = f" {y.text(float(f'{points[-1][1]:.3g}'))}" if points and last_values else ""
            self._draw(line, points, y, label=f"{line.name}{last}" if line.name else None)
        if level:
            self.axes.axhline(level[0], color=GRAY, linewidth=1.2, linestyle=":", label=level[1])
        self.set_y(y)
        self.legend()

    def _draw(self, line: Line, points: Sequence[Point], y: Axis, label: str | None) -> None:
        known, look = dict(points), dict(color=line.color, alpha=line.opacity)
        dashes = (0, (4, 2)) if line.dashed else "-"
        xs = [x for x, _ in line.points]
        ys = [known.get(x, math.nan) for x in xs]
        self.axes.plot(xs, ys, **look, linewidth=line.width, linestyle=dashes, label=label)
        band = np.array([b for b in line.band if not y.log or b[1] > 0]).reshape(-1, 3)
        if len(band) > 1:  # a spike of one step must not flatten the curve
            least, most = np.clip(band[:, 1:], *np.quantile(band[:, 1:], (0.01, 0.99))).T
            self.axes.fill_between(band[:, 0], least, most, color=line.color, alpha=0.16, lw=0)
        if line.dots or len(points) == 1:
            for x, value in points:
                self.dot(x, value, f"{line.name}: {short(x)}, {y.text(value)}", **look)

    def dot(self, x: float, y: float, hint: str, *, area: float = 17.0, **look) -> None:
        """Draw a dot with a tooltip. area: in square points."""
        size = 2 * math.sqrt(area / math.pi)
        look |= dict(markersize=size, markeredgewidth=0, gid=HINT + hint, zorder=3)
        self.axes.plot([x], [y], "o", **look)

    def set_y(self, y: Axis) -> None:
        """Set the scale, the ends and the ticks of the y axis."""
        from matplotlib import ticker

        axis = self.axes.yaxis
        if y.log:
            self.axes.set_yscale("log")
            low, high = self.axes.get_ylim()
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            axis.set_minor_locator(ticker.NullLocator())
        elif y.text is power_of_two:
            axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        text = _short_percent if y.text is percent else y.text
        axis.set_major_formatter(lambda value, _: text(value))
        self.axes.set_ylim(y.low, y.high)

    def set_x(self, low: float, high: float, text: Callable[[float], str] = short) -> None:
        """Set the ends of the x axis, where low may be the larger one, and its ticks."""
        self.axes.set_xlim(low, high)
        self.axes.xaxis.set_major_formatter(lambda value, _: text(value))

    def set_names(self, names: Sequence[str]) -> None:
        """Write names under the places 0, 1, 2, ... of the x axis."""
        words = [name if len(name) <= 14 else name[:12] + "..." for name in names]
        slanted = dict(rotation=45, ha="right", rotation_mode="anchor") if _slanted(names) else {}
        self.axes.set_xticks(range(len(words)), words, fontsize=9, **slanted)
        self.axes.set_xlim(-0.5, len(words) - 0.5)

    def legend(self) -> None:
        """Write the legend in one row or two between the title and the axes, which get smaller."""
        handles, labels = self.axes.get_legend_handles_labels()
        if handles:
            characters = sum(map(len, labels)) + 4 * len(labels)
            columns = len(labels) if characters < 56 else math.ceil(len(labels) / 2)
            place = dict(loc="upper left", bbox_to_anchor=(-0.008, 1 - 15 / HEIGHT))
            close = dict(handlelength=1.2, handletextpad=0.5, columnspacing=1.0, labelspacing=0.2)
            self.figure.legend(handles, labels, ncols=columns, frameon=False, **place, **close)
            self.axes.set_position(self._place(math.ceil(len(labels) / columns)))


def other_metrics(targets: Targets) -> list[tuple[str, str, Axis]]:
    """Return title, key and y axis of what is measured and has no chart of its own."""
    own = ("loss", accuracy_of(targets).name, "acc@5")
    return [
        (shown.titled, shown.name, Axis(text=percent if shown.unit == "%" else short))
        for shown in measured_of(targets)
        if shown.name not in own
    ]


def _slanted(names: Sequence[str]) -> bool:
    return max(map(len, names), default=0) > 3


def _is_shown(point: Point, y: Axis) -> bool:
    return all(map(math.isfinite, point)) and (not y.log or point[1] > 0)


def _short_percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def power_of_two(exponent: float) -> str:
    """Return "2^16"."""
    return f"2^{exponent:g}"


# ------------------------------------------------------------------------------ SVG and PNG


def _without_backend() -> None:
    """Import matplotlib without the backend in MPLBACKEND, which no figure here needs.

    A notebook sets it for the programs that are started in it, where its backend may be unknown.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib  # noqa: F401

    if backend is not None:
        os.environ["MPLBACKEND"] = backend


@contextmanager
def _style() -> Iterator[None]:
    """Draw in STYLE and not in the user's matplotlibrc, without warnings of missing glyphs."""
    from matplotlib import style

    with style.context(STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def to_svg(draw: Draw, *, width: float = WIDTH, height: float = HEIGHT) -> str:
    """Return a figure as an SVG element to be put into a page; its label is for screen readers."""
    _without_backend()
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    with _style():
        figure = Figure(figsize=(width / 72, height / 72))
        figure.patch.set_visible(False)
        draw(figure)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(file, metadata=no_metadata)
    label = escape(figure.get_label())
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">'
    return head + _small(file.getvalue())


def _small(svg: str) -> str:
    """Return the inside of matplotlib's SVG without what a page does not need, with tooltips."""
    body = svg[svg.index("</style>") :].partition("</defs>")[2]
    body = re.sub(rf'<g id="{HINT}([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'(<g) id="[^"]*"', r"\1", body)
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    body = body.replace("font-family: 'DejaVu Sans'; ", "")
    body = re.sub(r"\s*\n *", "", body)
    return re.sub(r"<[^>]*>", _styled, body)


def _styled(tag: re.Match) -> str:
    """Return a tag with short numbers, and with the colors that have names by these names."""
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", tag[0])
    return re.sub(r": (#[0-9a-f]{6})", _by_name, text)


def _by_name(color: re.Match) -> str:
    name = next((name for name, value in NAMED.items() if value == color[1]), None)
    return f": var(--{name}, {color[1]})" if name else color[0]


def _write_png(draws: Sequence[Draw], path: Path, *, columns: int, title: str = "") -> None:
    """Write panels under a title, `columns` of them per row."""
    _without_backend()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, head = math.ceil(len(draws) / columns), 36 if title else 8
    size = columns * WIDTH / 72, (rows * HEIGHT + head) / 72
    with _style():
        figure = Figure(figsize=size, dpi=PNG_DPI)
        top, panels = figure.subfigures(2, 1, height_ratios=[head, rows * HEIGHT])
        top.text(0.5, 0.4, title, ha="center", fontsize=13)
        for draw, part in zip(draws, panels.subfigures(rows, columns).flat, strict=False):
            draw(part)
        FigureCanvasAgg(figure).print_png(path)


# ------------------------------------------------------------------------------ an evaluation


def plot_evaluation(record: dict[str, Any], path: Path) -> None:
    """Write one evaluation's panels as a PNG file. record: the content of eval/NAME.json."""
    overall = record["classifier"]["uniform_t"]
    title = f"{record['name']}: {record['data']['samples']:,} images, uniform t: "
    title += overall_text(overall, targets_of(record))
    _write_png(_evaluation_panels(record), path, columns=3, title=title)


def overall_text(overall: dict[str, Any], targets: Targets) -> str:
    """Return the accuracy, the loss and the calibration error of an evaluation, in words."""
    best, loss = headline_of(targets), metrics_of(targets)["loss"]
    return (
        f"{best.words} {best.said(overall[best.name])}, {loss.words} {short(overall['loss'])}, "
        f"calibration error {percent(overall['ece'])}"
    )


def evaluation_svgs(record: dict[str, Any], older: Sequence[dict[str, Any]]) -> list[str]:
    """Return one evaluation's panels, with older ones of the same classes drawn faintly."""
    return [to_svg(draw) for draw in _evaluation_panels(record, older)]


def _evaluation_panels(record: dict[str, Any], older: Sequence[dict[str, Any]] = ()) -> list[Draw]:
    classes = len(record["classes"])
    equal = {"acc@1": 1 / classes, "loss": math.log(classes)}  # earlier records do not have it
    guessing, targets = record["data"].get("guessing", equal), targets_of(record)
    accuracy, cross_entropy = accuracy_of(targets), metrics_of(targets)["loss"]
    # The Bayes posterior of few images is overconfident: its loss may leave the axes.
    loss = Axis(0, 1.15 * max([guessing["loss"], *_known(record["classifier"], "loss")]))
    norm = Axis(log=all(value > 0 for value in _known(record["classifier"], "grad_norm")))
    noise = [
        (accuracy.title, accuracy.name, SHARE, (guessing[accuracy.name], "chance")),
        (cross_entropy.titled, "loss", loss, (guessing["loss"], "guessing")),
        ("Expected calibration error", "ece", Axis(0, text=percent), None),
        ("Mean norm of ∇ log p(y|x_t)", "grad_norm", norm, None),
    ]
    for title, key, y in other_metrics(targets):
        noise.append((title, key, y, (guessing[key], "guessing") if key in guessing else None))

    def draw(figure, title: str, key: str, y: Axis, level: tuple[float, str] | None) -> None:
        panel = _against_noise(figure, title, record["classifier"])
        panel.draw(_noise_lines(record, older, key), y, level)

    panels = [partial(draw, title=t, key=k, y=y, level=level) for t, k, y, level in noise]
    return [*panels, partial(_reliability, record=record), partial(_per_class, record=record)]


def _against_noise(figure, title: str, numbers: dict[str, Any]) -> Panel:
    """Return a panel with log-SNR along x, from clean to noise, and some t above."""
    panel = Panel(figure, title, "log-SNR, from clean to noise", above=TICKS_ABOVE)
    rows = numbers["levels"]
    clean, noise = rows[0]["log_snr"], rows[-1]["log_snr"]
    margin = 0.03 * (clean - noise) or 1.0
    panel.set_x(clean + margin, noise - margin)
    few: list[dict] = []
    for row in rows:  # ticks far enough apart to be read
        if not few or few[-1]["log_snr"] - row["log_snr"] > 0.1 * (clean - noise):
            few.append(row)
    above = panel.axes.secondary_xaxis("top")
    above.set_xticks([row["log_snr"] for row in few], [str(row["t"]) for row in few])
    above.tick_params(labelsize=9, length=2, pad=2)
    panel.axes.text(-0.02, 1.03, "t", transform=panel.axes.transAxes, fontsize=9, color=SLATE)
    return panel


def _noise_lines(record: dict[str, Any], older: Sequence[dict[str, Any]], key: str) -> list[Line]:
    """Return the lines of one number: older evaluations, the evaluation, the Bayes optimum."""
    lines = []
    for i, earlier in enumerate(older):
        faint = dict(opacity=0.15 + 0.25 * (i + 1) / len(older), width=1.3)
        name = "earlier" if i == 0 else ""
        lines.append(Line(name, _points(earlier["classifier"], key), BLUE, **faint))
    points = _points(record["classifier"], key)
    lines.append(Line(weights_name(record), points, BLUE, width=2, dots=True))
    if record.get("bayes") and key != "ece":
        points = _points(record["bayes"], key)
        lines.append(Line("Bayes", points, ORANGE, dashed=True, dots=True))
    if key == "acc@1" and len(record["classes"]) > 5:
        points = _points(record["classifier"], "acc@5")
        lines.append(Line("top 5", points, GREEN, dashed=True, dots=True))
    return lines


def weights_name(record: dict[str, Any]) -> str:
    """Return "step 20,000", or the name of weights that have no step."""
    return f"step {record['step']:,}" if record["step"] is not None else record["name"]


def _points(numbers: dict[str, Any], key: str) -> list[Point]:
    values = [(row["log_snr"], row.get(key)) for row in numbers["levels"]]
    return [(log_snr, math.nan if value is None else value) for log_snr, value in values]


def _known(numbers: dict[str, Any], key: str) -> list[float]:
    return [row[key] for row in numbers["levels"] if row[key] is not None]


def _reliability(figure, record: dict[str, Any]) -> None:
    """Draw accuracy against confidence; the area of a dot is its share of the images.

    Of soft vectors it is the probability that these give to the predicted class.
    """
    right = {"soft": "probability of the labels", "classes": "right answers"}
    what = right.get(targets_of(record).kind, "accuracy")
    panel = Panel(figure, f"Reliability: {what} by confidence", "confidence")
    panel.axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle=":")
    for level, color in zip(record["classifier"]["reliability"], LEVEL_COLORS, strict=False):
        total = sum(row["samples"] for row in level["bins"])
        for row in level["bins"]:
            right = row["correct"] / row["samples"]
            hint = f"{_level_name(level)}: {percent(row['confidence'])}, {percent(right)}"
            area = 12 + 300 * row["samples"] / total
            panel.dot(row["confidence"], right, hint, area=area, color=color, alpha=0.55)
        panel.axes.plot([], [], "o", color=color, label=_level_name(level))
    panel.set_x(0, 1.06, _short_percent)
    panel.set_y(Axis(0, 1.06, text=percent))  # a large dot at 100 % is whole
    panel.legend()


def _per_class(figure, record: dict[str, Any]) -> None:
    """Draw the accuracy of each class at the chosen levels; many classes are sorted by it.

    Where images have several classes, it is the average precision.
    """
    names, targets = record["classes"], targets_of(record)
    sort = len(names) > CLASSES_NAMED
    label = f"{targets.nouns}, from the worst to the best of a level" if sort else ""
    bottom = SLANTED_NAMES if not sort and _slanted(names) else BOTTOM
    several = targets.kind == "classes"
    title = f"{'Average precision' if several else 'Top-1 accuracy'} by {targets.noun}"
    panel = Panel(figure, title, label, bottom=bottom)
    lines = []
    for level, color in zip(record["classifier"]["per_class"], LEVEL_COLORS, strict=False):
        if several:
            values = [math.nan if value is None else value for value in level["ap"]]
        else:
            counts = zip(level["correct@1"], level["samples"], strict=True)
            values = [hit / count if count else math.nan for hit, count in counts]
        if sort:
            values = sorted(filter(math.isfinite, values))
        every = max(1, len(values) // 300)
        points = list(enumerate(values))[::every]
        look = {} if sort else dict(dots=True, width=0.8)
        lines.append(Line(_level_name(level), points, color, **look))
    panel.draw(lines, SHARE)
    if sort:
        panel.set_x(0, len(names))
    else:
        panel.set_names(names)


def _level_name(level: dict[str, Any]) -> str:
    return "uniform t" if level["t"] is None else f"t = {level['t']}"


# ------------------------------------------------------------------------------ a series


def plot_series(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write several evaluations as a PNG file: over training, and at every noise level."""
    draws = (_series_accuracy, _series_loss, _series_noise)
    _write_png([partial(draw, records=records) for draw in draws], path, columns=3)


def _over_training(figure, records: Sequence[dict[str, Any]], title: str):
    """Return a panel over the steps, or over the names if steps are missing or not distinct.

    Returns also the places of the records on its x axis.
    """
    steps = [record["step"] for record in records]
    if None not in steps and len(set(steps)) == len(steps):
        panel = Panel(figure, title, "step")
        margin = 0.03 * (max(steps) - min(steps)) or 1.0
        panel.set_x(min(steps) - margin, max(steps) + margin)
        return panel, steps
    panel = Panel(figure, title, "", bottom=SLANTED_NAMES)
    panel.set_names([record["name"] for record in records])
    return panel, range(len(records))


def _series_accuracy(figure, records: Sequence[dict[str, Any]]) -> None:
    best = headline_of(targets_of(records[-1]))
    panel, places = _over_training(figure, records, best.title)
    rows = [record["classifier"]["uniform_t"] for record in records]
    lines = [_series_line("uniform t", places, [row[best.name] for row in rows], LEVEL_COLORS[0])]
    chosen = [level["t"] for level in records[0]["classifier"]["per_class"][1:]]
    for t, color in zip(chosen, LEVEL_COLORS[1:], strict=False):
        at = [{row["t"]: row[best.name] for row in r["classifier"]["levels"]} for r in records]
        lines.append(_series_line(f"t = {t}", places, [row.get(t) for row in at], color))
    panel.draw(lines, Axis(text=percent) if best.unit == "%" else Axis())


def _series_loss(figure, records: Sequence[dict[str, Any]]) -> None:
    title = metrics_of(targets_of(records[-1]))["loss"].title
    panel, places = _over_training(figure, records, f"{title} under uniform t, nats")
    losses = [record["classifier"]["uniform_t"]["loss"] for record in records]
    panel.draw([_series_line("", places, losses, BLUE)], Axis())


def _series_line(
    name: str, places: Sequence[float], values: Sequence[float | None], color: str
) -> Line:
    known = [math.nan if value is None else value for value in values]
    return Line(name, list(zip(places, known, strict=True)), color, dots=True)


def _series_noise(figure, records: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    shades, best = matplotlib.colormaps["viridis_r"], headline_of(targets_of(records[-1]))
    lines = []
    for i, record in enumerate(records):
        color = shades(0.1 + 0.9 * i / max(1, len(records) - 1))
        named = i in (0, len(records) - 1) or len(records) <= 6
        points = _points(record["classifier"], best.name)
        lines.append(Line(record["name"] if named else "", points, color, dots=True))
    panel = _against_noise(figure, best.title, records[-1]["classifier"])
    panel.draw(lines, SHARE if best.unit == "%" else Axis())


# ------------------------------------------------------------------------------ over steps


def curves_svg(
    title: str,
    lines: Sequence[Line],
    y: Axis,
    *,
    last_step: int,
    level: tuple[float, str] | None = None,
) -> str:
    """Return curves over the steps of training as SVG. level: a dotted line across, its name."""

    def draw(figure) -> None:
        panel = Panel(figure, title, "step")
        panel.draw(lines, y, level, last_values=True)
        panel.set_x(0, max(last_step, 1))

    return to_svg(draw)


@dataclass(frozen=True)
class Bar:
    """A row of the timeline: the steps of an attempt, and how it ended."""

    name: str
    first: int
    last: int
    end: str
    color: str


@dataclass(frozen=True)
class Marks:
    """A row of the timeline: marks at the steps of one kind of fault."""

    name: str
    steps: Sequence[float]
    marker: str  # as matplotlib names it
    color: str


def timeline_svg(
    bars: Sequence[Bar], marks: Sequence[Marks], last_step: int, *, narrow: bool = False
) -> str:
    """Return bars from first to last step, and rows of marks under them, as SVG.

    narrow: for a phone; the names of the bars say how they ended, without how long they took.
    """
    rows = len(bars) + len(marks)
    height = STRIP_ROW * rows + BOTTOM
    strip_width, left, right = NARROW_STRIP if narrow else STRIP
    inside = strip_width - left - right
    per_point = last_step / inside

    def draw(figure) -> None:
        box = (left / strip_width, BOTTOM / height, inside / strip_width, 1 - BOTTOM / height)
        axes = figure.add_axes(box)
        names = [row.name for row in (*bars, *marks)]
        for row, bar in enumerate(bars):
            width = max(3 * per_point, bar.last - bar.first)
            hint = f"{bar.name}: steps {bar.first:,} to {bar.last:,}, {bar.end}"
            look = dict(color=bar.color, alpha=0.75, linewidth=0, gid=HINT + hint)
            axes.barh(row, width, left=bar.first, height=0.55)[0].set(**look)
            if narrow:
                names[row] = f"{bar.name.removeprefix('attempt ')}: {bar.end.partition(',')[0]}"
            else:
                right_of_it = bar.first + width + 6 * per_point
                axes.text(right_of_it, row, bar.end, va="center", color=SLATE)
        for row, kind in enumerate(marks, start=len(bars)):
            spots = {4 * per_point * round(s / (4 * per_point)) for s in kind.steps}
            spots = sorted(min(spot, last_step) for spot in spots)  # one per 4 points
            look = dict(color=kind.color, markersize=7, linestyle="", clip_on=False)
            axes.plot(spots, [row] * len(spots), marker=kind.marker, **look)
        axes.set_yticks(range(rows), names)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.grid(False)
        axes.set_xlim(0, last_step)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=4 if narrow else 9)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        figure.set_label("Attempts and faults over steps")

    return to_svg(draw, width=strip_width, height=height)
