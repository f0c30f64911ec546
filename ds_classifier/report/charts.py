"""Line charts as SVG text, without a library: small, sharp on paper, the page's own fonts.

Colours are Okabe and Ito's, told apart by the colour-blind; a line's dash or its legend's number
says the same again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
INK, QUIET, SLATE = "#1d2430", "#8a919c", "#4a5568"
QUARTILE_COLORS = ("#0b4f8a", "#2f9fd0", "#e69f00", "#b3470a")  # dark to light, light to dark
WIDTH, HEIGHT = 372, 216  # of a chart, in its own units: pixels where three stand side by side
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 36
EDGE = 4  # a dot on the edge is drawn whole
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve. band: (x, least, most), drawn faintly. dots: a mark at each point, with its numbers
    as the words a browser shows. areas: of the dots, if they differ; they stand without a line.
    name "": not in the legend."""

    name: str
    points: Sequence[Point]
    color: str
    band: Sequence[tuple[float, float, float]] = ()
    dash: str = ""
    opacity: float = 1.0
    width: float = 1.6
    dots: bool = False
    areas: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """label: words under or beside it. low, high: fixed ends; None: as the data has it.
    log: logarithmic. text: how a tick is written. falling: from high to low."""

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    falling: bool = False
    text: Callable[[float], str] = field(default=lambda value: short(value))


def line_chart(
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    level: tuple[float, str] | None = None,
    above: Sequence[tuple[float, str]] = (),
    above_label: str = "",
    diagonal: bool = False,
) -> str:
    """A chart with its title and legend, as HTML; the legend says each line's last value.

    level: a dotted line across, and its name. above: ticks along the top, (x, words). diagonal: a
    dotted line from (0, 0) to (100, 100).
    """
    known = [p for line in lines for p in line.points if _shown(p, y.log)]
    legend = _legend(lines, y, level)
    if not known:
        body = '<div class="empty">nothing to show yet</div>'
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{body}</figure>'
    extra = [(known[0][0], level[0])] if level else []
    banded = [(x, y) for line in lines for x, *ends in line.band for y in ends]
    scale_x = Scale(x, [p[0] for p in known], LEFT, WIDTH - RIGHT)
    top = TOP + (10 if above else 0)
    reach = [p[1] for p in known + extra] + _quantiles([p[1] for p in banded])
    scale_y = Scale(y, reach, HEIGHT - BOTTOM, top)
    parts = [_grid(scale_x, scale_y, top)]
    if diagonal:
        parts.append(_path([(0, 0), (100, 100)], scale_x, scale_y, QUIET, dash="2 3", width=1))
    if level:
        ends = [(scale_x.low, level[0]), (scale_x.high, level[0])]
        parts.append(_path(ends, scale_x, scale_y, QUIET, dash="2 3", width=1.2))
    drawn = [_band(line, scale_x, scale_y) for line in lines if line.band]
    drawn += [_curve(line, scale_x, scale_y) for line in lines]
    parts.append(_cut(top, "".join(drawn)))
    for place, words in above:
        at = scale_x(place)
        parts.append(f'<path d="M{at:.1f} {top}v-3" stroke="{QUIET}"/>')
        parts.append(_text(at, top - 6, words, "middle", "tick"))
    if above:
        parts.append(_text(LEFT - 6, top - 6, above_label, "end", "tick"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x.label, "middle", "axis"))
    described = escape(f"{title}: {y.label} against {x.label}")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}'
        f' <span class="unit">{escape(y.label)}</span></figcaption>{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">'
        f"{''.join(parts)}</svg></figure>"
    )


class Scale:
    """From values to places. ticks: values, far enough apart to be read."""

    def __init__(self, axis: Axis, values: Sequence[float], begin: float, end: float):
        self.axis, self._log = axis, axis.log
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        if self._log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        vertical = begin > end
        margin = 0.05 * (high - low) if vertical else 0.0
        if axis.low is None:
            low = 0.0 if not self._log and low >= 0 and low - margin < 0 else low - margin
        if axis.high is None:
            high += margin
        self._low, self._high = low, high
        self._begin, self._end = (end, begin) if axis.falling else (begin, end)
        wanted = 4 if vertical else 5
        self.ticks = _log_ticks(low, high) if self._log else nice_ticks(low, high, wanted)

    @property
    def low(self) -> float:
        return 10**self._low if self._log else self._low

    @property
    def high(self) -> float:
        return 10**self._high if self._log else self._high

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self._log else value
        share = (place - self._low) / (self._high - self._low)
        share = min(2.0, max(-1.0, share))
        return self._begin + share * (self._end - self._begin)


