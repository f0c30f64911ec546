"""The lines that a training run prints: a header, a table of log rows, a live line between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ds_classifier import distributed
from ds_classifier.common.text import count, duration, fitted, scientific, significant
from ds_classifier.common.urls import shown
from ds_classifier.config import CommandLine
from ds_classifier.config.deepspeed_json import WARM_UP, Resolved
from ds_classifier.data.arrays import Arrays
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.data.shards import ShardSet, neighbours
from ds_classifier.diffusion import range_in_words
from ds_classifier.distributed.engine import deepspeed_engine, deepspeed_state
from ds_classifier.evaluation import metrics
from ds_classifier.evaluation.meter import describe_quartiles
from ds_classifier.model.own import eval_mode_notes, names_own_code
from ds_classifier.training.parameter_groups import describe
from ds_classifier.training.setup import Setup

REPEAT = 20  # rows between two heads of the table
LOG_COLUMNS = 100  # width of the table where stdout is not a terminal
STEP = 7  # columns of a step's number, or of the space below it
EXPLAINED = "q0..q3: {} by quarter of the timesteps, q0 nearly clean, q3 nearly noise"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table.

    cell: takes a row, and "train" or "val", and returns at most `width` characters.
    keep: where the width does not suffice, the columns with the lowest number are left out.
    metric: whether a validation has it too.
    """

    head: str
    width: int
    cell: Callable[[dict[str, Any], str], str]
    keep: int
    metric: bool = False


class Table:
    """The rows of a training run on the screen: as many columns as fit, under repeated heads.

    The terminal's width is asked for at each head. A log has LOG_COLUMNS. What is left out of the
    screen stands in log.jsonl.

    num_classes: metrics that say nothing about so few classes are left out.
    loss_scale: whether there is a column for it, as in fp16. targets: of the data.
    """

    def __init__(self, *, num_classes: int, loss_scale: bool, targets: Targets = ONE_CLASS):
        judged = metrics.judged_of(targets)
        self._explained = EXPLAINED.format("accuracy" if judged.unit == "%" else judged.name)
        self._headline = metrics.headline_of(targets)
        self._possible = _columns(num_classes, loss_scale=loss_scale, targets=targets)
        self._columns, self._width, self._rows = self._possible, LOG_COLUMNS, 0

    def begin(self) -> str:
        """Return the first head, and what it means."""
        head = self._head()
        explained = any(column.head.split() == _QUARTILES for column in self._columns)
        return f"{head}\n{distributed.wrapped(self._explained, indent=8)}" if explained else head

    def training_line(self, row: dict[str, Any], *, eta_seconds: float) -> str:
        """Return the line of a training row. Accuracies are in per cent."""
        row = {**row, "eta_seconds": eta_seconds}
        return self._under_head(self._cells(row, "train", self._columns))

    def validation_line(self, row: dict[str, Any]) -> str:
        """Return the line of a validation row: its means in their columns, then what is its own."""
        best = self._headline
        line = self._cells(row, "val", [column for column in self._columns if column.metric])
        at_0 = best.text(row.get(f"val_{best.name}_t0"))
        at_0 += " %" * (best.unit == "%")
        at_0 = at_0 if best.name == "acc@1" else f"{best.name} {at_0}"
        rest = f"  at t=0 {at_0}, {row['val_seconds']:.1f} s"
        line = self._under_head(line + rest * (len(line + rest) <= self._width))
        if bad := row.get("val_bad_samples", 0):
            lost = f"without {bad:,} that did not decode (verify --decode names them)"
            line += "\n" + note("", lost)
        return line

    def _head(self) -> str:
        self._width = distributed.columns() or LOG_COLUMNS
        self._columns = list(self._possible)
        while sum(1 + column.width for column in self._columns) - 1 > self._width:
            least = min(column.keep for column in self._columns)
            if least == _ALWAYS:
                break
            *_, left_out = (column for column in self._columns if column.keep == least)
            self._columns.remove(left_out)
        return " ".join(column.head.rjust(column.width) for column in self._columns)

    def _cells(self, row: dict[str, Any], split: str, columns: Sequence[Column]) -> str:
        return " ".join(column.cell(row, split).rjust(column.width) for column in columns)

    def _under_head(self, line: str) -> str:
        """Return the line, under a new head if the last one is REPEAT rows above it."""
        self._rows += 1
        repeated = self._rows > 1 and self._rows % REPEAT == 1
        return f"{self._head()}\n{line}" if repeated else line


