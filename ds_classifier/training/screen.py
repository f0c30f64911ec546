"""The lines that a training run prints: a header, and one per log row."""

from __future__ import annotations

from typing import Any

from ds_classifier import distributed
from ds_classifier.common.text import count, duration
from ds_classifier.common.urls import shown
from ds_classifier.config import CommandLine
from ds_classifier.data.shards import ShardSet, neighbours
from ds_classifier.distributed import deepspeed_engine
from ds_classifier.evaluation import metrics
from ds_classifier.training.setup import Setup

HEADER = (
    f"{'step':>6} {'eta':>8} {metrics.console_heads()} "
    f"{'gnorm':>5} {'lr':>7} {'scale':>5} {'img/s':>6} {'wait':>4} {'mem':>5}"
)


def announce(setup: Setup, command: CommandLine) -> None:
    """Print the header of a run: what is trained on what, and how the numbers came about."""
    settings, batch = setup.resolved.settings, setup.resolved.batch
    engine, shards, say = setup.engine, setup.shards, distributed.say
    parameters = sum(p.numel() for p in engine.module.parameters())
    held_out = "none"
    if setup.val_shards is not None:
        held_out = f"{_split(setup.val_shards)} in {shown(settings.val_data_dir)}"
        if not command.settings.val_data_dir:
            held_out += ", found beside the training split"
    say(
        f"classifier  {parameters:,} parameters, {setup.arithmetic.forward / 1e9:.3g} GFLOP "
        f"forward per image; {settings.image_size} px, {settings.num_classes} classes; "
        f"{settings.noise_schedule} noise, {settings.diffusion_steps} steps"
    )
    say(f"data        {_split(shards)} in {shown(settings.data_dir)}")
    if neighbours(shards.index).sorted_by_class and settings.shuffle_shards != "lane":
        say(f"{'':12}its shards are sorted by class: --shuffle_shards lane would mix them better")
    say(f"validation  {held_out}")
    say(f"batch       {batch}; {shards.manifest.samples / batch.total:.1f} steps per epoch")
    say(
        f"engine      {deepspeed_engine.precision(engine)}, "
        f"ZeRO {engine.zero_optimization_stage()}, on "
        f"{deepspeed_engine.describe_device(engine.device)}; lr {settings.lr:g}, {_schedule(setup)}"
    )
    length = f"{count(settings.iterations, 'step')} in all"
    if command.overfit_steps:
        length = f"one batch again and again, {count(command.overfit_steps, 'step')} at most"
    say(f"start       from {setup.start.origin}; {length}")
    for note in setup.start.notes:
        say(f"  NOTE      {note}")
    where = "(log.jsonl, progress.csv, tb/, checkpoints/; report.html at the end)"
    say(f"run         {setup.run_dir}/ {'is not touched' if command.skips_training else where}")


def _split(shards: ShardSet) -> str:
    return (
        f"{count(shards.manifest.samples, 'image')} ({count(len(shards.manifest.shards), 'shard')})"
    )


def _schedule(setup: Setup) -> str:
    """Return the shape of the learning rate over the run, in words."""
    anneal = setup.resolved.settings.anneal_lr
    if anneal is None and "scheduler" in setup.resolved.ds_config:
        return "the JSON's WarmupDecayLR"
    return "linear to 0" if anneal else "constant"


def training_line(row: dict[str, Any], *, eta_seconds: float) -> str:
    """Return the line of a training row under HEADER. Accuracies are in per cent."""
    lg_scale = f"2^{row['lg_loss_scale']:g}" if row["lg_loss_scale"] else "-"
    return (
        f"{row['step']:>6} {duration(eta_seconds):>8} {metrics.console_cells(row)} "
        f"{row['grad_norm']:5.2f} {row['lr']:7.1e} {lg_scale:>5} "
        f"{row['images_per_sec']:6.0f} {100 * row['data_wait_frac']:3.0f}% "
        f"{row['memory_gib']:4.1f}G"
    )


def lost_line(row: dict[str, Any], why_skipped: str) -> str:
    """Return what was seen and what was lost since the run's first start, by a training row."""
    parts = [f"{count(row['samples'], 'sample')} seen so far"]
    if row["bad_samples"]:
        bad = count(row["bad_samples"], "bad sample")
        parts.append(f"{bad} (listed in bad_samples.rank*.jsonl)")
    if row["skipped_steps"]:
        parts.append(f"{count(row['skipped_steps'], 'step')} skipped ({why_skipped})")
    return f"{'':>6} {', '.join(parts)}"


def validation_line(row: dict[str, Any]) -> str:
    """Return the line of a validation row."""
    bad = row.get("val_bad_samples", 0)
    return (
        f"{row['step']:>6} validation: {metrics.validation_words(row)}, "
        f"{row['val_seconds']:.1f} s"
        + (f"; without {bad:,} that did not decode (verify --decode names them)" if bad else "")
    )


def compiled_line(seconds: float) -> str:
    """Return the line after a first step that compiled the classifier."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return f"{'':>6} first step, which compiles: {seconds:.1f} s; cached in {cache_dir()}"
