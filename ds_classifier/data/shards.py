"""Shards on disk: plain tars, with a manifest and an index in the same directory.

A split is a directory:

    train-000000.tar ...  members KEY.jpg (or .png ..., or .npy: see arrays.py) and KEY.cls (class
                          index in ASCII), mtime 0
    index.npy             [N] INDEX_DTYPE: place and label of each image; memory-mapped
    targets.npy           [N, K] uint8 (several classes) or fp32 (probabilities), of such targets
    weights.npy           [N] fp32: the weight of each image in the loss, if the source had some
    manifest.json         class names, counts, how images are stored; per shard: name, samples,
                          bytes, sha256; and a fingerprint of all of it

Shards made by others are indexed where they lie (data/foreign): index and manifest are then in a
directory of their own, the manifest says where the tars are, and samples may have more members.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ds_classifier.common import files
from ds_classifier.common.text import count
from ds_classifier.common.urls import shown
from ds_classifier.data.arrays import Arrays
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.data.store import Shard, ShardStore, is_url
from ds_classifier.data.tars import IMAGE_SUFFIXES, NAME_REACH, is_tar_name, key_of, member_name

MANIFEST = "manifest.json"
INDEX = "index.npy"
TARGETS = "targets.npy"
WEIGHTS = "weights.npy"
BESIDE = (TARGETS, WEIGHTS)  # the arrays that a split may have beside its index
VERSION = 1

# URLs that a manifest may name as the location of its tars: some of gopen's schemes run a shell.
PLAIN_URL = re.compile(
    r"(?!pipe:)[a-z][a-z0-9+.-]*:(?!.*//-)[A-Za-z0-9_.,:/@%+=~{}-]+", re.IGNORECASE
)

# 20 bytes per sample: a billion samples take 20 GB of mapped file.
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("shard", "<u4")])
INDEX_ROWS = 1 << 20  # rows of an index that are checked together
CHECKED_ROWS = 1 << 24  # an index with more rows, 336 MB, is not checked at every start
CHECKED_BYTES = CHECKED_ROWS * INDEX_DTYPE.itemsize  # of an array beside it


class Beside(NamedTuple):
    """An array beside the index, with a row for each sample."""

    dtype: type
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a split.

    plan: hash of the classes, names, labels and encoding that it was made from; "" if the shards
        were made by others and only indexed.
    stored: "original" for the unchanged bytes of the source; or "halved" for images halved as far
        as every crop at image_size pixels allows, in `form` ("png" or "jpg"): see `images.halve`.
    undecodable: names of the images that could not be halved and are stored unchanged.
    location: directory (absolute) or URL of the tars; None if they lie next to the manifest.
    labels: place of a sample's label: "cls", or "json:KEY".
    shard_keys: keys begin anew in each shard, so a sample's key has the name of its shard in front.
    held_out: the share of the images that `convert --val 10%` held out for validation, such as
        "10%"; "" if the splits were given.
    arrays: what the samples have in common if they are arrays; None for images.
    targets: the kind of the targets. Where these are vectors, the label in the index is the lowest
        class of an image (0 if it has none), or the most probable one.
    targets_sha256, weights_sha256: of targets.npy and weights.npy; "" without such a file.
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
    shard_keys: bool = False
    held_out: str = ""
    arrays: Arrays | None = None
    targets: Targets = ONE_CLASS
    targets_sha256: str = ""
    weights_sha256: str = ""

    def key(self, shard: int, key: str) -> str:
        """Return the key of a sample in the split. key: as its shard has it."""
        name = self.shards[shard].name
        return f"{os.path.splitext(name)[0]}/{key}" if self.shard_keys else key

    @property
    def batch_dtype(self) -> type:
        """The type of a batch's images, as NumPy has it: uint8, or float32 for x_0 of arrays."""
        return np.uint8 if self.arrays is None else self.arrays.batch_dtype

    @property
    def weighted(self) -> bool:
        """The samples have weights of their own in the loss."""
        return bool(self.weights_sha256)

    @property
    def beside(self) -> dict[str, Beside]:
        """The arrays beside the index by the names of their files."""
        kind = np.uint8 if self.targets.kind == "classes" else np.float32
        shape = (self.samples, len(self.classes))
        found = {}
        if self.targets.vectors:
            found[TARGETS] = Beside(kind, shape, self.targets_sha256)
        if self.weighted:
            found[WEIGHTS] = Beside(np.float32, shape[:1], self.weights_sha256)
        return found

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of everything that training sees; equal for equal data."""
        facts = [self.classes, self.image_size, [s.sha256 for s in self.shards], self.index_sha256]
        if self.arrays is not None:  # image sets have the fingerprints that they always had
            facts.append(self.arrays.facts)
        facts += self._own_targets.values()
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def _own_targets(self) -> dict[str, Any]:
        """The stored facts of targets and weights; empty for one class per image without any."""
        stored = {"targets": self.targets.to_json()} if self.targets != ONE_CLASS else {}
        hashes = {"targets_sha256": self.targets_sha256, "weights_sha256": self.weights_sha256}
        return stored | {name: sha256 for name, sha256 in hashes.items() if sha256}

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        fields = dict(vars(self), shards=[vars(shard) for shard in self.shards])
        for name in ("arrays", "targets", "targets_sha256", "weights_sha256"):
            del fields[name]
        fields |= self._own_targets
        if self.arrays is not None:  # earlier versions read the manifests of images
            fields["arrays"] = self.arrays.to_json()
        return json.dumps(
            {"format": "ds_classifier shards", "version": VERSION}
            | fields
            | {"fingerprint": self.fingerprint},
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of manifest.json.

        Raises ValueError, KeyError or TypeError if it is not a manifest of this version.
        """
        fields = json.loads(text)
        if (fields.pop("format"), fields.pop("version")) != ("ds_classifier shards", VERSION):
            raise ValueError("another format or version")
        fingerprint = fields.pop("fingerprint")
        fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
        if "arrays" in fields:
            fields["arrays"] = Arrays.from_json(fields["arrays"])
        fields["targets"] = Targets.from_json(fields.get("targets"))
        manifest = cls(**fields)
        if manifest.fingerprint != fingerprint:
            raise ValueError("its fingerprint does not match its content")
        return manifest


