"""Labelled images of a data source, and the class list that training and validation share."""

from __future__ import annotations

import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ds_classifier.common.files import size_of_file
from ds_classifier.common.text import count
from ds_classifier.data.arrays import Arrays
from ds_classifier.data.labels.classes import class_list, refuse_not_utf8
from ds_classifier.data.labels.reading import Label
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.data.tars import printable

# Folders of file servers, archive programs and Python. What begins with a dot is hidden anyway.
NO_DATA = {
    "__macosx",
    "__pycache__",
    "lost+found",
    "@eadir",
    "@recycle",
    "@tmp",
    "@recently-snapshot",
    "@__thumb",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
}
# Suffixes, or names without one, of what lies beside images and holds none.
SIDECARS = {
    *(".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".rst", ".html", ".htm", ".py"),
    *(".yaml", ".yml", ".log", ".ini", ".db", ".sh", ".md5", ".sha256"),
    *("readme", "license", "licence", "copying"),
}
ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
MAX_NAMED = 3  # kinds of folders in a message
MAX_SUFFIXES = 8  # in a message


class Content(Protocol):
    """The location of an image that is neither a whole file nor in memory; small and picklable.

    Its `origin` tells it from all other images: the path of its file, then its place there.
    Its `size` is that of the encoded image, or of its pixels if it is encoded when it is read.
    Content with an attribute `mark` (text that follows from its bytes) is known by it in a plan.
    Content with an attribute `group` (hashable) is read together with the rest of its group, so
    reading the samples of several groups in turn is slow: see `spool_groups`.
    """

    def read(self) -> bytes: ...

    def size(self) -> int: ...

    def changed_ns(self) -> int: ...

    @property
    def origin(self) -> tuple: ...


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of bytes in a file, such as a member of a tar."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Return the bytes. Raises ValueError if the file has become shorter, else as open does."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) != self.length:
            raise ValueError(
                f"{self.path}: got {len(data)} bytes at {self.offset}; need {self.length}; do: "
                "restore the file, it has changed since it was listed"
            )
        return data

    def pieces(self, starts: Sequence[int], length: int) -> list[bytes]:
        """Return `length` bytes from each start, counted from the first byte of the run."""
        with open(self.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # reads nothing ahead
            return [os.pread(file.fileno(), length, self.offset + start) for start in starts]

    def size(self) -> int:
        return self.length

    def changed_ns(self) -> int:
        return os.stat(self.path).st_ctime_ns

    @property
    def origin(self) -> tuple[Path, int]:
        return self.path, self.offset


@dataclass(frozen=True, slots=True)
class Sample:
    """A labelled image.

    name: its path in the source. label: its class index.
    content: its file, its bytes, or their location.
    target: what it is labelled with if that is more than a class, [K] (`Targets.vectors`).
    value: a number that is not in a bin yet: see `with_bins`.
    weight: in the loss; None if no sample of the source has one.
    """

    name: str
    label: int
    content: Path | bytes | Content
    target: np.ndarray | None = field(default=None, compare=False)
    value: float | None = None
    weight: float | None = None

    def read(self) -> bytes:
        """Return the encoded image, as it is in the source."""
        if isinstance(self.content, bytes):
            return self.content
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content.read()

    def pieces(self, starts: Sequence[int], length: int) -> list[bytes]:
        """Return `length` bytes from each start, without reading the rest if the source can."""
        content = self.content
        if isinstance(content, Path):
            content = Slice(content, 0, self.size())
        if isinstance(content, Slice):
            return content.pieces(starts, length)
        data = self.read()
        return [data[start : start + length] for start in starts]

    def size(self) -> int:
        """Return the size of the encoded image in bytes, without reading it if the source knows it.

        Raises OSError for a file that does not exist or is not a regular file.
        """
        if isinstance(self.content, bytes):
            return len(self.content)
        if isinstance(self.content, Path):
            return size_of_file(self.content)
        return self.content.size()

    def changed_ns(self) -> int:
        """Return when its file was last written or replaced, in ns since 1970; 0 if in memory.

        This is the inode's change time: unlike the modification time, it also changes if a file is
        replaced by an older one.
        """
        if isinstance(self.content, bytes):
            return 0
        if isinstance(self.content, Path):
            return os.stat(self.content).st_ctime_ns
        return self.content.changed_ns()


@dataclass(frozen=True)
class DataSource:
    """A data set to convert.

    classes: names; label i means classes[i]. splits: "train" and perhaps "val" -> samples.
    halved: (image_size, form) of the `Encoding` if the images have been halved; None: originals.
    held_out: the share that `hold_out` made the validation split of, such as "10%"; "" if the split
        was given.
    remarks: lines for the user, such as which files were taken for which split.
    arrays: what the samples have in common if they are stored as arrays; None for images.
    targets: their kind. values_of: the column of values that are not in bins yet, and so have no
        classes: see `with_bins`; "" otherwise.
    Raises ValueError for a class name that is not UTF-8, and for an image that is in both splits.
    """

    name: str
    classes: list[str]
    splits: dict[str, list[Sample]]
    halved: tuple[int, str] | None = None
    held_out: str = ""
    remarks: tuple[str, ...] = ()
    arrays: Arrays | None = None
    targets: Targets = ONE_CLASS
    values_of: str = ""

    def __post_init__(self):
        refuse_not_utf8(self.name, self.classes)
        _refuse_shared_images(self.name, self.splits)


def _refuse_shared_images(name: str, splits: dict[str, list[Sample]]) -> None:
    """Raise ValueError if an image of the validation split is in the training split too.

    Images are compared by where they come from, not by their bytes.
    """
    if splits.keys() < {"train", "val"}:
        return
    train, val = map(_origins, (splits["train"], splits["val"]))
    both = train.keys() & val.keys()
    if both:
        first = next(val[origin] for origin in val if origin in both)
        raise ValueError(
            f"--val: got {count(len(both), 'image')} in both splits of {name}, such as {first}; "
            "need validation images that are not trained on; do: hold out a share with --val 10%, "
            "or name the folders or files of each split"
        )


def _origins(samples: list[Sample]) -> dict[str | tuple, str]:
    """Return origin -> name of the samples that are not in memory.

    Paths are without links; a file with several names (hard links) is known by device and inode.
    """
    real = cache(os.path.realpath)  # of folders
    whole = cache(_identity)  # of files that hold many images
    origins = {}
    for sample in samples:
        content = sample.content
        if isinstance(content, Path):
            origins[_identity(str(content), real)] = sample.name
        elif not isinstance(content, bytes):
            path, *place = content.origin
            origins[(whole(str(path)), *place)] = sample.name
    return origins


def _identity(path: str, real: Callable[[str], str] = os.path.realpath) -> str | tuple[int, int]:
    """Return what all names of a file share: its real path, or (device, inode) with hard links.

    Inodes of files with one name are not compared: some network file systems invent them.
    real: returns the real path of a folder.
    """
    try:
        status = os.lstat(path)
        if is_link := stat.S_ISLNK(status.st_mode):
            status = os.stat(path)
    except OSError:  # reading the file reports it
        return os.path.realpath(path)
    if status.st_nlink > 1:
        return status.st_dev, status.st_ino
    folder, name = os.path.split(path)
    return os.path.realpath(path) if is_link else f"{real(folder)}/{name}"


class NamedSample(NamedTuple):
    """A sample before the classes are numbered.

    class_name: a name, or an integer that the user chose; or several, probabilities, or a value:
        see `labels.reading.Label`.
    weight: in the loss; None if no sample of the source has one.
    """

    name: str
    class_name: Label
    content: Path | bytes | Content
    weight: float | None = None


def share_classes(
    name: str,
    train: Sequence[NamedSample],
    val: Sequence[NamedSample] | None = None,
    classes: list[str] | None = None,
    remarks: Iterable[str] = (),
    targets: str = "class",
    column: str = "",
) -> DataSource:
    """Return a source whose classes are numbered by the training split alone.

    classes: the names in order; None: see `class_list`. remarks: see `DataSource`.
    targets: what the samples are labelled with, one of `labels.targets.ASKED`. column: the name of
    the values.
    Raises ValueError for a validation class without training images, for a gap in integers, and
    for a single class.
    """
    given = {"train": train} | ({} if val is None else {"val": val})
    if targets == "values":
        splits = {
            split: [
                Sample(s.name, 0, s.content, value=s.class_name, weight=s.weight) for s in named
            ]
            for split, named in given.items()
        }
        return DataSource(name, [], splits, remarks=tuple(remarks), values_of=column)
    if isinstance(train[0].class_name, np.ndarray):
        return _with_vectors(name, given, classes, remarks, targets)
    several = targets == "classes"
    if classes is None:
        found = [s.class_name if several else (s.class_name,) for s in train]
        names = set(itertools.chain.from_iterable(found))
        if not names:
            raise ValueError(f"source: got {name}, in which no image has a class; need some")
        classes = class_list(name, names)
    if len(classes) == 1:
        raise ValueError(
            f"source: got {name} with one class, {printable(classes[0])}; need at least two; do: "
            "take images and labels of other classes too"
        )
    label = {class_name: i for i, class_name in enumerate(classes)}
    if val is not None:
        held_out = [s.class_name if several else (s.class_name,) for s in val]
        unknown = sorted(set(map(str, itertools.chain.from_iterable(held_out))) - set(label))
        if unknown:
            raise ValueError(
                f"--val: got {len(unknown)} classes that {name} lacks, such as {unknown[0]!r}; "
                "need validation images of training classes only; do: rename or move them"
            )
    if several:
        given = {
            split: [s._replace(class_name=_hot(s.class_name, label)) for s in named]
            for split, named in given.items()
        }
        return _with_vectors(name, given, classes, remarks, targets)
    splits = {
        split: [Sample(s.name, label[str(s.class_name)], s.content, weight=s.weight) for s in named]
        for split, named in given.items()
    }
    return DataSource(name, classes, splits, remarks=tuple(remarks))


def _hot(classes: Iterable[str | int], label: Mapping[str, int]) -> np.ndarray:
    """Return a vector with 1 for each class and 0 for the others, [K] uint8."""
    vector = np.zeros(len(label), np.uint8)
    vector[[label[str(name)] for name in classes]] = 1
    return vector


def _with_vectors(
    name: str,
    given: Mapping[str, Sequence[NamedSample]],
    classes: list[str] | None,
    remarks: Iterable[str],
    targets: str,
) -> DataSource:
    """Return a source whose samples have vectors: several classes, or probabilities.

    given: the samples of each split. classes: the names; None: numbers. The others are those of
    `share_classes`.
    """
    width = len(given["train"][0].class_name)
    classes = [str(i) for i in range(width)] if classes is None else classes
    splits = {}
    for split, named in given.items():
        other = next((s for s in named if len(s.class_name) != len(classes)), None)
        if other is not None:
            raise ValueError(
                f"{'source' if split == 'train' else '--val'}: got {len(other.class_name)} numbers "
                f"for {other.name}; need {len(classes)}, one for each class; do: correct them"
            )
        splits[split] = [
            Sample(s.name, int(s.class_name.argmax()), s.content, s.class_name, weight=s.weight)
            for s in named
        ]
    kind = Targets("classes" if targets == "classes" else "soft")
    return DataSource(name, classes, splits, remarks=tuple(remarks), targets=kind)


@dataclass
class PassedOver:
    """The files and folders that a conversion does not take. False if there are none.

    hidden: the number of hidden files that would be taken. folders: name -> number.
    left_out: suffix of files that are not taken -> number; without what is in SIDECARS.
    examples: suffix -> the first of these files. wanted: what is taken.
    """

    hidden: int = 0
    folders: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    wanted: str = "images"

    def __bool__(self) -> bool:
        return bool(self.hidden or self.folders or self.left_out)

    def leave_out(self, name: str) -> None:
        """Count a file that is not hidden and not taken. name: its path in the source."""
        base = os.path.basename(name).lower()
        suffix = os.path.splitext(base)[1]
        if (suffix or base) not in SIDECARS and not is_passed_over(base):
            self.left_out[suffix] += 1
            self.examples.setdefault(suffix, name)

    def update(self, other: PassedOver) -> None:
        """Add what another part of the source passes over."""
        self.hidden += other.hidden
        self.folders.update(other.folders)
        self.left_out.update(other.left_out)
        self.examples = other.examples | self.examples

    @property
    def remarks(self) -> list[str]:
        """One line about what is hidden, and one about files that are not images, if any."""
        lines, names = [], sorted(self.folders)
        found = [count(self.hidden, "hidden file")] if self.hidden else []
        found += [f"{count(self.folders[n], 'folder')} {printable(n)}" for n in names[:MAX_NAMED]]
        if more := sum(self.folders[name] for name in names[MAX_NAMED:]):
            found.append(f"{count(more, 'other folder')}")
        if found:
            lines.append(f"passed over: {', '.join(found)}")
        kinds = sorted(self.left_out.items(), key=lambda kind: (-kind[1], kind[0]))
        found = [
            f"{number:,} {printable(suffix) or 'without suffix'} "
            f"({'such as ' * (number > 1)}{printable(self.examples[suffix])})"
            for suffix, number in kinds[:MAX_SUFFIXES]
        ]
        if more := sum(number for _, number in kinds[MAX_SUFFIXES:]):
            found.append(f"{more:,} of other suffixes")
        if found:
            unpack = any(suffix in ARCHIVES for suffix in self.left_out)
            lines.append(
                f"left out, since they are not {self.wanted}: {', '.join(found)}"
                + "; do: unpack the archives, if they hold images" * unpack
            )
        return lines


def is_passed_over(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or was not made by the user."""
    return name.startswith(".") or name.lower() in NO_DATA


def files_under(
    root: Path, wanted: Callable[[Path], bool], passed: PassedOver | None = None
) -> Iterator[Path]:
    """Yield every file that is wanted, following links; but not what is passed over.

    The files of a folder come first, then those of its folders, both sorted by name.
    passed: what is passed over, and what is not wanted, is added to it.
    Raises ValueError for a folder that cannot be read, and for a link to a folder above it.
    """
    passed = PassedOver() if passed is None else passed

    def refuse(error: OSError) -> None:
        raise ValueError(f"source: cannot read {error.filename}: {error.strerror}") from None

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        passed.folders.update(filter(is_passed_over, folders))
        folders[:] = sorted(name for name in folders if not is_passed_over(name))
        here = os.path.join(os.path.realpath(folder), "")
        for inner in folders:
            link = os.path.join(folder, inner)
            if os.path.islink(link) and here.startswith(os.path.join(os.path.realpath(link), "")):
                raise ValueError(
                    f"source: got {link}, a link to a folder that contains it; need each image "
                    "once; do: remove the link"
                )
        for name in sorted(names):
            file = Path(folder, name)
            if not wanted(file):
                passed.leave_out(str(file.relative_to(root)))
            elif is_passed_over(name):
                passed.hidden += 1
            else:
                yield file
