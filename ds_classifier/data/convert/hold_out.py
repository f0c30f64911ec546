"""Hold out a share of the images for validation: `convert --val 10%`.

A hash of an image's bytes decides its side. So the side is the same in any order, on any number of
machines, and when images are added later, and copies of an image are on the same side. A larger
share holds out the images of a smaller one, and more.

An image of more than 16 KiB is hashed by its size and four pieces of 4 KiB: of 1.28 million images
of 110 KB, 21 GB are then read before the conversion, not 141 GB. Images that agree in all of that
are on the same side, which is harmless.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from ds_classifier.common.text import count
from ds_classifier.data.convert.samples import DataSource, Sample
from ds_classifier.distributed.pool import in_processes, shared

SAMPLES_PER_TASK = 256  # hashed by a process between two calls of `progress`
PIECES, PIECE_BYTES = 4, 1 << 12  # of an image that is not hashed whole
_SHARE = re.compile(r"-?[0-9]*\.?[0-9]+ ?%")


def parse_share(text: str) -> float | None:
    """Return the percentage in a text like "10%"; None if it is not one, but a path.

    Raises ValueError for a percentage that is not between 0 and 100.
    """
    if not _SHARE.fullmatch(text):
        return None
    percentage = float(text.rstrip(" %"))
    if not 0 < percentage < 100:
        raise ValueError(
            f"--val: got {text}; need more than 0% and less than 100% of the images, such as 10%"
        )
    return percentage


def hold_out(
    source: DataSource,
    percentage: float,
    *,
    workers: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, phase: None,
) -> DataSource:
    """Return the source with a share of its training images as its validation split.

    percentage: the share, between 0 and 100. Images that cannot be read stay in the training split,
    where the conversion reports them.
    progress: called with the number of images hashed, of all images, and what is being done.
    Raises ValueError if the source has, or had, a validation split, or if a split would be empty.
    """
    share = f"{percentage:.10g}%"
    if "val" in source.splits:
        raise ValueError(
            f"--val: got {share} with {source.name}, which brings its own validation split of "
            f"{count(len(source.splits['val']), 'image')}; do: drop --val to use it, or convert "
            "the training split alone"
        )
    if source.held_out:  # by the same hash, so that the share would be another one
        raise ValueError(
            f"--val: got {share} with {source.name}, of which {source.held_out} were held out "
            "before; do: convert the original images"
        )
    samples = source.splits["train"]
    starts = _task_starts(samples)
    threshold = int(percentage / 100 * 2**64)
    held: list[bool] = []
    tasks = list(zip(starts, [*starts[1:], len(samples)], strict=True))
    for task in in_processes(workers, _hold_task, tasks, shared=(samples, threshold)):
        held += task
        progress(len(held), len(samples), "choosing validation images")
    val = [sample for sample, out in zip(samples, held, strict=True) if out]
    train = [sample for sample, out in zip(samples, held, strict=True) if not out]
    if not val or not train:
        need, other = ("one", "larger") if not val else ("fewer", "smaller")
        raise ValueError(
            f"--val: got {share} of {count(len(samples), 'image')}, which holds out "
            f"{'none' if not val else 'all'}; need {need}; do: hold out a {other} share, or name "
            "a folder of validation images"
        )
    return replace(source, splits={"train": train, "val": val}, held_out=share)


def _task_starts(samples: Sequence[Sample]) -> list[int]:
    """Return where the tasks start: a group of samples that are read together is not divided."""
    starts, last = [0], None
    for i, sample in enumerate(samples):
        group = getattr(sample.content, "group", None)
        if i - starts[-1] >= SAMPLES_PER_TASK and (group is None or group != last):
            starts.append(i)
        last = group
    return starts


def _hold_task(bounds: tuple[int, int]) -> list[bool]:
    samples, threshold = shared()
    return [_is_held(sample, threshold) for sample in samples[slice(*bounds)]]


def _is_held(sample: Sample, threshold: int) -> bool:
    """Return whether an image is held out. threshold: the share of 2^64."""
    try:
        size = sample.size()  # raises OSError for a FIFO, which must not be opened
        if size <= PIECES * PIECE_BYTES:
            pieces = [sample.read()]
        else:
            starts = [i * (size - PIECE_BYTES) // (PIECES - 1) for i in range(PIECES)]
            pieces = sample.pieces(starts, PIECE_BYTES)
    except (OSError, ValueError):
        return False
    digest = hashlib.sha256(size.to_bytes(8, "big"))
    for piece in pieces:
        digest.update(piece)
    return int.from_bytes(digest.digest()[:8], "big") < threshold
