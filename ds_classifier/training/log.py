"""Where a run's numbers go: the console, log.jsonl, progress.csv, tensorboardX; W&B if asked for.

Key names are the reference's (step, samples, train_loss, train_acc@1_q0, val_..., grad_norm,
lg_loss_scale), and ours beside them. A row appears once per step, also after resuming.
"""

from __future__ import annotations

import csv
import io
import json
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from ds_classifier import distributed
from ds_classifier.common import files


class RunLogger:
    """Writes on rank 0; the other ranks' calls do nothing.

    log.jsonl is the record: a row is appended and out of this process before anything else is done
    with it, so a kill costs the row being written at most. progress.csv is made from it anew at
    every start, and when a column is added. No rows are kept in memory, but for those that a full
    disk refuses: they wait, and the run goes on; whether it may is --max_failed_saves' to say.

    run_dir: of the run. first_step: finished before; rows of later steps are what a killed run
    wrote after its last checkpoint. They will be computed again, so they are dropped; at 0, all.
    wandb: a project there, if any; raises ValueError where it cannot be reached.
    """

    def __init__(self, run_dir: Path, *, first_step: int, wandb: str = ""):
        self._jsonl = self._tb = self._wandb = None
        if distributed.rank() != 0:
            return
        self._jsonl_path, self._csv_path = run_dir / "log.jsonl", run_dir / "progress.csv"
        _drop_rows(self._jsonl_path, after=first_step or -1)
        self._jsonl = open(self._jsonl_path, "ab", buffering=0)
        self._waiting, self._told = b"", False
        self._write_csv()
        from tensorboardX import SummaryWriter

        self._tb = SummaryWriter(
            str(run_dir / "tb"), purge_step=first_step + 1 if first_step else 0
        )
        _forgive_the_disk(self._tb)
        if wandb:
            self._wandb = _open_wandb(run_dir, wandb)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of numbers; `step` is among them. Not-a-number is written as null."""
        if self._jsonl is None:
            return
        row = {key: _finite(value) for key, value in row.items()}
        self._waiting += json.dumps(row).encode() + b"\n"
        try:
            self._append()
            if row.keys() <= set(self._columns):
                with open(self._csv_path, "a", newline="") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
            else:
                self._write_csv()
        except OSError as error:
            self._columns = []  # the table is made anew when there is room
            if not self._told:
                self._told = True
                distributed.say(
                    f"{'':>6} {self._jsonl_path}: cannot write: {files.problem(error)}; rows wait "
                    "until it can; do: make room, or see to the disk"
                )
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                self._tb.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(row, step=row["step"])

    def _append(self) -> None:
        """The rows that wait, to the file; what was written of one is not written again."""
        while self._waiting:
            self._waiting = self._waiting[self._jsonl.write(self._waiting) :]

    def image(self, name: str, pixels: Any, step: int) -> None:
        """Show an image, uint8 [h, w, 3]."""
        if self._tb is not None:
            self._tb.add_image(name, pixels, step, dataformats="HWC")

    def histogram(
        self, name: str, counts: Sequence[float], edges: Sequence[float], step: int
    ) -> None:
        """Show how values fell into bins: counts[i] of them up to edges[i], the last above all."""
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
        """The whole table, from log.jsonl: columns in the order in which they first appear."""
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
        if self._jsonl is not None:
            with suppress(OSError):  # told already
                self._append()
                if not self._columns:
                    self._write_csv()
            self._jsonl.close()
            with suppress(OSError):
                self._tb.close()
        if self._wandb is not None:
            self._wandb.finish()


def _forgive_the_disk(tensorboard) -> None:
    """Have tensorboardX's thread outlive a full disk: once it has died, the next rows wait for it
    for ever."""
    writer = tensorboard.file_writer.event_writer._ev_writer

    def forgiving(method: Callable[..., Any]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            with suppress(OSError):
                method(*arguments)

        return call

    writer.write_event, writer.flush = forgiving(writer.write_event), forgiving(writer.flush)


def _open_wandb(run_dir: Path, project: str):
    """The run at Weights & Biases, under an id that resuming finds again in RUN/wandb/id."""
    import wandb

    kept = run_dir / "wandb" / "id"
    try:
        kept.parent.mkdir(exist_ok=True)
        if not kept.exists():
            kept.write_text(secrets.token_hex(4))
        run = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=kept.read_text(),
            dir=str(run_dir),
            resume="allow",
            config=json.loads((run_dir / "config.json").read_text()),
            settings=wandb.Settings(console="off", silent=True),  # the console is ours
        )
    except (wandb.Error, OSError, ValueError) as error:
        raise ValueError(
            f"--wandb: {error}; do: wandb login, set WANDB_MODE=offline, or drop the flag"
        ) from None
    distributed.say(f"wandb       {run.url or f'offline, in {run_dir}/wandb/'}")
    return run


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log.jsonl one after the other; lines cut by a kill are passed over."""
    with open(path, "rb") as file:
        for line in file:
            row = _parsed(line)
            if row is not None:
                yield row


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The row in a line, or None: what a kill left of a row has no end, and is no JSON."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and isinstance(row, dict) and "step" in row else None


