"""Shards as they lie on disk: plain tars, with a manifest and an index beside them.

A split is a directory:

    train-000000.tar ...  members KEY.jpg (or .png ...) and KEY.cls (class index in ASCII), mtime 0
    index.npy             [N] INDEX_DTYPE: where each image lies, and its label; memory-mapped
    manifest.json         class names, counts, what is stored; per shard name, samples, bytes,
                          sha256; and a fingerprint of it all

Shards made by others are indexed where they lie (data/foreign.py): index and manifest are then in
a directory of their own, the manifest says where the tars are, and samples may have more members.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ds_classifier.common import files
from ds_classifier.common.urls import shown
from ds_classifier.data.tars import IMAGE_SUFFIXES, NAME_REACH, key_of, member_name

MANIFEST = "manifest.json"
INDEX = "index.npy"
VERSION = 1
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
    undecodable: names of images that could not be halved and are stored untouched.
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
        """The sample's key, read from the tar headers before its image."""
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
    Images are read by the index, so a damaged header between them loses none; an image whose
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
                f"{folder}: got shards that lie at {shown(manifest.location)}; need them on this "
                "machine; do: download them and index them there"
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
            raise ValueError(
                f"location {shown(str(place))!r} is no absolute directory and no plain URL"
            )
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
    except FileNotFoundError:
        raise ValueError(f"{path}: got no such file; do: convert again") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: got no index ({error}); do: convert again") from None
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
    if folder.suffix == ".partial" and folder.is_dir():
        folder = folder.with_suffix("")
    if folder.with_name(f"{folder.name}.partial").is_dir():
        return (
            f"got {folder}, whose conversion is not finished; do: run its missing parts, then "
            f"python launch/make_shards.py merge {folder.parent}; or the same convert again"
        )
    if not folder.is_dir():
        return (
            f"got {folder}, which does not exist; need a directory of shards; do: "
            f"{CONVERT} IMAGES {folder.parent}"
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
        return f"got {folder}, a folder of images; need shards; do: {CONVERT} {folder} data"
    return f"got {folder}, which holds no shards; do: {CONVERT} IMAGES {folder.parent}"
