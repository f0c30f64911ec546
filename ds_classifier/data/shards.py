"""Shards as they lie on disk: plain tars, with a manifest and an index beside them; checking them.

A split is a directory:

    train-000000.tar ...  members KEY.jpg (or .png ...) and KEY.cls (class index in ASCII), mtime 0
    index.npy             [N] INDEX_DTYPE: where each picture lies, and its label; memory-mapped
    manifest.json         class names, counts, what is stored; per shard name, samples, bytes,
                          sha256; and a fingerprint of it all

Shards made by others are indexed where they lie (data/foreign.py): index and manifest are then in
a directory of their own, the manifest says where the tars are, and samples may have more members.

Formats: POSIX.1-1988 ustar; WebDataset (keys group members up to the first dot of the base name).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ds_classifier import files
from ds_classifier.data.pool import in_processes, shared
from ds_classifier.data.samples import IMAGE_SUFFIXES
from ds_classifier.data.tars import (
    NAME_REACH,
    Member,
    Sequential,
    key_of,
    member_name,
    printable,
    tar_members,
)

MANIFEST = "manifest.json"
INDEX = "index.npy"
VERSION = 1
LARGEST_LABEL = 1 << 20  # bytes of a member that holds a label; img2dataset's JSON has a few KB
LARGEST_PICTURE = (1 << 32) - 1  # bytes, as the index counts them
CONVERT = "python launch/make_shards.py convert"

# What may stand in a manifest for where its tars lie: some of gopen's schemes run a shell.
PLAIN_URL = re.compile(
    r"(?!pipe:)[a-z][a-z0-9+.-]*:(?!.*//-)[A-Za-z0-9_.,:/@%+=~{}-]+", re.IGNORECASE
)

# 20 bytes a sample: a billion fit in 20 GB of mapped file.
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("shard", "<u4")])
INDEX_ROWS = 1 << 20  # looked at together
CHECKED_ROWS = 1 << 24  # of an index, at every start; 336 MB


@dataclass(frozen=True)
class Shard:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a split holds.

    plan: hash of the classes, names, labels and store it was made from; "" where the shards were
    made by others and only indexed.
    stored: "original", the source's bytes untouched; or "halved", as far as every crop at
    image_size pixels begins with, in `form` ("png" or "jpg"): see `images.halve`.
    undecodable: names of pictures that could not be halved and are stored untouched.
    location: where the tars lie: None, beside the manifest; an absolute directory; or a URL.
    labels: where a sample's label stands: "cls", or "json:KEY".
    """

    split: str
    source: str
    plan: str
    classes: list[str]
    samples: int
    stored: str
    image_size: int | None
    form: str
    undecodable: list[str]
    shards: list[Shard]
    index_sha256: str
    location: str | None = None
    labels: str = "cls"

    @property
    def fingerprint(self) -> str:
        """sha256 of everything the data consists of; equal where training sees equal data."""
        facts = [self.classes, self.image_size, [s.sha256 for s in self.shards], self.index_sha256]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_json(self) -> str:
        fields = dict(vars(self), shards=[vars(shard) for shard in self.shards])
        return json.dumps(
            {"format": "ds_classifier shards", "version": VERSION}
            | fields
            | {"fingerprint": self.fingerprint},
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError, KeyError or TypeError for what is not a manifest of this version."""
        fields = json.loads(text)
        if (fields.pop("format"), fields.pop("version")) != ("ds_classifier shards", VERSION):
            raise ValueError("another format or version")
        fingerprint = fields.pop("fingerprint")
        fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
        manifest = cls(**fields)
        if manifest.fingerprint != fingerprint:
            raise ValueError("its fingerprint does not match its content")
        return manifest


@dataclass(frozen=True)
class ShardSet:
    """A split opened for reading. index: [N] INDEX_DTYPE, memory-mapped."""

    folder: Path
    manifest: Manifest
    index: np.ndarray

    def path(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].name

    def key(self, sample: int) -> str:
        """The sample's key, read from the tar headers before its picture."""
        row = self.index[sample]
        offset, reach = int(row["offset"]), min(int(row["offset"]), NAME_REACH)
        try:
            name = member_name(self._bytes(int(row["shard"]), offset - reach, reach))
        except tarfile.TarError:  # damaged since it was indexed
            return f"at byte {offset}"
        return key_of(name)[0]

    def _bytes(self, shard: int, offset: int, length: int) -> bytes:
        with open(self.path(shard), "rb") as file:
            file.seek(offset)
            return file.read(length)


class Neighbours(NamedTuple):
    """How a split's samples lie: whether those side by side in a shard are of one class.

    alike: share of neighbours that are. by_chance: that of a random order.
    """

    alike: float
    by_chance: float

    @property
    def sorted_by_class(self) -> bool:
        return self.alike > 2 * self.by_chance + 0.05


def neighbours(index: np.ndarray) -> Neighbours:
    """Of the first INDEX_ROWS samples, which tell enough."""
    rows = index[:INDEX_ROWS]
    labels, shards = rows["label"], rows["shard"]
    beside = shards[1:] == shards[:-1]
    alike = (labels[1:] == labels[:-1])[beside].mean() if beside.any() else 0.0
    frequency = np.bincount(labels) / len(rows)
    return Neighbours(float(alike), float((frequency**2).sum()))


def open_shards(folder: Path | str, *, to_verify: bool = False) -> ShardSet:
    """Open a split on this machine by its manifest and index.

    What is checked: that manifest and index belong together and are whole, and that every shard is
    there in its size. to_verify: the index of any length, but no shard; `verify` will.
    Pictures are read by the index, so a damaged header between them loses none; a picture whose
    bytes changed is left to `verify` with its hash, and to the decoder.
    Raises ValueError that says what to run where there are no shards, or names what is damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(_no_shards(folder))
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), folder / MANIFEST)
    tars = folder
    if manifest.location is not None:
        if not os.path.isabs(manifest.location):
            raise ValueError(
                f"{folder}: got shards that lie at {manifest.location}; need them on this machine; "
                "do: download them and index them there"
            )
        tars = Path(manifest.location)
    for shard in () if to_verify else manifest.shards:
        path = tars / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "no such file" if size is None else f"{size} bytes"
            raise ValueError(
                f"{path}: got {found}; need {shard.bytes} bytes with {shard.samples} samples, as "
                "the manifest says; do: restore the shard, or convert again"
            )
    return ShardSet(tars, manifest, read_index(folder / INDEX, manifest, thorough=to_verify))


def parse_manifest(text: bytes, where: Path | str) -> Manifest:
    """The manifest in a file's bytes; ValueError, naming `where`, for what is none.

    Nothing in it is trusted: shards have names without directories, and sizes that are sizes.
    """
    try:
        manifest = Manifest.from_json(text.decode())
        sizes = [manifest.samples, *(n for s in manifest.shards for n in (s.samples, s.bytes))]
        names = [manifest.index_sha256, *(n for s in manifest.shards for n in (s.name, s.sha256))]
        names.append(manifest.labels)
        if any(type(n) is not int or n < 0 for n in sizes) or any(
            type(n) is not str for n in names
        ):
            raise ValueError("a name or a size is none")
        place = manifest.location
        if place is not None and not (os.path.isabs(place) or PLAIN_URL.fullmatch(place)):
            raise ValueError(f"location {place!r} is no absolute directory and no plain URL")
        if type(manifest.classes) is not list or any(type(c) is not str for c in manifest.classes):
            raise ValueError("its classes are no names")
        if type(manifest.image_size) not in (int, type(None)):
            raise ValueError("its image size is none")
        if not manifest.shards:
            raise ValueError("it names no shard")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where}: not a manifest of this program ({error}); do: convert again"
        ) from None
    for shard in manifest.shards:
        if os.path.basename(shard.name) != shard.name or shard.name in ("", ".", ".."):
            raise ValueError(f"{where}: shard name {shard.name!r} leaves the directory")
    return manifest


def read_index(path: Path, manifest: Manifest, *, thorough: bool = False) -> np.ndarray:
    """The index of a split, [N] INDEX_DTYPE, memory-mapped.

    Its hash and every row are compared with the manifest where it has at most CHECKED_ROWS, which
    takes a second or less; or where that shall be thorough.
    Raises ValueError where it is damaged or another's, or points outside of shards or classes.
    """
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; do: convert again") from None
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.samples,):
        raise ValueError(
            f"{path}: got {len(index)} samples; need the manifest's {manifest.samples}; "
            "do: convert again"
        )
    if thorough or len(index) <= CHECKED_ROWS:
        _check_index(path, index, manifest)
    return index


def _check_index(path: Path, index: np.ndarray, manifest: Manifest) -> None:
    if (found := files.sha256(path)) != manifest.index_sha256:
        raise ValueError(
            f"{path}: got sha256 {found}; need {manifest.index_sha256}, as the manifest beside it "
            "says; do: bring both from the same conversion, or convert again"
        )
    sizes = np.array([shard.bytes for shard in manifest.shards], dtype=np.uint64)
    counts = np.zeros(len(sizes), dtype=np.int64)
    for first in range(0, len(index), INDEX_ROWS):
        rows = index[first : first + INDEX_ROWS]
        inside = (rows["label"] >= 0) & (rows["label"] < len(manifest.classes))
        inside &= rows["shard"] < len(sizes)
        size = sizes[np.where(inside, rows["shard"], 0)]
        inside &= (rows["offset"] <= size) & (rows["length"] <= size - rows["offset"])
        if not inside.all():
            row = int(np.argmin(inside))
            raise ValueError(
                f"{path}: got {rows[row]} for sample {first + row}, outside of the shards' bytes "
                f"or of the {len(manifest.classes)} classes; do: convert again"
            )
        counts += np.bincount(rows["shard"].astype(np.int64), minlength=len(sizes))
    if counts.tolist() != [shard.samples for shard in manifest.shards]:
        raise ValueError(
            f"{path}: got other numbers of samples in the shards than the manifest has; do: "
            "convert again"
        )


def _no_shards(folder: Path) -> str:
    if folder.with_name(f"{folder.name}.partial").is_dir():
        return (
            f"got {folder}, whose conversion is not finished; do: run its missing parts, then "
            f"python launch/make_shards.py merge {folder.parent}; or the same convert again"
        )
    if not folder.is_dir():
        return (
            f"got {folder}, which does not exist; need a directory of shards; do: "
            f"{CONVERT} PICTURES {folder.parent}"
        )
    tars = any(folder.glob("*.tar"))
    if (folder / "train" / MANIFEST).is_file():
        return f"got {folder}; its shards are one level down; do: pass {folder / 'train'}"
    if tars:
        return (
            f"got {folder}: tars without {MANIFEST}; do: python launch/make_shards.py index "
            f"{folder} data, if they hold labels"
        )
    names = (name for _, _, names in os.walk(folder, followlinks=True) for name in names)
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return f"got {folder}, a folder of pictures; need shards; do: {CONVERT} {folder} data"
    return f"got {folder}, which holds no shards; do: {CONVERT} PICTURES {folder.parent}"


# ------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class ScannedSample:
    """A sample found in a tar: its key, and (offset, length, label, 0) as an index row."""

    key: str
    entry: tuple[int, int, int, int]


@dataclass
class _Group:
    """The members of one key, as they come."""

    key: str
    picture: Member | None = None
    label: int | None = None
    faults: list[str] = field(default_factory=list)
    label_seen: bool = False

    @property
    def whole(self) -> bool:
        return self.picture is not None and self.label is not None and not self.faults


def scan_shard(
    path: Path, *, labels: str = "cls", numbers: Mapping[str, int] | None = None
) -> Iterator[ScannedSample]:
    """Walk a tar on this machine and yield its samples in order, trusting nothing.

    Raises ValueError that names the shard and the place, for the first thing that is wrong. The
    keywords are those of scan_samples.
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
    """Walk a tar and yield its whole samples in order, trusting nothing.

    A sample is a run of members with one key, in any order: one picture, and its label. Members of
    other kinds are passed, never decoded.
    size: bytes; None: wherever the file ends. labels: "cls", or "json:KEY" for a field of .json.
    numbers: class name -> label, where labels may be names. report: called for every sample that
    is not whole, with the shard and its key.
    Raises ValueError for a damaged tar, see tar_members.
    """
    suffix_of_label = "json" if labels.startswith("json:") else labels
    seen: set[str] = set()
    group: _Group | None = None

    def end(group: _Group | None) -> Iterator[ScannedSample]:
        if group is None or (group.picture is None and not group.label_seen):
            return
        if group.picture is None:
            group.faults.append("has a label but no picture")
        elif not group.label_seen:
            group.faults.append(f"has a picture but no .{suffix_of_label}")
        elif group.picture.size > LARGEST_PICTURE:
            group.faults.append(f"has a picture of {group.picture.size} bytes; need 4 GiB at most")
        if group.key in seen:
            group.faults = ["comes twice; need its members side by side, and each key once"]
        seen.add(group.key)
        for fault in group.faults:
            report(f"{where}: {printable(group.key)} {fault}")
        if not group.faults:
            entry = (group.picture.offset, group.picture.size, group.label, 0)
            yield ScannedSample(group.key, entry)

    members = tar_members(file, where, 0, size)
    while True:
        try:
            member = next(members, None)
        except ValueError:
            if group is not None and group.whole:
                yield from end(group)  # the damage begins after it
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
            if group.picture is not None:
                group.faults.append("has two pictures; need one")
            group.picture = member
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
    """The label that a member holds; ValueError for what is none."""
    if len(content) > LARGEST_LABEL:
        raise ValueError(f"got more than {LARGEST_LABEL} bytes")
    if labels.startswith("json:"):
        name = labels.removeprefix("json:")
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"got no JSON ({error})") from None
        if not isinstance(fields, dict) or name not in fields:
            raise ValueError(f"got nothing called {name!r}")
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
    need = "a class index in digits" if numbers is None else "a class index, or a name of the list"
    raise ValueError(f"got {text[:40]!r}; need {need}")