def _drop_rows(path: Path, *, after: int) -> None:
    """Drop rows of steps after one, and damaged lines; a log without such stays as it is."""
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


_QUARTILE_HEADS = "  q0  q1  q2  q3"
CONSOLE_HEADER = (
    f"{'step':>6} {'eta':>8} {'loss':>6}{_QUARTILE_HEADS} "
    f"{'acc@1':>5}{_QUARTILE_HEADS} {'acc@5':>5}{_QUARTILE_HEADS} "
    f"{'gnorm':>5} {'lr':>7} {'scale':>5} {'img/s':>6} {'wait':>4} {'mem':>5}"
)


def console_line(row: dict[str, Any], *, eta_seconds: float) -> str:
    """One line under CONSOLE_HEADER, of a training row. Accuracies in per cent."""

    def cell(key: str, scale: float, width: int, decimals: int) -> str:
        value = row.get(key)
        if value is None:
            return "-".rjust(width)
        return f"{scale * value:{width}.{decimals}f}"

    def accuracies(name: str) -> str:
        parts = [cell(f"{name}_q{q}", 100, 4, 0) for q in range(4)]
        return cell(name, 100, 5, 1) + "".join(parts)

    losses = "".join(_short(row.get(f"train_loss_q{q}")).rjust(4) for q in range(4))
    lg_scale = f"2^{row['lg_loss_scale']:g}" if row["lg_loss_scale"] else "-"
    return (
        f"{row['step']:>6} {duration(eta_seconds):>8} "
        f"{cell('train_loss', 1, 6, 3)}{losses} "
        f"{accuracies('train_acc@1')} {accuracies('train_acc@5')} "
        f"{cell('grad_norm', 1, 5, 2)} {row['lr']:7.1e} {lg_scale:>5} "
        f"{row['images_per_sec']:6.0f} {100 * row['data_wait_frac']:3.0f}% "
        f"{row['memory_gib']:4.1f}G"
    )


def counts_line(row: dict[str, Any], why_skipped: str) -> str:
    """What was seen and what was lost since the run's first start, of a training row."""
    steps = row["skipped_steps"]
    parts = [f"{row['samples']:,} samples seen so far"]
    if row["bad_samples"]:
        ones = "one" + "s" * (row["bad_samples"] > 1)
        parts.append(f"{row['bad_samples']:,} bad {ones} (listed in bad_samples.rank*.jsonl)")
    if steps:
        parts.append(f"{steps:,} step{'s' * (steps > 1)} skipped ({why_skipped})")
    return f"{'':>6} {', '.join(parts)}"


def _short(value: float | None) -> str:
    """A loss in three characters: .03, 2.3."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2f}"[1:] if value < 0.995 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """1:02:03; days only when there are any."""
    hours, rest = divmod(int(seconds), 3600)
    if hours >= 100:
        return f"{hours / 24:.1f}d"
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def validation_line(row: dict[str, Any]) -> str:
    quartiles = [row.get(f"val_acc@1_q{q}") for q in range(4)]
    accuracies = " ".join("-" if value is None else f"{100 * value:.0f}" for value in quartiles)
    bad = row.get("val_bad_samples", 0)
    return (
        f"{row['step']:>6} validation: loss {row['val_loss']:.3f}, "
        f"acc@1 {100 * row['val_acc@1']:.1f} % (quartiles of t {accuracies}; "
        f"t=0 {100 * row['val_acc@1_t0']:.1f}), acc@5 {100 * row['val_acc@5']:.1f} %, "
        f"{row['val_seconds']:.1f} s"
        + (f"; without {bad:,} that did not decode (verify --decode names them)" if bad else "")
    )
