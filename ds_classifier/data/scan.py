"""Walk a WebDataset tar and yield its samples, without trusting its content.

Formats: POSIX.1-1988 ustar; WebDataset (keys group members up to the first dot of the base name).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ds_classifier.data.arrays import SUFFIX
from ds_classifier.data.tars import (
    IMAGE_SUFFIXES,
    Member,
    Sequential,
    key_of,
    printable,
    tar_members,
)

LARGEST_LABEL = 1 << 20  # bytes of a member that holds a label; img2dataset's JSON has a few KB
LARGEST_IMAGE = (1 << 32) - 1  # bytes; the index stores 32 bits


MOST_FIELDS = 12  # of a JSON object that a message names

# Kinds of faults.
NO_LABEL, BAD_LABEL, NO_IMAGE = "no label", "bad label", "no image"
TWO_IMAGES, LARGE_IMAGE, TWICE = "two images", "large image", "twice"
MOST_OTHERS = 3  # suffixes of other members that a fault names


@dataclass(frozen=True)
class ScannedSample:
    """A sample found in a tar: its key, and (offset, length, label, 0) as an index row."""

    key: str
    entry: tuple[int, int, int, int]


class Fault(NamedTuple):
    """A reason why a sample cannot be used, as a message: shard, key and words.

    kind: the kind of the reason.
    """

    kind: str
    where: Path | str
    key: str
    words: str

    def __str__(self) -> str:
        return f"{self.where}: {printable(self.key)} {self.words}"


def refuse(fault: Fault) -> None:
    """Raise ValueError for a fault, where one is too many."""
    raise ValueError(str(fault))


@dataclass(slots=True)
class _Group:
    """The members of one key that were found so far.

    array: a .npy, which is the image of a sample if no sample of the shard has another one.
    faults: (kind, words). others: the first suffixes of members that are neither image nor label.
    """

    key: str
    image: Member | None = None
    array: Member | None = None
    label: int | None = None
    label_seen: bool = False
    faults: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Shows whether neither an image nor a label was found."""
        return self.image is None and self.array is None and not self.label_seen

    @property
    def complete(self) -> bool:
        """Shows whether both an image and a label were found."""
        return self.image is not None and self.label_seen

    def complete_with(self, image: Member | None) -> bool:
        """Return whether this is a sample without faults if that member is its image."""
        return (self.image or image) is not None and self.label_seen and not self.faults

    def add_fault(self, kind: str, words: str) -> None:
        self.faults += ((kind, words),)

    def read_label(
        self, content: bytes, labels: str, numbers: Mapping[str, int] | None, suffix: str
    ) -> None:
        """Take the label from the content of its member; `_label_in` has the other arguments."""
        self.label_seen = True
        try:
            self.label = _label_in(content, labels, numbers)
        except ValueError as error:
            self.add_fault(BAD_LABEL, f"has no usable label in .{suffix}: {error}")

    def judge(self, suffix_of_label: str, *, twice: bool) -> None:
        """Add the fault that shows when all members have been found. twice: the key was met."""
        others = ", ".join(f".{other}" for other in self.others)
        others = f" (it has {others})" if others else ""
        if twice:
            self.faults = ((TWICE, "appears twice; need each key once"),)
        elif self.image is None:
            self.add_fault(NO_IMAGE, f"has a label but no image{others}")
        elif not self.label_seen:
            self.add_fault(NO_LABEL, f"has an image but no .{suffix_of_label}{others}")
        elif self.image.size > LARGEST_IMAGE:
            words = f"has an image of {self.image.size} bytes; need 4 GiB at most"
            self.add_fault(LARGE_IMAGE, words)

    def add_other(self, suffix: str) -> None:
        if len(self.others) < MOST_OTHERS and suffix not in self.others:
            self.others += (suffix,)