_ALWAYS = 9
_QUARTILES = [f"q{q}" for q in range(metrics.QUARTILES)]


def _quartiles(metric: metrics.Shown) -> Column:
    """Return the column of a metric by quartile of t, in three characters each for per cents, and
    in five for others."""
    width = 3 if metric.unit == "%" else 5

    def quartile(row: dict[str, Any], split: str, q: int) -> str:
        value = row.get(f"{split}_{metric.name}_q{q}")  # None if it had no images
        if value is None or metric.unit != "%":
            return significant(value, width).rjust(width)
        return fitted(metric.factor * value, width, 0).rjust(width)

    return Column(
        head=" ".join(q.rjust(width) for q in _QUARTILES),
        width=(width + 1) * metrics.QUARTILES - 1,
        cell=lambda row, split: " ".join(quartile(row, split, q) for q in range(metrics.QUARTILES)),
        keep=6,
        metric=True,
    )


def _columns(num_classes: int, *, loss_scale: bool, targets: Targets) -> list[Column]:
    """Return all columns, from left to right."""
    judged = metrics.judged_of(targets).name
    always = ("loss", metrics.accuracy_of(targets).name, metrics.headline_of(targets).name)
    columns = [
        Column(
            head="step",
            width=STEP,
            cell=lambda row, split: str(row["step"]),
            keep=_ALWAYS,
            metric=True,
        ),
        Column(
            head="eta",
            width=9,
            cell=lambda row, split: duration(row["eta_seconds"]) if split == "train" else split,
            keep=_ALWAYS,
            metric=True,
        ),
    ]
    for metric in metrics.measured_of(targets):
        if num_classes >= metric.classes:
            columns.append(_metric_column(metric, keep=_ALWAYS if metric.name in always else 1))
        if metric.name == judged:
            columns.append(_quartiles(metric))
    columns += [
        _number("gnorm", 6, 5, lambda row: fitted(row["grad_norm"], 6, 2)),
        _number("lr", 7, 4, lambda row: scientific(row["lr"])),
        _number("scale", 5, 3, lambda row: f"2^{row['lg_loss_scale']:g}"),
        _number("img/s", 6, 7, lambda row: _rate(row["images_per_sec"])),
        _number("wait", 4, 2, lambda row: f"{100 * row['data_wait_frac']:.0f}%"),
        _number("mem", 5, 0, lambda row: fitted(row["memory_gib"], 4, 1) + "G"),
    ]
    return [column for column in columns if loss_scale or column.head != "scale"]


def _metric_column(metric: metrics.Shown, *, keep: int) -> Column:
    """Return the column of a metric's mean."""
    width = max(len(metric.name), 5 if metric.unit == "%" else 6)

    def cell(row: dict[str, Any], split: str) -> str:
        value = row.get(f"{split}_{metric.name}")
        if metric.digits is None:
            return significant(value, width)
        return fitted(None if value is None else metric.factor * value, width, metric.digits)

    return Column(head=metric.name, width=width, cell=cell, keep=keep, metric=True)


def _number(head: str, width: int, keep: int, cell: Callable[[dict[str, Any]], str]) -> Column:
    """Return a column that only training rows have."""
    return Column(head=head, width=width, cell=lambda row, split: cell(row), keep=keep)


def _rate(images_per_sec: float) -> str:
    """Return images per second in six characters at most: 0.04, 7.3, 212, 100000."""
    return fitted(images_per_sec, 6, sum(images_per_sec < limit for limit in (100, 1)))