@dataclass(frozen=True)
class ShardSet:
    """A split opened for reading.

    folder: the directory of the tars; for a split at a URL, their part of the cache, where shards
        are added and removed.
    index: [N] INDEX_DTYPE, memory-mapped.
    remote_store: the store of a split at a URL; None for a local split.
    targets: [N, K] uint8 or fp32, memory-mapped; None if the label in the index is all.
    sample_weights: [N] fp32, memory-mapped, 0 or more; None if all samples count the same.
    """

    folder: Path
    manifest: Manifest
    index: np.ndarray
    remote_store: ShardStore | None = None
    targets: np.ndarray | None = None
    sample_weights: np.ndarray | None = None

    @cached_property
    def store(self) -> ShardStore:
        """The reader of the shards' bytes."""
        return self.remote_store or ShardStore(self.folder, self.manifest.shards)

    @property
    def contents(self) -> str:
        """The words for what the images are labelled with, such as "of 10 classes"."""
        targets, classes = self.manifest.targets, self.manifest.classes
        said = f"of {len(classes)} classes"
        if targets.kind == "values":
            least, most = classes[0].partition(" to ")[0], classes[-1].rpartition(" to ")[2]
            said = f"in {len(classes)} bins of {targets.name} ({least} to {most})"
        elif targets.kind == "soft":
            said = f"with probabilities of {len(classes)} classes"
        elif targets.kind == "classes":
            of_image = self.targets.sum(axis=1)
            none = int((of_image == 0).sum())
            said += f" ({of_image.mean():.1f} per image{f', {none:,} of none' if none else ''})"
        return said + " and with weights" * self.manifest.weighted

    def path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.folder / self.manifest.shards[shard].name

    def key(self, sample: int) -> str:
        """Return a sample's key in the split, read from the tar headers before its image."""
        row = self.index[sample]
        offset, reach = int(row["offset"]), min(int(row["offset"]), NAME_REACH)
        try:
            name = member_name(self.store.read(int(row["shard"]), offset - reach, reach))
        except (tarfile.TarError, OSError):  # the shard was damaged or cut after it was indexed
            return f"at byte {offset}"
        return self.manifest.key(int(row["shard"]), key_of(name)[0])


def refuse_shared_shards(train: Manifest, val: Manifest, flag: str, advice: str) -> None:
    """Raise ValueError if shards of the two splits have the same bytes.

    flag: the one that names `val`. advice: what to do.
    """
    hashes = {shard.sha256: shard.name for shard in train.shards}
    both = [shard for shard in val.shards if shard.sha256 in hashes]
    if both:
        copy = hashes[both[0].sha256]
        raise ValueError(
            f"{flag}: got {count(len(both), 'shard')} in both splits, such as {both[0].name}, with "
            f"the bytes of {copy} in the training split; need validation images that are not "
            f"trained on; do: {advice}"
        )


