"""Convert a data source to shards: plan, write with several processes, rename when complete.

OUT/train.partial/ is filled shard by shard. A shard gets its final name when it is complete, and
its facts (samples, bytes, sha256, index rows) are stored next to it. When no shard is missing, the
index and the manifest are written, and one rename turns the directory into OUT/train.

The content of a shard depends on the plan alone. So the bytes are the same for any number of
processes or machines, and after a kill: the same command writes the shards that are missing, and
those whose images have changed since. A finished split is compared with its source only by the
names, labels and sizes of the images.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ds_classifier.common import files
from ds_classifier.common.keyed_random import permutation, stream_key
from ds_classifier.data import images
from ds_classifier.data.arrays import Arrays, Tally
from ds_classifier.data.convert.bad_files import (
    BadFile,
    find_bad,
    find_bad_parallel,
    raise_if_bad,
    read_image,
    split_off_unreadable,
)
from ds_classifier.data.convert.plan import (
    ORIGINAL,
    PLAN,
    Encoding,
    Plan,
    class_lists,
    final_encoding,
    in_order_of_version_0_1,
    is_written,
    make_plan,
    open_partial,
    refuse_other_splits,
)
from ds_classifier.data.convert.samples import DataSource, Sample
from ds_classifier.data.convert.spool import spool_groups
from ds_classifier.data.labels.targets import Targets
from ds_classifier.data.remote.mirror import Mirror
from ds_classifier.data.scan import scan_shard
from ds_classifier.data.shards import (
    BESIDE,
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    TARGETS,
    WEIGHTS,
    Manifest,
    Shard,
    open_shards,
)
from ds_classifier.distributed.pool import in_processes, shared


def convert(
    source: DataSource,
    out: Path,
    *,
    encoding: Encoding = ORIGINAL,
    samples_per_shard: int = 1000,
    shuffle_seed: int = 0,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int, str], None] = lambda done, total, phase: None,
    mirror: Mirror | None = None,
) -> dict[str, Manifest | None]:
    """Write every split of a source as shards under out/SPLIT.

    The training split is shuffled once, so that every shard holds samples of many classes.
    encoding: how images are stored.
    part: (i, n): write only every n-th shard, starting with the i-th. `merge` finishes the splits
    when all parts have been written.
    progress: called with the number of images written, of all images, and what is being done.
    mirror: object storage that `out` stands for; None if it is the output itself.
    Returns the manifest of each split, or None if shards of other parts are missing.
    Raises ValueError if out holds something else, or if files of any split are not images. The
    error lists them all: after the first one, the other files are only checked, not written.
    """
    encoding = final_encoding(encoding, source)
    source = in_order_of_version_0_1(source, out)
    splits: dict[str, list[Sample]] = {}
    bad: dict[str, list[BadFile]] = {}
    for split, samples in source.splits.items():
        splits[split], bad[split] = split_off_unreadable(_shuffled(split, samples, shuffle_seed))
    plans, todo = {}, list(splits)
    if not any(bad.values()):
        for split, samples in splits.items():
            plans[split] = make_plan(source, split, samples, encoding, samples_per_shard)
        refuse_other_splits(out, source, set(plans))
        todo = [split for split, plan in plans.items() if not is_written(out / split, plan)]
    for split in todo:
        if any(bad.values()):
            look = functools.partial(progress, phase=f"{split}, only checked")
            bad[split] += find_bad_parallel(
                splits[split][part[0] :: part[1]], workers, look, source.arrays
            )
        else:
            plan = plans[split]
            partial = open_partial(out, plan)
            if mirror is not None:
                mirror.begin(partial)
            bad[split] += _write_shards(
                partial, plan, splits[split], part, workers, progress, mirror
            )
    raise_if_bad(bad, out, part, source.arrays)
    if part[1] == 1:
        merge(out, mirror)
    return {
        split: open_shards(out / split).manifest if (out / split).exists() else None
        for split in plans
    }


def _shuffled(split: str, samples: list[Sample], seed: int) -> list[Sample]:
    """Return the samples of the training split in random order, and of other splits unchanged."""
    if split != "train":
        return samples
    return [samples[i] for i in permutation(len(samples), stream_key(seed, "convert/shuffle"))]


def merge(out: Path, mirror: Mirror | None = None) -> list[str]:
    """Finish the splits under out whose shards are all written, and return their names.

    mirror: see `convert`.
    Raises ValueError if shards are missing.
    """
    plans = {}
    for partial in sorted(out.glob("*.partial")):
        plan = Plan(**json.loads((partial / PLAN).read_text(encoding="utf-8")))
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
    if plans:
        _refuse_two_class_lists(out)
    for partial, plan in plans.items():
        _finish(partial, plan)
        if mirror is not None:
            mirror.finish(partial)
    for partial, plan in plans.items():
        for spool in partial.glob("spool-*"):  # left by a part that was killed
            shutil.rmtree(spool)
        os.rename(partial, out / plan.split)
    # The facts go last: a kill at any point leaves a split that is complete, or can be continued.
    for plan in plans.values():
        for number in range(len(plan.shard_samples)):
            for suffix in (".json", *(f".{name}" for name in (INDEX, *BESIDE))):
                path = (out / plan.split / plan.shard_name(number)).with_suffix(suffix)
                path.unlink(missing_ok=suffix[1:] in BESIDE)
        (out / plan.split / PLAN).unlink()
    files.fsync(out)
    return [plan.split for plan in plans.values()]


def _refuse_two_class_lists(out: Path) -> None:
    """Raise ValueError if splits in OUT differ in their classes, or in the order of them."""
    lists = class_lists(out)
    first, *others = lists
    for folder in others:
        if lists[folder] != lists[first]:
            raise ValueError(
                f"OUT: got {folder} with other classes than {first}, or with another order of "
                "them; need one class list in OUT; do: convert both again, to another OUT"
            )


def _write_shards(
    partial: Path,
    plan: Plan,
    samples: list[Sample],
    part: tuple[int, int],
    workers: int,
    progress: Callable[[int, int, str], None],
    mirror: Mirror | None,
) -> list[BadFile]:
    """Write the missing shards of a split, and return its files that are not images."""
    first = np.cumsum([0, *plan.shard_samples]).tolist()
    numbers = range(part[0], len(plan.shard_samples), part[1])
    shards = {n: samples[first[n] : first[n + 1]] for n in numbers}
    total = sum(map(len, shards.values()))
    todo = [n for n in numbers if not _is_up_to_date(partial / plan.shard_name(n), shards[n])]
    if todo:  # a manifest left by a killed merge describes the shards before they are replaced
        (partial / MANIFEST).unlink(missing_ok=True)
    for n in todo:
        (partial / plan.shard_name(n)).unlink(missing_ok=True)
    spool = partial / f"spool-{part[0]}-{part[1]}"
    try:
        spooled = spool_groups(
            [s for n in todo for s in shards[n]], spool, workers, plan.split, progress
        )
        done = total - len(spooled)
        progress(done, total, plan.split)
        remaining, bad = iter(spooled), []
        samples_of = {n: [next(remaining) for _ in shards[n]] for n in todo}
        for number, bad_in_shard in in_processes(
            workers,
            _write_shard,
            todo,
            shared=(partial, plan, first, samples_of, multiprocessing.Event(), mirror),
            ordered=False,
        ):
            bad += bad_in_shard
            done += plan.shard_samples[number]
            progress(done, total, plan.split)
        return bad
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _is_up_to_date(path: Path, samples: list[Sample]) -> bool:
    """Return whether a shard exists, and no file of its images has changed since it was begun."""
    if not path.exists():
        return False
    began_ns = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["began_ns"]
    return all(sample.changed_ns() <= began_ns for sample in samples)


def _write_shard(number: int) -> tuple[int, list[BadFile]]:
    """Write one shard and its facts. Returns its number, and its files that are not images.

    After the first bad file, in this process or another one, the rest is only checked.
    """
    from webdataset import TarWriter

    partial, plan, firsts, samples_of, bad_met, mirror = shared()
    first, samples = firsts[number], samples_of[number]
    arrays = None if plan.arrays is None else Arrays(**plan.arrays)
    if bad_met.is_set():
        return number, find_bad(samples, arrays)
    path = partial / plan.shard_name(number)
    staging = path.with_suffix(".part")
    undecodable, tally, began_ns = [], Tally(), time.time_ns()
    with (
        files.naming(staging),
        open(staging, "wb") as file,
        TarWriter(file, encoder=False, mtime=0) as tar,
    ):
        for i, sample in enumerate(samples, first):
            try:
                data, suffix = read_image(sample, arrays)
            except ValueError:
                bad_met.set()
                return number, find_bad(samples[i - first :], arrays)
            if arrays is not None:
                tally.add(arrays.decode(data))
            if plan.image_size is not None:
                try:
                    halved = images.halve(images.decode(data), plan.image_size)
                except ValueError:  # stored untouched; training gives the sample weight 0
                    undecodable.append(sample.name)
                else:
                    if halved is not None:
                        data, suffix = images.encode(halved, plan.form), plan.form
            label = str(sample.label).encode()
            tar.write({"__key__": _key(i, sample.name), suffix: data, "cls": label})
    files.fsync(staging)
    rows = np.array([scanned.entry for scanned in scan_shard(staging)], dtype=INDEX_DTYPE)
    rows["shard"] = number
    np.save(path.with_suffix(".index.npy"), rows)
    if plan.targets is not None and samples[0].target is not None:
        np.save(path.with_suffix(f".{TARGETS}"), np.stack([s.target for s in samples]))
    if plan.weighted:
        np.save(path.with_suffix(f".{WEIGHTS}"), np.array([s.weight for s in samples], np.float32))
    shard = Shard(path.name, len(samples), staging.stat().st_size, files.sha256(staging))
    facts = asdict(shard) | {"undecodable": undecodable, "began_ns": began_ns}
    if arrays is not None:
        facts["tally"] = tally.to_json()
    files.replace_text(path.with_suffix(".json"), json.dumps(facts))
    os.rename(staging, path)
    if mirror is not None:
        mirror.add_shard(path)
    return number, []


def _finish(partial: Path, plan: Plan) -> None:
    """Collect the facts of all shards in an index and a manifest."""
    if (partial / MANIFEST).is_file():  # written before, by a merge that was killed
        return
    shards, index, undecodable, tally = [], [], [], Tally()
    for number in range(len(plan.shard_samples)):
        path = partial / plan.shard_name(number)
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        undecodable += facts.pop("undecodable")
        tally.update(Tally(*facts.pop("tally", ())))
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
        held_out=plan.held_out,
        arrays=None if plan.arrays is None else tally.finish(Arrays(**plan.arrays)),
        targets=Targets.from_json(plan.targets),
        targets_sha256=_joined(partial, plan, TARGETS),
        weights_sha256=_joined(partial, plan, WEIGHTS),
    )
    files.replace_text(partial / MANIFEST, manifest.to_json())


def _joined(partial: Path, plan: Plan, name: str) -> str:
    """Write the rows of all shards to the array `name`; return its SHA-256, or "" without rows."""
    names = [plan.shard_name(number) for number in range(len(plan.shard_samples))]
    paths = [(partial / shard).with_suffix(f".{name}") for shard in names]
    if not paths[0].exists():
        return ""
    first = np.load(paths[0], mmap_mode="r")
    shape = (plan.samples, *first.shape[1:])
    joined = np.lib.format.open_memmap(partial / name, "w+", first.dtype, shape)
    at = 0
    for path in paths:
        rows = np.load(path)
        joined[at : at + len(rows)] = rows
        at += len(rows)
    joined.flush()
    return files.sha256(partial / name)


def _key(number: int, name: str) -> str:
    """Return a key without dots that is unique by its number and still names the source file."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[-60:]
    return f"{number:09d}_{stem}"
