"""What a node's cache must hold in an epoch of ImageNet, by simulation."""

from __future__ import annotations

import statistics

import numpy as np

from ds_classifier.config import Settings
from ds_classifier.data.order import SampleOrder, share_of_rank

IMAGENET = dict(samples=1_281_167, shards=1024, gigabytes=138.0, global_batch=1024)


def measure(*, lanes: list[int], shuffle_shards: list[str], ranks: list[int]) -> list[dict]:
    """A node's shards over an epoch: most read side by side, and how many it downloads.

    Nothing is downloaded: the positions of a node's 8 ranks are followed through the order. Where
    there are several nodes, four of them stand for all.
    """
    samples, count = IMAGENET["samples"], IMAGENET["shards"]
    sizes = np.diff(np.arange(count + 1) * samples // count)
    gigabytes = IMAGENET["gigabytes"] / count
    rows = []
    for lane_count in lanes:
        for blocks in shuffle_shards:
            settings = Settings(lanes=lane_count, shuffle_shards=blocks)
            order = SampleOrder(sizes, **settings.order_kwargs())
            for world_size in ranks:
                nodes = world_size // 8
                some = sorted({node * nodes // 4 for node in range(4)})
                followed = [_follow(order, np.cumsum(sizes), node, nodes) for node in some]
                peak = max(most for most, _ in followed)
                fetched = statistics.mean(visits for _, visits in followed)
                rows.append(
                    {
                        "lanes": lane_count,
                        "shuffle_shards": blocks,
                        "ranks": world_size,
                        "shards side by side": peak,
                        "GB": peak * gigabytes,
                        "GB downloaded a node": fetched * gigabytes,
                        "of the data over nodes": fetched * nodes / count,
                    }
                )
    return rows


def _follow(order, ends: np.ndarray, node: int, nodes: int) -> tuple[int, int]:
    """The most shards a node reads side by side in an epoch, and how often it begins with one.

    ends: [shards] one past each one's last sample. The node has ended with a shard when a tenth of
    an epoch passes without it.
    """
    batch, samples = IMAGENET["global_batch"], IMAGENET["samples"]
    began, last, visits = {}, {}, []
    steps = samples // batch
    for step in range(steps):
        # A node's ranks lie side by side, and so do their shares.
        positions = share_of_rank(order, step, global_batch=batch, rank=node, world_size=nodes)
        read = np.searchsorted(ends, order.samples(positions), side="right")
        for shard in np.unique(read).tolist():
            if shard in last and step - last[shard] > steps // 10:
                visits.append((began.pop(shard), last[shard]))
            began.setdefault(shard, step)
            last[shard] = step
    visits += [(first, last[shard]) for shard, first in began.items()]
    change = np.zeros(steps + 1, dtype=int)
    for first, end in visits:
        change[first] += 1
        change[end + 1] -= 1
    return int(np.cumsum(change).max()), len(visits)