class Neighbours(NamedTuple):
    """The shares of neighbours, samples next to each other in a shard, that have the same class.

    same_class: the share in this split. by_chance: the expected share in a random order.
    """

    same_class: float
    by_chance: float

    @property
    def sorted_by_class(self) -> bool:
        """Shows whether the samples are sorted by class, fully or in part."""
        return self.same_class > 2 * self.by_chance + 0.05


def neighbours(index: np.ndarray) -> Neighbours:
    """Compute the shares from the first INDEX_ROWS samples of an index, [N] INDEX_DTYPE."""
    rows = index[:INDEX_ROWS]
    labels, shards = rows["label"], rows["shard"]
    same_shard = shards[1:] == shards[:-1]
    same_class = (labels[1:] == labels[:-1])[same_shard].mean() if same_shard.any() else 0.0
    frequency = np.bincount(labels) / len(rows)
    return Neighbours(float(same_class), float((frequency**2).sum()))


def images_per_class(split: ShardSet) -> dict[str, int]:
    """Return the number of images of each class in a split, by class name.

    An image of several classes counts for each, one with probabilities for the most probable.
    """
    if split.manifest.targets.kind == "classes":
        counts = split.targets.sum(axis=0, dtype=np.int64)
    else:
        counts = np.bincount(split.index["label"], minlength=len(split.manifest.classes))
    return dict(zip(split.manifest.classes, counts.tolist(), strict=True))