def scan_shard(
    path: Path, *, labels: str = "cls", numbers: Mapping[str, int] | None = None
) -> Iterator[ScannedSample]:
    """Walk a local tar and yield its samples in order; the keywords are those of scan_samples.

    Raises ValueError for the first fault, with the shard and the place.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield from scan_samples(file, path, size, labels=labels, numbers=numbers, report=refuse)


def scan_samples(
    file: BinaryIO | Sequential,
    where: Path | str,
    size: int | None,
    *,
    labels: str = "cls",
    numbers: Mapping[str, int] | None = None,
    report: Callable[[Fault], None],
    look: Callable[[int, bytes], None] | None = None,
) -> Iterator[ScannedSample]:
    """Walk a tar and yield its complete samples in the order in which they become complete.

    A sample is all members with one key: one image and its label. They need not be next to each
    other: a key waits for the rest, so memory is needed for all keys that wait at one time. Other
    members are skipped, never decoded. In a shard without images, .npy members stand for them; as
    that is not known before, these samples come at the end.
    size: bytes of the tar; None to read to the end of the file.
    labels: "cls", or "json:KEY" for a field of .json.
    numbers: class name -> label, if labels may be names; None if they are numbers.
    report: called for every fault of a sample.
    look: called with the place and the bytes of every .npy before the first image.
    Raises ValueError for a damaged tar; see tar_members.
    """
    suffix_of_label = "json" if labels.startswith("json:") else labels
    ended: set[str] = set()  # keys
    waiting: dict[str, _Group] = {}
    group: _Group | None = None
    images = False

    def end(group: _Group) -> Iterator[ScannedSample]:
        """Yield the group's sample if it is usable; report its faults if it is not."""
        if not images:
            group.image = group.image or group.array
        if group.image is None and not group.label_seen:
            return  # a .npy beside images
        group.judge(suffix_of_label, twice=group.key in ended)
        ended.add(group.key)
        for kind, words in group.faults:
            report(Fault(kind, where, group.key, words))
        if not group.faults:
            entry = (group.image.offset, group.image.size, group.label, 0)
            yield ScannedSample(group.key, entry)

    def leave(group: _Group | None) -> Iterator[ScannedSample]:
        """End a group that is complete or appears again; let others wait for their members."""
        if group is None or group.empty:
            return
        if group.complete or group.key in ended:
            yield from end(group)
        else:
            waiting[group.key] = group

    members = tar_members(file, where, 0, size)
    while True:
        try:
            member = next(members, None)
        except ValueError:
            before = [*waiting.values(), group] if group is not None else []
            for group in before:  # the damage begins after these samples
                if group.complete_with(group.image if images else group.array):
                    yield from end(group)
            raise
        if member is None:
            break
        split = key_of(member.name)
        if split is None:
            continue
        key, suffix = split
        if group is None or group.key != key:
            yield from leave(group)
            group = waiting.pop(key, None) or _Group(key)
        if f".{suffix}" in IMAGE_SUFFIXES:
            if group.image is not None:
                group.add_fault(TWO_IMAGES, "has two images; need one")
            group.image, images = member, True
        elif f".{suffix}" == SUFFIX and group.array is None:
            group.array = member
            group.add_other(suffix)
            if look is not None and not images and member.size <= LARGEST_IMAGE:
                file.seek(member.offset)
                look(member.offset, file.read(member.size))
        elif suffix == suffix_of_label:
            file.seek(member.offset)
            content = file.read(min(member.size, LARGEST_LABEL + 1))
            group.read_label(content, labels, numbers, suffix)
        else:
            group.add_other(suffix)
    yield from leave(group)
    for group in waiting.values():
        yield from end(group)


def _label_in(content: bytes, labels: str, numbers: Mapping[str, int] | None) -> int:
    """Return the label that a member holds; ValueError if it holds none."""
    if len(content) > LARGEST_LABEL:
        raise ValueError(f"got more than {LARGEST_LABEL} bytes")
    if labels.startswith("json:"):
        name = labels.removeprefix("json:")
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"got no JSON ({error})") from None
        if not isinstance(fields, dict) or name not in fields:
            raise ValueError(f"got no field {name!r}{fields_in(fields)}")
        value = fields[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = value if isinstance(value, str) else json.dumps(value)
    else:
        text = content.decode("ascii", "backslashreplace")
    text = text.strip()
    if re.fullmatch("[0-9]{1,10}", text) and int(text) < 1 << 31:
        return int(text)
    if numbers is not None and text in numbers:
        return numbers[text]
    need = "a class index in digits" if numbers is None else "a class index or a listed class name"
    if text.startswith("["):
        need = (
            "one class, which is all that an index has; do: unpack the images and list them with "
            "their classes (.csv, .jsonl), then convert the list with --targets classes"
        )
    raise ValueError(f"got {text[:40]!r}; need {need}")


def fields_in(content: object) -> str:
    """Return the names of the fields of a JSON object, for a message; empty if it has none."""
    if not isinstance(content, dict) or not content:
        return ""
    names = ", ".join(printable(name[:40]) for name in list(content)[:MOST_FIELDS])
    return f"; its fields are {names}" + (" ..." if len(content) > MOST_FIELDS else "")


def class_numbers(classes: list[str]) -> dict[str, int]:
    """Return class name -> label, for the names that are unique in the list and not a number."""
    once = {name: i for i, name in enumerate(classes)}
    for i, name in enumerate(classes):
        if once.get(name, i) != i or name.isdigit():
            once.pop(name, None)
    return once
