"""Time and memory of the sample order."""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np

from ds_classifier.config import Settings
from ds_classifier.data.order import SampleOrder


def measure(*, repeats: int) -> list[dict]:
    """ImageNet in 1,024 shards, and a billion samples in 200,000."""
    rows = []
    for samples, count in ((1_281_167, 1024), (1_000_000_000, 200_000)):
        sizes = np.diff(np.arange(count + 1) * samples // count)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        open_s, seek_s, batch_s = [], [], []
        for repeat in range(repeats):
            began = time.perf_counter()
            order = SampleOrder(sizes, **Settings(seed=repeat).order_kwargs())
            opened = time.perf_counter()
            order.samples(samples // 2 + np.arange(256))
            sought = time.perf_counter()
            for batch in range(1, 51):
                order.samples(samples // 2 + 256 * batch + np.arange(256))
            open_s.append(opened - began)
            seek_s.append(sought - opened)
            batch_s.append((time.perf_counter() - sought) / 50)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows.append(
            {
                "samples": samples,
                "shards": count,
                "open ms": 1e3 * statistics.median(open_s),
                "seek to mid-epoch ms": 1e3 * statistics.median(seek_s),
                "batch of 256 ms": 1e3 * statistics.median(batch_s),
                "memory MB": (after - before) / 1e3,
            }
        )
    return rows
