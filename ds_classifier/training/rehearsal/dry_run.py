"""A run rehearsed: a few real steps, a checkpoint there and back, and what the run will need.

Everything is measured on this machine with the run's own engine, data and settings; nothing is
looked up. What follows from it for the run is worked out in run_costs.py.
"""

from __future__ import annotations

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
from ds_classifier.checkpoint.writer import BYTES_A_PARAMETER, CheckpointWriter
from ds_classifier.common import files
from ds_classifier.config import Settings
from ds_classifier.config.batch_sizes import Batch as BatchSize
from ds_classifier.data.loader import Batch, Loader
from ds_classifier.distributed import deepspeed_engine, memory
from ds_classifier.distributed.stopping import Stopped, StopVote
from ds_classifier.distributed.watchdog import Watchdog
from ds_classifier.evaluation.evaluate import evaluate
from ds_classifier.evaluation.metrics import Meter
from ds_classifier.training.flops import Arithmetic, training_flops
from ds_classifier.training.loop import train_step
from ds_classifier.training.rehearsal.costs import (
    MemoryLine,
    SaveCost,
    StepTime,
    bytes_of,
    checkpoints_kept,
    disk_line,
    memory_lines,
    save_line,
    time_lines,
    times_done,
)

TIMED_STEPS, LEAST_TIMED, TIMING_SECONDS = 7, 2, 60.0
WARM_UP_SECONDS = 20.0
VALIDATION_BATCHES, VALIDATION_SECONDS = 16, 20.0
LEFTOVER = ".dry_run-"  # begins the name of the directory that is removed at the end


def micro_batches_to_measure(micro_batch: int) -> list[int]:
    """Ascending; up to the run's own, but for a run that takes single images."""
    sizes = {max(1, micro_batch // 4), max(1, micro_batch // 2), micro_batch}
    return sorted(sizes if len(sizes) > 1 else {1, 2})


def resized(batch: Batch, size: int) -> Batch:
    """A batch of another size, of the same images over and over."""
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
        means = self._meter.read().means
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
            (found,) = disk.list_checkpoints(folder)
            size = sum(file.stat().st_size for file in found.iterdir())
            return [str(found), disk.read_state(found), size]

        began = time.perf_counter()
        found, state, size = distributed.on_rank_0(find, engine.device)
        disk.load(Path(found), state, engine=engine, sampler=sampler)
        loaded = time.perf_counter() - began
        if self._fingerprint() != saved:
            raise RuntimeError("a checkpoint was loaded, and is not what was saved")
        return SaveCost(held, written, loaded, size, free)

    def _fingerprint(self) -> list[int]:
        """Of this rank's share of master weights and Adam moments, bit by bit."""
        return [int(bit_sum(value)) for value in deepspeed_engine.optimizer_share(self._engine)]


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

    def line_of_disk() -> str:
        present = bytes_of(disk.list_checkpoints(run_dir / "checkpoints"))
        return disk_line(save, kept=kept, present=present)

    distributed.say(distributed.on_rank_0(line_of_disk, engine.device))
    distributed.say(f"dry run: all well; {run_dir}/ is as it was")
