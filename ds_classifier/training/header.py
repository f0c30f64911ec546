"""The lines above a run's table."""

from __future__ import annotations

from ds_classifier import distributed
from ds_classifier.common.urls import shown
from ds_classifier.config import CommandLine
from ds_classifier.data.shards import ShardSet, neighbours
from ds_classifier.distributed import deepspeed_engine
from ds_classifier.training.job import Job, arithmetic


def announce(job: Job, command: CommandLine) -> None:
    """The header of a run: what is trained on what, and how the numbers came about."""
    settings, batch = job.resolved.settings, job.resolved.batch
    engine, shards, say = job.engine, job.shards, distributed.say
    parameters = sum(p.numel() for p in engine.module.parameters())
    schedule = {None: "the JSON's WarmupDecayLR", True: "linear to 0", False: "constant"}
    if settings.anneal_lr is None and "scheduler" not in job.resolved.ds_config:
        schedule[None] = "constant"
    held_out = "none"
    if job.val_shards is not None:
        held_out = f"{_split(job.val_shards)} in {shown(settings.val_data_dir)}"
    say(
        f"classifier  {parameters:,} parameters, {arithmetic(job).forward / 1e9:.3g} GFLOP forward "
        f"an image; {settings.image_size} px, {settings.num_classes} classes; "
        f"{settings.noise_schedule} noise, {settings.diffusion_steps} steps"
    )
    say(f"data        {_split(shards)} in {shown(settings.data_dir)}")
    if neighbours(shards.index).sorted_by_class and settings.shuffle_shards != "lane":
        say(f"{'':12}its shards are sorted by class: --shuffle_shards lane would mix them better")
    say(f"validation  {held_out}")
    say(f"batch       {batch}; {shards.manifest.samples / batch.total:.1f} steps an epoch")
    say(
        f"engine      {deepspeed_engine.precision(engine)}, "
        f"ZeRO {engine.zero_optimization_stage()}, on "
        f"{deepspeed_engine.describe_device(engine.device)}; lr {settings.lr:g}, "
        f"{schedule[settings.anneal_lr]}"
    )
    length = f"{settings.iterations:,} steps in all"
    if command.overfit_steps:
        length = f"one batch again and again, {command.overfit_steps} steps at most"
    say(f"start       from {job.start.origin}; {length}")
    for note in job.start.notes:
        say(f"  NOTE      {note}")
    where = (
        "stays as it is"
        if command.instead
        else "(log.jsonl, progress.csv, tb/, checkpoints/; report.html at the end)"
    )
    say(f"run         {job.run_dir}/ {where}")


def _split(shards: ShardSet) -> str:
    count = len(shards.manifest.shards)
    return f"{shards.manifest.samples:,} images ({count} shard{'s' * (count > 1)})"
