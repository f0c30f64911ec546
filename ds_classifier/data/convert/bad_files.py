"""Files that are not images: found by their size and first bytes, and listed in one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ds_classifier.common.text import count
from ds_classifier.data.arrays import MAGIC, Arrays
from ds_classifier.data.convert.formats import (
    READ_FORMATS,
    array_as_member,
    as_png,
    stored_suffix,
)
from ds_classifier.data.convert.samples import Sample
from ds_classifier.distributed.pool import in_processes, shared

BadFile = tuple[str, str]  # the name of a sample, and what is wrong with it

MAX_IMAGE_BYTES = 1 << 29  # an uncompressed image of images.MAX_PIXELS with four channels
MAX_LISTED = 20  # files per split in the error message; the .bad.txt lists all of them
SAMPLES_PER_TASK = 256  # read by a process between two calls of `progress`


def read_image(sample: Sample, arrays: Arrays | None = None) -> tuple[bytes, str]:
    """Return the bytes to store of a sample, and the suffix for their format ("jpg", "png" ...).

    arrays: what the samples have in common if they are arrays, see `formats.array_as_member`.

    The format is read from the first bytes, not from the name: a PNG named .JPEG becomes .png.
    Images in formats that shards do not hold are converted to PNG, see `formats.as_png`.
    Raises ValueError if the bytes cannot be read, or are not an image in a format that is read.
    """
    try:
        data = sample.read()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if arrays is not None or data.startswith(MAGIC):
        return array_as_member(data, arrays)
    suffix = stored_suffix(data)
    return (data, suffix) if suffix else (as_png(data, sample.name), "png")


def find_bad(samples: Sequence[Sample], arrays: Arrays | None = None) -> list[BadFile]:
    """Read all samples, and return those that are not images."""
    bad = []
    for sample in samples:
        try:
            read_image(sample, arrays)
        except ValueError as error:
            bad.append((sample.name, str(error)))
    return bad


def find_bad_parallel(
    samples: Sequence[Sample],
    workers: int,
    progress: Callable[[int, int], None],
    arrays: Arrays | None = None,
) -> list[BadFile]:
    """Return the same as `find_bad`, with several processes.

    progress: called with the number of samples read, and the number of all samples.
    """
    starts = range(0, len(samples), SAMPLES_PER_TASK)
    bad, done = [], 0
    for bad_in_task in in_processes(workers, _find_bad_task, starts, shared=(samples, arrays)):
        bad += bad_in_task
        done = min(done + SAMPLES_PER_TASK, len(samples))
        progress(done, len(samples))
    return bad


def _find_bad_task(start: int) -> list[BadFile]:
    samples, arrays = shared()
    return find_bad(samples[start : start + SAMPLES_PER_TASK], arrays)


def split_off_unreadable(samples: Sequence[Sample]) -> tuple[list[Sample], list[BadFile]]:
    """Return the samples that are safe to open, and the others with the reason; open none of them.

    The others are missing, no regular files, or larger than MAX_IMAGE_BYTES.
    """
    good, bad = [], []
    for sample in samples:
        try:
            size = sample.size()
        except OSError as error:
            bad.append((sample.name, f"cannot be read ({error.strerror})"))
            continue
        if size > MAX_IMAGE_BYTES:
            bad.append((sample.name, f"got {size} bytes; need at most {MAX_IMAGE_BYTES}"))
        else:
            good.append(sample)
    return good, bad


def raise_if_bad(
    bad: dict[str, list[BadFile]], out: Path, part: tuple[int, int], arrays: Arrays | None = None
) -> None:
    """Raise ValueError with the first bad files of every split, if there are any.

    All bad files of a split are written to out/SPLIT.bad.txt, or bad-I.txt for part (I, N).
    """
    suffix = "bad.txt" if part[1] == 1 else f"bad-{part[0]}.txt"
    listings = {split: out / f"{split}.{suffix}" for split in bad}
    for listing in listings.values():
        listing.unlink(missing_ok=True)
    bad = {split: sorted(files) for split, files in bad.items() if files}
    if not bad:
        return
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for split, files in bad.items():
        names = "".join(f"{name}\n" for name, _ in files)
        listings[split].write_text(names, errors="surrogateescape", encoding="utf-8")
        head = f"{split}: " if len(bad) > 1 else ""
        lines += [f"{head}{name}: {problem}" for name, problem in files[:MAX_LISTED]]
        if len(files) > MAX_LISTED:
            lines.append(f"{head}... and {len(files) - MAX_LISTED:,} more")
    needed = f"images ({READ_FORMATS})"
    if arrays is not None:
        needed = f"arrays of {arrays} with finite values"
    per_split = ", ".join(f"{len(files):,} of {split}" for split, files in bad.items())
    text = (
        count(sum(map(len, bad.values())), "file")
        + " that cannot be stored"
        + (f" ({per_split})" if len(bad) > 1 else "")
        + f"; need whole {needed}; do: remove or replace the files in "
        + " and ".join(str(listings[split]) for split in bad)
        + ", and remove "
        + " and ".join(f"{out / split}.partial" for split in bad)
        + " if it exists"
    )
    raise ValueError(f"got {text}:\n  " + "\n  ".join(lines))
