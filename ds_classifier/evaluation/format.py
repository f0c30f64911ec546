"""The names and the format of evaluations: RUN/eval/NAME.json."""

from __future__ import annotations

from typing import Any

from ds_classifier.data.labels.targets import Targets

EVALUATION_FORMAT, EVALUATION_VERSION = "ds_classifier evaluation", 1
PRECISIONS = ("fp32", "bf16", "fp16")  # the first one is the default


def targets_of(record: dict[str, Any]) -> Targets:
    """Return the kind of the evaluated data's targets; the record has none for one class."""
    return Targets.from_json(record.get("targets"))


def evaluation_name(weights: str, precision: str) -> str:
    """Return NAME of eval/NAME.json.

    weights: the name of the evaluated weights. precision: the one that they were evaluated in.
    """
    return weights if precision == PRECISIONS[0] else f"{weights}-{precision}"
