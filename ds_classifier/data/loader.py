"""Positions -> batches: read, decode and crop images in worker processes without state.

A batch: images [n, S, S, C] uint8, labels [n] int64, positions [n] int64, weights and importance
[n] fp32, and the bad samples, which could not be decoded: they keep their place in the batch with
weight 0. Images of arrays (arrays.py) that are no pixels are x_0, fp32. Labels of several classes,
or of probabilities, are [n, K] fp32 (labels/targets.py).
"""

from __future__ import annotations

import atexit
import errno
import importlib
import itertools
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.common.keyed_random import Draws, fold, stream_key
from ds_classifier.data import images
from ds_classifier.data.augment import Augmentation
from ds_classifier.data.order import SampleOrder, share_of_rank
from ds_classifier.data.shards import ShardSet
from ds_classifier.distributed import processes

AHEAD = 2**17  # positions that a rank looks ahead at most, to name the shards it will need
PREFETCH = 4  # batches that each worker prepares ahead
MAX_RESTARTS = 3  # restarts in a row without a batch between them
DEATH_S = 1.0  # seconds to wait for the death of a worker whose pipe broke

# What stops workers from being started -> what to do.
_ADVICE = {
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "close other programs, or raise fs.file-max",
    errno.EAGAIN: "raise `ulimit -u`, or the container's limit of processes",
    errno.ENOMEM: "free memory",
}
_NO_SHM = "let /dev/shm be writable and have room (docker run --shm-size 1g)"  # for semaphores


class BadSample(NamedTuple):
    """A sample that could not be decoded."""

    position: int
    key: str
    error: str


