"""Taking the classifier away: to and from guided-diffusion's modelNNNNNN.pt.

The file is a plain fp32 state dict that loads strictly, weights_only, into the reference's
`create_classifier`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_classifier import checkpoint
from ds_classifier.config import Settings
from ds_classifier.model import CHANNEL_MULT, create_classifier, parse_channel_mult
from ds_classifier.weights import read_weights

REFERENCE_SIZES = (64, 128, 256, 512)
REFERENCE_CLASSES = 1000
HEAD = "out."  # parameters whose shapes follow the class count


def export_reference(source: Path, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write a checkpoint's weights as the reference's modelNNNNNN.pt.

    source: a checkpoint, or a run (its newest). out: a directory; None: the run's export/.
    Before the file gets its name it is read back into a fresh classifier and compared bit by bit.
    Returns its path, and what keeps stock guided-diffusion from loading it (empty: it loads).
    Raises ValueError where source holds no valid checkpoint.
    """
    found = checkpoint.resolve_checkpoint(source)
    state = checkpoint.read_state(found)
    settings = Settings(**state["settings"])
    weights = checkpoint.read_model(found)
    classifier = create_classifier(**settings.model_kwargs())
    classifier.load_state_dict(weights)
    out = out or found.parents[1] / "export"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"model{state['step']:06d}.pt"
    staging = path.with_suffix(".staging")
    # The reference's parameter order, plain tensors of their own storage.
    torch.save({name: value.clone() for name, value in classifier.state_dict().items()}, staging)
    again = torch.load(staging, weights_only=True)
    if list(again) != list(classifier.state_dict()) or any(
        not torch.equal(again[name], weights[name]) for name in weights
    ):
        raise RuntimeError(f"{staging}: reads back other weights than the checkpoint's")
    os.replace(staging, path)
    return path, reference_obstacles(settings)


def reference_obstacles(settings: Settings) -> list[str]:
    """What of a classifier stock guided-diffusion has wired in otherwise, a line each."""
    obstacles = []
    if settings.num_classes != REFERENCE_CLASSES:
        obstacles.append(
            f"{settings.num_classes} classes: create_classifier has {REFERENCE_CLASSES} wired in"
        )
    if settings.in_channels != 3:
        obstacles.append(f"{settings.in_channels} channels: create_classifier has in_channels=3")
    mult = parse_channel_mult(settings.classifier_channel_mult, settings.image_size)
    if settings.image_size not in REFERENCE_SIZES or mult != CHANNEL_MULT[settings.image_size]:
        obstacles.append(
            f"image_size {settings.image_size}, multipliers {', '.join(f'{m:g}' for m in mult)}: "
            f"create_classifier knows sizes {', '.join(map(str, REFERENCE_SIZES))} and theirs"
        )
    return obstacles


def load_initial_weights(classifier: nn.Module, source: Path) -> str:
    """Start a classifier from other weights; returns a line that says what was taken.

    source: a guided-diffusion .pt, a checkpoint or a run. A head of another class count is left as
    it is. Raises ValueError for weights of another architecture.
    """
    weights = _read_weights(source)
    own = classifier.state_dict()
    other_shape = [
        name for name, value in weights.items() if name in own and own[name].shape != value.shape
    ]
    missing = sorted(set(own) ^ set(weights))
    # A head of another class count differs in its outputs alone, not in what it reads.
    misfit = [
        name
        for name in other_shape
        if not name.startswith(HEAD) or own[name].shape[1:] != weights[name].shape[1:]
    ]
    if missing or misfit:
        example = (missing or misfit)[0]
        raise ValueError(
            f"--init_from: got {source}, whose parameters are those of another classifier (such as "
            f"{example}); need the same classifier_* settings and image_size"
        )
    classifier.load_state_dict(
        {name: value for name, value in weights.items() if name not in other_shape}, strict=False
    )
    if other_shape:
        return (
            f"weights from {source}, all but its head ({', '.join(other_shape)}): it has another "
            "number of classes, so the head starts anew"
        )
    return f"weights from {source}"


def _read_weights(source: Path) -> dict[str, Tensor]:
    if source.is_file():
        try:
            return read_weights(source)
        except ValueError as error:
            raise ValueError(f"--init_from: {error}") from None
    return checkpoint.read_model(checkpoint.resolve_checkpoint(source))
