"""Scratch files for sources that can only be read in groups, such as the row groups of Parquet."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ds_classifier.common import files
from ds_classifier.data.convert.samples import Sample, Slice
from ds_classifier.distributed.pool import in_processes, shared


def spool_groups(
    samples: list[Sample],
    spool: Path,
    workers: int,
    split: str,
    progress: Callable[[int, int, str], None],
) -> list[Sample]:
    """Return the same samples, each of which can be read alone without reading its group.

    If the samples are not ordered by group, reading them one by one would read every group many
    times. In that case their images are written to files under `spool`, one group after the other.
    The files take as many bytes as the images.
    """
    shutil.rmtree(spool, ignore_errors=True)
    groups: dict[Hashable, list[int]] = {}
    changes, last = 0, None
    for i, sample in enumerate(samples):
        group = getattr(sample.content, "group", None)
        if group is not None:
            groups.setdefault(group, []).append(i)
            changes, last = changes + (group != last), group
    if changes == len(groups):  # each group is one run of samples
        return samples
    spool.mkdir()
    order = [i for group in sorted(groups) for i in groups[group]]
    cuts = np.linspace(0, len(order), workers + 1).astype(int).tolist()
    spooled, done = list(samples), 0
    for first, last, offsets in in_processes(
        workers,
        _spool_range,
        list(itertools.pairwise(cuts)),
        shared=(samples, order, spool),
        ordered=False,
    ):
        path = spool / f"{first}.bytes"
        for i, start, end in zip(order[first:last], offsets, offsets[1:], strict=False):
            spooled[i] = replace(samples[i], content=Slice(path, start, end - start))
        done += last - first
        progress(done, len(order), f"{split}, gathering")
    return spooled


def _spool_range(bounds: tuple[int, int]) -> tuple[int, int, list[int]]:
    """Write the images of order[first:last] to one file.

    Returns first, last, and last - first + 1 offsets: image i has the bytes [i] to [i + 1].
    """
    first, last = bounds
    samples, order, spool = shared()
    offsets = [0]
    path = spool / f"{first}.bytes"
    with open(path, "wb") as file, files.naming(path):
        for i in order[first:last]:
            offsets.append(offsets[-1] + file.write(samples[i].read()))
    return first, last, offsets
