"""The sample order is a permutation, independent of ranks and batches, and never changes."""

import io
import itertools
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from running import ROOT, environment

from ds_classifier.common.keyed_random import fold, permutation, stream_key
from ds_classifier.data.loader import ShardDataset, TrainingPositions, create_loader
from ds_classifier.data.order import OPEN_LIMIT, SampleOrder, node_shards, share_of_rank
from ds_classifier.data.shards import INDEX_DTYPE, Manifest, Shard, ShardSet

settings.register_profile("of any duration", deadline=None)  # other jobs may keep the cores busy
settings.load_profile("of any duration")

layouts = st.fixed_dictionaries(
    {
        "shard_samples": st.lists(st.integers(1, 30), min_size=1, max_size=12),
        "seed": st.integers(0, 2**40),
        "lanes": st.integers(1, 15),
        "shuffle_shards": st.none() | st.integers(1, 14),
    }
)


def by_hand(shard_samples, seed, lanes, shuffle_shards, epoch):
    """Compute an epoch's order by the five steps of order.py, with lists."""
    names = [[(s, i) for i in range(n)] for s, n in enumerate(shard_samples)]
    order = permutation(len(names), fold(stream_key(seed, "order/shards"), epoch))
    stream = [(place, name) for place, s in enumerate(order) for name in names[s]]
    lanes = min(lanes, len(names))
    length, extra = divmod(len(stream), lanes)
    read, start = [], 0
    for lane in range(lanes):
        end = start + length + (lane < extra)
        mine = []
        for _, block in itertools.groupby(
            range(start, end), lambda v: stream[v][0] // (shuffle_shards or len(names))
        ):
            block = list(block)
            key = fold(fold(stream_key(seed, "order/blocks"), epoch), block[0])
            mine += [stream[block[i]][1] for i in permutation(len(block), key)]
        read.append(mine)
        start = end
    first = np.cumsum([0, *shard_samples])
    turns = itertools.zip_longest(*read)
    return [int(first[name[0]]) + name[1] for turn in turns for name in turn if name]


