"""Batches are the same for any number of ranks and workers; bad samples; validation."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import select
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made import made_up_shards
from PIL import Image
from running import GOLDEN

from ds_classifier.data import images
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import DataSource, Sample
from ds_classifier.data.loader import (
    ShardDataset,
    TrainingPositions,
    ValidationPositions,
    _Slots,
    create_loader,
)
from ds_classifier.data.order import SampleOrder
from ds_classifier.data.shards import open_shards

GLOBAL_BATCH = 12


def training_loader(split, *, rank=0, world_size=1, micro=GLOBAL_BATCH, first=0, last=6, workers=0):
    shards = open_shards(split)
    order = SampleOrder(
        [s.samples for s in shards.manifest.shards], seed=4, lanes=8, shuffle_shards=1
    )
    dataset = ShardDataset(
        shards, image_size=16, order=order, seed=4, random_crop=True, random_flip=True
    )
    positions = TrainingPositions(
        order,
        first_step=first,
        steps=last,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro,
        rank=rank,
        world_size=world_size,
    )
    return create_loader(dataset, positions, workers=workers)


def global_batches(split, *, world_size, micro, workers=0, first=0, last=6):
    """Return the (label, pixels) of all ranks' samples, in the order of their positions."""
    steps = {}
    for rank in range(world_size):
        loader = training_loader(
            split,
            rank=rank,
            world_size=world_size,
            micro=micro,
            workers=workers,
            first=first,
            last=last,
        )
        for batch in loader:
            for i, position in enumerate(batch.positions.tolist()):
                steps[position] = (batch.labels[i].item(), batch.images[i].numpy().tobytes())
    assert sorted(steps) == list(range(first * GLOBAL_BATCH, last * GLOBAL_BATCH))
    return [steps[q] for q in sorted(steps)]


@pytest.mark.parametrize(
    ("world_size", "micro", "workers"),
    [
        (1, 4, 0),
        (2, 6, 0),
        (2, 3, 0),
        (3, 4, 0),
        (12, 1, 0),
        (1, 12, 1),
        (1, 3, 2),
        (2, 3, 3),
        (1, 4, 4),
    ],
)
def test_same_global_batches_however_they_are_cut(digits, world_size, micro, workers):
    expected = global_batches(digits / "train", world_size=1, micro=GLOBAL_BATCH)
    got = global_batches(digits / "train", world_size=world_size, micro=micro, workers=workers)
    assert got == expected


def test_resuming_gives_the_suffix_on_other_ranks_too(digits):
    whole = global_batches(digits / "val", world_size=1, micro=12, first=0, last=40)
    # 360 samples: step 30 is the epoch's edge.
    resumed = global_batches(digits / "val", world_size=3, micro=2, workers=1, first=29, last=40)
    assert resumed == whole[29 * GLOBAL_BATCH :]
    assert whole[: 30 * GLOBAL_BATCH] != whole[30 * GLOBAL_BATCH :][: 30 * GLOBAL_BATCH]


def test_each_epoch_trains_on_every_image_once(digits):
    shards = open_shards(digits / "val")
    order = SampleOrder([360], seed=0, lanes=8, shuffle_shards=1)
    dataset = ShardDataset(shards, image_size=8, order=order)
    positions = TrainingPositions(
        order, first_step=0, steps=60, global_batch=12, micro_batch=12, rank=0, world_size=1
    )
    seen = [batch.images for batch in create_loader(dataset, positions, workers=2)]
    plain = ShardDataset(shards, image_size=8)[np.arange(360)].images
    expected = sorted(image.numpy().tobytes() for image in plain)
    for epoch in (torch.cat(seen[:30]), torch.cat(seen[30:])):
        assert sorted(image.numpy().tobytes() for image in epoch) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 2, 5, 6, 7, 12, 13])
