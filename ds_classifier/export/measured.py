"""Find what evaluate.py measured of a classifier: the accuracies that its export records.

The models hold the fields that an export reads; an evaluation's JSON has more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from ds_classifier.checkpoint.weights import WeightsFile
from ds_classifier.evaluation.format import (
    EVALUATION_FORMAT,
    EVALUATION_VERSION,
    PRECISIONS,
    evaluation_name,
)


class _Strict(BaseModel, strict=True, allow_inf_nan=False):
    """A model that accepts no value of another type, and no NaN or infinity."""


class Means(_Strict):
    """The means over a validation set; null where the number is not finite."""

    loss: float | None
    ece: float | None
    grad_norm: float | None


class ClassMeans(Means):
    """The means of one class per image, which may be a bin."""

    accuracy: float = Field(alias="acc@1")
    top_5: float | None = Field(alias="acc@5")


class AnswerMeans(Means):
    """The means of several classes per image: of yes or no for each."""

    accuracy: float = Field(alias="acc")
    average_precision: float = Field(alias="mAP")


class Level(_Strict):
    """A noise level."""

    t: int
    log_snr: float


class ClassLevel(ClassMeans, Level):
    """The means at one noise level."""


class AnswerLevel(AnswerMeans, Level):
    """The means at one noise level."""


class Levels(_Strict):
    """The means under uniform t, and at single noise levels."""

    uniform_t: ClassMeans | AnswerMeans
    levels: list[ClassLevel | AnswerLevel]


class Data(_Strict):
    """The validation set."""

    samples: int
    fingerprint: str


class Evaluation(_Strict):
    """An evaluation's JSON."""

    format: str
    version: int
    weights_sha256: str
    settings: dict[str, Any]
    precision: str
    noise: str
    data: Data
    classifier: Levels


def find_evaluation(source: WeightsFile) -> dict[str, Any] | None:
    """Return the evaluation of exactly this classifier in eval/ of its run, or None.

    If there are several, the one of the highest precision is returned. An evaluation of the same
    weights with other settings (a bare file's noise process is only assumed) is of another
    classifier. A damaged evaluation is ignored.
    """
    names = [evaluation_name(source.name, precision) for precision in PRECISIONS]
    read = (_read(source, source.home / "eval" / f"{name}.json") for name in names)
    return next((evaluation for evaluation in read if evaluation is not None), None)


def _read(source: WeightsFile, path: Path) -> dict[str, Any] | None:
    """Read an evaluation for the JSON of an export; None if it is damaged or of other weights."""
    try:
        text = path.read_text(encoding="utf-8")
        record = Evaluation.model_validate_json(text)
    except (OSError, ValueError):
        return None
    settings = source.settings.model_kwargs() | source.settings.diffusion_kwargs()
    recorded = {"classifier": "", "classifier_args": ""} | record.settings  # not in older ones
    kind = (record.format, record.version) == (EVALUATION_FORMAT, EVALUATION_VERSION)
    if not kind or (record.weights_sha256, recorded) != (source.sha256, settings):
        return None
    rows = json.loads(text)["classifier"]  # with the fields that only a reader of the export uses
    return {
        "precision": record.precision,
        "samples": record.data.samples,
        "data": record.data.fingerprint,
        "noise": record.noise,
        "uniform_t": rows["uniform_t"],
        "levels": rows["levels"],
    }
