"""Repeats that are interleaved, and the table of what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(
    runs: dict[str, Callable[[], int]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median of things done a second by each run, in turn: A B A B ..., after one warm-up.

    clock: its seconds. before: called ahead of every run, not timed.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            before()
            began = clock()
            done = run()
            if repeat:
                rates[name].append(done / (clock() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


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
