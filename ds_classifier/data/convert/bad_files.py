"""Files that cannot be stored as images: found by size and first bytes, listed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ds_classifier.data.convert.samples import Sample
from ds_classifier.data.pool import in_processes, shared

BadFile = tuple[str, str]  # a sample's name, and what is wrong with it

MAX_IMAGE_BYTES = 1 << 29  # bytes; as many as images.MAX_PIXELS have, unpacked, four channels deep
MAX_LISTED = 20  # files of a split that are told of
SAMPLES_PER_TASK = 256  # by a process, until it says so
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n": "png", b"GIF8": "gif", b"BM": "bmp"}


def read_image(sample: Sample) -> tuple[bytes, str]:
    """A sample's bytes, and its suffix by content: a PNG named .JPEG is stored as .png.

    Raises ValueError where they cannot be read, or begin like no image.
    """
    try:
        data = sample.read()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    for signature, suffix in _SIGNATURES.items():
        if data.startswith(signature):
            return data, suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return data, "webp"
    raise ValueError(f"got {data[:8]!r}..., which no image format begins with")


def find_bad(samples: Sequence[Sample]) -> list[BadFile]:
    """Those that are no images; reads them all."""
    bad = []
    for sample in samples:
        try:
            read_image(sample)
        except ValueError as error:
            bad.append((sample.name, str(error)))
    return bad


def find_bad_parallel(
    samples: Sequence[Sample], workers: int, progress: Callable[[int, int], None]
) -> list[BadFile]:
    """As `find_bad`, by several processes. progress: called with samples seen and in all."""
    jobs = range(0, len(samples), SAMPLES_PER_TASK)
    bad, done = [], 0
    for found in in_processes(workers, _find_bad_chunk, jobs, shared=samples):
        bad += found
        done = min(done + SAMPLES_PER_TASK, len(samples))
        progress(done, len(samples))
    return bad


def _find_bad_chunk(first: int) -> list[BadFile]:
    return find_bad(shared()[first : first + SAMPLES_PER_TASK])


def split_off_unreadable(samples: Sequence[Sample]) -> tuple[list[Sample], list[BadFile]]:
    """Those that may be opened; and those that are not there, no files, or too large, unopened."""
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


def raise_if_bad(bad: dict[str, list[BadFile]], out: Path, part: tuple[int, int]) -> None:
    """ValueError with the first bad files of every split; a file a split lists them all."""
    suffix = "bad.txt" if part[1] == 1 else f"bad-{part[0]}.txt"
    listings = {split: out / f"{split}.{suffix}" for split in bad}
    for listing in listings.values():
        listing.unlink(missing_ok=True)
    bad = {split: sorted(found) for split, found in bad.items() if found}
    if not bad:
        return
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for split, found in bad.items():
        names = "".join(f"{name}\n" for name, _ in found)
        listings[split].write_text(names, errors="surrogateescape")
        head = f"{split}: " if len(bad) > 1 else ""
        lines += [f"{head}{name}: {problem}" for name, problem in found[:MAX_LISTED]]
        if len(found) > MAX_LISTED:
            lines.append(f"{head}... and {len(found) - MAX_LISTED:,} more")
    count = sum(map(len, bad.values()))
    each = ", ".join(f"{len(found):,} of {split}" for split, found in bad.items())
    text = (
        ("1 file" if count == 1 else f"{count:,} files")
        + " that cannot be stored"
        + (f" ({each})" if len(bad) > 1 else "")
        + "; need whole JPEG, PNG, WebP, GIF or BMP images; do: remove or replace those in "
        + " and ".join(str(listings[split]) for split in bad)
        + ", and remove "
        + " and ".join(f"{out / split}.partial" for split in bad)
        + (" if it is there" if len(bad) == 1 else " if they are there")
    )
    raise ValueError(f"got {text}:\n  " + "\n  ".join(lines))
