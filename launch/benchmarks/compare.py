"""Compare whole trainers with different flags, run in turn on this machine."""

from __future__ import annotations

import shlex
import statistics
import tempfile
from pathlib import Path

from .measuring import show_progress, spread
from .programs import (
    ProgramFailed,
    resolve_way,
    shards_for,
    trainer_row,
)


def measure(
    words: list[str],
    *,
    program: Path,
    images: str,
    ways: list[str],
    ranks: list[int],
    steps: int,
    repeats: int,
) -> list[dict]:
    """Return a row per way and number of ranks; ratios are medians over repeats, to the first row.

    words: flags of the training command that all ways share. program: launch/train.py.
    images: shards, or a source that convert takes. ways: the flags of each way, in one string.
    ranks: the numbers of ranks to run each way on. steps: steps timed per run.
    """
    runs = [(way, count) for count in ranks for way in ways]
    batches = [  # finds wrong flags before the first run
        resolve_way(_name(way, count), [*words, *shlex.split(way)], count).batch.total
        for way, count in runs
    ]
    measured: list[dict[str, list[float]]] = [{} for _ in runs]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = ["--data_dir", str(shards_for(words, images, folder))]
        for repeat in range(repeats):
            first = None
            for (way, count), figures in zip(runs, measured, strict=True):
                command = [*words, *shlex.split(way), *data]
                try:
                    row = trainer_row(program, command, folder / "run", ranks=count, steps=steps)
                except ProgramFailed as error:
                    raise ProgramFailed(f"{_name(way, count)}: {error}") from None
                rate = row["images_per_sec"]
                first = first or rate
                for name, value in {
                    "images/s": rate,
                    "x the first": rate / first,
                    "waiting for data, %": 100 * row["data_wait_frac"],
                    "GiB of rank 0": row["memory_gib"],
                    "start-up, s": row["start_s"],
                }.items():
                    figures.setdefault(name, []).append(value)
                show_progress(repeat, repeats, _name(way, count))
    return [
        {
            "way": way or "(as it is)",
            "ranks": count,
            "batch": batch,
            **{k: statistics.median(v) for k, v in figures.items()},
            "spread": spread(figures["images/s"]),
            "each repeat's images/s": figures["images/s"],
        }
        for (way, count), batch, figures in zip(runs, batches, measured, strict=True)
    ]


def _name(way: str, ranks: int) -> str:
    return f"--way '{way}', --ranks {ranks}"
