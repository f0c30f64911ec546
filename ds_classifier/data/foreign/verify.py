"""Whether shards are what their manifest and index say: here, or streamed from a URL."""

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
from ds_classifier.data.pool import in_processes, shared
from ds_classifier.data.remote.connections import CHUNK
from ds_classifier.data.remote.fetch import stream
from ds_classifier.data.scan import ScannedSample, class_numbers, scan_samples
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.store import RemoteShardSet, open_split, url_of
from ds_classifier.data.tars import Sequential


@dataclass(frozen=True)
class _Split:
    """firsts: [shards + 1] number of each shard's first sample. scratch: for what is fetched."""

    shards: ShardSet
    firsts: np.ndarray
    check_hash: bool
    check_decode: bool
    scratch: str

    @property
    def remote(self) -> bool:
        return isinstance(self.shards, RemoteShardSet)

    def where(self, number: int) -> str:
        """A shard's path, or its URL as it may be shown."""
        return shown(self.url(number)) if self.remote else str(self.shards.path(number))

    def url(self, number: int) -> str:
        return url_of(self.shards.store.location, self.shards.manifest.shards[number].name)


def verify(
    location: str | Path,
    *,
    check_hash: bool = False,
    check_decode: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Compare every shard of a split with its manifest and index; return what is wrong.

    location: its directory or URL. Shards behind a URL are streamed whole, so their hash is always
    compared; to decode them, each lies in a temporary file meanwhile.
    Finds what breaks a tar's structure: shards missing, cut, with damaged or zeroed headers, or
    that are none. Raises ValueError or OSError where there is no manifest and index to compare
    with. check_hash: read all bytes and compare sha256. check_decode: decode every image too.
    progress: called with images checked and images in all.
    """
    with tempfile.TemporaryDirectory() as scratch:
        shards = open_split(str(location), cache_dir=Path(scratch), allow_pipe=True, to_verify=True)
        manifest, problems = shards.manifest, []
        firsts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        split = _Split(shards, firsts, check_hash, check_decode, scratch)
        done, seen_keys = 0, set()
        numbers = range(len(manifest.shards))
        # Closed before the scratch directory is removed: no process then writes to it any more.
        with closing(in_processes(workers, _verify_one, numbers, shared=split)) as results:
            for number, (found, keys) in enumerate(results):
                problems += found
                for key in keys:
                    if key in seen_keys:
                        problems.append(f"{split.where(number)}: key {key} appears twice")
                    seen_keys.add(key)
                done += manifest.shards[number].samples
                progress(done, manifest.samples)
        return problems


def _verify_one(number: int) -> tuple[list[str], list[str]]:
    """The problems of one shard, and its keys."""
    split: _Split = shared()
    where, shard = split.where(number), split.shards.manifest.shards[number]
    found: list[ScannedSample] = []  # keeps what comes before an error
    try:
        with ExitStack() as opened:
            if not split.remote:
                path = split.shards.path(number)
            elif split.check_decode:
                path = _fetched(split.url(number), shard.bytes, split.scratch, opened)
            else:
                file = Sequential(stream(split.url(number), size=shard.bytes, allow_pipe=True))
                _scan(file, where, None, number, found)
                facts = file.arrived, file.digest.hexdigest()
                return _problems(number, found, *facts), [sample.key for sample in found]
            size = files.size_of_file(path)
            file = opened.enter_context(open(path, "rb"))
            _scan(file, where, size, number, found)
            sha256 = files.sha256(path) if split.check_hash or split.remote else None
            problems = _problems(number, found, size, sha256)
            if split.check_decode:
                problems += _undecodable(file, where, found)
            return problems, [sample.key for sample in found]
    except FileNotFoundError:
        return [f"{where}: got no such file; need {shard.samples} samples"], []
    except (ValueError, OSError) as error:
        whole = f"got {len(found)} whole samples; need {shard.samples}"
        return [f"{where}: {str(error).removeprefix(f'{where}: ')}: {whole}"], []


def _fetched(url: str, size: int, folder: str, opened: ExitStack) -> Path:
    """A shard in a temporary file, which ends with `opened`."""
    file = opened.enter_context(tempfile.NamedTemporaryFile(dir=folder, buffering=CHUNK))
    for chunk in stream(url, size=size, allow_pipe=True):
        file.write(chunk)
    file.flush()
    return Path(file.name)


def _scan(
    file: BinaryIO | Sequential,
    where: str,
    size: int | None,
    number: int,
    found: list[ScannedSample],
) -> None:
    """Add a shard's samples to `found`; ValueError for the first thing that is wrong."""

    def refuse(problem: str) -> None:
        raise ValueError(problem)

    manifest = shared().shards.manifest
    numbers = class_numbers(manifest.classes)
    labels = dict(labels=manifest.labels, numbers=numbers)
    found.extend(scan_samples(file, where, size, report=refuse, **labels))


def _problems(number: int, found: list[ScannedSample], size: int, sha256: str | None) -> list[str]:
    """What differs between a shard that is whole and what manifest and index say of it."""
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
    from ds_classifier.data import images

    problems = []
    for sample in samples:
        file.seek(sample.entry[0])
        try:
            images.decode(file.read(sample.entry[1]))
        except ValueError as error:
            problems.append(f"{where}: {sample.key} does not decode ({error})")
    return problems
