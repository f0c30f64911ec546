"""Decide by a tar's first members what it holds: samples of WebDataset, class folders or tars."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ds_classifier.data.convert.samples import files_under
from ds_classifier.data.foreign.layouts import SPLITS
from ds_classifier.data.remote.connections import CHUNK
from ds_classifier.data.remote.fetch import stream
from ds_classifier.data.scan import LARGEST_LABEL
from ds_classifier.data.store import is_url, url_of
from ds_classifier.data.tars import (
    IMAGE_SUFFIXES,
    Sequential,
    is_tar_name,
    key_of,
    printable,
    tar_members,
)

FIRST_MEMBERS = 1000
LABEL_SUFFIXES = ("label", "lbl", "labels", "target", "class", "category", "classname", "y")
LONGEST_CLASS = 200  # bytes of a label
MAX_NAMED = 5  # suffixes and fields in a message


@dataclass(frozen=True)
class Contents:
    """The kinds of the first FIRST_MEMBERS members of a tar.

    cls: there are labels in .cls. fields: of the first .json next to an image; None without one.
    images: the number of images. in_folders: whether these and all whose keys have dots have a
    directory in their names, and none of the latter has a label.
    suffixes: those of the other members, most frequent first; "" for a name without suffix.
    dotted: the first name whose image or label has a dot in its key, as in a.left.png; "" for none.
    apart: names of an image and a label that differ in their directories alone; None without any.
    unread_label: the suffix of a member that seems to be a label, as in .label; "" without any.
    """

    cls: bool
    fields: list[str] | None
    images: int
    in_folders: bool
    suffixes: list[str]
    dotted: str
    apart: tuple[str, str] | None
    unread_label: str

    @property
    def labelled(self) -> bool:
        """Shows whether this is a WebDataset shard with members that can hold labels."""
        return self.cls or self.fields is not None

    @property
    def class_folders(self) -> bool:
        """Shows whether this is an archive of directories with images, which may be classes."""
        return not self.labelled and not self.unread_label and self.in_folders

    @property
    def tars(self) -> bool:
        """Shows whether this is a tar of tars."""
        return "tar" in self.suffixes and not self.images and not self.labelled

    @property
    def fields_shown(self) -> list[str]:
        """The first fields, for a message."""
        return [printable(name[:40]) for name in (self.fields or [])[:MAX_NAMED]]

    def renaming(self, tar: str) -> str:
        """Return how to make `unread_label` of a tar .cls."""
        suffix, quoted = printable(self.unread_label), shlex.quote(tar)
        return (
            f"if .{suffix} is the label, rename it to .cls, which is read, in each tar: mkdir NEW "
            f"&& tar xf {quoted} -C NEW --transform 's/[.]{suffix}$/.cls/i' && tar cf NEW.tar "
            "--sort=name -C NEW ."
        )

    @property
    def others(self) -> str:
        """The suffixes that are neither images nor .cls, for a message; empty if there are none."""
        shown = [s for s in self.suffixes if s != "cls"][:MAX_NAMED]
        return ", ".join(
            printable(f".{suffix}") if suffix else "files without suffix" for suffix in shown
        )


def contents_of(file: BinaryIO | Sequential, where: Path | str, size: int | None) -> Contents:
    """Look at the first members of a tar.

    size: bytes of the tar; None to read to the end of the file.
    Raises ValueError if it is no tar, or is damaged before that many members.
    """
    suffixes: Counter[str] = Counter()
    fields: dict[str, list[str]] = {}  # key -> fields of its .json, for the first one and any image
    with_image: set[str] = set()
    images, folders, unread_label = 0, [], ""  # folders: whether each image is in one
    dotted, image_of, label_of = "", {}, {}  # base name without suffix -> name
    for member in itertools.islice(tar_members(file, where, 0, size), FIRST_MEMBERS):
        name = member.name.removeprefix("./")
        key, suffix = key_of(name) or (name, os.path.splitext(name)[1][1:].lower())
        if f".{suffix}" in IMAGE_SUFFIXES:
            images += 1
            folders.append("/" in name)
            with_image.add(key)
            image_of[os.path.basename(key)] = name
            continue
        suffixes[suffix] += 1
        if suffix in ("cls", "json"):
            label_of[os.path.basename(key)] = name
        elif suffix.endswith((*IMAGE_SUFFIXES, ".cls", ".json")):
            dotted = dotted or name
            folders.append("/" in name and suffix.endswith(IMAGE_SUFFIXES))
        elif (
            suffix.isalnum()
            and suffix.isascii()
            and not unread_label
            and 0 < member.size <= LONGEST_CLASS
        ):
            file.seek(member.offset)
            content = file.read(member.size).strip()
            if content.isdigit() or suffix in LABEL_SUFFIXES:
                unread_label = suffix
        if suffix == "json" and member.size <= LARGEST_LABEL:
            file.seek(member.offset)
            fields[key] = _fields(file.read(member.size))
    pairs = ((name, label_of[base]) for base, name in image_of.items() if base in label_of)
    return Contents(
        "cls" in suffixes,
        next((found for key, found in fields.items() if key in with_image), None),
        images,
        bool(folders) and all(folders),
        [suffix for suffix, _ in suffixes.most_common()],
        dotted,
        next((pair for pair in pairs if len(set(map(os.path.dirname, pair))) > 1), None),
        unread_label,
    )


def shard_bytes(location: str, name: str) -> Iterator[bytes]:
    """Yield the bytes of a shard in a directory or behind a URL."""
    if is_url(location):
        yield from stream(url_of(location, name))
        return
    with open(f"{location}/{name}", "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _fields(text: bytes) -> list[str]:
    """Return the names of the fields in a JSON object that could be labels: integers and texts."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    values = content.items() if isinstance(content, dict) else ()
    return [name for name, value in values if type(value) in (int, str)]


