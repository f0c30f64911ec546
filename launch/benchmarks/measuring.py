"""Repeats that are interleaved, and the table of what came out."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial


def in_turn(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each of the ways tells, asked in turn: A B A B ..."""
    told: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            told[name].append(way())
            show_progress(repeat, repeats, name)
    return told


def show_progress(repeat: int, repeats: int, name: object) -> None:
    """On a screen, that one of the repeats, from 0, has been done; for a table comes at the end."""
    if sys.stderr.isatty():
        done = f"repeat {repeat + 1} of {repeats}: {name}"
        print(f"\r{done[:78]:78}", end="\r", file=sys.stderr, flush=True)


def interleaved(
    runs: dict[str, Callable[[], int]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median of things done a second by each run, in turn, after one warm-up.

    clock: its seconds. before: called ahead of every run, not timed.
    """

    def rate(run: Callable[[], int]) -> float:
        before()
        began = clock()
        done = run()
        return done / (clock() - began)

    ways = {name: partial(rate, run) for name, run in runs.items()}
    in_turn(ways, 1)
    return {name: statistics.median(rates) for name, rates in in_turn(ways, repeats).items()}


def spread(values: list[float]) -> float:
    """How far the repeats lie apart, as a share of their median."""
    return (max(values) - min(values)) / statistics.median(values)


def print_table(rows: list[dict]) -> None:
    """Lists, such as the numbers of each repeat, are for the JSON alone."""
    columns = list(dict.fromkeys(k for row in rows for k in row if not isinstance(row[k], list)))
    if sys.stderr.isatty():
        print(f"\r{'':78}", end="\r", file=sys.stderr, flush=True)
    cells = [columns, *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
