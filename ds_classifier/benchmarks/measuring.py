"""Repeats that are interleaved, and the table of what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial


def in_turn(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each of the ways tells, asked in turn: A B A B ..."""
    told: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            told[name].append(way())
    return told


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


def print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
