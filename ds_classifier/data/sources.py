"""What people have on disk -> samples (name, picture bytes, class)."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
DIGITS = "digits"
DIGITS_HELD_OUT = 360  # the last pictures of scikit-learn's digits: other writers than the first


@dataclass(frozen=True)
class Sample:
    """One labelled picture. name: where it came from; content: its file, or its bytes."""

    name: str
    label: int
    content: Path | bytes

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def size(self) -> int:
        """Bytes of the picture, without reading it."""
        return (
            len(self.content) if isinstance(self.content, bytes) else os.stat(self.content).st_size
        )


@dataclass(frozen=True)
class Source:
    """classes: names, label i is classes[i]. splits: "train" and perhaps "val" -> samples."""

    name: str
    classes: list[str]
    splits: dict[str, list[Sample]]


def open_source(source: str, val: str | None = None) -> Source:
    """`digits`, or an image folder with perhaps a second one for validation.

    Raises ValueError where there is nothing to convert or the classes do not fit together.
    """
    if source == DIGITS and not Path(source).exists():
        if val is not None:
            raise ValueError(
                f"--val: got {val!r}; need nothing: digits brings its own validation split"
            )
        return digits()
    return image_folder(Path(source), Path(val) if val else None)


def image_folder(train: Path, val: Path | None = None) -> Source:
    """Pictures in directories, one a class; or side by side, the class before the first underscore.

    Train and validation share one class list, the sorted names of the training classes.
    """
    named = {"train": _labelled_files(train)}
    if val is not None:
        named["val"] = _labelled_files(val)
    classes = sorted({class_name for _, class_name in named["train"]})
    if val is not None:
        unknown = sorted({class_name for _, class_name in named["val"]} - set(classes))
        if unknown:
            raise ValueError(
                f"--val: got {len(unknown)} classes that {train} lacks, such as {unknown[0]!r}; "
                "need validation pictures of training classes only; do: name or move them alike"
            )
    label = {class_name: i for i, class_name in enumerate(classes)}
    splits = {
        split: [Sample(str(file), label[class_name], file) for file, class_name in files]
        for split, files in named.items()
    }
    return Source(str(train), classes, splits)


def _labelled_files(root: Path) -> list[tuple[Path, str]]:
    """Every picture under root with its class name, in the order of their paths."""
    if not root.is_dir():
        raise ValueError(
            f"source: got {root}, which is not a directory; need a folder of pictures, or the word "
            f"{DIGITS!r} for the built-in handwritten digits"
        )

    def refuse(error: OSError) -> None:
        raise ValueError(f"source: cannot read {error.filename}: {error.strerror}") from None

    loose, sorted_by_class = [], []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES):
                file = Path(folder, name)
                parts = file.relative_to(root).parts
                if len(parts) == 1:
                    loose.append((file, name.split("_")[0]))
                else:
                    sorted_by_class.append((file, parts[0]))
    if loose and sorted_by_class:
        raise ValueError(
            f"source: got pictures both directly in {root} ({loose[0][0].name}) and in class "
            f"directories ({sorted_by_class[0][1]}/); need one or the other; do: move the loose "
            "ones"
        )
    found = loose or sorted_by_class
    if not found:
        raise ValueError(
            f"source: got {root} without any picture ({' '.join(IMAGE_SUFFIXES)}); need "
            "CLASS/picture.jpg, or CLASS_picture.jpg side by side"
        )
    if loose and any("_" not in file.name for file, _ in loose):
        bare = next(file.name for file, _ in loose if "_" not in file.name)
        raise ValueError(
            f"source: got {bare} directly in {root}; need CLASS_picture.jpg there, the class "
            "before the first underscore, or one directory a class"
        )
    return found


def digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn carries (UCI, Alpaydin & Kaynak 1998).

    8 x 8 grey pictures; the last 360 are held out for validation, as PNG bytes.
    """
    import numpy as np
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "source: digits needs scikit-learn, which carries them; do: pip install scikit-learn"
        ) from None

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], 0..16 -> 0..255
    samples = []
    for i, (picture, label) in enumerate(zip(pixels, bunch.target, strict=True)):
        png = io.BytesIO()
        Image.fromarray(picture).save(png, format="PNG")
        samples.append(Sample(f"digit_{i:04d}", int(label), png.getvalue()))
    held_out = len(samples) - DIGITS_HELD_OUT
    splits = {"train": samples[:held_out], "val": samples[held_out:]}
    return Source(DIGITS, [str(name) for name in bunch.target_names], splits)
