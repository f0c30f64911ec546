"""A sample, wherever its bytes lie; and the one class list that training and validation share."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from ds_classifier.common.files import size_of_file
from ds_classifier.data.classes import class_list, refuse_not_utf8


class Content(Protocol):
    """Where an image's bytes lie, when that is neither a file nor memory; small, picklable."""

    def read(self) -> bytes: ...

    def size(self) -> int: ...

    def changed_ns(self) -> int: ...


class Grouped(Content, Protocol):
    """Content that is read together with that of its group, and slowly one at a time."""

    group: Hashable


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of bytes in a file, such as a member of a tar."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """The bytes. Raises ValueError where the file has become shorter, OSError as open does."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) != self.length:
            raise ValueError(
                f"{self.path}: got {len(data)} bytes at {self.offset}; need {self.length}; do: "
                "restore the file, it has changed since it was listed"
            )
        return data

    def size(self) -> int:
        return self.length

    def changed_ns(self) -> int:
        return os.stat(self.path).st_ctime_ns


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image. name: where it came from; content: its file, bytes, or their place."""

    name: str
    label: int
    content: Path | bytes | Content

    def read(self) -> bytes:
        """The image's bytes, as they are at the source."""
        if isinstance(self.content, bytes):
            return self.content
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content.read()

    def size(self) -> int:
        """Bytes of the image, without reading it where the source knows them.

        Raises OSError for a file that is not there, or is none: a FIFO may never answer, a device
        never end.
        """
        if isinstance(self.content, bytes):
            return len(self.content)
        if isinstance(self.content, Path):
            return size_of_file(self.content)
        return self.content.size()

    def changed_ns(self) -> int:
        """When its file was last written or replaced, ns since 1970; 0 for what is in memory.

        The inode's change time, which a copy with an older modification time moves too.
        """
        if isinstance(self.content, bytes):
            return 0
        if isinstance(self.content, Path):
            return os.stat(self.content).st_ctime_ns
        return self.content.changed_ns()


@dataclass(frozen=True)
class DataSource:
    """classes: names, label i is classes[i]. splits: "train" and perhaps "val" -> samples.

    halved: (pixels, form) where the images were halved already, as Encoding tells; None: originals.
    Raises ValueError for a class name that is no UTF-8.
    """

    name: str
    classes: list[str]
    splits: dict[str, list[Sample]]
    halved: tuple[int, str] | None = None

    def __post_init__(self):
        refuse_not_utf8(self.name, self.classes)


class NamedSample(NamedTuple):
    """An image that knows its class by name, or by a number of the user's."""

    name: str
    class_name: str | int
    content: Path | bytes | Content


def share_classes(
    name: str,
    train: Sequence[NamedSample],
    val: Sequence[NamedSample] | None = None,
    classes: list[str] | None = None,
) -> DataSource:
    """Number the classes by the training split alone; validation is looked up in that list.

    classes: their names in order, where the source brings them. Otherwise the sorted names; or,
    where all are integers, 0 to the largest, named so.
    Raises ValueError for a validation class that training lacks, and for a gap in integers.
    """
    if classes is None:
        classes = class_list(name, {image.class_name for image in train})
    label = {class_name: i for i, class_name in enumerate(classes)}
    if val is not None:
        unknown = sorted({str(image.class_name) for image in val} - set(label))
        if unknown:
            raise ValueError(
                f"--val: got {len(unknown)} classes that {name} lacks, such as {unknown[0]!r}; "
                "need validation images of training classes only; do: name or move them alike"
            )
    splits = {
        split: [Sample(p.name, label[str(p.class_name)], p.content) for p in images]
        for split, images in (("train", train), ("val", val))
        if images is not None
    }
    return DataSource(name, classes, splits)


def files_under(root: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Every file with one of the suffixes, links followed: those of a folder, then its folders'.

    Both by name. Raises ValueError for a folder that cannot be read or that contains itself.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"source: cannot read {error.filename}: {error.strerror}") from None

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        folders.sort()
        here = os.path.join(os.path.realpath(folder), "")
        for inner in folders:
            link = os.path.join(folder, inner)
            if os.path.islink(link) and here.startswith(os.path.join(os.path.realpath(link), "")):
                raise ValueError(
                    f"source: got {link}, a link to a folder that it lies in; need each image "
                    "once; do: remove the link"
                )
        for name in sorted(names):
            if name.lower().endswith(tuple(suffixes)):
                yield Path(folder, name)
