"""Shards as they lie on disk: plain tars, with a manifest and an index beside them; checking them.

A split is a directory:

    train-000000.tar ...  members KEY.jpg (or .png ...) and KEY.cls (class index in ASCII), mtime 0
    index.npy             [N] INDEX_DTYPE: where each picture lies, and its label; memory-mapped
    manifest.json         class names, counts, what is stored; per shard name, samples, bytes,
                          sha256; and a fingerprint of it all

Formats: POSIX.1-1988 ustar; WebDataset (keys group members up to the first dot of the base name).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_classifier import files
from ds_classifier.data.samples import IMAGE_SUFFIXES

MANIFEST = "manifest.json"
INDEX = "index.npy"
VERSION = 1
TAR_BLOCK = 512
CONVERT = "python launch/make_shards.py convert"

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

    plan: hash of the classes, names, labels and store it was made from.
    stored: "original", the source's bytes untouched; or "halved", as far as every crop at
    image_size pixels begins with, in `form` ("png" or "jpg"): see `images.halve`.
    undecodable: names of pictures that could not be halved and are stored untouched.
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
        """The sample's key, read from the tar header before its picture."""
        row = self.index[sample]
        header = self._header(int(row["shard"]), int(row["offset"]) - TAR_BLOCK, 100)
        return os.path.splitext(header.split(b"\0")[0].decode("utf-8", "replace"))[0]

    def _header(self, shard: int, offset: int, length: int) -> bytes:
        with open(self.path(shard), "rb") as file:
            file.seek(offset)
            return file.read(length)


def open_shards(folder: Path | str, *, to_verify: bool = False) -> ShardSet:
    """Open a split by its manifest and index.

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
    for shard in () if to_verify else manifest.shards:
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "no such file" if size is None else f"{size} bytes"
            raise ValueError(
                f"{path}: got {found}; need {shard.bytes} bytes with {shard.samples} samples, as "
                "the manifest says; do: restore the shard, or convert again"
            )
    return ShardSet(folder, manifest, read_index(folder / INDEX, manifest, thorough=to_verify))


def parse_manifest(text: bytes, where: Path | str) -> Manifest:
    """The manifest in a file's bytes; ValueError, naming `where`, for what is none.

    Nothing in it is trusted: shards have names without directories, and sizes that are sizes.
    """
    try:
        manifest = Manifest.from_json(text.decode())
        sizes = [manifest.samples, *(n for s in manifest.shards for n in (s.samples, s.bytes))]
        names = [manifest.index_sha256, *(n for s in manifest.shards for n in (s.name, s.sha256))]
        if any(type(n) is not int or n < 0 for n in sizes) or any(
            type(n) is not str for n in names
        ):
            raise ValueError("a name or a size is none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    if not folder.is_dir():
        return (
            f"got {folder}, which does not exist; need a directory of shards; do: "
            f"{CONVERT} PICTURES {folder.parent}"
        )
    tars = any(folder.glob("*.tar"))
    if (folder / "train" / MANIFEST).is_file():
        return f"got {folder}; its shards are one level down; do: pass {folder / 'train'}"
    if tars:
        return f"got {folder}: tars without {MANIFEST}; do: {CONVERT} the pictures they came from"
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


def scan_shard(path: Path) -> Iterator[ScannedSample]:
    """Walk a tar and yield its samples in order, trusting nothing.

    Python's tarfile stops without a word at a damaged header, so the end is checked too: after the
    last member nothing but zeros, at least two blocks of them (POSIX.1-1988).
    Raises ValueError that names the shard and the place.
    """
    size = path.stat().st_size
    picture: tuple[str, int, int] | None = None  # of the sample being read: key, offset, length
    label: int | None = None
    end = 0
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = folder + slash + stem
                if not member.isreg() or folder.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"{path}: member {member.name!r} is no plain file inside it")
                end = member.offset_data + -(-member.size // TAR_BLOCK) * TAR_BLOCK
                if end > size:
                    raise ValueError(
                        f"{path}: cut short: {member.name} needs {end} bytes, there are {size}"
                    )
                if picture is not None and picture[0] != key:
                    raise ValueError(f"{path}: {picture[0]} has a picture but no .cls")
                if suffix == "cls":
                    label = _read_label(path, member.name, tar.extractfile(member).read(16))
                elif f".{suffix}" in IMAGE_SUFFIXES:
                    picture = (key, member.offset_data, member.size)
                if picture is not None and label is not None:
                    yield ScannedSample(key, (picture[1], picture[2], label, 0))
                    picture = label = None
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar ({error})") from None
    with open(path, "rb") as file:
        file.seek(end)
        trailer = file.read()
    if len(trailer) < 2 * TAR_BLOCK or trailer.strip(b"\0"):
        raise ValueError(
            f"{path}: damaged or cut at byte {end}: no end-of-archive mark follows the last "
            "readable member"
        )
    if picture is not None or label is not None:
        raise ValueError(f"{path}: its last sample lacks its picture or its .cls")


def _read_label(path: Path, member: str, text: bytes) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"{path}: {member} holds {text!r}; need a class index in digits")
    return int(text)


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
    jobs = [(shards, number, check_hash, check_decode) for number in range(len(manifest.shards))]
    done, seen_keys = 0, set()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for number, (found, keys) in enumerate(pool.imap(_verify_one, jobs)):
            problems += found
            for key in keys:
                if key in seen_keys:
                    problems.append(f"{shards.path(number)}: key {key} appears twice")
                seen_keys.add(key)
            done += manifest.shards[number].samples
            progress(done, manifest.samples)
    return problems


def _verify_one(job: tuple[ShardSet, int, bool, bool]) -> tuple[list[str], list[str]]:
    """The problems of one shard, and its keys."""
    shards, number, check_hash, check_decode = job
    shard, path, problems, found = shards.manifest.shards[number], shards.path(number), [], []
    try:
        found.extend(scan_shard(path))  # keeps what comes before an error
    except FileNotFoundError:
        return [f"{path}: got no such file; need {shard.samples} samples"], []
    except (ValueError, OSError) as error:
        whole = f"got {len(found)} whole samples; need {shard.samples}"
        return [f"{path}: {str(error).removeprefix(f'{path}: ')}: {whole}"], []
    if (size := path.stat().st_size) != shard.bytes:
        problems.append(f"{path}: got {size} bytes; need {shard.bytes}, as the manifest says")
    rows = shards.index[shards.index["shard"] == number]
    expected = [(int(r["offset"]), int(r["length"]), int(r["label"]), 0) for r in rows]
    if [sample.entry for sample in found] != expected:
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
