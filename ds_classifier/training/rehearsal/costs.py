"""The memory, time and disk that a run will need, worked out from a rehearsal's figures.

The largest micro-batch comes from a straight line through the peak memory of several, and the time
of the run from the times of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_classifier.common.text import duration
from ds_classifier.config.batch_sizes import BatchSizes

ACCUMULATION = 2  # the most micro-batches of a rehearsed step: one within it, one that ends it
ROOM = 0.9  # the share of the memory that may be filled; the rest is for fragmentation


def rehearsed(batch: BatchSizes) -> BatchSizes:
    """Return the batch of a rehearsed step: fewer micro-batches of the same size."""
    return BatchSizes(batch.micro, min(batch.accumulation, ACCUMULATION), batch.world_size)


@dataclass(frozen=True)
class MemoryLine:
    """A line through measured peaks: bytes of a rank = fixed + per_image * micro-batch.

    capacity: the bytes that the rank may use. sizes: the micro-batches that were measured.
    """

    fixed: float
    per_image: float
    capacity: float
    sizes: tuple[int, ...]

    @classmethod
    def through(cls, peaks: dict[int, float], capacity: float) -> MemoryLine:
        """Fit the line by least squares. peaks: bytes by micro-batch, of at least two sizes."""
        per_image, fixed = np.polyfit(list(peaks), list(peaks.values()), deg=1)
        return cls(float(fixed), float(per_image), capacity, tuple(peaks))

    def at(self, micro_batch: int) -> float:
        """Return the bytes at a micro-batch."""
        return self.fixed + self.per_image * micro_batch

    def largest(self) -> int | None:
        """Return the micro-batch that fills ROOM of the capacity; None if the cost of an image is
        too small to be measured."""
        if self.per_image < 1024:
            return None
        return max(0, int((ROOM * self.capacity - self.fixed) / self.per_image))


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step's micro-batches, medians over `steps` steps.

    within: of a micro-batch that does not end the step. last: of the one that does, including the
    optimizer. waited: the share of the time spent waiting for data.
    """

    within: float
    last: float
    waited: float
    steps: int

    def of_step(self, accumulation: int) -> float:
        """Return the seconds of a step of this number of micro-batches."""
        return (accumulation - 1) * self.within + self.last


@dataclass(frozen=True)
class SaveCost:
    """The cost of a checkpoint.

    held: seconds that training stands still. written: seconds until it is on the disk. loaded:
    seconds to load it. bytes: its size. free: the free bytes of the disk before it was written.
    """

    held: float
    written: float
    loaded: float
    bytes: int
    free: int


def checkpoints_kept(
    *, steps: int, save_interval: int, keep_last: int, keep_every: int, validated: bool
) -> int:
    """Return the most checkpoints on the disk at once: those kept, the best, and the new one."""
    saves = times_done(0, steps, save_interval)
    for_good = 0
    if keep_every:
        for_good = steps // math.lcm(save_interval, keep_every)
    return min(saves, keep_last + for_good + validated + 1)


def times_done(first: int, last: int, interval: int) -> int:
    """Return how often something is done after step `first` that is due every `interval` steps, and
    at the last step."""
    return last // interval - first // interval + (last % interval > 0)


def memory_lines(line: MemoryLine, batch: BatchSizes) -> list[str]:
    """Return lines on the memory of a micro-batch, and on the largest that fits."""
    sizes = ", ".join(map(str, line.sizes))
    text = (
        f"memory      {_gib(line.fixed)} + {line.per_image / 2**20:.1f} MiB per image (measured at "
        f"{sizes}): {_gib(line.at(batch.micro))} per rank at micro-batch {batch.micro}"
    )
    return [text, f"{'':12}{_what_fits(line, batch)}"]


def _what_fits(line: MemoryLine, batch: BatchSizes) -> str:
    per_rank = batch.micro * batch.accumulation
    largest, room = line.largest(), f"{ROOM:.0%} of its {_gib(line.capacity)}"
    key = "micro-batch (train_micro_batch_size_per_gpu)"
    if largest is None or largest >= per_rank:
        return f"all {per_rank} images of a rank fit one {key} in {room}"
    fitting = [n for n in range(1, largest + 1) if per_rank % n == 0]
    dividing = f"; dividing its {per_rank}: {fitting[-1]}" if fitting else ""
    return f"largest {key} in {room}: {largest}{dividing}"


def time_lines(
    pace: StepTime,
    *,
    batch: BatchSizes,
    steps: int,
    validation: float | None,
    validations: int,
    save: SaveCost,
    saves: int,
    gflops_per_image: float,
) -> list[str]:
    """Return lines on how long the run will take, and how that was worked out."""
    seconds = pace.of_step(batch.accumulation)
    per_sec = batch.total / seconds
    done = rehearsed(batch)
    cut = ""
    if done.accumulation < batch.accumulation:
        cut = f", from {done.accumulation} of its {batch.accumulation} micro-batches"
    total = steps * seconds + saves * save.held
    parts = [f"{steps:,} steps x {_seconds(seconds)}"]
    if validation is not None:
        total += validations * validation
        parts.append(f"{validations} x {_seconds(validation)} of validation")
    parts.append(f"{saves} x {_seconds(save.held)} of saving")
    return [
        f"step        {_seconds(seconds)} (median of {pace.steps}{cut}), {per_sec:,.1f} images/s, "
        f"{per_sec / batch.world_size * gflops_per_image:,.0f} GFLOP/s per rank, "
        f"{pace.waited:.0%} waiting for data",
        f"time        about {duration(total)} = {' + '.join(parts)}",
        f"{'':12}at this machine's pace now; start-up not counted",
    ]


def disk_line(save: SaveCost, *, kept: int, present: int) -> str:
    """Return a line on the room for checkpoints. present: bytes of those already there.

    Raises ValueError if there is no room for those that the run keeps.
    """
    need = max(0, kept * save.bytes - present)
    text = (
        f"checkpoints {_gib(save.bytes)} each, at most {kept} at a time; {_gib(need)} to come, "
        f"{_gib(save.free)} free"
    )
    if need > save.free:
        raise ValueError(
            f"--run_dir: got {_gib(save.free)} free; need {_gib(need)} more for {kept} checkpoints "
            f"of {_gib(save.bytes)}; do: make room, lower --keep_last or raise --keep_every, or "
            "choose another"
        )
    return text


def save_line(save: SaveCost) -> str:
    """Return a line on the cost of a checkpoint."""
    return (
        f"save        training stands still {_seconds(save.held)}, written after "
        f"{_seconds(save.written)}; loaded back equal in {_seconds(save.loaded)}"
    )


def bytes_of(checkpoints: Iterable[Path]) -> int:
    """Return the bytes that checkpoints take on the disk."""
    return sum(file.stat().st_size for folder in checkpoints for file in folder.iterdir())


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