@given(layout=layouts, epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(layout, epoch):
    order = SampleOrder(**layout)
    n = order.num_samples
    samples = order.samples(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(samples.tolist()) == list(range(n))


@given(layout=layouts, epoch=st.integers(0, 5))
def test_the_five_steps_by_hand(layout, epoch):
    order = SampleOrder(**layout)
    positions = epoch * order.num_samples + np.arange(order.num_samples)
    assert order.samples(positions).tolist() == by_hand(**layout, epoch=epoch)


@given(layout=layouts, start=st.integers(0, 10**5), length=st.integers(1, 80))
def test_any_position_can_be_asked_for_alone(layout, start, length):
    """Resuming at q gives the suffix of the uninterrupted stream, across epochs too."""
    stream = SampleOrder(**layout).samples(np.arange(start, start + length))
    fresh = SampleOrder(**layout)
    backwards = [
        int(fresh.samples(np.array([q]))[0]) for q in range(start + length - 1, start - 1, -1)
    ]
    assert backwards[::-1] == stream.tolist()


@given(
    layout=layouts,
    share=st.integers(1, 12),
    world_size=st.integers(1, 6),
    step=st.integers(0, 1000),
)
def test_ranks_share_out_the_global_batch_by_lane(layout, share, world_size, step):
    order, total = SampleOrder(**layout), share * world_size
    shares = [
        share_of_rank(order, step, global_batch=total, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert {len(positions) for positions in shares} == {share}
    dealt = np.concatenate(shares)
    assert sorted(dealt.tolist()) == list(range(step * total, (step + 1) * total))
    assert (np.diff(order.lane(dealt)) >= 0).all()


def shards_of(folder, shard_samples):
    """Make a split with the given samples per shard; a sample's label is its number."""
    image = io.BytesIO()
    Image.new("L", (1, 1)).save(image, format="PNG")
    shards, rows = [], []
    for number, samples in enumerate(shard_samples):
        (folder / f"{number}.tar").write_bytes(image.getvalue() * samples)
        length = len(image.getvalue())
        shards.append(Shard(f"{number}.tar", samples, samples * length, ""))
        rows += [(i * length, length, len(rows) + i, number) for i in range(samples)]
    facts = dict(split="", source="", plan="", classes=[], stored="original", image_size=None)
    facts |= dict(samples=len(rows), form="", undecodable=[], shards=shards, index_sha256="")
    return ShardSet(folder, Manifest(**facts), np.array(rows, dtype=INDEX_DTYPE))


def loaded(shards, order, cut, steps, workers):
    """Return position -> sample of all ranks' batches in these steps, read by the loader."""
    found = {}
    micro, accumulation, world_size = cut
    shape = dict(global_batch=micro * accumulation * world_size, micro_batch=micro)
    for rank in range(world_size):
        positions = TrainingPositions(
            order,
            first_step=steps[0],
            steps=steps[-1] + 1,
            rank=rank,
            world_size=world_size,
            **shape,
        )
        dataset = ShardDataset(shards, image_size=1, channels=1, order=order)
        batches = list(create_loader(dataset, positions, workers=workers))
        assert [len(batch.labels) for batch in batches] == [micro] * (len(steps) * accumulation)
        for batch in batches:
            assert batch.weights.tolist() == [1.0] * micro
            new = dict(zip(batch.positions.tolist(), batch.labels.tolist(), strict=True))
            assert not new.keys() & found.keys()
            found |= new
    return found


def check_loaded(layout, cuts, begins, first_step, workers):
    """Check that any cut of the global batch, from any step on, reads the order by hand."""
    total = math.prod(cuts[0])
    steps = range(first_step, first_step + 4)
    order = SampleOrder(**layout)
    last = (steps[-1] + 1) * total - 1
    epochs = range(steps[0] * total // order.num_samples, last // order.num_samples + 1)
    stream = [sample for epoch in epochs for sample in by_hand(**layout, epoch=epoch)]
    with tempfile.TemporaryDirectory() as folder:
        shards = shards_of(Path(folder), layout["shard_samples"])
        for cut, begin in zip(cuts, begins, strict=True):
            found = loaded(shards, order, cut, steps[begin:], workers)
            wanted = range(steps[begin] * total, (steps[-1] + 1) * total)
            start = epochs[0] * order.num_samples
            assert found == {q: stream[q - start] for q in wanted}


@st.composite
def two_cuts(draw):
    """Draw two ways to cut one global batch: (micro-batch, accumulation, ranks)."""
    total = draw(st.integers(1, 16))
    divisors = [
        (micro, total // micro // ranks, ranks)
        for micro in range(1, total + 1)
        for ranks in range(1, 5)
        if total % (micro * ranks) == 0
    ]
    return draw(st.sampled_from(divisors)), draw(st.sampled_from(divisors))


resumed = dict(layout=layouts, cuts=two_cuts(), begin=st.integers(0, 3), first=st.integers(0, 60))


@settings(max_examples=40)
@given(**resumed)
def test_the_loader_reads_the_same_stream_for_any_cut_and_resume(layout, cuts, begin, first):
    check_loaded(layout, cuts, (0, begin), first, workers=0)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@settings(max_examples=2)
@given(**resumed)
def test_workers_read_the_same_stream_for_any_cut_and_resume(workers, layout, cuts, begin, first):
    check_loaded(layout, cuts, (0, begin), first, workers)


@given(layout=layouts, start=st.integers(0, 1000), length=st.integers(1, 300))
def test_open_shards_are_those_that_may_be_read(layout, start, length):
    order = SampleOrder(**layout)
    positions = np.arange(start, start + length)
    ends = np.cumsum(layout["shard_samples"])
    read = np.searchsorted(ends, order.samples(positions), side="right").tolist()
    announced = order.open_shards(positions)
    assert len(set(announced)) == len(announced)
    assert set(read) <= set(announced)
    if layout["shuffle_shards"] == 1:  # then a block is in one shard, and all of them are read
        assert announced == list(dict.fromkeys(read))


@pytest.mark.parametrize(("nodes", "open_lanes"), [(1, 16), (2, 8), (16, 1), (32, 1)])
def test_the_shards_are_divided_among_the_nodes(nodes, open_lanes):
    """A node of 4 ranks has one open shard per lane, and fetches few shards twice."""
    order = SampleOrder([50] * 128, seed=3, lanes=16, shuffle_shards=1)
    world_size = 4 * nodes
    shape = dict(global_batch=world_size, world_size=world_size)
    fetched, most = 0, 0
    for node in range(nodes):
        ranks, last = range(4 * node, 4 * node + 4), set()
        for step in range(order.num_samples // world_size):
            shares = [share_of_rank(order, step, rank=r, **shape) for r in ranks]
            read = set((order.samples(np.concatenate(shares)) // 50).tolist())
            window = set(node_shards(order, step, ranks=ranks, **shape))
            assert read <= window
            fetched += len(window - last)
            most, last = max(most, len(window)), window
    assert most <= 2 * open_lanes + 1  # two shards at an edge between them
    if nodes <= 16:
        assert fetched <= 1.1 * 128
    else:
        assert fetched <= 2.2 * 128  # two nodes read each lane


def test_epochs_and_seeds_differ():
    first = SampleOrder([50, 50], seed=0, lanes=4, shuffle_shards=1)
    epochs = first.samples(np.arange(300)).reshape(3, 100)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    other = SampleOrder([50, 50], seed=1, lanes=4, shuffle_shards=1)
    assert other.samples(np.arange(100)).tolist() != epochs[0].tolist()


GOLDEN_ORDER = """
import hashlib, numpy as np
from ds_classifier.data.order import SampleOrder
order = SampleOrder([300, 17, 1, 682], seed=11, lanes=3, shuffle_shards=2)
print(hashlib.sha256(order.samples(np.arange(2500)).astype("<i8").tobytes()).hexdigest())
"""


def test_the_order_never_changes():
    """A change of this hash would make every saved run continue with other data."""
    expected = "503310ce968df858f836d9a07c68a4244b0c021b4d4c72d5c00238ea0d794ac4"
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", GOLDEN_ORDER],
            cwd=ROOT,
            env=environment(PYTHONHASHSEED=hash_seed),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


def test_a_lane_walks_through_its_shards_one_after_another():
    """Few shards are read at a time: lane 0's samples stay within its part of the shard order."""
    order = SampleOrder([100] * 10, seed=0, lanes=5, shuffle_shards=1)
    lane_0 = order.samples(np.arange(0, 1000, 5))  # 200 samples: two shards
    shards = lane_0 // 100
    assert len(set(shards.tolist())) == 2
    assert (np.diff(shards) != 0).sum() == 1  # the second begins after the first ends


@pytest.mark.parametrize("shuffle_shards", [1, 4, None])
@pytest.mark.parametrize("sort", [True, False])
def test_neighbours_share_a_class_no_more_often_than_at_random(shuffle_shards, sort):
    """The shards may be sorted by class or shuffled. One order is luck, the mean of many is not."""
    n, classes, seeds = 16000, 100, 16
    labels = np.repeat(np.arange(classes), n // classes)
    same_class = []
    for seed in range(seeds):
        order = SampleOrder([125] * 128, seed=seed, lanes=64, shuffle_shards=shuffle_shards)
        shown = labels if sort else np.random.RandomState(seed).permutation(labels)
        stream = shown[order.samples(np.arange(n))]
        same_class.append((stream[1:] == stream[:-1]).mean())
    # Lanes read side by side lie in different shards: neighbours then share a class less often.
    assert np.mean(same_class) < 1 / classes + 4 * np.sqrt(1 / classes / n / seeds)


def distinct_classes(shuffle_shards: int | None, seed: int) -> float:
    """Return the share of classes in the first 64 batches of 64, for shards sorted by class."""
    n, classes = 64 * 1024, 256
    labels = np.repeat(np.arange(classes), n // classes)
    order = SampleOrder([128] * 512, seed=seed, lanes=64, shuffle_shards=shuffle_shards)
    stream = labels[order.samples(np.arange(64 * 64))]
    return len(set(stream.tolist())) / classes


def test_mixing_whole_lanes_brings_every_class_early():
    """The first sixteenth of an epoch has as many classes as at random, for sorted shards."""
    chance = 1 - (1 - 1 / 256) ** (64 * 64)
    assert distinct_classes(None, seed=0) == pytest.approx(chance, abs=0.02)
    assert distinct_classes(1, seed=0) < 0.5


def test_blocks_that_do_not_fit_in_memory_are_refused():
    with pytest.raises(ValueError, match="lower one of them"):
        SampleOrder([OPEN_LIMIT // 4] * 5, seed=0, lanes=2, shuffle_shards=None)
    SampleOrder([OPEN_LIMIT // 4] * 5, seed=0, lanes=2, shuffle_shards=1)
