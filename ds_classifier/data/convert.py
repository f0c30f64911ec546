"""A source -> shards: planned first, written by several processes, final when complete.

OUT/train.partial/ is filled shard by shard, each under its name when it is whole, with its facts
(samples, bytes, sha256, index rows) beside it. When no shard is missing, index and manifest are
written and the directory becomes OUT/train by one rename. What a shard holds follows from the plan
alone, so the bytes are the same for any number of processes or machines, and after a kill: the same
command goes on with the shards that are missing, and with those whose pictures changed since. A
split that is finished is not compared with its source again, but by names, labels and sizes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ds_classifier import files
from ds_classifier.data import images
from ds_classifier.data.pool import in_processes, shared
from ds_classifier.data.samples import Sample, Slice, Source
from ds_classifier.data.scan import scan_shard
from ds_classifier.data.shards import (
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    Shard,
    open_shards,
)
from ds_classifier.keyed_random import permutation, stream_key

PLAN = "plan.json"
LARGEST_PICTURE = 1 << 29  # bytes; as many as images.MAX_PIXELS have, unpacked, four channels deep
MOST_BAD = 20  # files told of
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
    Raises ValueError where out holds something else already; or that lists the files that are no
    pictures: after the first the others are only looked for, nothing more is written.
    """
    store = _settled(store, source)
    planned = {}
    for split, samples in source.splits.items():
        order = range(len(samples))
        if split == "train":
            order = permutation(len(samples), stream_key(shuffle_seed, "convert/shuffle"))
        samples = [samples[i] for i in order]
        _refuse_bad(_too_large(samples), out, split, part)
        planned[split] = samples, _plan(source, split, samples, store, samples_per_shard)
    _refuse_other_splits(out, source, set(planned))
    todo = [s for s, (_, plan) in planned.items() if not _already_written(out / s, plan)]
    for split in todo:
        samples, plan = planned[split]
        bad = _write_shards(_partial(out, plan), plan, samples, part, workers, progress)
        _refuse_bad(bad, out, split, part)
    if part[1] == 1:
        merge(out)
    return {
        split: open_shards(out / split).manifest if (out / split).exists() else None
        for split in planned
    }


def _refuse_other_splits(out: Path, source: Source, planned: set[str]) -> None:
    """ValueError where OUT has a split, whole or not, of other classes that would stay beside."""
    for split in {"train", "val"} - planned:
        for folder, facts in ((out / split, MANIFEST), (out / f"{split}.partial", PLAN)):
            if not (folder / facts).is_file():
                continue
            if json.loads((folder / facts).read_text())["classes"] != source.classes:
                raise ValueError(
                    f"OUT: got {folder}, of other classes than {source.name}; need one class list "
                    "in OUT; do: remove it, or choose another OUT"
                )


def _settled(store: Store, source: Source) -> Store:
    """The store that comes out: pictures that were halved stay so, and cannot grow again."""
    if source.halved is None:
        return store
    size, form = source.halved
    if store.image_size is None:
        return Store(size, form)
    if store.image_size > size or (form, store.form) == ("jpg", "png"):
        raise ValueError(
            f"--image_size, --form: got {store}, from pictures that are {Store(size, form)} in "
            f"{source.name}; need what they still allow; do: convert the originals"
        )
    return store


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
        for spool in partial.glob("spool-*"):  # of a part that was killed
            shutil.rmtree(spool)
        os.rename(partial, out / plan.split)
    for plan in plans.values():  # last, so that a kill anywhere leaves what goes on, or is whole
        for number in range(len(plan.shard_samples)):
            for suffix in (".json", ".index.npy"):
                (out / plan.split / plan.shard_name(number)).with_suffix(suffix).unlink()
        (out / plan.split / PLAN).unlink()
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
        size = sample.size()
        name = os.path.basename(sample.name)  # however the way to the source was spelled
        digest.update(f"{name}\0{sample.label}\0{size}\n".encode(errors="surrogateescape"))
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
    """The directory being filled. It appears with its plan, so that parts may begin together.

    Raises ValueError where shards of another plan lie in it.
    """
    partial = out / f"{plan.split}.partial"
    staging = out / f".{plan.split}.{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    (staging / PLAN).write_text(json.dumps(asdict(plan), indent=1))
    try:
        os.rename(staging, partial)  # over an empty directory only
    except OSError:
        shutil.rmtree(staging)
    if not (partial / PLAN).is_file():
        raise ValueError(f"OUT: got {partial} without {PLAN}; need a free place; do: remove it")
    if json.loads((partial / PLAN).read_text())["digest"] != plan.digest:
        raise ValueError(
            f"OUT: got {partial}, the unfinished conversion of another source or store; need one "
            "in OUT; do: finish it, remove it, or choose another OUT"
        )
    return partial


