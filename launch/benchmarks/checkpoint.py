"""How long a save holds up training, written behind it or waited for."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from ds_classifier.checkpoint.writer import CheckpointWriter
from ds_classifier.diffusion import UniformSampler

from .programs import training_command
from .step import Bench


def measure(words: list[str], *, folder: Path | None, repeats: int) -> list[dict]:
    """One rank, random images of 64 px: saves that are waited for and saves behind, in turn."""
    training_command(words)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--folder: got {folder}, which is no directory; need one on the disk")
    bench = Bench.of([*words, "--num_classes", "1000"])
    engine, take_step = bench.engine, bench.trainer_step()

    def step() -> float:
        began = time.perf_counter()
        take_step()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        writer = CheckpointWriter(
            Path(temporary),
            engine=engine,
            sampler=UniformSampler(1000),
            keep_last=1,
            keep_every=0,
            max_failed=0,
        )
        seconds: dict[str, dict[str, list[float]]] = {"waited for": {}, "behind": {}}

        def note(way: str, **figures: float) -> None:
            for name, value in figures.items():
                seconds[way].setdefault(name, []).append(value)

        step()  # the first is slower than any other
        plain = [step()]
        for repeat in range(repeats + 1):
            began = time.perf_counter()
            writer.save({})
            saved = time.perf_counter()
            writer.finish()
            ended = time.perf_counter()
            if repeat:  # the first save makes the buffers
                note("waited for", snapshot=saved - began, write=ended - saved, slower=0.0)
            plain.append(step())
            began = time.perf_counter()
            writer.save({})
            saved = time.perf_counter()
            behind = []
            while writer.under_way is not None:
                behind.append(step())
                writer.check()
            if repeat:
                usual = statistics.median(plain)
                written = time.perf_counter() - saved
                slower = sum(behind) - len(behind) * usual
                note("behind", snapshot=saved - began, write=written, slower=slower)
    parameters = sum(p.numel() for p in engine.module.parameters())
    usual = statistics.median(plain)
    rows = []
    for way, figures in seconds.items():
        medians = {name: statistics.median(values) for name, values in figures.items()}
        stall = medians["snapshot"] + (medians["write"] if way == "waited for" else 0.0)
        rows.append(
            {
                "checkpoint": way,
                "parameters": parameters,
                "step s": usual,
                "snapshot s": medians["snapshot"],
                "written after s": medians["write"],
                "training stands still s": stall,
                "steps behind it lose s": medians["slower"],
                "threads": torch.get_num_threads(),
            }
        )
    return rows
