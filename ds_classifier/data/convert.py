"""A source -> shards: planned first, written by several processes, final when complete.

OUT/train.partial/ is filled shard by shard, each under its name when it is whole, with its facts
(samples, bytes, sha256, index rows) beside it. When no shard is missing, index and manifest are
written and the directory becomes OUT/train by one rename. What a shard holds follows from the plan
alone, so the bytes are the same for any number of processes or machines, and after a kill: the same
command goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ds_classifier import files
from ds_classifier.data import images
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

PLAN = "plan.json"
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n": "png", b"GIF8": "gif", b"BM": "bmp"}


@dataclass(frozen=True)
class Store:
    """How pictures are stored.

    image_size: None: bytes untouched. S: halved as far as every crop at S pixels begins with, and
    encoded as `form`; pictures that are small enough already are copied untouched.
    form: "png", the reference's very pixels, or "jpg", quality 95 4:4:4.
    """

    image_size: int | None = None
    form: str = "jpg"

    def __str__(self) -> str:
        return (
            "original"
            if self.image_size is None
            else f"halved for {self.image_size} px, {self.form}"
        )


ORIGINAL = Store()


@dataclass(frozen=True)
class Plan:
    """What a split's shards will hold. digest: of names, labels, sizes and the store."""

    split: str
    source: str
    classes: list[str]
    samples: int
    shard_samples: list[int]
    image_size: int | None
    form: str
    digest: str

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:06d}.tar"