def _write_shards(
    partial: Path,
    plan: Plan,
    samples: list[Sample],
    part: tuple[int, int],
    workers: int,
    progress: Callable[[str, int, int], None],
) -> list[tuple[str, str]]:
    """Write what is missing; returns the files that are no pictures, see `_refuse_bad`."""
    first = np.cumsum([0, *plan.shard_samples]).tolist()
    numbers = range(part[0], len(plan.shard_samples), part[1])
    shards = {n: samples[first[n] : first[n + 1]] for n in numbers}
    total = sum(map(len, shards.values()))
    todo = [n for n in numbers if not _up_to_date(partial / plan.shard_name(n), shards[n])]
    for n in todo:
        (partial / plan.shard_name(n)).unlink(missing_ok=True)
    spool = partial / f"spool-{part[0]}-{part[1]}"
    try:
        flat = _gathered([s for n in todo for s in shards[n]], spool, workers, plan.split, progress)
        done = total - len(flat)
        progress(plan.split, done, total)
        flat = iter(flat)
        tasks = [(first[n], [next(flat) for _ in shards[n]]) for n in todo]
        jobs, bad = list(enumerate(todo)), []
        together = (partial, plan, tasks, multiprocessing.Event())
        for number, found in in_processes(
            workers, _write_one, jobs, shared=together, ordered=False
        ):
            bad += found
            done += plan.shard_samples[number]
            progress(plan.split, done, total)
        return bad
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _up_to_date(path: Path, samples: list[Sample]) -> bool:
    """Whether a shard is written, and no file of its pictures has changed since it was begun."""
    if not path.exists():
        return False
    began_ns = json.loads(path.with_suffix(".json").read_text())["began_ns"]
    return all(sample.changed_ns() <= began_ns for sample in samples)


def _gathered(
    samples: list[Sample],
    spool: Path,
    workers: int,
    split: str,
    progress: Callable[[str, int, int], None],
) -> list[Sample]:
    """The same samples, each quick to read alone.

    Pictures that lie in groups, such as a parquet file's row groups, and are wanted in another
    order are written to files under `spool` once, group by group: as many bytes as they have.
    """
    shutil.rmtree(spool, ignore_errors=True)
    groups: dict[Hashable, list[int]] = {}
    changes, last = 0, None
    for i, sample in enumerate(samples):
        group = getattr(sample.content, "group", None)
        if group is not None:
            groups.setdefault(group, []).append(i)
            changes, last = changes + (group != last), group
    if changes == len(groups):
        return samples
    spool.mkdir()
    wanted = [i for group in sorted(groups) for i in groups[group]]
    cuts = np.linspace(0, len(wanted), workers + 1).astype(int).tolist()
    jobs = list(itertools.pairwise(cuts))
    gathered, done = list(samples), 0
    shared_by_all = (samples, wanted, spool)
    for first, last, ends in in_processes(
        workers, _spool_some, jobs, shared=shared_by_all, ordered=False
    ):
        place = spool / f"{first}.bytes"
        for i, start, end in zip(wanted[first:last], ends, ends[1:], strict=False):
            gathered[i] = replace(samples[i], content=Slice(place, start, end - start))
        done += last - first
        progress(f"{split}, gathering", done, len(wanted))
    return gathered