def test_validation_counts_every_sample_once_in_equal_steps(samples, world_size):
    parts = [
        list(ValidationPositions(samples, batch=2, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    assert {len(positions) for part in parts for positions in part} == {2}
    seen = np.concatenate([positions for part in parts for positions in part])
    assert sorted(seen[seen >= 0].tolist()) == list(range(samples))


def test_padding_has_no_weight(digits):
    dataset = ShardDataset(open_shards(digits / "val"), image_size=8)
    batch = dataset[np.array([3, -1, 4])]
    assert batch.weights.tolist() == [1.0, 0.0, 1.0]
    assert batch.images[1].max() == 0
    assert batch.bad == []


def test_pixels_are_those_of_the_decoder(digits):
    """Compare with bytes decoded by hand; equal seeds and positions give equal crops."""
    shards = open_shards(digits / "val")
    row = shards.index[17]
    data = shards.path(row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]]
    by_hand = images.center_crop(images.decode(data), 32)
    batch = ShardDataset(shards, image_size=32)[np.array([17])]
    assert np.array_equal(batch.images[0].numpy(), by_hand)
    assert batch.labels.tolist() == [row["label"]]
    crops = [
        ShardDataset(shards, image_size=32, seed=seed, random_crop=True)[np.array([17])].images
        for seed in (0, 0, 1)
    ]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_flips_are_half_of_all_and_mirror(digits):
    shards = open_shards(digits / "val")
    plain = ShardDataset(shards, image_size=8)[np.arange(300)].images
    flipped = ShardDataset(shards, image_size=8, random_flip=True)[np.arange(300)].images
    mirrored = [bool((f == p.flip(1)).all()) for f, p in zip(flipped, plain, strict=True)]
    same = [bool((f == p).all()) for f, p in zip(flipped, plain, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert 110 < sum(m and not s for m, s in zip(mirrored, same, strict=True)) < 190


def test_fast_is_the_same_crops_and_flips(digits):
    shards = open_shards(digits / "val")
    exact, fast = (
        ShardDataset(
            shards, image_size=32, channels=3, random_crop=True, random_flip=True, fast=fast
        )[np.arange(300)].images.int()
        for fast in (False, True)
    )
    difference = (exact - fast).abs()
    assert 0 < difference.max() <= 2
    assert difference.float().mean() < 0.01


def memory_of(pid: int, index: str) -> tuple[int, int]:
    """Return two numbers of bytes: the process's private memory, and its copied index pages.

    The first leaves out the mapping of the index file; the second counts pages of that mapping that
    are no longer the file's but copies.
    """
    own = copied = 0
    in_index = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if not name[0].isupper():  # a mapping begins: addresses, rights, ..., path
            in_index = line.endswith(str(index))
        elif name in ("Private_Clean", "Private_Dirty") and not in_index:
            own += 1024 * int(rest.split()[0])
        elif name == "Anonymous" and in_index:
            copied += 1024 * int(rest.split()[0])
    return own, copied


def test_workers_hold_one_index_and_do_not_grow(tmp_path):
    """A 400 MB index stays in shared pages of the file; many epochs take no more than one."""
    epoch = np.random.RandomState(0).randint(0, 20_000_000, (10, 32))
    shards = made_up_shards(tmp_path, [20_000_000], np.unique(epoch))
    assert shards.index.nbytes == 400_000_000
    dataset = ShardDataset(shards, image_size=16, random_crop=True)
    before, own = set(multiprocessing.active_children()), []
    for number, batch in enumerate(create_loader(dataset, [*epoch] * 11, workers=1)):
        assert batch.bad == []
        if number in (10, 100):  # the worker is at most 4 batches ahead
            (worker,) = set(multiprocessing.active_children()) - before
            private, copied = memory_of(worker.pid, shards.index.filename)
            own.append(private)
            assert copied == 0
    assert 0 < own[0] < 100e6
    # The images read by then are 60 MB. Python's garbage collection in the worker copies pages that
    # it shares with this process, which are more after other tests.
    assert own[1] - own[0] < 30e6


@pytest.mark.parametrize(("workers", "fast"), [(0, False), (2, False), (0, True)])
def test_a_bad_sample_keeps_its_place_with_weight_zero(tmp_path, workers, fast):
    pixels = Image.fromarray(np.load(GOLDEN / "images.npz")["pixels"])
    pixels.save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    samples = [Sample(f"s{i}", i, good if i != 3 else good[:200]) for i in range(6)]
    source = DataSource("made", [str(i) for i in range(6)], {"val": samples})
    convert(source, tmp_path / "data")
    dataset = ShardDataset(open_shards(tmp_path / "data" / "val"), image_size=8, fast=fast)
    positions = ValidationPositions(6, batch=6, rank=0, world_size=1)
    (batch,) = create_loader(dataset, positions, workers=workers)
    assert batch.weights.tolist() == [1, 1, 1, 0, 1, 1]
    assert batch.labels.tolist() == list(range(6))
    assert [(b.position, b.key) for b in batch.bad] == [(3, "000000003_s3")]


def test_a_shard_cut_while_training_is_named(digits, tmp_path):
    shutil.copytree(digits / "val", tmp_path / "val")
    dataset = ShardDataset(open_shards(tmp_path / "val"), image_size=8)
    os.truncate(tmp_path / "val" / "val-000000.tar", 2048)
    with pytest.raises(OSError, match=r"val-000000\.tar.*cut while training"):
        dataset[np.array([300])]


def test_workers_ignore_the_signals_that_stop_a_run(digits):
    before = set(multiprocessing.active_children())
    batches = iter(training_loader(digits / "train", micro=4, last=40, workers=2))
    for _ in range(2):  # one from each worker: both have started
        next(batches)
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker.pid, number)
    for worker in workers:
        worker.join(0.2)
        assert worker.is_alive(), "the loader would replace it, and hide the failure"
    assert len(list(batches)) == 40 * 3 - 2


@pytest.fixture
def frequent_checks(monkeypatch):
    """Let torch check its workers ten times per second, not every 5 s."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Iterator

    monkeypatch.setattr(Iterator._try_get_data, "__defaults__", (0.1,))


def read_with_killings(split, at: dict[int, int]) -> tuple[list, int]:
    """Read all batches; after batch n, kill at[n] of the 2 workers. Return batches and kills."""
    before, killed, got = set(multiprocessing.active_children()), 0, []
    batches = iter(training_loader(split, micro=4, last=30, workers=2))
    for batch in batches:
        got.append((batch.positions.tolist(), batch.images.numpy().tobytes()))
        workers = list(set(multiprocessing.active_children()) - before)
        for worker in workers[: at.get(len(got), 0)]:
            os.kill(worker.pid, signal.SIGKILL)
            killed += 1
    return got, killed


def test_a_killed_worker_loses_no_batch(digits, frequent_checks, capfd):
    """Kill one of two workers, then both, then one when all batches have been requested."""
    expected, _ = read_with_killings(digits / "train", {})
    assert len(expected) == 90
    got, killed = read_with_killings(digits / "train", {5: 1, 40: 2, 85: 1})
    assert killed == 4
    assert got == expected
    said = capfd.readouterr().err
    assert 2 <= said.count("rank 0: a loader worker died (SIGKILL); new workers continue") <= 3


def test_a_worker_hands_over_a_short_message_whatever_the_batch(digits):
    """Longer than PIPE_BUF, a killed worker could leave a part of it, and the rank would wait."""
    dataset = training_loader(digits / "train", last=50).dataset
    positions = np.arange(500)
    slots = _Slots(dataset, [positions], count=2)
    handed_over = pickle.dumps(slots[1, positions])
    assert len(handed_over) < select.PIPE_BUF
    batch, direct = slots.take(*pickle.loads(handed_over)), dataset[positions]
    assert all(torch.equal(a, b) for a, b in zip(batch[:-1], direct[:-1], strict=True))


def test_workers_that_keep_dying_are_an_error(digits, frequent_checks, monkeypatch):
    monkeypatch.setattr(ShardDataset, "__getitem__", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(OSError, match=r"SIGKILL\), 4 times in a row.*--workers \(now 2 per rank\)"):
        list(training_loader(digits / "train", workers=2))


def test_batches_need_no_shared_memory_socket_or_descriptor(digits, tmp_path, monkeypatch):
    """The batches are the same with little of what torch hands over tensors by."""
    expected = [batch.images for batch in training_loader(digits / "train")]
    far = tmp_path / ("far" * 40)  # a socket's path has at most 107 bytes
    far.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(far))
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", None)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        got = [batch.images for batch in training_loader(digits / "train", workers=2)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(got) == 6
    assert all(map(torch.equal, got, expected))


def test_batches_that_are_kept_stay_as_they_were(digits):
    """The memory that workers fill is used again and again; a batch is a copy."""
    loader = training_loader(digits / "train", micro=2, last=20, workers=2)
    kept = list(loader)
    assert len(kept) > 5 * (2 * loader.prefetch + 1)
    for batch in kept:
        again = loader.dataset[batch.positions.numpy()]
        assert torch.equal(batch.images, again.images)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EAGAIN, "ulimit -u"), (errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "/dev/shm")],
)
def test_workers_that_cannot_be_started_are_an_error(digits, monkeypatch, number, advice):
    def refuse():
        raise OSError(number, os.strerror(number))

    before = multiprocessing.active_children()
    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(OSError, match=rf"{os.strerror(number)}.*; do: .*{advice}.*--workers 0"):
        next(iter(training_loader(digits / "train", workers=2)))
    assert multiprocessing.active_children() == before


def test_an_error_in_a_worker_is_raised_without_a_restart(digits, tmp_path):
    shutil.copytree(digits / "val", tmp_path / "val")
    loader = training_loader(tmp_path / "val", workers=1)
    os.truncate(tmp_path / "val" / "val-000000.tar", 2048)
    with pytest.raises(OSError, match=r"val-000000\.tar.*cut while training"):
        list(loader)


def test_the_manifest_says_how_images_are_stored(digits):
    manifest = json.loads((digits / "train" / "manifest.json").read_text())
    assert (manifest["stored"], manifest["samples"]) == ("original", 1437)
    assert len(manifest["fingerprint"]) == 64
