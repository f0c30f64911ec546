"""The parts that the ranks of a run build before the first step: shards, engine, loaders, facts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.config.deepspeed_json import Resolved
from ds_classifier.config.settings import Settings
from ds_classifier.data.augment import create_augmentation
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.data.loader import (
    Loader,
    ShardDataset,
    TrainingPositions,
    create_loader,
    worker_count,
)
from ds_classifier.data.order import SampleOrder, node_shards
from ds_classifier.data.shards import ShardSet
from ds_classifier.diffusion import high_noise_weights
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.distributed.engine.deepspeed_engine import Group
from ds_classifier.distributed.stopping import StopVote
from ds_classifier.distributed.watchdog import Watchdog
from ds_classifier.evaluation.data import create_validation_loader, labels_of
from ds_classifier.loss import RecentImages
from ds_classifier.training.balance import Balance, measure
from ds_classifier.training.logs.flops import (
    Arithmetic,
    forward_flops,
    training_flops,
    training_flops_with,
)
from ds_classifier.training.logs.sanity import Guessing
from ds_classifier.training.start import Start
from ds_classifier.training.step import Objective


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts that training, --dry_run and --overfit_batch have in common."""

    resolved: Resolved  # settings, JSON and batch sizes
    shards: ShardSet
    val_shards: ShardSet | None
    start: Start  # where the run begins
    groups: list[Group] | None  # the parameters that are trained; None: all alike
    engine: Any  # DeepSpeed's
    fixed: dict[str, Tensor]  # what training does not change, see fixed_state.py
    sampler: Any  # draws timesteps
    stop: StopVote
    watch: Watchdog

    @property
    def run_dir(self) -> Path:
        """The directory of the run."""
        return Path(self.resolved.settings.run_dir)

    @property
    def targets(self) -> Targets:
        """The kind of the data's targets."""
        return self.shards.manifest.targets

    @property
    def val_samples(self) -> int:
        """The number of images to validate on."""
        return self.val_shards.manifest.samples if self.val_shards is not None else 0

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts that a checkpoint records about its run."""
        return facts_of(self.resolved, self.shards) | self.start.parts

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of a step, and what the device could do."""
        device, kwargs = self.engine.device, self.resolved.settings.model_kwargs()
        named = self.engine.module.classifier.named_parameters()
        frozen = [name for name, parameter in named if not parameter.requires_grad]
        forward = forward_flops(kwargs)
        return Arithmetic(
            forward,
            training_flops_with(frozen, kwargs) if frozen else training_flops(forward),
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            precision=deepspeed_engine.precision(self.engine),
        )

    @cached_property
    def guessing(self) -> Guessing:
        """The loss and accuracy of guessing by class frequency.

        Large data sets are sampled down to about a million labels, or ten million numbers. With a
        loss of the user's, that of guessing is not known.
        """
        labels = labels_of(self.shards, most=10_000_000 if self.targets.vectors else 1_000_000)
        guessing = Guessing.of(labels, len(self.shards.manifest.classes), self.targets)
        return dataclasses.replace(guessing, loss=None) if self.resolved.settings.loss else guessing

    @cached_property
    def balance(self) -> Balance | None:
        """The weights of images in the loss; None if all count the same.

        Every rank must ask for it.
        """
        kind, device = self.resolved.settings.class_balance, self.engine.device
        if not kind and not self.shards.manifest.weighted:
            return None
        found = distributed.on_rank_0(lambda: measure(self.shards, kind), device)
        by_class = torch.tensor(found["by_class"], device=device)
        return Balance(**found | {"by_class": by_class})

    def recent_images(self) -> RecentImages | None:
        """Return the place for the last images, still empty; None without posterior targets."""
        settings = self.resolved.settings
        if not settings.posterior_images:
            return None
        pixels = self.shards.manifest.batch_dtype is np.uint8
        return RecentImages(
            settings.posterior_images,
            image_shape=(settings.image_size, settings.image_size, settings.in_channels),
            num_classes=settings.num_classes,
            device=self.engine.device,
            dtype=torch.uint8 if pixels else torch.float32,
            vectors=self.targets.vectors,
        )

    def objective(self, recent: RecentImages | None) -> Objective:
        """Return the choices of a step's loss. recent: see `recent_images`."""
        settings, weights = self.resolved.settings, None
        if settings.high_noise_weight != 1:
            numbers = settings.image_size**2 * settings.in_channels
            diffusion, device = self.engine.module.diffusion, self.engine.device
            weights = high_noise_weights(diffusion, numbers, settings.high_noise_weight).to(device)
        return Objective(
            self.sampler, settings.seed, settings.noised, recent, weights, self.balance
        )

    def steps_to_know(self, recent: RecentImages | None) -> int:
        """Return the number of steps, before the next one, whose images must be read again."""
        if recent is None:
            return 0
        steps = -(-recent.size // self.resolved.batch.total)
        return min(steps, self.engine.global_steps)

    def loaders(
        self, first_step: int, *, resolved: Resolved | None = None
    ) -> tuple[Loader, Loader | None]:
        """Return this rank's training batches from a step on, and its validation batches.

        resolved: other batch sizes or another length than the run's.
        """
        resolved = resolved or self.resolved
        settings = resolved.settings
        workers = worker_count(settings.workers)
        loader = create_training_loader(
            resolved, self.shards, first_step, workers=workers, device=self.engine.device
        )
        if self.val_shards is None:
            return loader, None
        # Validation is always exact: its figures are compared with those of other runs.
        return loader, create_validation_loader(
            self.val_shards, settings, batch_size=resolved.batch.micro, workers=min(workers, 1)
        )


def facts_of(resolved: Resolved, shards: ShardSet) -> dict[str, Any]:
    """Return what a checkpoint records about its run, and a resumed run may not change."""
    arrays = shards.manifest.arrays
    of_data = {} if arrays is None else {"arrays": arrays.to_json()}
    if (targets := shards.manifest.targets) != ONE_CLASS:
        of_data["targets"] = targets.to_json()
    return of_data | {
        "settings": resolved.settings.recorded(),
        "classes": shards.manifest.classes,
        "data": shards.manifest.fingerprint,
        "deepspeed": resolved.shaping,
    }


def lr_factor(settings: Settings, steps: int) -> Callable[[int], float] | None:
    """Return the learning rate of step k as a share of the peak; None if the JSON's scheduler
    decides.

    The rate rises over the first --warmup_steps steps. After them step k, counted from their end,
    runs at 1 - k / n (linear), (1 + cos(pi k / n)) / 2 (cosine) or 1, with n steps left.

    steps: the number of steps of the part of the run, in which k counts from 0.
    """
    if not settings.schedule:
        return None
    warm_up = max(0, settings.warmup_steps)
    left = max(1, steps - warm_up)
    decay = {
        "linear": deepspeed_engine.linear_anneal(left),
        "cosine": lambda k: (1 + math.cos(math.pi * min(1, k / left))) / 2,
        "constant": lambda k: 1.0,
    }[settings.schedule]
    return lambda k: (k + 1) / (warm_up + 1) if k < warm_up else decay(k - warm_up)


def create_training_loader(
    resolved: Resolved, shards: ShardSet, first_step: int, *, workers: int, device: torch.device
) -> Loader:
    """Return this rank's training batches from a step on; raises AgreedError if the node's cache
    cannot hold the shards that are read at the same time."""
    settings, batch = resolved.settings, resolved.batch
    order = SampleOrder(
        [shard.samples for shard in shards.manifest.shards], **settings.order_kwargs()
    )
    positions = TrainingPositions(
        order,
        first_step=first_step,
        steps=settings.steps,
        global_batch=batch.total,
        micro_batch=batch.micro,
        rank=distributed.rank(),
        world_size=batch.world_size,
    )
    distributed.raise_together(_cache_problem(resolved, shards, order, first_step), device)
    dataset = ShardDataset(
        shards,
        order=order,
        batches=positions,
        seed=settings.seed,
        random_crop=settings.random_crop,
        random_flip=settings.random_flip,
        fast=settings.resize == "fast",
        augment=create_augmentation(settings),
        image_size=settings.image_size,
        channels=settings.in_channels,
    )
    return create_loader(dataset, positions, workers=workers)


def _cache_problem(
    resolved: Resolved, shards: ShardSet, order: SampleOrder, first_step: int
) -> str | None:
    """Return why this node's cache cannot hold the shards that it reads at once, or None."""
    settings, batch = resolved.settings, resolved.batch
    if not shards.store.remote or not settings.cache_gb:
        return None
    first = distributed.rank() - distributed.local_rank()
    at_once = node_shards(
        order,
        first_step,
        global_batch=batch.total,
        ranks=range(first, first + distributed.local_world_size()),
        world_size=batch.world_size,
    )
    need = sum(shards.manifest.shards[shard].bytes for shard in at_once) / 1e9
    if need <= settings.cache_gb:
        return None
    return (
        f"--cache_gb: got {settings.cache_gb:g}; need at least {need:.3g} for the "
        f"{len(at_once)} shards that a node reads at the same time, better twice that; do: raise "
        "it, or lower --lanes"
    )
