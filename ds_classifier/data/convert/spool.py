"""Images that lie in groups and are wanted in another order, gathered once."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ds_classifier.common import files
from ds_classifier.data.convert.samples import Sample, Slice
from ds_classifier.data.pool import in_processes, shared


def spool_groups(
    samples: list[Sample],
    spool: Path,
    workers: int,
    split: str,
    progress: Callable[[int, int, str], None],
) -> list[Sample]:
    """The same samples, each quick to read alone.

    Images that lie in groups, such as a parquet file's row groups, and are wanted in another
    order are written to files under `spool` once, group by group: as many bytes as they have.
    """
    shutil.rmtree(spool, ignore_errors=True)
    groups: dict[Hashable, list[int]] = {}
    changes, last = 0, None
    for i, sample in enumerate(samples):
        group = getattr(sample.content, "group", None)
        if group is not None:
            groups.setdefault(group, []).append(i)
            changes, last = changes + (group != last), group
    if changes == len(groups):
        return samples
    spool.mkdir()
    wanted = [i for group in sorted(groups) for i in groups[group]]
    cuts = np.linspace(0, len(wanted), workers + 1).astype(int).tolist()
    jobs = list(itertools.pairwise(cuts))
    gathered, done = list(samples), 0
    shared_by_all = (samples, wanted, spool)
    for first, last, ends in in_processes(
        workers, _spool_chunk, jobs, shared=shared_by_all, ordered=False
    ):
        place = spool / f"{first}.bytes"
        for i, start, end in zip(wanted[first:last], ends, ends[1:], strict=False):
            gathered[i] = replace(samples[i], content=Slice(place, start, end - start))
        done += last - first
        progress(done, len(wanted), f"{split}, gathering")
    return gathered


def _spool_chunk(job: tuple[int, int]) -> tuple[int, int, list[int]]:
    """Write some of the wanted images to one file; returns the job, and where each begins."""
    first, last = job
    samples, wanted, spool = shared()
    ends = [0]
    place = spool / f"{first}.bytes"
    with open(place, "wb") as file, files.naming(place):
        for i in wanted[first:last]:
            ends.append(ends[-1] + file.write(samples[i].read()))
    return first, last, ends
