"""The order of samples: position q of the endless training stream -> sample, without state.

N samples lie in shards; L lanes and blocks of K shards are fixed for a run. With perm(n; ...) a
keyed permutation of range(n):

1. Shard order: perm(shards; seed, epoch). So concatenated, they number the samples v in [0, N).
2. g = q mod N, lane l = g mod L, depth j = g // L. Lane l owns a contiguous run of v, of length
   N // L + (l < N mod L), and reads it from its start. (l, j) <-> g is a bijection: nothing is
   padded, nothing dropped.
3. A block is what K consecutive shards of the shard order hold of a lane; each block is permuted
   within itself: perm(block length; seed, epoch, block).
4. A search in the cumulated shard sizes gives shard and sample.
5. A global batch is dealt to the ranks by lane: rank r of W takes the r-th of W equal shares of its
   positions, sorted by lane.

So every epoch holds each sample exactly once, the global batches do not depend on the number of
ranks, workers or accumulation steps, and a resumed run just starts at its q. A lane walks through
its shards one block after another, and neighbouring ranks read the same lanes: a node has few
shards open at a time, and many nodes share the shards out instead of each reading most of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ds_classifier.common.keyed_random import fold, permutation, stream_key

OPEN_LIMIT = 2**27  # samples in the open blocks; with the next blocks, 1 GB per process


class _Blocks(NamedTuple):
    """The blocks in which positions of one epoch lie: [n] int64 each."""

    place: np.ndarray  # v before the block is permuted
    start: np.ndarray  # v of the block's first sample
    end: np.ndarray  # v of the block's last sample, plus one


class SampleOrder:
    """Maps positions of the training stream to samples, numbered shard after shard.

    shard_samples: number of samples in each shard, in the manifest's order.
    seed: the seed of the run.
    lanes: L above; lowered to the number of shards.
    shuffle_shards: K above; None for one block per lane. A larger K mixes more samples, and has
        more shards open at a time.
    Raises ValueError if the open blocks would hold more than OPEN_LIMIT samples.
    """

    def __init__(
        self, shard_samples: Sequence[int], *, seed: int, lanes: int, shuffle_shards: int | None
    ):
        sizes = np.asarray(shard_samples, dtype=np.int64)
        if sizes.ndim != 1 or len(sizes) == 0 or sizes.min() < 1:
            raise ValueError("shard_samples: need at least one shard, and a sample in each")
        if lanes < 1 or (shuffle_shards is not None and shuffle_shards < 1):
            raise ValueError(
                f"lanes, shuffle_shards: got {lanes}, {shuffle_shards}; need 1 or more"
            )
        self.num_samples = int(sizes.sum())
        self.lanes = min(lanes, len(sizes))
        lane_length = -(-self.num_samples // self.lanes)
        self._block_shards = len(sizes) if shuffle_shards is None else shuffle_shards
        # Upper limit for the number of samples in the open blocks.
        self.open_samples = self.lanes * min(self._block_shards * int(sizes.max()), lane_length)
        if self.open_samples > OPEN_LIMIT:
            raise ValueError(
                f"lanes, shuffle_shards: got {self.lanes} lanes with {self.open_samples:,} samples "
                f"in their open blocks; need at most {OPEN_LIMIT:,}; do: lower one of them"
            )
        self._sizes = sizes
        self._first = np.cumsum(sizes) - sizes  # [shards] number of each shard's first sample
        self._shard_key = stream_key(seed, "order/shards")
        self._block_key = stream_key(seed, "order/blocks")
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Map positions q, [n] int64, to sample numbers, [n] int64, in manifest order from 0."""
        positions = np.asarray(positions, dtype=np.int64)
        samples = np.empty_like(positions)
        for epoch, here, blocks in self._located(positions):
            v = blocks.place.copy()
            starts, which = np.unique(blocks.start, return_inverse=True)
            for i, start in enumerate(starts.tolist()):
                inside = which == i
                length = int(blocks.end[inside][0]) - start
                v[inside] = start + self._permutation(epoch, start, length)[v[inside] - start]
            order, ends = self._shard_order(epoch)
            at = np.searchsorted(ends, v, side="right")
            shard = order[at]
            samples[here] = self._first[shard] + v - (ends[at] - self._sizes[shard])
        return samples

    def lane(self, positions: np.ndarray) -> np.ndarray:
        """Return the lane of each position, [n] int64."""
        return positions % self.num_samples % self.lanes

    def open_shards(self, positions: np.ndarray) -> list[int]:
        """Return the shards that these positions may read, in the order of their first use."""
        shards: dict[int, None] = {}
        for epoch, _, blocks in self._located(np.asarray(positions, dtype=np.int64)):
            order, ends = self._shard_order(epoch)
            _, first = np.unique(blocks.start, return_index=True)
            for i in np.sort(first).tolist():
                at = np.searchsorted(ends, blocks.start[i], side="right")
                until = np.searchsorted(ends, blocks.end[i] - 1, side="right")
                shards |= dict.fromkeys(order[at : until + 1].tolist())
        return list(shards)

    def _located(self, positions: np.ndarray):
        """Yield for each epoch its number, the mask of its positions, and their blocks."""
        epochs = positions // self.num_samples
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            yield epoch, here, self._blocks(epoch, positions[here] % self.num_samples)

    def _blocks(self, epoch: int, g: np.ndarray) -> _Blocks:
        """Find the blocks of positions g within an epoch."""
        lane = g % self.lanes
        lane_start, lane_end = self._lane_start(lane), self._lane_start(lane + 1)
        place = lane_start + g // self.lanes
        _, ends = self._shard_order(epoch)
        first = np.searchsorted(ends, place, side="right") // self._block_shards
        first *= self._block_shards  # place of the block's first shard in the shard order
        last = np.minimum(first + self._block_shards, len(ends)) - 1
        begins = np.where(first > 0, ends[first - 1], 0)
        return _Blocks(place, np.maximum(begins, lane_start), np.minimum(ends[last], lane_end))

    def _lane_start(self, lane):
        """Return v of a lane's first sample."""
        base, extra = divmod(self.num_samples, self.lanes)
        return lane * base + np.minimum(lane, extra)

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's shard numbers in order, and v of the end of each, both [shards]."""

        def make():
            order = permutation(len(self._sizes), fold(self._shard_key, epoch))
            return order, np.cumsum(self._sizes[order])

        return _remembered(self._epochs, epoch, make, limit=2)

    def _permutation(self, epoch: int, start: int, length: int) -> np.ndarray:
        """Return the permutation of the block that begins at v = start, [length] int32."""

        def make():
            key = fold(fold(self._block_key, epoch), start)
            return permutation(length, key).astype(np.int32)

        # A batch that crosses a block's or an epoch's edge needs two blocks of each lane.
        return _remembered(self._permutations, (epoch, start), make, limit=2 * self.lanes)


def _remembered(cache: OrderedDict, key, make, *, limit: int):
    """Return cache[key], made if it is not there; keep the `limit` entries used last."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def share_of_rank(
    order: SampleOrder, step: int, *, global_batch: int, rank: int, world_size: int
) -> np.ndarray:
    """Return the positions that a rank trains on in a step, [global_batch / world_size] int64."""
    positions = step * global_batch + np.arange(global_batch, dtype=np.int64)
    by_lane = positions[np.argsort(order.lane(positions), kind="stable")]
    share = global_batch // world_size
    return by_lane[rank * share : (rank + 1) * share]


def node_shards(
    order: SampleOrder, step: int, *, global_batch: int, ranks: range, world_size: int
) -> list[int]:
    """Return the shards that the ranks of a node have open together around a step."""
    steps = range(step, step + -(-order.lanes // global_batch))  # until every lane was read
    shape = dict(global_batch=global_batch, world_size=world_size)
    shares = [share_of_rank(order, s, rank=rank, **shape) for s in steps for rank in ranks]
    return order.open_shards(np.concatenate(shares))
