"""The plan of a conversion: the encoding, the shards, the directories."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ds_classifier.data.convert.samples import DataSource, Sample
from ds_classifier.data.labels.classes import in_order
from ds_classifier.data.labels.targets import ONE_CLASS
from ds_classifier.data.shards import MANIFEST, open_shards, parse_manifest

PLAN = "plan.json"


@dataclass(frozen=True)
class Encoding:
    """The way images are stored.

    image_size: S: halve an image as often as every crop of S pixels would (`images.halve`), and
    encode it as `form`; images that need no halving are copied untouched. None: copy all untouched.
    form: "png", lossless, or "jpg", quality 95 4:4:4.
    """

    image_size: int | None = None
    form: str = "jpg"

    def __str__(self) -> str:
        return (
            "original"
            if self.image_size is None
            else f"halved for {self.image_size} px, {self.form}"
        )


ORIGINAL = Encoding()


@dataclass(frozen=True)
class Plan:
    """The content of the shards of a split.

    shard_samples: number of samples per shard.
    digest: sha256 of all other fields but `source`, and of the names, labels, sizes and marks of
        images.
    held_out: see `DataSource`. arrays: what its arrays have in common, in JSON; None for images.
    targets: their kind, in JSON; None for one class per image. weighted: samples have weights.
    """

    split: str
    source: str
    classes: list[str]
    samples: int
    shard_samples: list[int]
    image_size: int | None
    form: str
    digest: str
    held_out: str = ""
    arrays: dict[str, Any] | None = None
    targets: dict[str, Any] | None = None
    weighted: bool = False

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:06d}.tar"


def class_lists(out: Path) -> dict[Path, list[str]]:
    """Return the class list of every split in OUT, finished or not, by its directory.

    Raises ValueError for a damaged manifest.
    """
    lists = {}
    for split in ("train", "val"):
        finished, begun = out / split, out / f"{split}.partial"
        if (finished / MANIFEST).is_file():
            manifest = (finished / MANIFEST).read_bytes()
            lists[finished] = parse_manifest(manifest, finished / MANIFEST).classes
        if (begun / PLAN).is_file():
            lists[begun] = json.loads((begun / PLAN).read_text(encoding="utf-8"))["classes"]
    return lists


def refuse_other_splits(out: Path, source: DataSource, planned: set[str]) -> None:
    """Raise ValueError if OUT holds another split, finished or not, with other classes.

    planned: the splits that the conversion writes; only others are checked.
    """
    for folder, classes in class_lists(out).items():
        if folder.stem not in planned and classes != source.classes:
            raise ValueError(
                f"OUT: got {folder}, with other classes than {source.name}; need one class "
                "list in OUT; do: remove it, or choose another OUT"
            )


def in_order_of_version_0_1(source: DataSource, out: Path) -> DataSource:
    """Return the source with its classes in the order of the splits in OUT, if 0.1 made them.

    Version 0.1 sorted names that are numbers as text: 1, 10, 2. What it began is continued so.
    """
    as_text = sorted(source.classes)
    if source.classes == as_text or source.classes != in_order(as_text):
        return source
    if source.targets != ONE_CLASS or as_text not in class_lists(out).values():
        return source
    label = {class_name: i for i, class_name in enumerate(as_text)}
    new_label = [label[class_name] for class_name in source.classes]
    splits = {
        split: [replace(sample, label=new_label[sample.label]) for sample in samples]
        for split, samples in source.splits.items()
    }
    return replace(source, classes=as_text, splits=splits)


def final_encoding(encoding: Encoding, source: DataSource) -> Encoding:
    """Return the encoding of the shards, given the encoding that was asked for.

    Images that the source has halved stay halved. Raises ValueError if larger images are asked for,
    or lossless ones from a JPEG source.
    """
    if source.arrays is not None and encoding.image_size is not None:
        raise ValueError(
            f"--image_size: got {encoding.image_size} for arrays ({source.arrays}), which are not "
            "resized; do: drop it"
        )
    if source.halved is None:
        return encoding
    size, form = source.halved
    if encoding.image_size is None:
        return Encoding(size, form)
    if encoding.image_size > size or (form, encoding.form) == ("jpg", "png"):
        raise ValueError(
            f"--image_size, --form: got {encoding}, from images that are {Encoding(size, form)} in "
            f"{source.name}; need that size or less, and no png from jpg; do: convert the originals"
        )
    return encoding


def make_plan(
    source: DataSource,
    split: str,
    samples: list[Sample],
    encoding: Encoding,
    samples_per_shard: int,
) -> Plan:
    """Return the plan of a split: shards whose sizes differ by one sample at most.

    Raises ValueError for a training split in which no image counts, or none has a class.
    """
    if split == "train":
        _refuse_nothing_to_learn(source, samples)
    count = -(-len(samples) // samples_per_shard)
    ends = [len(samples) * (n + 1) // count for n in range(count)]
    facts = dict(
        split=split,
        source=Path(source.name).name,
        classes=source.classes,
        samples=len(samples),
        shard_samples=np.diff([0, *ends]).tolist(),
        image_size=encoding.image_size,
        form=encoding.form if encoding.image_size else "",
    )
    if source.held_out:  # other digests stay as they were before there were shares, and arrays
        facts["held_out"] = source.held_out
    if source.arrays is not None:
        facts["arrays"] = source.arrays.to_json()
    if source.targets != ONE_CLASS:
        facts["targets"] = source.targets.to_json()
    if any(sample.weight is not None for sample in samples[:1]):
        facts["weighted"] = True
    digest = hashlib.sha256(json.dumps({k: v for k, v in facts.items() if k != "source"}).encode())
    for sample in samples:
        size = sample.size()
        name = os.path.basename(sample.name)  # the same for any path to the source
        mark = getattr(sample.content, "mark", "")
        digest.update(f"{name}\0{sample.label}\0{size}{mark}\n".encode(errors="surrogateescape"))
        if sample.target is not None:
            digest.update(sample.target.tobytes())
        if sample.weight is not None:
            digest.update(f"weight {sample.weight!r}\n".encode())
    return Plan(digest=digest.hexdigest(), **facts)


def _refuse_nothing_to_learn(source: DataSource, samples: list[Sample]) -> None:
    """Raise ValueError if all training images have the weight 0, or none shows a class."""
    if all(sample.weight == 0 for sample in samples):
        raise ValueError(
            f"{source.name}: got weight 0 for all training images; need one above 0; do: correct "
            "the weights, or the splits"
        )
    if source.targets.kind == "classes" and not any(sample.target.any() for sample in samples):
        raise ValueError(
            f"{source.name}: got training images without any class; need some with one; do: "
            "correct the labels, or the splits"
        )


def is_written(folder: Path, plan: Plan) -> bool:
    """Return whether a folder is the finished split of a plan. Raises ValueError if it is not."""
    if not folder.exists():
        return False
    held = ""
    if (folder / MANIFEST).is_file():
        manifest = open_shards(folder).manifest
        if manifest.plan == plan.digest:
            return True
        if manifest.held_out != plan.held_out:
            held = f", converted {_held(manifest.held_out)}, not {_held(plan.held_out)}"
    raise ValueError(
        f"OUT: got {folder}, which already holds something else{held}; need a new directory; do: "
        "remove it, or choose another OUT"
    )


def _held(share: str) -> str:
    return f"with --val {share}" if share else "without a share for --val"


def open_partial(out: Path, plan: Plan) -> Path:
    """Return the directory to write shards to, and create it if it does not exist.

    It is created together with its plan by one rename, so several parts can start at once.
    Raises ValueError if it holds shards of another plan.
    """
    partial = out / f"{plan.split}.partial"
    staging = out / f".{plan.split}.{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    (staging / PLAN).write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")
    try:
        os.rename(staging, partial)  # replaces nothing but an empty directory
    except OSError:
        shutil.rmtree(staging)
    if not (partial / PLAN).is_file():
        raise ValueError(f"OUT: got {partial} without {PLAN}; need a new directory; do: remove it")
    if json.loads((partial / PLAN).read_text(encoding="utf-8"))["digest"] != plan.digest:
        raise ValueError(
            f"OUT: got {partial}, the unfinished conversion of another source, encoding, share or "
            "targets; need one in OUT; do: finish it, remove it, or choose another OUT"
        )
    return partial
