"""What the ranks build together before the first step: where it starts, its loaders, its facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_classifier import distributed
from ds_classifier.checkpoint.initial_weights import load_initial_weights
from ds_classifier.config import Settings
from ds_classifier.config.deepspeed_json import Resolved
from ds_classifier.data.loader import (
    ShardDataset,
    TrainingPositions,
    create_loader,
    default_workers,
)
from ds_classifier.data.order import SampleOrder, node_shards
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.store import RemoteShardSet
from ds_classifier.distributed import deepspeed_engine
from ds_classifier.distributed.stopping import StopVote
from ds_classifier.distributed.watchdog import Watchdog
from ds_classifier.evaluation.data import create_validation_loader
from ds_classifier.training.flops import Arithmetic, forward_flops
from ds_classifier.training.run_dir import find_checkpoint, read_done, refuse_changes
from ds_classifier.training.sanity import Guessing


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training starts. state: of the checkpoint, if from one, which rank 0 has at its path.
    origin: in words. notes: what of other weights could not be kept. initialized: from those."""

    origin: str
    checkpoint: Path | None = None
    state: dict[str, Any] | None = None
    notes: Sequence[str] = ()
    initialized: bool = False

    @classmethod
    def fresh(cls, settings: Settings) -> Start:
        return cls(f"seed {settings.seed}")


@dataclasses.dataclass(frozen=True)
class Job:
    """What the ranks have built together, before its first step."""

    resolved: Resolved
    shards: ShardSet
    val_shards: ShardSet | None
    start: Start
    engine: Any
    sampler: Any
    stop: StopVote
    watch: Watchdog

    @property
    def run_dir(self) -> Path:
        return Path(self.resolved.settings.run_dir)

    @property
    def val_samples(self) -> int:
        """Images to validate on."""
        return self.val_shards.manifest.samples if self.val_shards is not None else 0

    def loaders(self, first_step: int, *, resolved: Resolved | None = None):
        """See `create_loaders`; resolved: another batch or length than the job's."""
        return create_loaders(
            resolved or self.resolved, self.shards, self.val_shards, first_step, self.engine.device
        )


def facts_of(resolved: Resolved, shards: ShardSet) -> dict[str, Any]:
    """What a checkpoint says of the training that it is of."""
    return {
        "settings": resolved.settings.recorded(),
        "classes": shards.manifest.classes,
        "data": shards.manifest.fingerprint,
        "deepspeed": resolved.shaping,
    }


def find_start(resolved: Resolved, facts: dict[str, Any], device) -> Start | None:
    """The checkpoint to go on from, or fresh weights; None, and said so, of a finished run."""
    settings, run_dir = resolved.settings, Path(resolved.settings.run_dir)
    found, state = find_checkpoint(settings, run_dir, device)
    if state is not None:
        refuse_changes(state, settings, facts)
    finished = distributed.on_rank_0(lambda: read_done(run_dir), device)
    if finished is not None:
        distributed.say(
            f"{run_dir} is finished ({finished}). To train again, choose another --run_dir."
        )
        return None
    if state is None:
        return Start.fresh(settings)
    return Start(f"checkpoint {found}, step {state['step']}", found, state)


def load_given_weights(
    classifier, start: Start, settings: Settings, names: list[str], device
) -> Start:
    """Those of --init_from, where no checkpoint goes before them. names: of the classes."""
    if start.state is not None or not settings.init_from:
        return start
    source = Path(settings.init_from)
    origin, *notes = distributed.on_rank_0(
        lambda: load_initial_weights(classifier, source, settings, names), device
    )
    return dataclasses.replace(start, origin=origin, notes=notes, initialized=True)


def lr_factor(settings: Settings) -> Callable[[int], float] | None:
    """The learning rate of step k as a share of the peak; None: the JSON's scheduler decides."""
    if settings.anneal_lr is None:
        return None
    return (
        deepspeed_engine.linear_anneal(settings.iterations)
        if settings.anneal_lr
        else lambda step: 1.0
    )


def arithmetic(job: Job):
    """What a rank's images a second are in operations."""
    device = job.engine.device
    return Arithmetic(
        forward_flops(job.resolved.settings.model_kwargs()),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        precision=deepspeed_engine.precision(job.engine),
    )


def guessing(shards: ShardSet):
    """What is known of the labels without looking; of very many, of a million of them."""
    every = max(1, len(shards.index) // 1_000_000)
    return Guessing.of(shards.index["label"][::every], len(shards.manifest.classes))


def create_loaders(
    resolved: Resolved, shards: ShardSet, val_shards: ShardSet | None, first_step: int, device
):
    """This rank's training batches from a step on, and the validation batches if there are any."""
    settings, batch = resolved.settings, resolved.batch
    rank, world_size = distributed.rank(), batch.world_size
    workers = settings.workers
    if workers < 0:
        workers = default_workers(distributed.local_world_size())
    pixels = dict(image_size=settings.image_size, channels=settings.in_channels)
    order = SampleOrder(
        [shard.samples for shard in shards.manifest.shards], **settings.order_kwargs()
    )
    positions = TrainingPositions(
        order,
        first_step=first_step,
        steps=settings.iterations,
        global_batch=batch.total,
        micro_batch=batch.micro,
        rank=rank,
        world_size=world_size,
    )
    distributed.raise_together(cache_problem(resolved, shards, order, first_step), device)
    dataset = ShardDataset(
        shards,
        order=order,
        batches=positions,
        seed=settings.seed,
        random_crop=settings.random_crop,
        random_flip=settings.random_flip,
        fast=settings.resize == "fast",
        **pixels,
    )
    loader = create_loader(dataset, positions, workers=workers)
    if val_shards is None:
        return loader, None
    # Validation is always exact: its figures stand beside those of other runs.
    return loader, create_validation_loader(
        val_shards, settings, batch_size=batch.micro, workers=min(workers, 1)
    )


def cache_problem(resolved: Resolved, shards: ShardSet, order, first_step: int) -> str | None:
    """Why this node's cache cannot hold the shards that it reads side by side, or None."""
    settings, batch = resolved.settings, resolved.batch
    if not isinstance(shards, RemoteShardSet) or not settings.cache_gb:
        return None
    first = distributed.rank() - distributed.local_rank()
    side_by_side = node_shards(
        order,
        first_step,
        global_batch=batch.total,
        ranks=range(first, first + distributed.local_world_size()),
        world_size=batch.world_size,
    )
    need = sum(shards.manifest.shards[shard].bytes for shard in side_by_side) / 1e9
    if need <= settings.cache_gb:
        return None
    return (
        f"--cache_gb: got {settings.cache_gb:g}; need at least {need:.3g} for the "
        f"{len(side_by_side)} shards that a node reads side by side, better twice that; do: raise "
        "it, or lower --lanes"
    )