def nice_ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` multiples of 1, 2 or 5 times a power of ten between two numbers."""
    size = 10 ** math.floor(math.log10((high - low) / wanted))
    step = min((size * m for m in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - wanted))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with their doubles and halves where there are few; between exponents."""
    parts = (1, 2, 5) if high - low < 2.5 else (1,)
    exponents = range(math.floor(low) - 1, math.ceil(high) + 1)
    ticks = [m * 10.0**e for e in exponents for m in parts]
    ticks = [v for v in ticks if low - 1e-9 <= math.log10(v) <= high + 1e-9]
    return ticks[:: max(1, math.ceil(len(ticks) / 6))]


def short(value: float) -> str:
    """A number in a few characters: 300k, 0.25, 3e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{value:.3g} %"


def _quantiles(values: list[float]) -> list[float]:
    """So far a band is shown: a spike of one step must not flatten the curve."""
    ranked = sorted(v for v in values if math.isfinite(v))
    if not ranked:
        return []
    return [ranked[int(share * (len(ranked) - 1))] for share in (0.01, 0.99)]


def _shown(point: Point, log: bool) -> bool:
    return all(map(math.isfinite, point)) and (not log or point[1] > 0)


def _cut(top: float, body: str) -> str:
    """An image in the image: what leaves the axes is cut off."""
    x, y = LEFT - EDGE, top - EDGE
    width, height = WIDTH - RIGHT + EDGE - x, HEIGHT - BOTTOM + EDGE - y
    box = f'x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{x} {y} {width} {height}"'
    return f"<svg {box}>{body}</svg>"


def _text(x: float, y: float, words: str, anchor: str, kind: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{escape(words)}</text>'


def _grid(scale_x: Scale, scale_y: Scale, top: float) -> str:
    parts = []
    for tick in scale_y.ticks:
        at = scale_y(tick)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(_text(LEFT - 6, at + 3.5, scale_y.axis.text(tick), "end", "tick"))
    for tick in scale_x.ticks:
        at = scale_x(tick)
        parts.append(f'<path d="M{at:.1f} {HEIGHT - BOTTOM}v3" stroke="{QUIET}"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 14, scale_x.axis.text(tick), "middle", "tick"))
    bottom = HEIGHT - BOTTOM
    parts.append(f'<path d="M{LEFT} {bottom}H{WIDTH - RIGHT}" stroke="{QUIET}" fill="none"/>')
    return "".join(parts)


def _path(points, scale_x, scale_y, color, *, dash="", width=1.6, opacity=1.0) -> str:
    """A line through the points, interrupted where one is not a number."""
    words, drawing = [], False
    for point in points:
        if not _shown(point, scale_y.axis.log):
            drawing = False
            continue
        words.append(f"{'L' if drawing else 'M'}{scale_x(point[0]):.1f} {scale_y(point[1]):.1f}")
        drawing = True
    if not words:
        return ""
    more = f' stroke-dasharray="{dash}"' if dash else ""
    more += f' opacity="{opacity:g}"' if opacity < 1 else ""
    return (
        f'<path d="{"".join(words)}" class="line" stroke="{color}" stroke-width="{width}"{more}/>'
    )


def _curve(line: Line, scale_x: Scale, scale_y: Scale) -> str:
    shown = [p for p in line.points if _shown(p, scale_y.axis.log)]
    path = _path(
        line.points,
        scale_x,
        scale_y,
        line.color,
        dash=line.dash,
        width=line.width,
        opacity=line.opacity,
    )
    if not line.dots and len(shown) > 1:
        return path
    path = "" if line.areas else path
    dots = []
    for i, (x, y) in enumerate(shown):
        radius = math.sqrt(line.areas[i] / math.pi) if line.areas else 2.3
        words = escape(f"{line.name}: {scale_x.axis.text(x)}, {scale_y.axis.text(y)}")
        dots.append(
            f'<circle cx="{scale_x(x):.1f}" cy="{scale_y(y):.1f}" r="{radius:.1f}" '
            f'fill="{line.color}" opacity="{line.opacity:g}"><title>{words}</title></circle>'
        )
    return path + "".join(dots)


def _band(line: Line, scale_x: Scale, scale_y: Scale) -> str:
    shown = [b for b in line.band if not scale_y.axis.log or b[1] > 0]
    if len(shown) < 2:
        return ""
    there = [f"{scale_x(x):.1f} {scale_y(high):.1f}" for x, _, high in shown]
    back = [f"{scale_x(x):.1f} {scale_y(low):.1f}" for x, low, _ in reversed(shown)]
    return f'<path d="M{"L".join([*there, *back])}Z" fill="{line.color}" opacity="0.16"/>'


def _legend(lines: Sequence[Line], y: Axis, level: tuple[float, str] | None) -> str:
    """A sample of each named line, its name and its last value."""
    entries = []
    for line in lines:
        if not line.name:
            continue
        last = next((p[1] for p in reversed(line.points) if _shown(p, y.log)), None)
        value = ""
        if last is not None and not line.dots:
            value = f" <b>{escape(y.text(float(f'{last:.3g}')))}</b>"
        entries.append(_sample(line.color, line.dash, line.opacity) + escape(line.name) + value)
    if level:
        entries.append(_sample(QUIET, "2 3") + escape(level[1]))
    return f'<p class="legend">{"".join(f"<span>{entry}</span>" for entry in entries)}</p>'


def _sample(color: str, dash: str, opacity: float = 1.0) -> str:
    more = f' stroke-dasharray="{dash}"' if dash else ""
    more += f' opacity="{opacity:g}"' if opacity < 1 else ""
    return (
        '<svg width="14" height="8" viewBox="0 0 14 8" aria-hidden="true">'
        f'<path d="M0 4H14" stroke="{color}" stroke-width="2.4"{more}/></svg>'
    )
