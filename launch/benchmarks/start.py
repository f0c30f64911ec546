"""Time from the command to the first step of training, and what it is made of."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from .measuring import show_progress
from .programs import (
    launched,
    seconds_to_lines,
    shards_for,
    training_command,
)

# What a run's lines begin with, and what was done when they come.
MARKS = {
    "engine built": "classifier",
    "ready to train": "  step",
    "first step": "     1 ",
    "second step": "     2 ",
}


def measure(
    words: list[str], *, program: Path, images: str, ranks: list[int], repeats: int
) -> list[dict]:
    """Seconds since the command. words: of the training command. images: shards, or what they
    are made of."""
    training_command(words)
    imports = [sys.executable, "-c", "import torch, deepspeed; print('done', flush=True)"]
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = ["--data_dir", shards_for(words, images, folder), "--iterations", 100]
        flags += ["--log_interval", 1]
        for repeat in range(repeats):
            ways = {"importing torch and deepspeed": (imports, {"imported": "done"})}
            for count in ranks:
                run = ["--run_dir", folder / f"run {repeat} {count}"]
                command = [*launched(program, count), *words, *map(str, flags + run)]
                ways[f"launch/train.py, {count} rank" + "s" * (count > 1)] = (command, MARKS)
            for name, (command, marks) in ways.items():
                for mark, value in seconds_to_lines(command, marks).items():
                    seconds.setdefault(name, {}).setdefault(mark, []).append(value)
                show_progress(repeat, repeats, name)
    return [
        {"seconds until": name, **{mark: statistics.median(v) for mark, v in marks.items()}}
        for name, marks in seconds.items()
    ]