def class_numbers(classes: list[str]) -> dict[str, int]:
    """Class name -> label, of those names that stand in the list once and are no number."""
    once = {name: i for i, name in enumerate(classes)}
    for i, name in enumerate(classes):
        if once.get(name, i) != i or name.isdigit():
            once.pop(name, None)
    return once


def verify(
    folder: Path,
    *,
    check_hash: bool = False,
    check_decode: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Compare every shard of a split with its manifest and index; return what is wrong.

    Finds what breaks a tar's structure: shards missing, cut, with damaged or zeroed headers, or
    that are none. Raises ValueError where there is no manifest and index to compare with.
    check_hash: read all bytes and compare sha256. check_decode: decode every picture too.
    progress: called with pictures checked and pictures in all.
    """
    shards = open_shards(folder, to_verify=True)
    manifest, problems = shards.manifest, []
    done, seen_keys = 0, set()
    firsts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    everything = (shards, firsts, check_hash, check_decode)
    numbers = range(len(manifest.shards))
    results = in_processes(workers, _verify_one, numbers, shared=everything)
    for number, (found, keys) in enumerate(results):
        problems += found
        for key in keys:
            if key in seen_keys:
                problems.append(f"{shards.path(number)}: key {key} appears twice")
            seen_keys.add(key)
        done += manifest.shards[number].samples
        progress(done, manifest.samples)
    return problems


def _verify_one(number: int) -> tuple[list[str], list[str]]:
    """The problems of one shard, and its keys."""
    shards, firsts, check_hash, check_decode = shared()
    shard, path, problems, found = shards.manifest.shards[number], shards.path(number), [], []
    numbers = class_numbers(shards.manifest.classes)
    try:
        # Keeps what comes before an error.
        found.extend(scan_shard(path, labels=shards.manifest.labels, numbers=numbers))
    except FileNotFoundError:
        return [f"{path}: got no such file; need {shard.samples} samples"], []
    except (ValueError, OSError) as error:
        whole = f"got {len(found)} whole samples; need {shard.samples}"
        return [f"{path}: {str(error).removeprefix(f'{path}: ')}: {whole}"], []
    if (size := path.stat().st_size) != shard.bytes:
        problems.append(f"{path}: got {size} bytes; need {shard.bytes}, as the manifest says")
    rows = shards.index[firsts[number] : firsts[number + 1]]
    expected = [(int(r["offset"]), int(r["length"]), int(r["label"]), 0) for r in rows]
    if [sample.entry for sample in found] != expected or (rows["shard"] != number).any():
        problems.append(
            f"{path}: its {len(found)} samples are not the {len(expected)} of the index"
        )
    classes = len(shards.manifest.classes)
    problems += [
        f"{path}: {sample.key} has label {sample.entry[2]}; there are {classes} classes"
        for sample in found
        if sample.entry[2] >= classes
    ]
    if check_hash and files.sha256(path) != shard.sha256:
        problems.append(f"{path}: its sha256 is not the manifest's")
    if check_decode:
        problems += _undecodable(path, found)
    return problems, [sample.key for sample in found]


def _undecodable(path: Path, samples: list[ScannedSample]) -> list[str]:
    from ds_classifier.data import images

    problems = []
    with open(path, "rb") as file:
        for sample in samples:
            file.seek(sample.entry[0])
            try:
                images.decode(file.read(sample.entry[1]))
            except ValueError as error:
                problems.append(f"{path}: {sample.key} does not decode ({error})")
    return problems