def convert(
    source: Source,
    out: Path,
    *,
    store: Store = ORIGINAL,
    samples_per_shard: int = 1000,
    shuffle_seed: int = 0,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> dict[str, Manifest | None]:
    """Write every split of a source as shards under out/SPLIT.

    The training split is shuffled once, so that every shard holds all kinds of classes.
    part: (i, n): write every n-th shard from the i-th on; `merge` finishes when all are there.
    progress: called with split, pictures written, pictures in all.
    Returns each split's manifest, None where shards of other parts are missing.
    Raises ValueError where out holds something else already, or a file is no picture.
    """
    planned = {}
    for split, samples in source.splits.items():
        order = range(len(samples))
        if split == "train":
            order = permutation(len(samples), stream_key(shuffle_seed, "convert/shuffle"))
        samples = [samples[i] for i in order]
        planned[split] = samples, _plan(source, split, samples, store, samples_per_shard)
    todo = [s for s, (_, plan) in planned.items() if not _already_written(out / s, plan)]
    for split in todo:
        samples, plan = planned[split]
        _write_shards(_partial(out, plan), plan, samples, part, workers, progress)
    if part[1] == 1:
        merge(out)
    return {
        split: open_shards(out / split).manifest if (out / split).exists() else None
        for split in planned
    }


def merge(out: Path) -> list[str]:
    """Finish the splits under out whose shards are all written; returns their names.

    Raises ValueError that names missing shards.
    """
    plans = {}
    for partial in sorted(out.glob("*.partial")):
        plan = Plan(**json.loads((partial / PLAN).read_text()))
        missing = [
            plan.shard_name(n)
            for n in range(len(plan.shard_samples))
            if not (partial / plan.shard_name(n)).exists()
        ]
        if missing:
            raise ValueError(
                f"{partial}: {len(missing)} of {len(plan.shard_samples)} shards are missing, such "
                f"as {missing[0]}; do: run the parts that write them, then merge"
            )
        plans[partial] = plan
    for partial, plan in plans.items():
        _finish(partial, plan)
    for partial, plan in plans.items():
        os.rename(partial, out / plan.split)
    files.fsync(out)
    return [plan.split for plan in plans.values()]


def _plan(
    source: Source, split: str, samples: list[Sample], store: Store, samples_per_shard: int
) -> Plan:
    count = -(-len(samples) // samples_per_shard)
    ends = [len(samples) * (n + 1) // count for n in range(count)]  # they differ by one at most
    facts = dict(
        split=split,
        source=Path(source.name).name,
        classes=source.classes,
        samples=len(samples),
        shard_samples=np.diff([0, *ends]).tolist(),
        image_size=store.image_size,
        form=store.form if store.image_size else "",
    )
    digest = hashlib.sha256(json.dumps({k: v for k, v in facts.items() if k != "source"}).encode())
    for sample in samples:
        digest.update(
            f"{sample.name}\0{sample.label}\0{sample.size()}\n".encode(errors="surrogateescape")
        )
    return Plan(digest=digest.hexdigest(), **facts)


def _already_written(folder: Path, plan: Plan) -> bool:
    if not folder.exists():
        return False
    if (folder / MANIFEST).is_file() and open_shards(folder).manifest.plan == plan.digest:
        return True
    raise ValueError(
        f"OUT: got {folder}, which holds something else already; need a free place; do: remove it, "
        "or choose another OUT"
    )


def _partial(out: Path, plan: Plan) -> Path:
    """The directory being filled; one of another plan is emptied first."""
    partial = out / f"{plan.split}.partial"
    text = json.dumps(asdict(plan), indent=1)
    if partial.exists():
        before = partial / PLAN
        if not before.exists() or json.loads(before.read_text())["digest"] != plan.digest:
            shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    files.replace_text(partial / PLAN, text)
    return partial


def _write_shards(
    partial: Path,
    plan: Plan,
    samples: list[Sample],
    part: tuple[int, int],
    workers: int,
    progress: Callable[[str, int, int], None],
) -> None:
    first = np.cumsum([0, *plan.shard_samples]).tolist()
    numbers = range(part[0], len(plan.shard_samples), part[1])
    total = sum(plan.shard_samples[n] for n in numbers)
    todo = [n for n in numbers if not (partial / plan.shard_name(n)).exists()]
    done = total - sum(plan.shard_samples[n] for n in todo)
    progress(plan.split, done, total)
    shared = (partial, plan, [(first[n], samples[first[n] : first[n + 1]]) for n in todo])
    jobs = list(zip(todo, range(len(todo)), strict=True))
    if workers > 1 and len(todo) > 1:
        # Forked processes inherit the samples; only numbers travel.
        with multiprocessing.get_context("fork").Pool(
            workers, initializer=_share, initargs=(shared,)
        ) as pool:
            for number in pool.imap_unordered(_write_one, jobs):
                done += plan.shard_samples[number]
                progress(plan.split, done, total)
        return
    _share(shared)
    for job in jobs:
        done += plan.shard_samples[_write_one(job)]
        progress(plan.split, done, total)


_shared: tuple[Path, Plan, list[tuple[int, list[Sample]]]]


def _share(shared: tuple[Path, Plan, list[tuple[int, list[Sample]]]]) -> None:
    global _shared
    _shared = shared


def _write_one(job: tuple[int, int]) -> int:
    """Write one shard and its facts; returns its number."""
    from webdataset import TarWriter

    number, at = job
    partial, plan, tasks = _shared
    first, samples = tasks[at]
    path = partial / plan.shard_name(number)
    staging = path.with_suffix(".part")
    undecodable = []
    with open(staging, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for i, sample in enumerate(samples, first):
            data = sample.read()
            suffix = _suffix(data, sample.name)
            if plan.image_size is not None:
                try:
                    halved = images.halve(images.decode(data), plan.image_size)
                except ValueError:  # kept untouched: in training it has its place, but no weight
                    undecodable.append(sample.name)
                else:
                    if halved is not None:
                        data, suffix = images.encode(halved, plan.form), plan.form
            label = str(sample.label).encode()
            tar.write({"__key__": _key(i, sample.name), suffix: data, "cls": label})
    files.fsync(staging)
    rows = np.array([found.entry for found in scan_shard(staging)], dtype=INDEX_DTYPE)
    rows["shard"] = number
    np.save(path.with_suffix(".index.npy"), rows)
    shard = Shard(path.name, len(samples), staging.stat().st_size, files.sha256(staging))
    facts = asdict(shard) | {"undecodable": undecodable}
    files.replace_text(path.with_suffix(".json"), json.dumps(facts))
    os.rename(staging, path)
    return number


def _finish(partial: Path, plan: Plan) -> None:
    """Gather the shards' facts into index and manifest."""
    shards, index, undecodable, sidecars = [], [], [], [partial / PLAN]
    for number in range(len(plan.shard_samples)):
        path = partial / plan.shard_name(number)
        facts = json.loads(path.with_suffix(".json").read_text())
        undecodable += facts.pop("undecodable")
        shards.append(Shard(**facts))
        index.append(np.load(path.with_suffix(".index.npy")))
        sidecars += [path.with_suffix(".json"), path.with_suffix(".index.npy")]
    np.save(partial / INDEX, np.concatenate(index))
    manifest = Manifest(
        split=plan.split,
        source=plan.source,
        plan=plan.digest,
        classes=plan.classes,
        samples=plan.samples,
        stored="original" if plan.image_size is None else "halved",
        image_size=plan.image_size,
        form=plan.form,
        undecodable=undecodable,
        shards=shards,
        index_sha256=files.sha256(partial / INDEX),
    )
    files.replace_text(partial / MANIFEST, manifest.to_json())
    for sidecar in sidecars:
        sidecar.unlink()


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
