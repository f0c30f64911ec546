"""Compare shards with their manifest and index, on this machine or behind a URL."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ds_classifier.common import files
from ds_classifier.common.urls import shown
from ds_classifier.data.remote.connections import CHUNK
from ds_classifier.data.remote.fetch import stream
from ds_classifier.data.scan import ScannedSample, class_numbers, refuse, scan_samples
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.splits import open_split
from ds_classifier.data.store import url_of
from ds_classifier.data.tars import Sequential
from ds_classifier.distributed.pool import in_processes, shared


@dataclass(frozen=True)
class _Split:
    """A split to verify.

    firsts: [shards + 1] the number of the first sample of each shard, and of all samples.
    scratch: the directory for downloads.
    """

    shards: ShardSet
    firsts: np.ndarray
    check_hash: bool
    check_decode: bool
    scratch: str

    @property
    def remote(self) -> bool:
        """The shards are behind a URL."""
        return self.shards.store.remote

    def where(self, number: int) -> str:
        """Return the path of a shard, or its URL without passwords, for messages."""
        return shown(self.url(number)) if self.remote else str(self.shards.path(number))

    def url(self, number: int) -> str:
        """Return the URL of a shard."""
        return url_of(self.shards.store.location, self.shards.manifest.shards[number].name)


def verify(
    location: str | Path,
    *,
    check_hash: bool = False,
    check_decode: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Compare every shard of a split with its manifest and index, and return the problems found.

    Finds damage to the structure of a tar: shards that are missing, cut short, no tars, or have
    damaged or zeroed headers.
    location: the directory or URL of the split. Shards behind a URL are read completely, so their
    hash is always compared. To be decoded, they are downloaded to a temporary file one at a time.
    check_hash: also read all bytes and compare their sha256.
    check_decode: also decode every image.
    progress: called with the number of images checked, and of all images.
    Raises ValueError or OSError if there is no manifest or index to compare with.
    """
    with tempfile.TemporaryDirectory() as scratch:
        shards = open_split(str(location), cache_dir=Path(scratch), allow_pipe=True, to_verify=True)
        manifest, problems = shards.manifest, []
        firsts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        split = _Split(shards, firsts, check_hash, check_decode, scratch)
        done, seen_keys = 0, set()
        numbers = range(len(manifest.shards))
        # Close the processes before the scratch directory, which they write to, is removed.
        with closing(in_processes(workers, _verify_one, numbers, shared=split)) as results:
            for number, (shard_problems, keys) in enumerate(results):
                problems += shard_problems
                for key in keys:
                    if key in seen_keys:
                        problems.append(f"{split.where(number)}: key {key} appears twice")
                    seen_keys.add(key)
                done += manifest.shards[number].samples
                progress(done, manifest.samples)
        return problems


def _verify_one(number: int) -> tuple[list[str], list[str]]:
    """Return the problems of one shard, and the keys of its samples."""
    split: _Split = shared()
    where, shard = split.where(number), split.shards.manifest.shards[number]
    found: list[ScannedSample] = []  # after an error: the samples before it
    try:
        with ExitStack() as opened:
            if split.remote and not split.check_decode:
                file = Sequential(stream(split.url(number), size=shard.bytes, allow_pipe=True))
                _scan(file, where, None, found)
                size, sha256 = file.arrived, file.digest.hexdigest()
            else:
                path = _download(number, opened) if split.remote else split.shards.path(number)
                size = files.size_of_file(path)
                file = opened.enter_context(open(path, "rb"))
                _scan(file, where, size, found)
                sha256 = files.sha256(path) if split.check_hash or split.remote else None
            problems = _problems(number, found, size, sha256)
            if split.check_decode:
                problems += _undecodable(file, where, found)
            manifest = split.shards.manifest
            return problems, [manifest.key(number, sample.key) for sample in found]
    except FileNotFoundError:
        return [f"{where}: got no such file; need {shard.samples} samples"], []
    except (ValueError, OSError) as error:
        whole = f"got {len(found)} whole samples; need {shard.samples}"
        return [f"{where}: {str(error).removeprefix(f'{where}: ')}: {whole}"], []


def _download(number: int, opened: ExitStack) -> Path:
    """Download a shard to a temporary file, which is removed when `opened` is closed."""
    split: _Split = shared()
    file = opened.enter_context(tempfile.NamedTemporaryFile(dir=split.scratch, buffering=CHUNK))
    size = split.shards.manifest.shards[number].bytes
    for chunk in stream(split.url(number), size=size, allow_pipe=True):
        file.write(chunk)
    file.flush()
    return Path(file.name)


def _scan(
    file: BinaryIO | Sequential, where: str, size: int | None, found: list[ScannedSample]
) -> None:
    """Add the samples of a shard to `found`. Raises ValueError for the first problem.

    size: bytes of the shard; None: read to the end of the file.
    """

    manifest = shared().shards.manifest
    numbers = class_numbers(manifest.classes)
    labels = dict(labels=manifest.labels, numbers=numbers)
    found.extend(scan_samples(file, where, size, report=refuse, **labels))


def _problems(number: int, found: list[ScannedSample], size: int, sha256: str | None) -> list[str]:
    """Return the differences between a readable shard and the manifest and index."""
    split: _Split = shared()
    where, manifest, problems = split.where(number), split.shards.manifest, []
    shard = manifest.shards[number]
    if size != shard.bytes:
        problems.append(f"{where}: got {size} bytes; need {shard.bytes}, as the manifest says")
    rows = split.shards.index[split.firsts[number] : split.firsts[number + 1]]
    expected = [(int(r["offset"]), int(r["length"]), int(r["label"]), 0) for r in rows]
    if [sample.entry for sample in found] != expected or (rows["shard"] != number).any():
        problems.append(
            f"{where}: its {len(found)} samples are not the {len(expected)} of the index"
        )
    problems += [
        f"{where}: {sample.key} has label {sample.entry[2]}; there are {len(manifest.classes)} "
        "classes"
        for sample in found
        if sample.entry[2] >= len(manifest.classes)
    ]
    if sha256 not in (None, shard.sha256):
        problems.append(f"{where}: its sha256 is not the manifest's")
    return problems


def _undecodable(file: BinaryIO, where: str, samples: list[ScannedSample]) -> list[str]:
    """Return a problem for every image that cannot be decoded."""
    from ds_classifier.data import images

    arrays, problems = shared().shards.manifest.arrays, []
    for sample in samples:
        file.seek(sample.entry[0])
        try:
            (arrays or images).decode(file.read(sample.entry[1]))
        except ValueError as error:
            problems.append(f"{where}: {sample.key} cannot be decoded ({error})")
    return problems
