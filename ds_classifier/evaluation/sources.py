"""The weights that an evaluation is of: find them, read them, build their classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.weights import WeightsFile, find_recorded, open_weights
from ds_classifier.config import Settings
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.model import create_classifier
from ds_classifier.model.own import cast_floating, load_weights


def find_sources(source: Path | None, checkpoints: list[str]) -> list[str]:
    """Return the paths of the weights to evaluate, in order.

    source: a run, a checkpoint, an export or a file of weights; None if only checkpoints are given.
    checkpoints: more such paths; ["all"]: every whole checkpoint of the run `source`, the oldest
    first.
    Raises ValueError if one of them does not exist.
    """
    if checkpoints != ["all"]:
        paths = [*([source] if source else []), *map(Path, checkpoints)]
        for path in paths:
            find_recorded(path)
        return list(map(str, paths))
    if source is None:
        raise ValueError(
            "--checkpoints: got all; need the run too; do: ds-classifier evaluate RUN ..."
        )
    whole = []
    for path in reversed(disk.list_checkpoints(source / "checkpoints")):
        if problem := disk.damage(path):
            distributed.say(f"skipped {path}: {problem}")
        else:
            whole.append(str(path))
    if not whole:
        raise ValueError(f"--checkpoints: got all; need a whole one in {source}")
    return whole


def read_source(
    path: Path, given: dict[str, Any], device: torch.device
) -> tuple[WeightsFile, dict[str, Tensor]]:
    """Return the weights' description, on every rank, and the weights, on rank 0 only (else {})."""
    weights: dict[str, Tensor] = {}

    def read() -> dict[str, Any]:
        source, tensors = open_weights(path, given)
        weights.update(tensors)
        source.refuse_contradicting_flags(given)
        return vars(source) | {"path": str(source.path), "settings": vars(source.settings)}

    answer = distributed.on_rank_0(read, device)
    paths = {"path": Path(answer["path"]), "settings": Settings(**answer["settings"])}
    return WeightsFile(**answer | paths), weights


def build_classifier(
    settings: Settings, weights: dict[str, Tensor], precision: str, device: torch.device
) -> nn.Module:
    """Return the classifier in eval mode, with rank 0's weights on every rank."""
    classifier = create_classifier(**settings.model_kwargs())
    if weights:
        load_weights(classifier, weights)
    classifier.to(device).eval().requires_grad_(False)
    for tensor in classifier.state_dict().values():
        distributed.broadcast_bytes(tensor)
    return cast_floating(classifier, deepspeed_engine.DTYPES[precision])
