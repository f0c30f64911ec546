"""Files that cannot be stored as pictures: found by size and first bytes, listed together."""

from __future__ import annotations

from pathlib import Path

from ds_classifier.data.samples import Sample

LARGEST_PICTURE = 1 << 29  # bytes; as many as images.MAX_PIXELS have, unpacked, four channels deep
MOST_BAD = 20  # files told of
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n": "png", b"GIF8": "gif", b"BM": "bmp"}


def picture_of(sample: Sample) -> tuple[bytes, str]:
    """A sample's bytes, and its suffix by content: a PNG named .JPEG is stored as .png.

    Raises ValueError where they cannot be read, or begin like no picture.
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
    raise ValueError(f"got {data[:8]!r}..., which no picture format begins with")


def bad_among(samples: list[Sample]) -> list[tuple[str, str]]:
    """(name, what is wrong) of those that are no pictures."""
    bad = []
    for sample in samples:
        try:
            picture_of(sample)
        except ValueError as error:
            bad.append((sample.name, str(error)))
    return bad


def too_large(samples: list[Sample]) -> list[tuple[str, str]]:
    sizes = ((sample.name, sample.size()) for sample in samples)
    need = f"need at most {LARGEST_PICTURE}"
    return [(name, f"got {size} bytes; {need}") for name, size in sizes if size > LARGEST_PICTURE]


def refuse_bad(bad: list[tuple[str, str]], out: Path, split: str, part: tuple[int, int]) -> None:
    """ValueError that lists the first of the files that are no pictures; a file lists them all."""
    listing = out / (f"{split}.bad.txt" if part[1] == 1 else f"{split}.bad-{part[0]}.txt")
    listing.unlink(missing_ok=True)
    if not bad:
        return
    bad = sorted(bad)
    out.mkdir(parents=True, exist_ok=True)
    names = "".join(f"{name}\n" for name, _ in bad)
    listing.write_text(names, errors="surrogateescape")
    lines = [f"{name}: {problem}" for name, problem in bad[:MOST_BAD]]
    if len(bad) > MOST_BAD:
        lines.append(f"... and {len(bad) - MOST_BAD:,} more")
    files = "1 file" if len(bad) == 1 else f"{len(bad):,} files"
    text = (
        f"{files} that cannot be stored; need whole JPEG, PNG, WebP, GIF or BMP pictures; do: "
        f"remove or replace those in {listing}, and remove {out / split}.partial if it is there"
    )
    raise ValueError(f"got {text}:\n  " + "\n  ".join(lines))
