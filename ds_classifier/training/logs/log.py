"""The log of a run: log.jsonl, progress.csv, TensorBoard, W&B if asked for, and the screen.

Key names are the reference's (step, samples, train_loss, train_acc@1_q0, val_..., grad_norm,
lg_loss_scale), with more of our own. There is one row per step, also after resuming.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.distributed.memory import peak_memory
from ds_classifier.evaluation.meter import LOSS_EDGES, Meter, Reading
from ds_classifier.evaluation.metrics import QUARTILES
from ds_classifier.training.logs import screen
from ds_classifier.training.logs.flops import Arithmetic
from ds_classifier.training.logs.lost import Lost
from ds_classifier.training.logs.sanity import SanityWatch
from ds_classifier.training.step import Trained

# The groups of TensorBoard's sidebar; tensorboard_tag has those of all other numbers.
TENSORBOARD_GROUPS = {
    **dict.fromkeys(("lr", "grad_norm", "param_norm", "lg_loss_scale"), "optimizer"),
    **dict.fromkeys(("images_per_sec", "data_wait_frac", "val_seconds"), "speed"),
    **dict.fromkeys(("gflops_per_sec", "mfu", "memory_gib"), "speed"),
    **dict.fromkeys(("samples", "bad_samples", "val_bad_samples", "skipped_steps"), "counts"),
    **dict.fromkeys(
        ("window_samples", *(f"window_samples_q{q}" for q in range(QUARTILES))), "counts"
    ),
}


class RunLogger:
    """Writes rows of numbers on rank 0; the calls of other ranks do nothing.

    log.jsonl is the record: a row is appended, and has left this process, before anything else is
    done with it, so that a kill costs at most the row being written. progress.csv is made anew from
    it at every start, and when a column is added. No rows are kept in memory except those that a
    full disk refuses: they wait, and the run continues for as long as --max_failed_saves allows.

    first_step: the step that the run continues from. Rows of later steps were written by a killed
    run after its last checkpoint; they will be computed again, so they are dropped. At 0, all are.
    wandb: the name of a project at Weights & Biases, if any.
    Raises ValueError if W&B cannot be reached, and OSError if nothing can be written.
    """

    def __init__(self, run_dir: Path, *, first_step: int, wandb: str = ""):
        self._jsonl = self._tb = self._wandb = None
        if distributed.rank() != 0:
            return
        self._jsonl_path, self._csv_path = run_dir / "log.jsonl", run_dir / "progress.csv"
        _drop_rows(self._jsonl_path, after=first_step or -1)
        self._jsonl = open(self._jsonl_path, "ab", buffering=0)
        self._waiting, self._warned = b"", False
        self._write_csv()
        from tensorboardX import SummaryWriter

        try:
            self._tb = SummaryWriter(
                str(run_dir / "tb"), purge_step=first_step + 1 if first_step else 0
            )
        except OSError as error:
            raise OSError(
                f"{run_dir}/tb: {files.problem(error)}; do: make room there and in /dev/shm, where "
                "its semaphores are (docker run --shm-size 1g)"
            ) from None
        _forgive_the_disk(self._tb)
        if wandb:
            self._wandb = _open_wandb(run_dir, wandb)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of numbers, with its `step`. Values that are not finite become null."""
        if self._jsonl is None:
            return
        row = {key: _finite(value) for key, value in row.items()}
        self._waiting += json.dumps(row).encode() + b"\n"
        try:
            self._append()
            if row.keys() <= set(self._columns):
                with open(self._csv_path, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
            else:
                self._write_csv()
        except OSError as error:
            self._columns = []  # the table is made anew once there is room
            if not self._warned:
                self._warned = True
                distributed.say(
                    screen.note(
                        "",
                        f"{self._jsonl_path}: cannot write: {files.problem(error)}; rows wait "
                        "until it can; do: make room on the disk",
                    )
                )
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                self._tb.add_scalar(tensorboard_tag(key), value, row["step"])
        if self._wandb is not None:
            self._wandb.log(row, step=row["step"])

    def _append(self) -> None:
        """Write the rows that wait; the part of a row that was written is not written again."""
        while self._waiting:
            self._waiting = self._waiting[self._jsonl.write(self._waiting) :]

    def image(self, name: str, pixels: Any, step: int) -> None:
        """Show an image, uint8 [h, w, 3], in TensorBoard."""
        if self._tb is not None:
            self._tb.add_image(name, pixels, step, dataformats="HWC")

    def histogram(
        self, name: str, counts: Sequence[float], edges: Sequence[float], step: int
    ) -> None:
        """Show a histogram: counts[i] values up to edges[i], the last count above all of them."""
        if self._tb is None or not sum(counts):
            return
        limits = [*edges, 2 * edges[-1]]
        middles = [(low + high) / 2 for low, high in pairwise([0.0, *limits])]
        found = [i for i, count in enumerate(counts) if count]
        self._tb.add_histogram_raw(
            name,
            min=([0.0, *limits])[found[0]],
            max=limits[found[-1]],
            num=sum(counts),
            sum=sum(c * x for c, x in zip(counts, middles, strict=True)),
            sum_squares=sum(c * x * x for c, x in zip(counts, middles, strict=True)),
            bucket_limits=limits,
            bucket_counts=list(counts),
            global_step=step,
        )

    def _write_csv(self) -> None:
        """Write the whole table from log.jsonl, columns in the order of their first appearance."""
        self._columns = list(
            dict.fromkeys(key for row in read_rows(self._jsonl_path) for key in row)
        )
        line = io.StringIO()
        writer = csv.DictWriter(line, self._columns)

        def lines() -> Iterator[str]:
            writer.writeheader()
            for row in read_rows(self._jsonl_path):
                writer.writerow(row)
                yield line.getvalue()
                line.seek(0)
                line.truncate()
            yield line.getvalue()

        files.replace_lines(self._csv_path, lines())

    def close(self) -> None:
        """Write what waits, and close the files."""
        if self._jsonl is not None:
            with suppress(OSError):  # reported already
                self._append()
                if not self._columns:
                    self._write_csv()
            self._jsonl.close()
            with suppress(OSError):
                self._tb.close()
        if self._wandb is not None:
            self._wandb.finish()


def tensorboard_tag(key: str) -> str:
    """Return the tag of a row's number in TensorBoard, whose sidebar has a group per first part.

    train_loss -> train/loss, val_acc@1_q0 -> val_quartiles/acc@1_q0, lr -> optimizer/lr.
    """
    if key in TENSORBOARD_GROUPS:
        return f"{TENSORBOARD_GROUPS[key]}/{key}"
    split, _, name = key.partition("_")
    if split not in ("train", "val"):
        return key
    return f"{split}_quartiles/{name}" if re.search("_q[0-9]$", name) else f"{split}/{name}"


def _forgive_the_disk(tensorboard) -> None:
    """Let tensorboardX's thread survive a full disk.

    It has no public way to do so: once an OSError has ended the thread, nobody empties its queue,
    and the row after the next ten waits for ever.
    """
    writer = tensorboard.file_writer.event_writer._ev_writer

    def forgiving(method: Callable[..., Any]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            with suppress(OSError):
                method(*arguments)

        return call

    writer.write_event, writer.flush = forgiving(writer.write_event), forgiving(writer.flush)


def _open_wandb(run_dir: Path, project: str):
    """Open the run at Weights & Biases, under an id that resuming finds again in RUN/wandb/id."""
    import wandb

    kept = run_dir / "wandb" / "id"
    try:
        kept.parent.mkdir(exist_ok=True)
        if not kept.exists():
            kept.write_text(secrets.token_hex(4), encoding="utf-8")
        run = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=kept.read_text(encoding="utf-8"),
            dir=str(run_dir),
            resume="allow",
            config=json.loads((run_dir / "config.json").read_text(encoding="utf-8")),
            settings=wandb.Settings(console="off", silent=True),  # the console is ours
        )
    except (wandb.Error, OSError, ValueError) as error:
        raise ValueError(
            f"--wandb: {error}; do: wandb login, set WANDB_MODE=offline, or drop the flag"
        ) from None
    distributed.say(f"wandb       {run.url or f'offline, in {run_dir}/wandb/'}")
    return run


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a log.jsonl; lines that a kill cut are skipped."""
    with open(path, "rb") as file:
        for line in file:
            row = _parsed(line)
            if row is not None:
                yield row


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line, or None for the part of one that a kill has left."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and isinstance(row, dict) and "step" in row else None


def _drop_rows(path: Path, *, after: int) -> None:
    """Drop rows of steps after `after`, and damaged lines; a log without any stays as it is."""
    if not path.exists():
        return

    def kept(line: bytes) -> bool:
        row = _parsed(line)
        return row is not None and row["step"] <= after

    with open(path, "rb") as file:
        if all(map(kept, file)):
            return
        file.seek(0)
        files.replace_lines(path, (line.decode() for line in file if kept(line)))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """The seconds spent training since the last row, without the pauses to validate and save."""

    def __init__(self):
        self._began = time.perf_counter()
        self._paused = 0.0
        self.steps, self.waited = 0, 0.0  # waited: seconds, for data

    def count(self, waited: float) -> None:
        """Count a step. waited: the seconds of it that were spent waiting for data."""
        self.steps += 1
        self.waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the seconds spent in this context."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.perf_counter() - self._began - self._paused

    def restart(self) -> Window:
        """Return the numbers so far, and start again from zero at this moment."""
        now = time.perf_counter()
        window = Window(now - self._began - self._paused, self.steps, self.waited)
        self._began, self._paused, self.steps, self.waited = now, 0.0, 0, 0.0
        return window


class Window(NamedTuple):
    """The time between two log rows. seconds: training. waited: seconds of them, for data."""

    seconds: float
    steps: int
    waited: float


class TrainingLog:
    """Logs a training run: rows in the files, lines on the screen; every rank calls it.

    meter: the sums that rows are made of. sanity: reports, from the rows, when the run starts or
    stops looking healthy. iterations: the number of steps of the run. num_classes: of the data.
    compiled: whether the first step compiles the classifier, whose time is reported.
    """

    def __init__(
        self,
        logger: RunLogger,
        *,
        engine,
        meter: Meter,
        lost: Lost,
        arithmetic: Arithmetic,
        sanity: SanityWatch,
        iterations: int,
        num_classes: int,
        compiled: bool,
    ):
        self._logger, self._engine, self._meter, self._lost = logger, engine, meter, lost
        self._arithmetic, self._sanity = arithmetic, sanity
        self._iterations, self._compiled = iterations, compiled
        self._reported = (0, 0)  # bad samples and skipped steps; a resumed run reports earlier ones
        self._table = screen.Table(
            num_classes=num_classes, loss_scale=engine.fp16_enabled(), targets=meter.targets
        )
        self._clock, self._window = Clock(), Window(0.0, 0, 0.0)

    def begin(self) -> None:
        """Print the head of the table; the first row's time starts now."""
        distributed.say(self._table.begin())
        self._clock.restart()
        self._show_progress(at_once=True)

    def count(self, trained: Trained) -> None:
        """Count a step."""
        self._clock.count(trained.waited)
        if self._compiled:
            distributed.say(screen.compiled_line(self._clock.seconds()))
            self._compiled = False
        self._show_progress()

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Leave the seconds in this context out of the speed; show what is done meanwhile."""
        self.show(doing, at_once=True)
        with self._clock.paused():
            yield
        self._show_progress(at_once=True)

    def show(self, doing: str, *, at_once: bool = False) -> None:
        """Show on a terminal what is done between two steps."""
        distributed.live(screen.note(self._engine.global_steps, doing), at_once=at_once)

    def _show_progress(self, *, at_once: bool = False) -> None:
        """Show on a terminal how far the run is, with the speed since the row before the last."""
        steps = self._window.steps + self._clock.steps
        if not steps:
            what = "is under way"
            if self._compiled:
                what = "compiles the classifier, which may take minutes"
            distributed.live(screen.note("", f"the first step {what}"), at_once=at_once)
            return
        step = self._engine.global_steps
        seconds = (self._window.seconds + self._clock.seconds()) / steps
        line = screen.progress_line(
            step=step,
            iterations=self._iterations,
            images_per_sec=self._engine.train_batch_size() / seconds,
            eta_seconds=(self._iterations - step) * seconds,
        )
        distributed.live(line, at_once=at_once)

    def write_window(self, trained: Trained) -> None:
        """Write a row of means over the steps since the last one, and over all ranks.

        trained: the last of them. Raises TooManyBadSamples.
        """
        reading = self._meter.read()  # waits for the device
        window = self._window = self._clock.restart()
        row = self._row(reading, window)
        row |= {"lr": trained.lr, "bad_samples": self._lost.bad_samples.total()}
        self._logger.write(row)
        for q, counts in enumerate(reading.losses.tolist()):
            tag = tensorboard_tag(f"train_losses_q{q}")
            self._logger.histogram(tag, counts, LOSS_EDGES, row["step"])
        eta = (self._iterations - row["step"]) * window.seconds / window.steps
        distributed.say(self._table.training_line(row, eta_seconds=eta))
        self._report_news(row)
        counts = (row["bad_samples"], row["skipped_steps"])
        if counts != self._reported:
            distributed.say(screen.lost_line(row, self._lost.skipped_steps.news()))
        self._reported = counts
        self._lost.bad_samples.refuse_too_many(row["samples"])
        self._show_progress(at_once=True)

    def _row(self, reading: Reading, window: Window) -> dict[str, Any]:
        """Return the numbers of a window. Memory and GFLOP/s are those of one rank.

        window_samples: the number of images that the means rest on, also by quartile of t.
        """
        engine = self._engine
        samples = engine.train_batch_size()
        images_per_sec = window.steps * samples / window.seconds
        return {
            "step": engine.global_steps,
            "samples": engine.global_steps * samples,
            "window_samples": int(reading.weight),
            **{f"window_samples_q{q}": int(n) for q, n in enumerate(reading.losses.sum(dim=1))},
            **{f"train_{name}": value for name, value in reading.means.items()},
            "grad_norm": deepspeed_engine.grad_norm(engine),
            "param_norm": deepspeed_engine.param_norm(engine),
            "lg_loss_scale": math.log2(deepspeed_engine.loss_scale(engine)),
            "images_per_sec": images_per_sec,
            "data_wait_frac": window.waited / window.seconds,
            **self._arithmetic.achieved(images_per_sec / distributed.world_size()),
            "memory_gib": peak_memory(engine.device) / 2**30,
            "skipped_steps": engine.skipped_steps,
        }

    def write_validation(self, row: dict[str, Any]) -> None:
        """Write a row of validation means."""
        self._logger.write(row)
        distributed.say(self._table.validation_line(row))
        self._report_news(row)

    def image(self, name: str, pixels: Any, step: int) -> None:
        """Show an image, uint8 [h, w, 3], in TensorBoard."""
        self._logger.image(name, pixels, step)

    def close(self) -> None:
        """Close the files."""
        self._logger.close()

    def _report_news(self, row: dict[str, Any]) -> None:
        """Print what the row changes in the answer to: is it working?"""
        for line in self._sanity.add(row):
            distributed.say(screen.note(row["step"], line))