def progress_line(*, step: int, iterations: int, images_per_sec: float, eta_seconds: float) -> str:
    """Return the live line between two rows."""
    return (
        f"{step:>{STEP}} of {count(iterations, 'step')} ({step / iterations:.0%}), "
        f"{_rate(images_per_sec)} images/s, {duration(eta_seconds)} left"
    )


def note(step: int | str, text: str) -> str:
    """Return a line about a step, or about the run for "", as wide as the table's."""
    return distributed.wrapped(f"{step:>{STEP}} {text}", indent=STEP + 1)


def announce(setup: Setup, command: CommandLine) -> None:
    """Print the header of a run: what is trained on what, and how the numbers came about."""
    resolved, engine, shards = setup.resolved, setup.engine, setup.shards
    settings, batch = resolved.settings, resolved.batch
    say = distributed.say_labelled
    held_out = "none"
    if setup.val_shards is not None:
        held_out = f"{_split(setup.val_shards)} in {shown(settings.val_data_dir)}"
        if not command.settings.val_data_dir:
            held_out += ", found beside the training split"
    for line in _of_classifier(setup):
        say(line)
    noise = "none, at t = 0"
    if settings.noised:
        noise = f"{settings.noise_schedule}, {settings.diffusion_steps} steps"
        noise += f"; quartiles of t: {describe_quartiles(engine.module.diffusion)}"
    say(f"noise       {noise}")
    if settings.t_range:
        say(f"{'':12}trained at {range_in_words(setup.sampler.levels, engine.module.diffusion)}")
    say(f"data        {_split(shards)} in {shown(settings.data_dir)}")
    if shards.manifest.beside or shards.manifest.targets != ONE_CLASS:
        say(f"{'':12}{shards.contents}")
    if shards.manifest.arrays is not None:
        for line in _of_arrays(shards.manifest.arrays, mirrored=settings.random_flip):
            say(f"{'':12}{line}")
    if neighbours(shards.index).sorted_by_class and settings.shuffle_shards != "lane":
        say(f"{'':12}its shards are sorted by class: --shuffle_shards lane would mix them better")
    for line in _of_objective(setup):
        say(line)
    say(f"validation  {held_out}")
    say(f"batch       {batch}; {shards.manifest.samples / batch.total:.1f} steps per epoch")
    say(f"engine      {way(setup)}, on {deepspeed_engine.describe_device(engine.device)}")
    rates = f"lr {resolved.peak_lr:g}, {schedule(resolved)}"
    if settings.muon_lr_scale:
        inside = deepspeed_engine.trained_by_muon(engine)
        rates += f"; {settings.muon_lr_scale:g} times that for {inside:,} parameters, by Muon"
    say(f"{'':12}{rates}")
    for line in describe(setup.groups or []):
        say(f"{'':12}{line}")
    length = f"{count(settings.steps, 'step')} in all"
    if setup.start.part_begin:
        length = f"extended from {setup.start.part_begin:,} to {count(settings.steps, 'step')}"
        if not resolved.open_ended and engine.global_steps == setup.start.part_begin:
            length += ", the learning rate begins anew"
    if command.overfit_steps:
        length = f"one batch again and again, {count(command.overfit_steps, 'step')} at most"
    say(f"start       from {setup.start.origin}; {length}")
    for note in setup.start.notes:
        say(f"  NOTE      {note}")
    fresh = setup.start.state is None and not setup.start.initialized
    if settings.freeze and fresh and not names_own_code(settings.classifier):
        say("  NOTE      what is frozen was never trained; do: give its weights to --init_from")
    where = "(log.jsonl, progress.csv, tb/, checkpoints/; report.html at the end)"
    say(f"run         {setup.run_dir}/ {'is not touched' if command.skips_training else where}")


def _of_classifier(setup: Setup) -> list[str]:
    """Return what the network is, and what it does not do in training."""
    settings = setup.resolved.settings
    trained, frozen = deepspeed_state.parameter_counts(setup.engine)
    name = f"{settings.classifier}, " if settings.classifier else ""
    parameters = f"{trained + frozen:,} parameters"
    if frozen:
        parameters += f", {trained:,} of them trained"
    line = (
        f"classifier  {name}{parameters}, {setup.arithmetic.forward / 1e9:.3g} GFLOP "
        f"forward per image; {settings.image_size} px, {settings.num_classes} "
        f"{setup.targets.nouns}"
    )
    return [line, *(f"{'':12}{note}" for note in eval_mode_notes(setup.engine.module.classifier))]


