"""Which sample stands at position q of the endless training stream: a pure function, no state.

N samples lie in shards; L lanes and blocks of K are fixed for a run. With perm(n; ...) a keyed
permutation of range(n):

1. Shard order: perm(shards; seed, epoch). So concatenated, they number the samples v in [0, N).
2. g = q mod N, lane l = g mod L, depth j = g // L. Lane l owns a contiguous run of v, of length
   N // L + (l < N mod L). (l, j) <-> g is a bijection: nothing is padded, nothing dropped.
3. Block k = j // K of the lane is permuted within itself: perm(block length; seed, epoch, l, k).
4. A search in the cumulated shard sizes gives shard and sample.
5. Rank r of W takes the positions of a global batch with q mod W == r, cut into micro-batches.

So every epoch holds each sample exactly once, the global batches do not depend on the number of
ranks, workers or accumulation steps, and a resumed run just starts at its q. A node reads from few
shards at a time, since a lane walks through its shards one after another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ds_classifier.keyed_random import fold, permutation, stream_key


class SampleOrder:
    """Maps positions of the training stream to samples, numbered shard after shard.

    shard_samples: samples in each shard, in the manifest's order. seed: of the run.
    lanes, block: L and K above, in samples; larger ones mix more and touch more shards at a time.
    """

    def __init__(self, shard_samples: Sequence[int], *, seed: int, lanes: int, block: int):
        sizes = np.asarray(shard_samples, dtype=np.int64)
        if sizes.ndim != 1 or len(sizes) == 0 or sizes.min() < 1:
            raise ValueError("shard_samples: need at least one shard, and a sample in each")
        if lanes < 1 or block < 1:
            raise ValueError(f"lanes, block: got {lanes}, {block}; need at least 1 each")
        self.num_samples = int(sizes.sum())
        self.lanes, self.block = min(lanes, self.num_samples), block
        self._sizes = sizes
        self._first = np.cumsum(sizes) - sizes  # [shards] sample number of each shard's first
        self._shard_key = stream_key(seed, "order/shards")
        self._block_key = stream_key(seed, "order/blocks")
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """positions q [n] int64 -> sample numbers [n] int64, in manifest order from 0."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs = positions // self.num_samples
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._samples_of_epoch(int(epoch), positions[here] % self.num_samples)
        return samples

    def _samples_of_epoch(self, epoch: int, g: np.ndarray) -> np.ndarray:
        lane, depth = g % self.lanes, g // self.lanes
        block, within = depth // self.block, depth % self.block
        v = self._lane_start(lane) + block * self.block
        pairs, which = np.unique(np.stack([lane, block], axis=1), axis=0, return_inverse=True)
        which = which.reshape(-1)
        for i, (one_lane, one_block) in enumerate(pairs.tolist()):
            here = which == i
            v[here] += self._block_permutation(epoch, one_lane, one_block)[within[here]]
        order, ends = self._shard_order(epoch)
        at = np.searchsorted(ends, v, side="right")
        shard = order[at]
        return self._first[shard] + v - (ends[at] - self._sizes[shard])

    def _lane_start(self, lane):
        base, extra = divmod(self.num_samples, self.lanes)
        return lane * base + np.minimum(lane, extra)

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard numbers in order, and where each ends among the samples v."""

        def make():
            order = permutation(len(self._sizes), fold(self._shard_key, epoch))
            return order, np.cumsum(self._sizes[order])

        return _remembered(self._epochs, epoch, make, limit=2)

    def _block_permutation(self, epoch: int, lane: int, block: int) -> np.ndarray:
        def make():
            lane_length = self.num_samples // self.lanes + (lane < self.num_samples % self.lanes)
            length = min(self.block, lane_length - block * self.block)
            return permutation(length, fold(fold(fold(self._block_key, epoch), lane), block))

        # A batch that crosses a block's or an epoch's edge needs two blocks of each lane.
        return _remembered(self._blocks, (epoch, lane, block), make, limit=2 * self.lanes)


def _remembered(cache: OrderedDict, key, make, *, limit: int):
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def micro_batch_positions(
    *,
    step: int,
    micro_step: int,
    micro_batch: int,
    global_batch: int,
    rank: int,
    world_size: int,
) -> np.ndarray:
    """Positions [micro_batch] int64 of one rank in one micro-step."""
    first = step * global_batch + micro_step * micro_batch * world_size
    return first + rank + world_size * np.arange(micro_batch, dtype=np.int64)
