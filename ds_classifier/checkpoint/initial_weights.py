"""Starting a training from other weights: --init_from.

From guided-diffusion's file, an export or a run: all weights; or all but a head of another class
count; or those of another image size, whose positional embedding is interpolated.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_classifier.checkpoint.fitting import differences, fitting_settings, tensors_of
from ds_classifier.checkpoint.weights import (
    find_recorded,
    read_recorded,
    read_weights,
    refuse_not_finite,
)
from ds_classifier.config import Settings
from ds_classifier.model import parse_channel_mult

POSITIONAL_EMBEDDING = "out.2.positional_embedding"  # of the attention pool


def load_initial_weights(
    classifier: nn.Module, path: Path, settings: Settings, classes: list[str]
) -> list[str]:
    """Start a classifier from other weights; returns lines for the screen.

    path: a guided-diffusion .pt, an export, a checkpoint or a run. settings, classes: those of
    `classifier`. The first line says where the weights are from, the others what of them was left
    out or changed, and what they were trained for otherwise.
    Raises ValueError for weights of another architecture, naming the flags that would fit, and for
    some that are not finite: training would skip every step.
    """
    try:
        recorded = find_recorded(path)
        weights = read_recorded(recorded) if recorded else read_weights(path)
        refuse_not_finite(weights, path)
    except ValueError as error:
        raise ValueError(f"--init_from: {error}") from None
    theirs = recorded.settings if recorded else fitting_settings(weights, settings)
    own = classifier.state_dict()
    notes = []
    if _resize_positional_embedding(weights, own):
        notes.append(_size_note(settings, theirs, how="the attention pool's positional embedding "
            "is interpolated"))  # fmt: skip
    elif theirs is not None and theirs.image_size != settings.image_size:
        notes.append(_size_note(settings, theirs, how="all weights are kept"))
    head = _head_of_other_classes(weights, own)
    kept = {name: value for name, value in weights.items() if name not in head}
    if weights.keys() != own.keys() or any(own[n].shape != v.shape for n, v in kept.items()):
        raise ValueError(_misfit(path, theirs, settings))
    classifier.load_state_dict(kept, strict=False)
    if head:
        notes.append(
            f"another number of classes, {len(weights[head[0]])} there and {len(classes)} here: "
            f"the head starts anew ({', '.join(head)})"
        )
    if recorded is not None:
        notes += _other_purpose(recorded.settings, recorded.classes, settings, classes)
    origin = f"weights from {path}"
    return [f"{origin}, all but its head" if head else origin, *notes]


def interpolate_positional_embedding(embedding: Tensor, side: int) -> Tensor:
    """An attention pool's positional embedding for a feature map of another side.

    embedding: [C, 1 + S^2], the mean token's first, then the pixels' row by row. Returns
    [C, 1 + side^2]. The mean token's stays; the others are an image of S x S that is interpolated,
    as is usual for vision transformers (Dosovitskiy et al. 2021, section 3.2): bicubic, with
    antialiasing, as open_clip and timm do.
    """
    own_side = math.isqrt(embedding.shape[1] - 1)
    mean, grid = embedding[:, :1], embedding[:, 1:].unflatten(1, (own_side, own_side))
    grid = F.interpolate(
        grid[None].float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([mean, grid[0].flatten(1).to(embedding.dtype)], dim=1)


def _resize_positional_embedding(weights: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Interpolate it in `weights` if it is of another feature map's size; returns whether."""
    got, need = weights.get(POSITIONAL_EMBEDDING), own.get(POSITIONAL_EMBEDDING)
    if got is None or need is None or got.shape == need.shape:
        return False
    if got.dim() != 2 or got.shape[0] != need.shape[0]:
        return False
    pixels = got.shape[1] - 1
    if pixels == 0 or math.isqrt(pixels) ** 2 != pixels:
        return False
    side = math.isqrt(need.shape[1] - 1)
    weights[POSITIONAL_EMBEDDING] = interpolate_positional_embedding(got, side)
    return True


def _head_of_other_classes(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """The last layer's weight and bias if they differ by the class count and by nothing else."""
    layer = list(own)[-1].rpartition(".")[0]  # out.2.c_proj, out.3 or out.2, as the pool has it
    head = [f"{layer}.weight", f"{layer}.bias"]
    if not weights.keys() >= set(head):
        return []
    theirs, ours = ([state[name].shape for name in head] for state in (weights, own))
    other_count = theirs[0][:1] != ours[0][:1] and theirs[1] == theirs[0][:1]
    return head if other_count and theirs[0][1:] == ours[0][1:] else []


def _size_note(settings: Settings, theirs: Settings | None, *, how: str) -> str:
    size = f"{theirs.image_size} px" if theirs else "another size"
    return f"another image size, {size} there and {settings.image_size} px here: {how}"


def _other_purpose(
    theirs: Settings, their_classes: list[str] | None, settings: Settings, classes: list[str]
) -> list[str]:
    """What the weights were trained for otherwise than they will be: noise, classes."""
    notes = []
    was, now = (dict(s.diffusion_kwargs(), noised=s.noised) for s in (theirs, settings))
    changed = [f"{name} {was[name]!r} there, {now[name]!r} here" for name in was
               if was[name] != now[name]]  # fmt: skip
    if changed:
        notes.append(f"another noise process: {'; '.join(changed)}")
    if their_classes is not None and len(their_classes) == len(classes) != 0:
        pairs = [(a, b) for a, b in zip(their_classes, classes, strict=True) if a != b]
        if pairs:
            notes.append(
                f"{len(pairs)} of {len(classes)} classes have other names (such as {pairs[0][0]!r} "
                f"there, {pairs[0][1]!r} here): the head is kept as it is"
            )
    return notes


def _misfit(path: Path, theirs: Settings | None, settings: Settings) -> str:
    """The error for weights of another architecture, with the flags that would fit if there are."""
    needed = None
    if theirs is not None:
        try:
            needed = fitting_settings(tensors_of(_at_size_of(theirs, settings)), settings)
        except ValueError:
            needed = None
    flags = differences(needed, settings) if needed else []
    if not flags:
        return (
            f"--init_from: got {path}, whose parameters are not a classifier's that could be "
            "continued here; need those of guided-diffusion's EncoderUNetModel"
        )
    lines = [f"--{n}: got {getattr(settings, n)!r}; need {getattr(needed, n)!r}" for n in flags]
    return (
        f"--init_from: the classifier in {path} was built with other settings:\n  "
        + "\n  ".join(lines)
        + "\ndo: give these flags"
    )


def _at_size_of(theirs: Settings, settings: Settings) -> Settings:
    """The same blocks and weights for another image size and class count."""
    mult = parse_channel_mult(theirs.classifier_channel_mult, theirs.image_size)
    sides = theirs.classifier_attention_resolutions.split(",")
    factors = {theirs.image_size // int(side) for side in sides if side and int(side) > 0}
    attended = [2**level for level in range(len(mult)) if 2**level in factors]
    return theirs.replace(
        image_size=settings.image_size,
        num_classes=settings.num_classes,
        classifier_channel_mult=",".join(f"{m:g}" for m in mult),
        classifier_attention_resolutions=",".join(
            str(settings.image_size // factor) for factor in attended
        ),
    )
