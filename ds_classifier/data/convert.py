"""A source -> shards: planned first, then written under a name that becomes final when complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ds_classifier import files
from ds_classifier.data.samples import Sample, Source
from ds_classifier.data.shards import (
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    Shard,
    open_shards,
    scan_shard,
)
from ds_classifier.keyed_random import permutation, stream_key

_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n": "png", b"GIF8": "gif", b"BM": "bmp"}


def convert(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    shuffle_seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> dict[str, Manifest]:
    """Write every split of a source as shards under out/SPLIT; pictures are copied untouched.

    The training split is shuffled once, so that every shard holds all kinds of classes; the order
    follows from shuffle_seed alone, and so do the bytes written. A split appears under its final
    name when it is complete. Returns the manifest of each split.
    Raises ValueError where out holds something else already.
    """
    planned = {}
    for split, samples in source.splits.items():
        order = range(len(samples))
        if split == "train":
            order = permutation(len(samples), stream_key(shuffle_seed, "convert/shuffle"))
        planned[split] = [samples[i] for i in order]
    plans = {
        split: _plan_digest(source.classes, samples, samples_per_shard)
        for split, samples in planned.items()
    }
    done = {split: _already_written(out / split, plan) for split, plan in plans.items()}
    for split, samples in planned.items():
        if done[split] is None:
            partial = out / f"{split}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
            partial.mkdir(parents=True)
            _write_split(
                partial,
                samples,
                split=split,
                source=source,
                plan=plans[split],
                samples_per_shard=samples_per_shard,
                progress=progress,
            )
    for split in planned:
        if done[split] is None:
            os.rename(out / f"{split}.partial", out / split)
    return {split: open_shards(out / split).manifest for split in planned}


def _plan_digest(classes: list[str], samples: list[Sample], samples_per_shard: int) -> str:
    """A hash of what will be written, from names, labels and sizes; no picture is read."""
    digest = hashlib.sha256(json.dumps([classes, samples_per_shard]).encode())
    for sample in samples:
        digest.update(f"{sample.name}\0{sample.label}\0{sample.size()}\n".encode())
    return digest.hexdigest()


def _already_written(folder: Path, plan: str) -> Manifest | None:
    if not folder.exists():
        return None
    if (folder / MANIFEST).is_file():
        manifest = open_shards(folder).manifest
        if manifest.plan == plan:
            return manifest
    raise ValueError(
        f"OUT: got {folder}, which holds something else already; need a free place; do: remove it, "
        "or choose another OUT"
    )


def _write_split(
    folder: Path,
    samples: list[Sample],
    *,
    split: str,
    source: Source,
    plan: str,
    samples_per_shard: int,
    progress: Callable[[str, int, int], None],
) -> None:
    from webdataset import TarWriter  # heavy: brings torch

    count = -(-len(samples) // samples_per_shard)
    shards, index = [], []
    written = 0
    for number in range(count):
        # Shards differ by at most one sample.
        last = len(samples) * (number + 1) // count
        path = folder / f"{split}-{number:06d}.tar"
        with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for i in range(written, last):
                data = samples[i].read()
                label = str(samples[i].label).encode()
                key = _key(i, samples[i].name)
                tar.write({"__key__": key, _suffix(data, samples[i].name): data, "cls": label})
                progress(split, i + 1, len(samples))
        rows = np.array([row.entry for row in scan_shard(path)], dtype=INDEX_DTYPE)
        rows["shard"] = number
        index.append(rows)
        shards.append(Shard(path.name, last - written, path.stat().st_size, files.sha256(path)))
        written = last
    np.save(folder / INDEX, np.concatenate(index))
    manifest = Manifest(
        split=split,
        source=source.name,
        plan=plan,
        classes=source.classes,
        samples=len(samples),
        stored="original",
        shards=shards,
        index_sha256=files.sha256(folder / INDEX),
    )
    (folder / MANIFEST).write_text(manifest.to_json())


def _key(number: int, name: str) -> str:
    """A key without dots, unique by its number, that still tells the source file."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[-60:]
    return f"{number:09d}_{stem}"


def _suffix(data: bytes, name: str) -> str:
    """The member's suffix by content: a PNG named .JPEG is stored as .png."""
    for signature, suffix in _SIGNATURES.items():
        if data.startswith(signature):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ValueError(
        f"{name}: got {data[:8]!r}..., which no picture format begins with; need JPEG, PNG, WebP, "
        "GIF or BMP; do: remove the file, or replace it with a whole one"
    )
