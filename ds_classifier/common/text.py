"""Numbers, durations and tables as text, the same way on the screen, in reports and in cards."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence


def count(number: int, noun: str) -> str:
    """Return "1 image", "0 images" or "12,000 images"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in [0, 1] as "96.7 %", and None as "-"."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def short(value: float | None) -> str:
    """Return a number in at most seven characters: 300k, 0.2468, 3.1e-4; None is "-"."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}"


def scientific(value: float, digits: int = 1) -> str:
    """Return "9.2e-4" or "1.5e6": scientific form without needless signs and zeros; 0 is "0"."""
    return re.sub(r"e\+?(-?)0?", r"e\1", f"{value:.{digits}e}") if value else "0"


def fitted(value: float | None, width: int, digits: int) -> str:
    """Return a number in `width` characters, with fewer than `digits` decimals if it must be.

    Five characters hold any number in scientific form, six a negative one. None is "-".
    """
    if value is None:
        return "-"
    fixed = [f"{value:.{n}f}" for n in range(digits, -1, -1)]
    brief = [scientific(value, n) for n in (1, 0)]
    return next((text for text in fixed + brief if len(text) <= width), brief[-1])


def significant(value: float | None, width: int) -> str:
    """Return a number in `width` characters with three digits that count, or with two, or in
    scientific form: 0.0123, 12.3, 12345, 1.2e-5.

    Four characters hold the scientific form of any number above 0. None is "-".
    """
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    first = math.floor(math.log10(abs(value)))
    fixed = [f"{value:.{max(0, digits - first)}f}" for digits in (2, 1)]
    brief = [scientific(value, n) for n in (2, 1, 0)]
    return next((text for text in fixed + brief if len(text) <= width), brief[-1])


def duration(seconds: float) -> str:
    """Return "0:00:07", "1:02:03" or, from 100 hours on, "4.2 days" or "45 days"."""
    hours, rest = divmod(max(0, int(seconds)), 3600)
    if hours >= 100:
        return f"{hours / 24:.{1 if hours < 239 else 0}f} days"
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lay out cells in lines under their heads, two spaces apart.

    left: the number of first columns that are aligned left; numbers, in the others, right.
    """
    cells = [list(heads), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
