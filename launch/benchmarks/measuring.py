"""Interleaved repeats, seconds of a call, and the table of the results."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from ds_classifier.common import text


def in_turn(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Return what each way measures in each repeat, the ways taken in turn: A B A B ..."""
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            measured[name].append(way())
            show_progress(repeat, repeats, name)
    return measured


def show_progress(repeat: int, repeats: int, name: object) -> None:
    """Show on a terminal that repeat number `repeat`, from 0, is done."""
    if sys.stderr.isatty():
        done = f"repeat {repeat + 1} of {repeats}: {name}"
        print(f"\r{done[:78]:78}", end="\r", file=sys.stderr, flush=True)


def interleaved(
    runs: dict[str, Callable[[], int]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median rate of each run, taken in turn after one warm-up.

    runs: each returns how many things it did; rates are things per second of `clock`.
    """

    def rate(run: Callable[[], int]) -> float:
        began = clock()
        done = run()
        return done / (clock() - began)

    ways = {name: partial(rate, run) for name, run in runs.items()}
    in_turn(ways, 1)
    return {name: statistics.median(rates) for name, rates in in_turn(ways, repeats).items()}


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; on a CPU everything is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Return the seconds of a call, the mean of as many as take `at_least` seconds."""
    call()
    wait_for(device)  # else the first call would be timed too
    began = time.perf_counter()
    for calls in itertools.count(1):
        call()
        wait_for(device)
        seconds = time.perf_counter() - began
        if seconds >= at_least:
            return seconds / calls
    raise AssertionError


def spread(values: list[float]) -> float:
    """Return the range of the repeats as a share of their median."""
    return (max(values) - min(values)) / statistics.median(values)


def print_table(rows: list[dict]) -> None:
    """Print rows under their keys. Lists, such as each repeat's numbers, go to the JSON only."""
    columns = list(dict.fromkeys(k for row in rows for k in row if not isinstance(row[k], list)))
    if sys.stderr.isatty():
        print(f"\r{'':78}", end="\r", file=sys.stderr, flush=True)
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    print("\n".join(text.table(columns, cells)))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