def refuse_shards(source: Path | None, val: Path | None) -> None:
    """Raise ValueError if convert is given WebDataset shards; it names the command `index`.

    source, val: a tar, or a folder of tars without images; None for anything else. A folder of
    other tars is refused too; a tar of another kind is left to convert.
    """
    at, labels = {}, ""
    for flag, place in (("source", source), ("--val", val)):
        if place is None:
            continue
        tar = place
        if place.is_dir():
            tar = next(files_under(place, lambda file: is_tar_name(file.name)))
        with open(tar, "rb") as file:
            contents = contents_of(file, tar, os.fstat(file.fileno()).st_size)
        if contents.labelled:
            at[flag] = shlex.quote(str(_shards_place(place, tar)))
            if not contents.cls:
                fields = ", ".join(contents.fields_shown)
                labels = f" --label json:KEY, where KEY is the field of the class: {fields}"
        elif contents.unread_label and contents.images:
            raise ValueError(
                f"{flag}: got {place}, with shards of WebDataset such as {tar.name} that have no "
                f".cls; need labels; do: {contents.renaming(str(tar))}; then use index"
            )
        elif place.is_dir():
            raise ValueError(
                f"{flag}: got {place} without any image, but with tars such as {tar.name}, which "
                "hold no labels; need a folder of images; do: unpack each tar into a directory "
                "named after its class, and convert the folder above them"
            )
        elif contents.class_folders:
            raise ValueError(
                f"{flag}: got {place}, an archive of folders with images; need the folders "
                f"themselves; do: mkdir FOLDER && tar xf {shlex.quote(str(place))} -C FOLDER, and "
                "convert FOLDER, or the folder in it that holds the classes"
            )
    if "source" in at:
        val_too = f" --val {at['--val']}" if len(at) > 1 else ""
        raise ValueError(
            f"source: got shards of WebDataset at {at['source']}; these are used in place, without "
            f"a conversion; do: ds-classifier index {at['source']} data{val_too}{labels}"
        )
    if at:
        raise ValueError(
            f"--val: got shards of WebDataset at {at['--val']}, with a source to convert; need "
            "both in one form, or an index of their own for these shards; do: convert the source "
            f"without --val, then ds-classifier index {at['--val']} VAL --classes FILE, where FILE "
            "has the class names of the conversion in their order, one per line, and train with "
            f"--data_dir OUT/train --val_data_dir VAL/train{labels and '; also'}{labels}"
        )


def _shards_place(place: Path, tar: Path) -> Path:
    """Return what to index, for a tar that is the place or lies in or below it."""
    folder = tar.parent
    is_split = folder.parent == place and folder.name.lower() in (*SPLITS["train"], *SPLITS["val"])
    return place if tar == place or is_split else folder