def _of_objective(setup: Setup) -> list[str]:
    """Return how training images count, vary and are judged, where that is not as usual."""
    settings, lines = setup.resolved.settings, []
    if setup.balance is not None:
        by = f"--class_balance {settings.class_balance}" if settings.class_balance else "the data"
        lines.append(f"weights     by {by}: {setup.balance}")
    if settings.high_noise_weight != 1:
        lines.append(
            f"weights     up to {settings.high_noise_weight:g} times as much for the noisiest "
            "timesteps (--high_noise_weight)"
        )
        if not (settings.posterior_images or setup.targets.vectors):
            lines.append(
                "  NOTE      on labels, which are luck at high noise, this was not tried; do: add "
                "--posterior_images, or --high_noise_weight 1"
            )
    if settings.augment:
        lines.append(f"augment     {settings.augment}, of training images alone")
    if settings.loss:
        lines.append(f"loss        {settings.loss}, a function of yours")
    return lines


def _of_arrays(arrays: Arrays, *, mirrored: bool) -> list[str]:
    """Return how arrays are read, and a warning if they are mirrored."""
    lines = [f"arrays of {arrays}, not resized or cropped; x_0 = {arrays.scaling}"]
    if mirrored:
        lines.append(
            "NOTE: half of them are mirrored (--random_flip True); a mirrored latent is not the "
            "latent of the mirrored image"
        )
    return lines


def _split(shards: ShardSet) -> str:
    return (
        f"{count(shards.manifest.samples, 'image')} ({count(len(shards.manifest.shards), 'shard')})"
    )


def way(setup: Setup) -> str:
    """Return how the engine trains: precision, ZeRO stage and optimizer."""
    engine, ds_config = setup.engine, setup.resolved.ds_config
    stage = f"ZeRO {engine.zero_optimization_stage()}{offloaded(ds_config)}"
    return f"{deepspeed_engine.precision(engine)}, {stage}, {ds_config['optimizer']['type']}"


def offloaded(ds_config: dict[str, Any]) -> str:
    """Return what ZeRO keeps in the CPU's memory, in words to add to its stage; "" if nothing."""
    parts = {"offload_optimizer": "the optimizer", "offload_param": "the parameters"}
    zero = ds_config["zero_optimization"]
    what = " and ".join(name for key, name in parts.items() if key in zero)
    return f" with {what} offloaded to the CPU" if what else ""


def schedule(resolved: Resolved) -> str:
    """Return the shape of the learning rate over the run, in words."""
    if "scheduler" in resolved.ds_config:
        shape = f"the JSON's {resolved.ds_config['scheduler']['type']}"
        warm_up = resolved.ds_config["scheduler"]["params"].get(WARM_UP, 0)
    else:
        shape = resolved.settings.schedule or "constant"
        shape += " to 0" * (shape != "constant")
        warm_up = resolved.settings.warmup_steps if resolved.settings.schedule else 0
    return f"{shape} with {count(warm_up, 'step')} of warm-up" if warm_up > 0 else shape


def lost_line(row: dict[str, Any], why_skipped: str) -> str:
    """Return what was seen and what was lost since the run's first start, by a training row."""
    parts = [f"{count(row['samples'], 'sample')} seen so far"]
    if row["bad_samples"]:
        bad = count(row["bad_samples"], "bad sample")
        parts.append(f"{bad} (listed in bad_samples.rank*.jsonl)")
    if row["skipped_steps"]:
        parts.append(f"{count(row['skipped_steps'], 'step')} skipped ({why_skipped})")
    return note("", ", ".join(parts))


def compiled_line(seconds: float) -> str:
    """Return the line after a first step that compiled the classifier."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return note("", f"first step, which compiles: {seconds:.1f} s; cached in {cache_dir()}")
