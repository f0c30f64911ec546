"""What a conversion will write, settled before it writes: the encoding, the shards, their place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ds_classifier.data.convert.samples import DataSource, Sample
from ds_classifier.data.shards import MANIFEST, open_shards

PLAN = "plan.json"


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    image_size: None: bytes untouched. S: halved as far as every crop at S pixels begins with, and
    encoded as `form`; images that are small enough already are copied untouched.
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


ORIGINAL = Encoding()


@dataclass(frozen=True)
class Plan:
    """What a split's shards will hold. digest: of names, labels, sizes and the encoding."""

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


def refuse_other_splits(out: Path, source: DataSource, planned: set[str]) -> None:
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


def final_encoding(encoding: Encoding, source: DataSource) -> Encoding:
    """The store that comes out: images that were halved stay so, and cannot grow again."""
    if source.halved is None:
        return encoding
    size, form = source.halved
    if encoding.image_size is None:
        return Encoding(size, form)
    if encoding.image_size > size or (form, encoding.form) == ("jpg", "png"):
        raise ValueError(
            f"--image_size, --form: got {encoding}, from images that are {Encoding(size, form)} in "
            f"{source.name}; need what they still allow; do: convert the originals"
        )
    return encoding


def make_plan(
    source: DataSource,
    split: str,
    samples: list[Sample],
    encoding: Encoding,
    samples_per_shard: int,
) -> Plan:
    count = -(-len(samples) // samples_per_shard)
    ends = [len(samples) * (n + 1) // count for n in range(count)]  # they differ by one at most
    facts = dict(
        split=split,
        source=Path(source.name).name,
        classes=source.classes,
        samples=len(samples),
        shard_samples=np.diff([0, *ends]).tolist(),
        image_size=encoding.image_size,
        form=encoding.form if encoding.image_size else "",
    )
    digest = hashlib.sha256(json.dumps({k: v for k, v in facts.items() if k != "source"}).encode())
    for sample in samples:
        size = sample.size()
        name = os.path.basename(sample.name)  # however the way to the source was spelled
        digest.update(f"{name}\0{sample.label}\0{size}\n".encode(errors="surrogateescape"))
    return Plan(digest=digest.hexdigest(), **facts)


def is_written(folder: Path, plan: Plan) -> bool:
    if not folder.exists():
        return False
    if (folder / MANIFEST).is_file() and open_shards(folder).manifest.plan == plan.digest:
        return True
    raise ValueError(
        f"OUT: got {folder}, which holds something else already; need a free place; do: remove it, "
        "or choose another OUT"
    )


def open_partial(out: Path, plan: Plan) -> Path:
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
            f"OUT: got {partial}, the unfinished conversion of another source or encoding; need "
            "one in OUT; do: finish it, remove it, or choose another OUT"
        )
    return partial
