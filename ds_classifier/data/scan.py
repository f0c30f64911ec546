"""Walk a WebDataset tar and yield its samples, without trusting its content.

Formats: POSIX.1-1988 ustar; WebDataset (keys group members up to the first dot of the base name).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

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


@dataclass(frozen=True)
class ScannedSample:
    """A sample found in a tar: its key, and (offset, length, label, 0) as an index row."""

    key: str
    entry: tuple[int, int, int, int]


@dataclass
class _Group:
    """The members of one key, collected in the order of the tar."""

    key: str
    image: Member | None = None
    label: int | None = None
    faults: list[str] = field(default_factory=list)
    label_seen: bool = False

    @property
    def whole(self) -> bool:
        """Shows whether the sample has an image and a label, and no fault."""
        return self.image is not None and self.label is not None and not self.faults


def scan_shard(
    path: Path, *, labels: str = "cls", numbers: Mapping[str, int] | None = None
) -> Iterator[ScannedSample]:
    """Walk a local tar and yield its samples in order; the keywords are those of scan_samples.

    Raises ValueError for the first fault, with the shard and the place.
    """

    def refuse(problem: str) -> None:
        raise ValueError(problem)

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
    report: Callable[[str], None],
) -> Iterator[ScannedSample]:
    """Walk a tar and yield its complete samples in order.

    A sample is a run of members with one key, in any order: one image and its label. Other members
    are skipped, never decoded.
    size: bytes of the tar; None to read to the end of the file.
    labels: "cls", or "json:KEY" for a field of .json.
    numbers: class name -> label, if labels may be names; None if they are numbers.
    report: called with a message for every incomplete sample; it names the shard and the key.
    Raises ValueError for a damaged tar; see tar_members.
    """
    suffix_of_label = "json" if labels.startswith("json:") else labels
    seen: set[str] = set()
    group: _Group | None = None

    def end(group: _Group | None) -> Iterator[ScannedSample]:
        """Yield the group's sample if it is complete; report its faults if it is not."""
        if group is None or (group.image is None and not group.label_seen):
            return
        if group.image is None:
            group.faults.append("has a label but no image")
        elif not group.label_seen:
            group.faults.append(f"has an image but no .{suffix_of_label}")
        elif group.image.size > LARGEST_IMAGE:
            group.faults.append(f"has an image of {group.image.size} bytes; need 4 GiB at most")
        if group.key in seen:
            group.faults = ["appears twice; need its members next to each other, and each key once"]
        seen.add(group.key)
        for fault in group.faults:
            report(f"{where}: {printable(group.key)} {fault}")
        if not group.faults:
            entry = (group.image.offset, group.image.size, group.label, 0)
            yield ScannedSample(group.key, entry)

    members = tar_members(file, where, 0, size)
    while True:
        try:
            member = next(members, None)
        except ValueError:
            if group is not None and group.whole:
                yield from end(group)  # the damage begins after this sample
            raise
        if member is None:
            break
        split = key_of(member.name)
        if split is None:
            continue
        key, suffix = split
        if group is None or group.key != key:
            yield from end(group)
            group = _Group(key)
        if f".{suffix}" in IMAGE_SUFFIXES:
            if group.image is not None:
                group.faults.append("has two images; need one")
            group.image = member
        elif suffix == suffix_of_label:
            group.label_seen = True
            file.seek(member.offset)
            content = file.read(min(member.size, LARGEST_LABEL + 1))
            try:
                group.label = _label_in(content, labels, numbers)
            except ValueError as error:
                group.faults.append(f"has no usable label in .{suffix}: {error}")
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
            raise ValueError(f"got no field {name!r}")
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
    raise ValueError(f"got {text[:40]!r}; need {need}")


def class_numbers(classes: list[str]) -> dict[str, int]:
    """Return class name -> label, for the names that are unique in the list and not a number."""
    once = {name: i for i, name in enumerate(classes)}
    for i, name in enumerate(classes):
        if once.get(name, i) != i or name.isdigit():
            once.pop(name, None)
    return once