class Batch(NamedTuple):
    """A micro-batch of samples."""

    images: Tensor  # [n, S, S, C] uint8; of arrays that are no pixels, x_0 in fp32
    labels: Tensor  # [n] int64; of several classes, or of probabilities, [n, K] fp32
    positions: Tensor  # [n] int64, in the training stream
    weights: Tensor  # [n] fp32: 1, or 0 for a bad sample or padding
    importance: Tensor  # [n] fp32: the data's own weights of samples in the loss; 1 without them
    bad: list[BadSample]

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device, without waiting if its memory is pinned."""
        moved = [tensor.to(device, non_blocking=True) for tensor in self[:-1]]
        return Batch(*moved, self.bad)


class ShardDataset(Dataset):
    """A data set whose item is a whole batch: dataset[positions] with positions [n] int64.

    order: maps positions to samples; None for the order of the manifest.
    batches: positions of this rank, from which the shards at a URL are fetched ahead; or None.
    image_size: S, pixels. channels: C, 1 to 4; both are those of the data if these are arrays.
    random_crop, random_flip: their random numbers depend on (seed, position) alone.
    fast: resize with torchvision; see `images.resize_and_crop`.
    augment: changes images after crop and flip; None: nothing does.
    Arrays are not resized or cropped. Raises ValueError if they have another shape.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        image_size: int,
        channels: int = 3,
        order: SampleOrder | None = None,
        batches: TrainingPositions | ValidationPositions | None = None,
        seed: int = 0,
        random_crop: bool = False,
        random_flip: bool = False,
        fast: bool = False,
        augment: Augmentation | None = None,
    ):
        self.shards, self.order = shards, order
        self.arrays = shards.manifest.arrays
        if self.arrays is not None:
            self.arrays.refuse_other_shape(image_size, channels)
        self.image_size, self.channels = image_size, channels
        self.random_crop, self.random_flip, self.fast = random_crop, random_flip, fast
        self.augment = augment
        if fast:  # imported before the workers are forked, since it takes 1.5 s and 165 MB
            importlib.import_module("torchvision.transforms.v2.functional")
        self._crop_key = stream_key(seed, "crop")
        self._store = shards.store
        self._batches = batches if self._store.remote else None
        self._looked = (0, 0)  # range of positions for which the shards ahead have been named

    def __getitem__(self, positions: np.ndarray) -> Batch:
        """Read, decode and crop the samples at the positions; -1 is padding, with weight 0.

        Raises OSError if a shard cannot be read, and ValueError if the augmentation fails.
        """
        positions = np.asarray(positions, dtype=np.int64)
        inside = positions >= 0
        if self._batches is not None and inside.any():
            self._look_ahead(int(positions[inside].min()))
        samples = np.where(inside, positions, 0)
        samples = samples if self.order is None else self.order.samples(samples)
        rows = self.shards.index[samples]
        size = self.image_size
        pixels = np.zeros(
            (len(positions), size, size, self.channels), dtype=self.shards.manifest.batch_dtype
        )
        as_tensor = torch.from_numpy(pixels)
        weights = inside.astype(np.float32)
        importance = np.ones(len(positions), np.float32)
        if self.shards.sample_weights is not None:
            importance = self.shards.sample_weights[samples]
        labels = rows["label"].astype(np.int64)
        if self.shards.targets is not None:
            labels = self.shards.targets[samples].astype(np.float32)
        bad = []
        places = [rows[name].tolist() for name in ("shard", "offset", "length")]
        for i in np.flatnonzero(inside).tolist():
            data = self._store.read(*(place[i] for place in places))
            try:
                pixels[i], flip = self._crop(data, int(positions[i]))
            except ValueError as error:
                weights[i] = 0.0
                key = self.shards.key(int(samples[i]))
                bad.append(BadSample(int(positions[i]), key, str(error)))
            else:
                if flip:
                    _flip(as_tensor[i])
                if self.augment is not None:
                    as_tensor[i] = self._augmented(as_tensor[i], int(positions[i]))
        return Batch(
            as_tensor,
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            torch.from_numpy(weights),
            torch.from_numpy(importance),
            bad,
        )

    def _look_ahead(self, position: int) -> None:
        """Name to the store the shards that the current and the next blocks need."""
        if self._looked[0] <= position < self._looked[1]:
            return
        ahead = self._batches.after(position)
        if self.order is None:
            shards = np.unique(self.shards.index["shard"][ahead]).tolist()
        else:
            shards = self.order.open_shards(ahead)
        self._store.prefetch(shards)
        self._looked = (position, int(ahead[len(ahead) // 8]))

    def key(self, position: int) -> str:
        """Return the key of the sample at a position."""
        return self.shards.key(self._sample(position))

    def _sample(self, position: int) -> int:
        """Return the number of the sample at a position."""
        at = np.array([position])
        return int((at if self.order is None else self.order.samples(at))[0])

    def _augmented(self, image: Tensor, position: int) -> Tensor:
        """Return the image at a position, [S, S, C], as it is trained on.

        Raises ValueError that names the sample if the augmentation fails.
        """
        try:
            return self.augment(image, position)
        except ValueError as error:
            sample = self._sample(position)
            shard = self.shards.manifest.shards[self.shards.index["shard"][sample]]
            raise ValueError(
                f"{error}; the image is {self.shards.key(sample)} in {shard.name}; do: correct the "
                "function, and run the same command again, which continues from the last checkpoint"
            ) from error

    def _crop(self, data: bytes, position: int) -> tuple[np.ndarray, bool]:
        """Return the crop, [S, S, C], and whether to flip it."""
        draws = Draws(fold(self._crop_key, position))
        if self.arrays is not None:
            return self.arrays.decode(data), self.random_flip and draws.randrange(2) == 1
        decode = images.decode_pixels if self.fast else images.decode
        image = decode(data, self.channels)
        if self.random_crop:
            pixels = images.random_crop(image, self.image_size, draws.randrange, fast=self.fast)
        else:
            pixels = images.center_crop(image, self.image_size, fast=self.fast)
        return pixels, self.random_flip and draws.randrange(2) == 1


def _flip(pixels: Tensor) -> None:
    """Mirror an image, [H, W, C], in place; torch does it ten times faster than numpy."""
    image = pixels.permute(2, 0, 1)[None]  # [1, C, H, W], channels last
    image.copy_(image.flip(-1))


class TrainingPositions(Sampler):
    """The positions of one rank's micro-batches, [micro_batch] each, for the given steps.

    first_step, steps: the range of steps is [first_step, steps).
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        first_step: int,
        steps: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ):
        self.order, self.first_step, self.steps = order, first_step, steps
        self.micro_batch = micro_batch
        self.shape = dict(global_batch=global_batch, rank=rank, world_size=world_size)
        self.accumulation = global_batch // (micro_batch * world_size)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.first_step, self.steps):
            yield from share_of_rank(self.order, step, **self.shape).reshape(-1, self.micro_batch)

    def after(self, position: int) -> np.ndarray:
        """Return this rank's positions from the step of `position` on.

        They cover the rest of all open blocks and one more step; at most AHEAD positions.
        """
        step, share = position // self.shape["global_batch"], self.accumulation * self.micro_batch
        count = min(-(-self.order.open_samples // self.shape["world_size"]), AHEAD)
        steps = range(step, min(step + 1 + -(-count // share), self.steps))
        return np.concatenate([share_of_rank(self.order, step, **self.shape) for step in steps])


class ValidationPositions(Sampler):
    """The positions of one rank's part of all samples, [batch] each.

    Every rank has the same number of batches; the last ones are padded with -1.
    """

    def __init__(self, samples: int, *, batch: int, rank: int, world_size: int):
        self.samples, self.batch = samples, batch
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.world_size))

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(len(self)):
            first = (self.rank * len(self) + step) * self.batch
            positions = np.arange(first, first + self.batch, dtype=np.int64)
            yield np.where(positions < self.samples, positions, -1)

    def after(self, position: int) -> np.ndarray:
        """Return this rank's next positions, beginning with `position`."""
        end = min((self.rank + 1) * len(self) * self.batch, self.samples)
        return np.arange(position, min(position + AHEAD // 8, end), dtype=np.int64)


class Loader:
    """The batches of a dataset at the given positions, in their order.

    A batch is a function of its positions alone. So if a worker is killed, for example because
    memory ran out, all workers are restarted at the first batch not yet delivered, and the same
    batches are read again.
    """

    def __init__(self, dataset: ShardDataset, positions: Sampler, *, workers: int, prefetch: int):
        self.dataset, self.positions = dataset, positions
        self.workers, self.prefetch = workers, prefetch

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises the error of a worker; OSError if workers cannot be started, or die after
        MAX_RESTARTS restarts in a row.
        """
        if self.workers == 0:
            yield from (self._pinned(self.dataset[positions]) for positions in self.positions)
            return
        delivered = restarts = 0
        while True:
            children = set(multiprocessing.active_children())
            try:
                batches = self._start(first=delivered)
            except OSError as error:
                for worker in set(multiprocessing.active_children()) - children:
                    worker.kill()
                raise OSError(
                    f"{self.workers} loader workers per rank cannot be started: "
                    f"{files.problem(error)}; do: {_ADVICE.get(error.errno, _NO_SHM)}, or use "
                    "fewer --workers (--workers 0 reads in the rank itself)"
                ) from None
            workers = set(multiprocessing.active_children()) - children
            try:
                for batch in batches:
                    delivered, restarts = delivered + 1, 0
                    yield batch
                return
            except Exception as error:  # torch reports a lost worker by several error types
                death = _first_death(workers)
                if death is None:
                    raise
                lost = f"a loader worker died ({death})"
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise OSError(
                        f"{lost}, {restarts} times in a row; do: check whether memory ran out, and "
                        f"use fewer --workers (now {self.workers} per rank)"
                    ) from error
            for worker in workers:  # the other workers may wait for a lock that the dead one held
                worker.kill()
            del batches
            distributed.warn(f"{lost}; new workers continue at the same position")

    def _start(self, first: int) -> Iterator[Batch]:
        """Start the workers; return the batches from number `first` on."""
        slots = _Slots(self.dataset, self.positions, count=self.workers * self.prefetch + 1)
        loader = DataLoader(
            slots,
            batch_size=None,  # an item of the sampler is a whole batch
            sampler=_Rest(self.positions, first),
            num_workers=self.workers,
            collate_fn=_as_is,
            prefetch_factor=self.prefetch,
            multiprocessing_context="fork",
            worker_init_fn=_start_worker,
        )
        # torch's handler for SIGCHLD raises wherever this process is, for example in a collective.
        # Without it, torch checks the workers when a batch does not come in time.
        handler = signal.getsignal(signal.SIGCHLD)
        handed_over = iter(loader)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        return (self._pinned(slots.take(*item)) for item in handed_over)

    @staticmethod
    def _pinned(batch: Batch) -> Batch:
        """Return the batch in memory from which a GPU can copy, if there is one."""
        if not torch.cuda.is_available():
            return batch
        return Batch(*(tensor.pin_memory() for tensor in batch[:-1]), batch.bad)


class _Slots(Dataset):
    """A data set that puts its batches into memory that the workers inherit, in slots.

    slots[number, positions] fills a slot, in a worker; `take` copies it, in the rank.

    torch hands over tensors by files in /dev/shm, sent as descriptors through sockets in TMPDIR.
    Each of these may be full, too few or too long a path, and the batch is then lost without an
    error. Memory of this kind needs none of them. Only a number and the bad samples go through the
    workers' pipe: a short message is written whole or not at all (PIPE_BUF), so a worker that is
    killed leaves no part of one for which the rank would wait.

    count: the number of slots; more than the number of batches that the workers are ahead, since
        batch `number` lies in the slot number % count until it is taken.
    """

    def __init__(self, dataset: ShardDataset, positions: Sampler, *, count: int):
        self._dataset, self._count = dataset, count
        batch = len(next(iter(positions), ()))  # all batches have the size of the first one
        side = dataset.image_size
        self._images = _inherited(
            (count, batch, side, side, dataset.channels), dataset.shards.manifest.batch_dtype
        )
        manifest = dataset.shards.manifest
        if manifest.targets.vectors:
            self._labels = _inherited((count, batch, len(manifest.classes)), np.float32)
        else:
            self._labels = _inherited((count, batch), np.int64)
        self._positions = _inherited((count, batch), np.int64)
        self._weights = _inherited((count, batch), np.float32)
        self._importance = _inherited((count, batch), np.float32)

    def __getitem__(self, item: tuple[int, np.ndarray]) -> tuple[int, list[BadSample]]:
        """Read a batch into its slot; return its number and its bad samples."""
        number, positions = item
        *tensors, bad = self._dataset[positions]
        for slot, tensor in zip(self._slot(number), tensors, strict=True):
            slot[:] = tensor.numpy()
        return number, bad

    def take(self, number: int, bad: list[BadSample]) -> Batch:
        """Return a copy of a batch, whose slot may then be filled again."""
        return Batch(*(torch.from_numpy(slot.copy()) for slot in self._slot(number)), bad)

    def _slot(self, number: int) -> list[np.ndarray]:
        fields = (self._images, self._labels, self._positions, self._weights, self._importance)
        return [field[number % self._count] for field in fields]


def _inherited(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Return an array of zeros whose memory is shared with the processes forked later."""
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(1, size * np.dtype(kind).itemsize))
    return np.frombuffer(memory, kind, size).reshape(shape)


class _Rest(Sampler):
    """The numbered positions without the first batches."""

    def __init__(self, positions: Sampler, first: int):
        self._positions, self._first = positions, first

    def __len__(self) -> int:
        return len(self._positions) - self._first

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return itertools.islice(enumerate(self._positions), self._first, None)


def _first_death(workers: set[multiprocessing.Process]) -> str | None:
    """Return the signal or exit code of a dead worker, or None if all workers are alive.

    A worker's pipe breaks shortly before its process ends, so wait up to DEATH_S.
    """
    ended = multiprocessing.connection.wait(
        [w.sentinel for w in workers], timeout=DEATH_S if workers else 0
    )
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if not codes:
        return None
    return signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"


def create_loader(
    dataset: ShardDataset, positions: Sampler, *, workers: int, prefetch: int = PREFETCH
) -> Loader:
    """Build a loader for the batches at the given positions, in their order.

    workers: number of worker processes; 0 reads in this process.
    prefetch: number of batches that each worker prepares ahead.
    """
    return Loader(dataset, positions, workers=workers, prefetch=prefetch)


@atexit.register
def _end_workers() -> None:
    """Kill the workers at exit: they ignore the SIGTERM that multiprocessing sends them."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each death as an error
    for worker in workers:
        worker.kill()


def _as_is(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    """Make a worker ignore the signals that stop a run, so that the last step gets its data.

    The worker is killed when its rank dies, for whatever reason.
    """
    processes.die_with(multiprocessing.parent_process().pid)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow warns about odd EXIF; bad images are counted anyway


def worker_count(asked: int) -> int:
    """Return the number of loader processes of this rank; below 0, as many as suit the machine."""
    return default_workers(distributed.local_world_size()) if asked < 0 else asked


def default_workers(ranks_here: int) -> int:
    """Return the number of loader processes per rank.

    With a GPU: the node's cores divided by its ranks, minus one for the rank itself, at most 8.
    Without a GPU, training needs the cores, and one worker is enough to overlap reading.
    """
    cores = len(os.sched_getaffinity(0)) // max(ranks_here, 1)
    if not torch.cuda.is_available():
        return 1
    return max(1, min(cores - 1, 8))
