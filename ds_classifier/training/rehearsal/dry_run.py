"""--dry_run: take a few real steps, save and load a checkpoint, and print what the run will need.

Everything is measured on this machine with the run's own engine, data and settings. costs.py works
out what follows for the run.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.replicas import bit_sum
from ds_classifier.checkpoint.writer import BYTES_A_PARAMETER, CheckpointWriter, check_room
from ds_classifier.common import files
from ds_classifier.data.loader import Batch, Loader
from ds_classifier.distributed import memory
from ds_classifier.distributed.engine import deepspeed_state
from ds_classifier.distributed.stopping import STOPPED, Stopped
from ds_classifier.evaluation.evaluate import evaluate
from ds_classifier.evaluation.meter import Meter
from ds_classifier.training.logs.log import RunLogger
from ds_classifier.training.rehearsal.costs import (
    MemoryLine,
    SaveCost,
    StepTime,
    bytes_of,
    checkpoints_kept,
    disk_line,
    memory_lines,
    rehearsed,
    save_line,
    time_lines,
    times_done,
)
from ds_classifier.training.run_lock import RunLock
from ds_classifier.training.setup import Setup
from ds_classifier.training.step import Objective, train_step

TIMED_STEPS, LEAST_TIMED, TIMING_SECONDS = 7, 2, 60.0
WARM_UP_SECONDS = 20.0
VALIDATION_BATCHES, VALIDATION_SECONDS = 16, 20.0
LEFTOVER = ".dry_run-"  # begins the name of the directory that is removed at the end


def micro_batches_to_measure(micro_batch: int) -> list[int]:
    """Return micro-batches in ascending order, up to the run's own; 1 and 2 if that is 1."""
    sizes = {max(1, micro_batch // 4), max(1, micro_batch // 2), micro_batch}
    return sorted(sizes if len(sizes) > 1 else {1, 2})


def resized(batch: Batch, size: int) -> Batch:
    """Return a batch of another size, which repeats the same images."""
    rows = torch.arange(size) % len(batch.labels)
    return Batch(*(tensor[rows] for tensor in batch[:-1]), [])


class Rehearsal:
    """Measures a run with its engine; every rank makes one and calls everything.

    The engine's batch is `rehearsed(batch)`, where batch is the run's.
    Every method raises Stopped on all ranks when the rehearsal is asked to stop.
    """

    def __init__(self, setup: Setup):
        settings = setup.resolved.settings
        self._setup, self._engine, self._batch = setup, setup.engine, setup.resolved.batch
        self._objective = Objective(setup.sampler, settings.seed, settings.noised)
        self._meter = Meter(setup.engine.module.diffusion.num_timesteps, setup.engine.device)

    def _carry_on(self) -> None:
        if self._setup.stop.decide(now=True):
            raise Stopped
        self._setup.watch.stepping(self._engine.global_steps + 1)

    def take_step(self, batches: Iterator[Batch]) -> float:
        """Take a step, and return the seconds that it waited for data.

        Raises FloatingPointError on all ranks if its loss is not finite.
        """
        self._carry_on()
        trained = train_step(self._engine, batches, self._objective, self._meter)
        means = self._meter.read().means
        if not math.isfinite(means.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss of a step is {means['loss']}; do: look at the weights it starts from"
            )
        return trained.waited

    def measure_memory(self, batch: Batch) -> MemoryLine:
        """Measure peak memory at several micro-batches, on the rank that has the least room."""
        device, ranks_here = self._engine.device, distributed.local_world_size()
        sizes = micro_batches_to_measure(self._batch.micro)
        accumulation = self._engine.gradient_accumulation_steps()

        def step_of(size: int) -> None:
            self.take_step(iter([resized(batch, size)] * accumulation))

        step_of(sizes[0])  # allocates what is allocated once, such as Adam's state
        peaks = {}
        for size in sizes:
            memory.restart_peak(device)
            step_of(size)
            peaks[size] = memory.peak_memory(device)
        capacity = memory.memory_for_rank(device, ranks_here=ranks_here)
        if device.type == "cpu":  # from the first save on it holds rank 0's snapshot too
            trained, _ = deepspeed_state.parameter_counts(self._engine)
            capacity -= BYTES_A_PARAMETER * trained // ranks_here
        mine = torch.tensor([capacity, *peaks.values()], dtype=torch.float64, device=device)
        lines = [
            MemoryLine.through(dict(zip(sizes, peaks, strict=True)), capacity)
            for capacity, *peaks in distributed.all_gather(mine).tolist()
        ]
        return min(lines, key=lambda line: line.capacity - line.at(self._batch.micro))

    def measure_steps(self, batches: Iterator[Batch], *, buffered: int) -> StepTime:
        """Time real steps, including the wait for data, once the loader's lead is used up.

        buffered: the number of batches that the loader prepares ahead.
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
        """Yield the batches, and note when each was asked for, after the device's earlier work."""
        while True:
            starts.append(self._now())
            yield next(batches)

    def _now(self) -> float:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        return time.perf_counter()

    def _seconds_since(self, began: float) -> float:
        """Return rank 0's seconds on all ranks, so that all decide the same."""
        return distributed.broadcast_json(time.perf_counter() - began, self._engine.device)

    def measure_validation(self, loader: Loader) -> float:
        """Return the seconds of a validation, estimated from some batches of its two passes."""

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
                    noised=self._objective.noised,
                    t=t,
                )
            return self._seconds_since(began)

        once = seconds(1)
        count = max(1, min(VALIDATION_BATCHES, len(loader), int(VALIDATION_SECONDS / once)))
        return seconds(count) / count * len(loader)

    def measure_save(self, folder: Path, batch: Batch) -> SaveCost:
        """Save, take a step on `batch`, which changes everything, load, and compare.

        folder: a directory of rank 0 without checkpoints. Raises RuntimeError if what was loaded
        differs from what was saved.
        """
        engine, sampler = self._engine, self._setup.sampler
        free = shutil.disk_usage(folder).free if distributed.rank() == 0 else 0
        writer = CheckpointWriter(
            folder,
            engine=engine,
            sampler=sampler,
            fixed=self._setup.fixed,
            keep_last=1,
            keep_every=0,
            max_failed=0,
        )
        began = time.perf_counter()
        writer.save(self._setup.facts)
        held = time.perf_counter() - began
        writer.finish()
        written = time.perf_counter() - began
        saved = self._fingerprint()
        self.take_step(iter([batch] * engine.gradient_accumulation_steps()))

        def find() -> list[Any]:
            (found,) = disk.list_checkpoints(folder)
            size = sum(file.stat().st_size for file in found.iterdir())
            return [str(found), disk.read_state(found), size]

        began = time.perf_counter()
        found, state, size = distributed.on_rank_0(find, engine.device)
        disk.load(Path(found), state, engine=engine, sampler=sampler)
        loaded = time.perf_counter() - began
        if self._fingerprint() != saved:
            raise RuntimeError("a checkpoint was loaded that differs from what was saved")
        return SaveCost(held, written, loaded, size, free)

    def _fingerprint(self) -> list[int]:
        """Return sums over the bits of this rank's share of master weights and optimizer state."""
        return [int(bit_sum(value)) for value in deepspeed_state.optimizer_share(self._engine)]


@contextmanager
def scratch_beside(
    run_dir: Path, device: torch.device
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Make a directory on the file system of a run directory, and remove it at the end.

    It lies in the run directory if that exists, else in the nearest parent that does; rank 0 makes
    it, and all ranks get its path. The second value removes it, for a process that ends without
    leaving the context. Raises AgreedError if the run could not be locked, saved or logged there.
    """

    def make() -> str:
        try:
            scratch = tempfile.mkdtemp(prefix=LEFTOVER, dir=files.nearest_directory(run_dir))
        except OSError as error:
            raise ValueError(
                f"--run_dir: got {run_dir}, where nothing can be written ({error.strerror}); do: "
                "choose another"
            ) from None
        try:
            lock = RunLock(Path(scratch))
            lock.acquire(distributed.say)
            lock.release()
            check_room(Path(scratch), size=0)
            RunLogger(Path(scratch), first_step=0).close()
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return scratch

    scratch = Path(distributed.on_rank_0(make, device))

    def remove() -> None:
        if distributed.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)

    try:
        yield scratch, remove
    finally:
        remove()


def dry_run(setup: Setup) -> int:
    """Rehearse the run from where it begins, print what it will need, and return the exit code.

    Every rank must call it. Raises AgreedError if the disk has no room for the run's checkpoints,
    and what training would raise.
    """
    first = setup.engine.global_steps
    settings = setup.resolved.settings.replace(iterations=first + 100 * TIMED_STEPS)
    short = setup.resolved.with_batch(rehearsed(setup.resolved.batch))
    short = dataclasses.replace(short, settings=settings)
    loader, val_loader = setup.loaders(first, resolved=short)
    try:
        rehearse(setup, loader, val_loader, first_step=first)
    except Stopped:
        distributed.say(f"stopped by {setup.stop.reason}")
        return STOPPED
    return 0


def rehearse(setup: Setup, loader: Loader, val_loader: Loader | None, *, first_step: int) -> None:
    """Measure memory, time and a checkpoint, and print what the run will need of each."""
    rehearsal, watch, say = Rehearsal(setup), setup.watch, distributed.say_labelled
    settings, batch, run_dir = setup.resolved.settings, setup.resolved.batch, setup.run_dir
    batches = watch.batches(iter(loader))
    first_batch = next(batches)
    for line in memory_lines(rehearsal.measure_memory(first_batch), batch):
        say(line)
    pace = rehearsal.measure_steps(batches, buffered=loader.workers * loader.prefetch)
    batches.close()
    validation = rehearsal.measure_validation(val_loader) if val_loader is not None else None
    with scratch_beside(run_dir, setup.engine.device) as (scratch, remove), watch.during("save"):
        watch.release_at_end(remove)
        save = rehearsal.measure_save(scratch, first_batch)
    last = settings.steps
    for line in time_lines(
        pace,
        batch=batch,
        steps=last - first_step,
        validation=validation,
        validations=times_done(first_step, last, settings.eval_interval),
        save=save,
        saves=times_done(first_step, last, settings.save_interval),
        gflops_per_image=setup.arithmetic.training / 1e9,
    ):
        say(line)
    say(save_line(save))
    kept = checkpoints_kept(
        steps=last,
        save_interval=settings.save_interval,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        validated=val_loader is not None,
    )

    def room() -> str:
        present = bytes_of(disk.list_checkpoints(run_dir / "checkpoints"))
        return disk_line(save, kept=kept, present=present)

    say(distributed.on_rank_0(room, setup.engine.device))
    say(f"dry run: all is well; {run_dir}/ was not changed")
