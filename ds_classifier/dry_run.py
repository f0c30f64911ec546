"""A run rehearsed: a few real steps, a checkpoint there and back, and what the run will need.

Everything is measured on this machine with the run's own engine, data and settings; nothing is
looked up. What is worked out from it says so: the largest micro-batch from a straight line through
the peak memory of several, the time of the run from the time of its parts.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_classifier import checkpoint, distributed, files, memory
from ds_classifier import engine as engines
from ds_classifier.batch import Batch as BatchSize
from ds_classifier.checkpoint_writer import BYTES_A_PARAMETER, CheckpointWriter
from ds_classifier.config import Settings
from ds_classifier.data.loader import Batch, Loader
from ds_classifier.evaluation import evaluate
from ds_classifier.flops import Arithmetic, training_flops
from ds_classifier.logger import duration
from ds_classifier.metrics import Meter
from ds_classifier.replicas import bit_sum
from ds_classifier.shutdown import Stopped, StopVote
from ds_classifier.training import train_step
from ds_classifier.watchdog import Watchdog

ACCUMULATION = 2  # micro-batches of a rehearsed step at most: one within, one that ends it
TIMED_STEPS, LEAST_TIMED, TIMING_SECONDS = 7, 2, 60.0
WARM_UP_SECONDS = 20.0
VALIDATION_BATCHES, VALIDATION_SECONDS = 16, 20.0
ROOM = 0.9  # of the memory there is that a micro-batch may fill; the rest is for fragments
LEFTOVER = ".dry_run-"  # begins the name of the directory that is removed at the end


def rehearsed(batch: BatchSize) -> BatchSize:
    """The batch of a rehearsed step: fewer micro-batches of the same size."""
    return BatchSize(batch.micro, min(batch.accumulation, ACCUMULATION), batch.world_size)


# ------------------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class MemoryLine:
    """Peak bytes of a rank = fixed + per_image * micro-batch, through what was measured.

    capacity: bytes that the rank may have. sizes: the micro-batches that were measured.
    """

    fixed: float
    per_image: float
    capacity: float
    sizes: tuple[int, ...]

    @classmethod
    def through(cls, peaks: dict[int, float], capacity: float) -> MemoryLine:
        """The line of least squares. peaks: bytes by micro-batch, of two sizes or more."""
        per_image, fixed = np.polyfit(list(peaks), list(peaks.values()), deg=1)
        return cls(float(fixed), float(per_image), capacity, tuple(peaks))

    def at(self, micro_batch: int) -> float:
        return self.fixed + self.per_image * micro_batch

    def largest(self) -> int | None:
        """The micro-batch that fills ROOM of the capacity; None where a picture costs nothing
        that could be measured."""
        if self.per_image < 1024:
            return None
        return max(0, int((ROOM * self.capacity - self.fixed) / self.per_image))


@dataclass(frozen=True)
class StepTime:
    """Seconds: `within` of a micro-batch that does not end the step, `last` of the one that does,
    with the optimizer's work in it. waited: the share of them spent waiting for data. steps: that
    these are the median of."""

    within: float
    last: float
    waited: float
    steps: int

    def of_step(self, accumulation: int) -> float:
        return (accumulation - 1) * self.within + self.last


@dataclass(frozen=True)
class SaveCost:
    """held: seconds that training stands still. written: seconds until it is on the disk.
    loaded: seconds to load it. bytes: of a checkpoint on the disk. free: of the disk, before it."""

    held: float
    written: float
    loaded: float
    bytes: int
    free: int


def checkpoints_kept(
    *, steps: int, save_interval: int, keep_last: int, keep_every: int, validated: bool
) -> int:
    """The most checkpoints that lie on the disk at once: those kept, the best, the one in hand."""
    saves = times_done(0, steps, save_interval)
    for_good = 0
    if keep_every:
        for_good = steps // math.lcm(save_interval, keep_every)
    return min(saves, keep_last + for_good + validated) + 1


def times_done(first: int, last: int, interval: int) -> int:
    """How often something is done after step `first` that is done every so many steps, and at the
    last."""
    return last // interval - first // interval + (last % interval > 0)


# ------------------------------------------------------------------------- measuring


def micro_batches_to_measure(micro_batch: int) -> list[int]:
    """Ascending; up to the run's own, but for a run that takes single pictures."""
    sizes = {max(1, micro_batch // 4), max(1, micro_batch // 2), micro_batch}
    return sorted(sizes if len(sizes) > 1 else {1, 2})


def resized(batch: Batch, size: int) -> Batch:
    """A batch of another size, of the same pictures over and over."""
    rows = torch.arange(size) % len(batch.labels)
    return Batch(*(tensor[rows] for tensor in batch[:4]), [])


class Rehearsal:
    """Measures a run with its engine; every rank makes one and calls everything.

    step: keywords of train_step but for batches, accumulation and meter. carry_on: called between
    parts; raises where the rehearsal was asked to stop.
    """

    def __init__(
        self,
        engine,
        *,
        batch: BatchSize,
        num_timesteps: int,
        step: dict[str, Any],
        carry_on: Callable[[], None],
    ):
        self._engine, self._batch, self._step = engine, batch, step
        self._meter = Meter(num_timesteps, engine.device)
        self._carry_on = carry_on

    def take_step(self, batches: Iterator[Batch]) -> float:
        """A rehearsed step; returns the seconds that it waited for data.

        Raises FloatingPointError on all ranks if its loss is not finite.
        """
        self._carry_on()
        accumulation = self._engine.gradient_accumulation_steps()
        _, waited, _ = train_step(
            self._engine, batches, accumulation=accumulation, meter=self._meter, **self._step
        )
        means, _ = self._meter.read()
        if not math.isfinite(means.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss of a step is {means['loss']}; do: look at the weights it starts from"
            )
        return waited

    def measure_memory(self, batch: Batch) -> MemoryLine:
        """Peak memory at several micro-batches, of the rank that has the least room."""
        device, ranks_here = self._engine.device, distributed.local_world_size()
        sizes = micro_batches_to_measure(self._batch.micro)
        accumulation = self._engine.gradient_accumulation_steps()

        def step_of(size: int) -> None:
            self.take_step(iter([resized(batch, size)] * accumulation))

        step_of(sizes[0])  # what is allocated once, such as Adam's state, is there from now on
        peaks = {}
        for size in sizes:
            memory.restart_peak(device)
            step_of(size)
            peaks[size] = memory.peak_memory(device)
        capacity = memory.memory_for_rank(device, ranks_here=ranks_here)
        if device.type == "cpu":  # which holds rank 0's snapshot too, from the first save on
            parameters = sum(p.numel() for p in self._engine.module.parameters())
            capacity -= BYTES_A_PARAMETER * parameters // ranks_here
        mine = torch.tensor([capacity, *peaks.values()], dtype=torch.float64, device=device)
        lines = [
            MemoryLine.through(dict(zip(sizes, peaks, strict=True)), capacity)
            for capacity, *peaks in distributed.all_gather(mine).tolist()
        ]
        return min(lines, key=lambda line: line.capacity - line.at(self._batch.micro))

    def measure_steps(self, batches: Iterator[Batch], *, buffered: int) -> StepTime:
        """Time real steps, waiting for data included, after the loader's lead is used up.

        buffered: batches that the loader has ahead.
        """
        accumulation = self._engine.gradient_accumulation_steps()
        warm_up = max(2, -(-buffered // accumulation))
        began = time.perf_counter()
        for _ in range(warm_up):
            self.take_step(batches)
            if self._seconds_since(began) > WARM_UP_SECONDS:
                break
        within, last, waited = [], [], 0.0
        began = time.perf_counter()
        while len(last) < TIMED_STEPS:
            starts: list[float] = []
            waited += self.take_step(self._noting(starts, batches))
            starts.append(self._now())
            *inner, final = np.diff(starts).tolist()
            within += inner
            last.append(final)
            if len(last) >= LEAST_TIMED and self._seconds_since(began) > TIMING_SECONDS:
                break
        total = sum(within) + sum(last)
        median = statistics.median
        return StepTime(median(within or [0.0]), median(last), waited / total, len(last))

    def _noting(self, starts: list[float], batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, and when each was asked for, the device's work before it being done."""
        while True:
            starts.append(self._now())
            yield next(batches)

    def _now(self) -> float:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        return time.perf_counter()

    def _seconds_since(self, began: float) -> float:
        """Rank 0's, on all ranks, so that all do the same."""
        return distributed.broadcast_json(time.perf_counter() - began, self._engine.device)

    def measure_validation(self, loader: Loader, *, noised: bool) -> float:
        """Seconds that a validation takes, from some of its batches, both passes of them."""

        def seconds(batches: int) -> float:
            self._carry_on()
            positions = islice(iter(loader.positions), batches)
            here = sum(int((part >= 0).sum()) for part in positions)
            device = self._engine.device
            samples = int(distributed.all_reduce_sum(torch.tensor(here, device=device)))
            began = time.perf_counter()
            for t in (None, 0):
                evaluate(
                    self._engine.module,
                    islice(iter(loader), batches),
                    samples=samples,
                    device=device,
                    noised=noised,
                    t=t,
                )
            return self._seconds_since(began)

        once = seconds(1)
        count = max(1, min(VALIDATION_BATCHES, len(loader), int(VALIDATION_SECONDS / once)))
        return seconds(count) / count * len(loader)

    def measure_save(
        self, folder: Path, *, sampler, facts: dict[str, Any], batch: Batch
    ) -> SaveCost:
        """Save, take a step that changes everything, load, and compare.

        folder: empty, on rank 0. Raises RuntimeError if what was loaded is not what was saved.
        """
        engine = self._engine
        free = shutil.disk_usage(folder).free if distributed.rank() == 0 else 0
        writer = CheckpointWriter(
            folder, engine=engine, sampler=sampler, keep_last=1, keep_every=0, max_failed=0
        )
        began = time.perf_counter()
        writer.save(facts)
        held = time.perf_counter() - began
        writer.finish()
        written = time.perf_counter() - began
        saved = self._fingerprint()
        self.take_step(iter([batch] * engine.gradient_accumulation_steps()))

        def find() -> list[Any]:
            (found,) = checkpoint.list_checkpoints(folder)
            size = sum(file.stat().st_size for file in found.iterdir())
            return [str(found), checkpoint.read_state(found), size]

        began = time.perf_counter()
        found, state, size = distributed.on_rank_0(find, engine.device)
        checkpoint.load(Path(found), state, engine=engine, sampler=sampler)
        loaded = time.perf_counter() - began
        if self._fingerprint() != saved:
            raise RuntimeError("a checkpoint was loaded, and is not what was saved")
        return SaveCost(held, written, loaded, size, free)

    def _fingerprint(self) -> list[int]:
        """Of this rank's share of master weights and Adam moments, bit by bit."""
        return [int(bit_sum(value)) for value in engines.optimizer_share(self._engine)]


@contextmanager
def scratch_beside(
    run_dir: Path, device: torch.device
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An empty directory on the file system of a run directory, removed at the end.

    In it if it exists, else in what exists of its path; all ranks get the name, rank 0 makes it.
    Also what removes it, for ends that leave no context. Raises AgreedError where nothing can be
    written.
    """

    def make() -> str:
        try:
            return tempfile.mkdtemp(prefix=LEFTOVER, dir=files.nearest_directory(run_dir))
        except OSError as error:
            raise ValueError(
                f"--run_dir: got {run_dir}, where nothing can be written ({error.strerror}); do: "
                "choose another"
            ) from None

    scratch = Path(distributed.on_rank_0(make, device))

    def remove() -> None:
        if distributed.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)

    try:
        yield scratch, remove
    finally:
        remove()


# ------------------------------------------------------------------------- in words


def memory_lines(line: MemoryLine, batch: BatchSize) -> list[str]:
    """What a micro-batch takes, and which would fit."""
    sizes = ", ".join(map(str, line.sizes))
    text = (
        f"memory      {_gib(line.fixed)} + {line.per_image / 2**20:.1f} MiB an image (measured at "
        f"{sizes}): {_gib(line.at(batch.micro))} a rank at micro-batch {batch.micro}"
    )
    return [text, f"{'':12}{_what_fits(line, batch)}"]


def _what_fits(line: MemoryLine, batch: BatchSize) -> str:
    per_rank = batch.micro * batch.accumulation
    largest, room = line.largest(), f"{ROOM:.0%} of the {_gib(line.capacity)} that a rank may have"
    if largest is None or largest >= per_rank:
        return f"all {per_rank} pictures of a rank fit in one micro-batch, by {room}"
    fitting = [n for n in range(1, largest + 1) if per_rank % n == 0]
    dividing = f"; {fitting[-1]} is the largest that divides a rank's {per_rank}" if fitting else ""
    return f"the largest micro-batch that fits {room}: {largest}{dividing}"


def time_lines(
    pace: StepTime,
    *,
    batch: BatchSize,
    steps: int,
    validation: float | None,
    validations: int,
    save: SaveCost,
    saves: int,
    gflops_per_image: float,
) -> list[str]:
    """How long the run will take, and from what that is worked out."""
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
        f"{per_sec / batch.world_size * gflops_per_image:,.0f} GFLOP/s a rank, "
        f"{pace.waited:.0%} waiting for data",
        f"time        about {duration(total)} = {' + '.join(parts)}",
        f"{'':12}at this machine's pace now; start-up not counted",
    ]


def disk_line(save: SaveCost, *, kept: int, present: int) -> str:
    """What checkpoints will take. present: bytes of those that are there already.

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
    return (
        f"save        training stands still {_seconds(save.held)}, written after "
        f"{_seconds(save.written)}; loaded back equal in {_seconds(save.loaded)}"
    )


def bytes_of(checkpoints: Iterable[Path]) -> int:
    return sum(file.stat().st_size for folder in checkpoints for file in folder.iterdir())


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


# ------------------------------------------------------------------------- all of it


def dry_run(
    engine,
    loader: Loader,
    val_loader: Loader | None,
    *,
    settings: Settings,
    batch: BatchSize,
    first_step: int,
    sampler,
    facts: dict[str, Any],
    arithmetic: Arithmetic,
    stop: StopVote,
    watch: Watchdog,
) -> None:
    """Rehearse a run from a step on, and say what it will need; every rank must call it.

    engine: of the batch `rehearsed(batch)`, as the loaders; batch, settings: the run's. facts: of
    its checkpoints. Raises ValueError where the disk has no room for the run's checkpoints, Stopped
    on all ranks when asked to stop; what training would raise it raises too.
    """

    def carry_on() -> None:
        if stop.decide(now=True):
            raise Stopped
        watch.stepping(engine.global_steps + 1)

    rehearsal = Rehearsal(
        engine,
        batch=batch,
        num_timesteps=engine.module.diffusion.num_timesteps,
        step=dict(sampler=sampler, seed=settings.seed, noised=settings.noised),
        carry_on=carry_on,
    )
    batches = watch.batches(iter(loader))
    first_batch = next(batches)
    for line in memory_lines(rehearsal.measure_memory(first_batch), batch):
        distributed.say(line)
    pace = rehearsal.measure_steps(batches, buffered=loader.workers * loader.prefetch)
    batches.close()
    validation = None
    if val_loader is not None:
        validation = rehearsal.measure_validation(val_loader, noised=settings.noised)
    run_dir = Path(settings.run_dir)
    with scratch_beside(run_dir, engine.device) as (scratch, remove), watch.during("save"):
        watch.release_at_end(remove)
        save = rehearsal.measure_save(scratch, sampler=sampler, facts=facts, batch=first_batch)
    last = settings.iterations
    for line in time_lines(
        pace,
        batch=batch,
        steps=last - first_step,
        validation=validation,
        validations=times_done(first_step, last, settings.eval_interval),
        save=save,
        saves=times_done(first_step, last, settings.save_interval),
        gflops_per_image=training_flops(arithmetic.forward) / 1e9,
    ):
        distributed.say(line)
    distributed.say(save_line(save))
    kept = checkpoints_kept(
        steps=last,
        save_interval=settings.save_interval,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        validated=val_loader is not None,
    )

    def disk() -> str:
        present = bytes_of(checkpoint.list_checkpoints(run_dir / "checkpoints"))
        return disk_line(save, kept=kept, present=present)

    distributed.say(distributed.on_rank_0(disk, engine.device))
    distributed.say(f"dry run: all well; {run_dir}/ is as it was")