def open_shards(folder: Path | str, *, to_verify: bool = False) -> ShardSet:
    """Open a split on this machine by its manifest and index.

    Checked: manifest and index are complete and belong together, and every shard has its size.
    Images are read by the index, so a damaged tar header between them loses none. Changed bytes of
    an image are found by `verify`, from the hashes, or by the decoder.
    to_verify: check an index of any length, and no shard, since `verify` checks them.
    Raises ValueError that names the damage, or what to run if there are no shards.
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
                f"the manifest says; do: restore the shard, or {make_again(folder / MANIFEST)}"
            )
    index = read_index(folder / INDEX, manifest, thorough=to_verify)
    return ShardSet(
        tars, manifest, index, **read_beside(folder.joinpath, manifest, thorough=to_verify)
    )


def parse_manifest(text: bytes, where: Path | str) -> Manifest:
    """Parse the bytes of a manifest without trusting them: types, sizes and names are checked.

    where: the file's name, for messages.
    Raises ValueError if it is not a manifest of this program.
    """
    try:
        manifest = Manifest.from_json(text.decode())
        sizes = [manifest.samples, *(n for s in manifest.shards for n in (s.samples, s.bytes))]
        names = [manifest.index_sha256, *(n for s in manifest.shards for n in (s.name, s.sha256))]
        names += [manifest.labels, manifest.held_out]
        names += [manifest.targets_sha256, manifest.weights_sha256]
        if any(type(n) is not int or n < 0 for n in sizes) or any(
            type(n) is not str for n in names
        ):
            raise ValueError("got a name that is not a text, or a size that is not an integer >= 0")
        place = manifest.location
        if place is not None and not (os.path.isabs(place) or PLAIN_URL.fullmatch(place)):
            raise ValueError(
                f"got location {shown(str(place))!r}; need an absolute directory or a plain URL"
            )
        if type(manifest.classes) is not list or any(type(c) is not str for c in manifest.classes):
            raise ValueError("got classes that are not a list of names")
        if type(manifest.shard_keys) is not bool:
            raise ValueError("got shard_keys that are neither true nor false")
        if type(manifest.image_size) not in (int, type(None)):
            raise ValueError("got an image size that is not an integer")
        bins = manifest.targets.values
        if bins is not None and len(bins) != len(manifest.classes):
            raise ValueError(f"got {len(bins)} bins for {len(manifest.classes)} classes")
        if not manifest.shards:
            raise ValueError("got no shards")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where}: not a manifest of this program: {error}; do: {make_again(where)}"
        ) from None
    for shard in manifest.shards:
        if os.path.basename(shard.name) != shard.name or shard.name in ("", ".", ".."):
            raise ValueError(
                f"{where}: got shard name {shard.name!r}, which leaves the directory; need a plain "
                f"file name; do: {make_again(where)}"
            )
    return manifest


def read_index(path: Path, manifest: Manifest, *, thorough: bool = False) -> np.ndarray:
    """Open the index of a split, [N] INDEX_DTYPE, memory-mapped if its file system can.

    Its hash and all rows are compared with the manifest if it has at most CHECKED_ROWS rows, which
    takes a second or less.
    thorough: compare them for an index of any length.
    Raises ValueError if it is damaged, belongs to another manifest, or points outside the shards
    or classes.
    """
    index = _mapped(path, "an index")
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.samples,):
        raise ValueError(
            f"{path}: got {len(index)} samples; need the manifest's {manifest.samples}; "
            f"do: {make_again(path)}"
        )
    if thorough or len(index) <= CHECKED_ROWS:
        _check_index(path, index, manifest)
    return index


def read_beside(
    path_of: Callable[[str], Path], manifest: Manifest, *, thorough: bool = False
) -> dict[str, np.ndarray]:
    """Open the arrays beside an index, by the names of the fields of ShardSet.

    path_of: returns the path of one by its name, such as TARGETS.
    Their hashes are compared with the manifest's, as that of an index is: see `read_index`.
    Raises ValueError for one that is damaged, or belongs to another manifest.
    """
    fields = {}
    for name, need in manifest.beside.items():
        path = path_of(name)
        found = _mapped(path, "an array")
        if (found.dtype, found.shape) != (need.dtype, need.shape):
            raise ValueError(
                f"{path}: got {found.dtype} of shape {list(found.shape)}; need "
                f"{np.dtype(need.dtype)} of shape {list(need.shape)}, as the manifest says; do: "
                f"{make_again(path)}"
            )
        if thorough or found.nbytes <= CHECKED_BYTES:
            _check_hash(path, need.sha256)
        fields["targets" if name == TARGETS else "sample_weights"] = found
    return fields


def _mapped(path: Path, what: str) -> np.ndarray:
    """Open an array, memory-mapped if its file system can. what: it should be, for messages."""
    try:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return np.load(path, allow_pickle=False)  # a file system that maps no files
    except FileNotFoundError:
        raise ValueError(f"{path}: got no such file; do: {make_again(path)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not {what}: {error}; do: {make_again(path)}") from None


def _check_hash(path: Path, sha256: str) -> None:
    if (found := files.sha256(path)) != sha256:
        raise ValueError(
            f"{path}: got sha256 {found}; need {sha256}, as the manifest next to it "
            f"says; do: bring both from the same conversion, or {make_again(path)}"
        )


def _check_index(path: Path, index: np.ndarray, manifest: Manifest) -> None:
    """Raise ValueError if the hash or a row of the index does not fit the manifest."""
    _check_hash(path, manifest.index_sha256)
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
                f"{path}: got {rows[row]} for sample {first + row}, outside of the bytes of the "
                f"shards or of the {len(manifest.classes)} classes; do: {make_again(path)}"
            )
        counts += np.bincount(rows["shard"].astype(np.int64), minlength=len(sizes))
    if counts.tolist() != [shard.samples for shard in manifest.shards]:
        raise ValueError(
            f"{path}: got numbers of samples per shard that differ from the manifest; do: "
            f"{make_again(path)}"
        )


def make_again(place: Path | str) -> str:
    """Return the advice for a damaged split. place: the path or URL of a file in it.

    A finished split is never written again where it is, so it must be removed first.
    """
    if is_url(str(place)):
        return "upload the split again"
    return f"remove {Path(place).parent} and give the command that made it again"


def _no_shards(folder: Path) -> str:
    """Return the message for a directory without a manifest, by what it holds instead."""
    if folder.suffix == ".partial" and folder.is_dir():
        folder = folder.with_suffix("")
    if folder.with_name(f"{folder.name}.partial").is_dir():
        return (
            f"got {folder}, whose conversion is not finished; do: run its missing parts, then "
            f"ds-classifier merge {folder.parent}; or the same convert again"
        )
    if folder.is_file():
        command = "index" if is_tar_name(folder.name) else "convert"
        return (
            f"got {folder}, which is a file; need a directory of shards; do: "
            f"ds-classifier {command} {folder} data"
        )
    if not folder.is_dir():
        return (
            f"got {folder}, which does not exist; need a directory of shards; do: "
            f"ds-classifier convert IMAGES {folder.parent} --val 10%"
        )
    tars = any(is_tar_name(entry.name) for entry in folder.iterdir())
    if (folder / "train" / MANIFEST).is_file():
        return f"got {folder}; its shards are one level down; do: pass {folder / 'train'}"
    if tars:
        return (
            f"got {folder}: tars without {MANIFEST}; do: ds-classifier index "
            f"{folder} data, if they hold labels"
        )
    names = (name for _, _, names in os.walk(folder, followlinks=True) for name in names)
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return (
            f"got {folder}, a folder of images; need shards; do: ds-classifier convert {folder} "
            "data --val 10%"
        )
    return (
        f"got {folder}, which holds no shards; do: ds-classifier convert IMAGES {folder.parent} "
        "--val 10%"
    )