def _spool_some(job: tuple[int, int]) -> tuple[int, int, list[int]]:
    """Write some of the wanted pictures to one file; returns the job, and where each begins."""
    first, last = job
    samples, wanted, spool = shared()
    ends = [0]
    place = spool / f"{first}.bytes"
    with open(place, "wb") as file, _naming(place):
        for i in wanted[first:last]:
            ends.append(ends[-1] + file.write(samples[i].read()))
    return first, last, ends


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk does not tell which; say the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write_one(job: tuple[int, int]) -> tuple[int, list[tuple[str, str]]]:
    """Write one shard and its facts; returns its number, and its files that are no pictures.

    Where there is one, and once another process has met one, the rest is only looked at.
    """
    from webdataset import TarWriter

    at, number = job
    partial, plan, tasks, bad_met = shared()
    first, samples = tasks[at]
    if bad_met.is_set():
        return number, _bad_among(samples)
    path = partial / plan.shard_name(number)
    staging = path.with_suffix(".part")
    undecodable, began_ns = [], time.time_ns()
    with (
        _naming(staging),
        open(staging, "wb") as file,
        TarWriter(file, encoder=False, mtime=0) as tar,
    ):
        for i, sample in enumerate(samples, first):
            try:
                data, suffix = _picture(sample)
            except ValueError:
                bad_met.set()
                return number, _bad_among(samples[i - first :])
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
    facts = asdict(shard) | {"undecodable": undecodable, "began_ns": began_ns}
    files.replace_text(path.with_suffix(".json"), json.dumps(facts))
    os.rename(staging, path)
    return number, []


def _finish(partial: Path, plan: Plan) -> None:
    """Gather the shards' facts into index and manifest."""
    if (partial / MANIFEST).is_file():  # gathered before, and killed
        return
    shards, index, undecodable = [], [], []
    for number in range(len(plan.shard_samples)):
        path = partial / plan.shard_name(number)
        facts = json.loads(path.with_suffix(".json").read_text())
        undecodable += facts.pop("undecodable")
        del facts["began_ns"]
        shards.append(Shard(**facts))
        index.append(np.load(path.with_suffix(".index.npy")))
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


def _key(number: int, name: str) -> str:
    """A key without dots, unique by its number, that still tells the source file."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[-60:]
    return f"{number:09d}_{stem}"


def _picture(sample: Sample) -> tuple[bytes, str]:
    """A sample's bytes, and its suffix by content: a PNG named .JPEG is stored as .png.

    Raises ValueError where they cannot be read, or begin like no picture.
    """
    try:
        data = sample.read()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    for signature, suffix in _SIGNATURES.items():
        if data.startswith(signature):
            return data, suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return data, "webp"
    raise ValueError(f"got {data[:8]!r}..., which no picture format begins with")


def _bad_among(samples: list[Sample]) -> list[tuple[str, str]]:
    """(name, what is wrong) of those that are no pictures."""
    bad = []
    for sample in samples:
        try:
            _picture(sample)
        except ValueError as error:
            bad.append((sample.name, str(error)))
    return bad


def _too_large(samples: list[Sample]) -> list[tuple[str, str]]:
    sizes = ((sample.name, sample.size()) for sample in samples)
    need = f"need at most {LARGEST_PICTURE}"
    return [(name, f"got {size} bytes; {need}") for name, size in sizes if size > LARGEST_PICTURE]


def _refuse_bad(bad: list[tuple[str, str]], out: Path, split: str, part: tuple[int, int]) -> None:
    """ValueError that lists the first of the files that are no pictures; a file lists them all."""
    listing = out / (f"{split}.bad.txt" if part[1] == 1 else f"{split}.bad-{part[0]}.txt")
    listing.unlink(missing_ok=True)
    if not bad:
        return
    bad = sorted(bad)
    out.mkdir(parents=True, exist_ok=True)
    names = "".join(f"{name}\n" for name, _ in bad)
    listing.write_text(names, errors="surrogateescape")
    lines = [f"{name}: {problem}" for name, problem in bad[:MOST_BAD]]
    if len(bad) > MOST_BAD:
        lines.append(f"... and {len(bad) - MOST_BAD:,} more")
    files = "1 file" if len(bad) == 1 else f"{len(bad):,} files"
    text = (
        f"{files} that cannot be stored; need whole JPEG, PNG, WebP, GIF or BMP pictures; do: "
        f"remove or replace those in {listing}, and remove {out / split}.partial if it is there"
    )
    raise ValueError(f"got {text}:\n  " + "\n  ".join(lines))
