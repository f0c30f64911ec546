"""Positions -> batches: read, decode and crop in worker processes that keep no state.

A batch: images [n, S, S, C] uint8, labels [n] int64, positions [n] int64, weights [n] fp32; and
bad, the samples that could not be decoded: they keep their place with weight 0.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_classifier import processes
from ds_classifier.data import images
from ds_classifier.data.order import SampleOrder, micro_batch_positions
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.store import store_of
from ds_classifier.keyed_random import Draws, fold, stream_key


class BadSample(NamedTuple):
    position: int
    key: str
    error: str


class Batch(NamedTuple):
    images: Tensor  # [n, S, S, C] uint8
    labels: Tensor  # [n] int64
    positions: Tensor  # [n] int64, places in the training stream
    weights: Tensor  # [n] fp32: 1, or 0 for a bad sample or padding
    bad: list[BadSample]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the copies do not wait when the memory is pinned."""
        moved = [tensor.to(device, non_blocking=True) for tensor in self[:4]]
        return Batch(*moved, self.bad)


class ShardDataset(Dataset):
    """Samples by position. An item is a whole batch: dataset[positions] with positions [n] int64.

    order: which sample stands at a position, or None for the manifest's order.
    image_size: S, pixels. channels: 1 to 4. random_crop, random_flip: keyed by (seed, position).
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        image_size: int,
        channels: int = 3,
        order: SampleOrder | None = None,
        seed: int = 0,
        random_crop: bool = False,
        random_flip: bool = False,
    ):
        self.shards, self.order = shards, order
        self.image_size, self.channels = image_size, channels
        self.random_crop, self.random_flip = random_crop, random_flip
        self._crop_key = stream_key(seed, "crop")
        self._store = store_of(shards)

    def __getitem__(self, positions: np.ndarray) -> Batch:
        positions = np.asarray(positions, dtype=np.int64)
        inside = positions >= 0  # padding stands at -1
        samples = np.where(inside, positions, 0)
        samples = samples if self.order is None else self.order.samples(samples)
        rows = self.shards.index[samples]
        size = self.image_size
        pixels = np.zeros((len(positions), size, size, self.channels), dtype=np.uint8)
        weights = inside.astype(np.float32)
        bad = []
        for i in np.flatnonzero(inside):
            row = rows[i]
            data = self._store.read(int(row["shard"]), int(row["offset"]), int(row["length"]))
            try:
                pixels[i] = self._pixels(data, int(positions[i]))
            except ValueError as error:
                weights[i] = 0.0
                key = self.shards.key(int(samples[i]))
                bad.append(BadSample(int(positions[i]), key, str(error)))
        return Batch(
            torch.from_numpy(pixels),
            torch.from_numpy(rows["label"].astype(np.int64)),
            torch.from_numpy(positions),
            torch.from_numpy(weights),
            bad,
        )

    def _pixels(self, data: bytes, position: int) -> np.ndarray:
        image = images.decode(data, self.channels)
        draws = Draws(fold(self._crop_key, position))
        if self.random_crop:
            pixels = images.random_crop(image, self.image_size, draws.randrange)
        else:
            pixels = images.center_crop(image, self.image_size)
        if self.random_flip and draws.randrange(2):
            pixels = pixels[:, ::-1]
        return pixels


class TrainingPositions(Sampler):
    """The positions of one rank's micro-batches from a step on, [micro_batch] each."""

    def __init__(
        self,
        *,
        first_step: int,
        steps: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ):
        self.first_step, self.steps = first_step, steps
        self.shape = dict(
            global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size
        )
        self.accumulation = global_batch // (micro_batch * world_size)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.first_step, self.steps):
            for micro_step in range(self.accumulation):
                yield micro_batch_positions(step=step, micro_step=micro_step, **self.shape)


class ValidationPositions(Sampler):
    """Every sample once over all ranks, in order; equal steps on each, padded with -1."""

    def __init__(self, samples: int, *, batch: int, rank: int, world_size: int):
        self.samples, self.batch = samples, batch
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.world_size))

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(len(self)):
            first = step * self.batch * self.world_size + self.rank
            positions = first + self.world_size * np.arange(self.batch, dtype=np.int64)
            yield np.where(positions < self.samples, positions, -1)


def create_loader(
    dataset: ShardDataset, positions: Sampler, *, workers: int, prefetch: int = 4
) -> DataLoader:
    """Batches of the dataset at the given positions, in their order.

    workers: processes beside this one; 0 reads in this process. prefetch: batches ahead a worker.
    """
    in_workers = {}
    if workers > 0:
        in_workers = dict(
            prefetch_factor=prefetch, multiprocessing_context="fork", worker_init_fn=_start_worker
        )
    return DataLoader(
        dataset,
        batch_size=None,  # the sampler's item is a whole batch already
        sampler=positions,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_is,
        **in_workers,
    )


@atexit.register
def _end_workers() -> None:
    """Deaf workers would not hear multiprocessing's own request to end with this process."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each as an accident
    for worker in workers:
        worker.kill()


def _as_is(batch: Batch) -> Batch:
    return batch


def _start_worker(worker: int) -> None:
    """Workers outlive the signals that stop a run, so that its last step gets its data.

    They die with their rank, whatever it dies of.
    """
    processes.die_with(multiprocessing.parent_process().pid)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF; bad pictures are counted


def default_workers(ranks_here: int) -> int:
    """Loader processes a rank: the node's cores shared by its ranks, less one each to compute.

    Without a GPU the cores are the computer: one worker is enough to overlap reading.
    """
    cores = len(os.sched_getaffinity(0)) // max(ranks_here, 1)
    if not torch.cuda.is_available():
        return 1
    return max(1, min(cores - 1, 8))
