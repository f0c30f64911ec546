"""Give the digits targets of another kind: several classes, soft vectors, or bins of a value."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np

from ds_classifier.data.labels.targets import Targets
from ds_classifier.data.shards import MANIFEST, TARGETS, open_shards

# The classes of a digit where it has several, and their names.
PROPERTIES = ("even", "prime", "above 4", "has a loop")
HAS = np.array(
    [[d % 2 == 0, d in (2, 3, 5, 7), d > 4, d in (0, 6, 8, 9)] for d in range(10)], np.uint8
)
# The values of the digits 0 to 9, and the edges between them.
SQUARES = Targets(
    "values",
    values=tuple(float(k * k) for k in range(10)),
    edges=tuple(k * k + k + 0.5 for k in range(9)),
    name="square",
)


def soft_vectors(digits: np.ndarray) -> np.ndarray:
    """Return a vector per digit, [N, 10] fp32: 0.8 on it and 0.2 on the next one."""
    vectors = 0.8 * np.eye(10) + 0.2 * np.roll(np.eye(10), 1, axis=1)
    return vectors[digits].astype(np.float32)


def with_targets(digits: Path, out: Path, kind: str) -> Path:
    """Copy the splits train/ and val/ of the digits with targets of a kind; return `out`.

    A value is the digit's square; its bins hold one value each.
    """
    for split in ("train", "val"):
        shutil.copytree(digits / split, out / split)
        shards = open_shards(digits / split)
        labels, classes = shards.index["label"], shards.manifest.classes
        targets, vectors = SQUARES if kind == "values" else Targets(kind), None
        if kind == "soft":
            vectors = soft_vectors(labels)
        elif kind == "classes":
            vectors, classes = HAS[labels], list(PROPERTIES)
            index = np.array(shards.index)
            index["label"] = vectors.argmax(axis=1)
            np.save(out / split / "index.npy", index)
        facts = dict(targets=targets, classes=classes)
        facts["index_sha256"] = _sha256(out / split / "index.npy")
        if vectors is not None:
            np.save(out / split / TARGETS, vectors)
            facts["targets_sha256"] = _sha256(out / split / TARGETS)
        manifest = dataclasses.replace(shards.manifest, **facts)
        (out / split / MANIFEST).write_text(manifest.to_json())
    return out


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
