"""Which settings build a classifier of given tensors: guided-diffusion's files do not say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_classifier.config import Settings
from ds_classifier.model import create_classifier, parse_channel_mult


def fitting_settings(weights: dict[str, Tensor], given: Settings) -> Settings | None:
    """The settings that build a classifier of exactly these tensors, as near to `given` as can be.

    weights: without empty dimensions, as `weights.read_weights` gives them; their names and shapes
    may be anything. None if no setting does.
    """
    if fits(weights, given):
        return given
    fitting = []
    for candidate in filter(lambda settings: fits(weights, settings), _candidates(weights, given)):
        # What the tensors do not decide stays as given.
        for name, value in vars(given).items():
            nearer = candidate.replace(**{name: value})
            if nearer != candidate and fits(weights, nearer):
                candidate = nearer
        fitting.append(candidate)
    return min(fitting, key=lambda settings: len(differences(settings, given)), default=None)


def differences(settings: Settings, given: Settings) -> list[str]:
    """The flags that `given` would have to have another value for; 0 classes: as many as fit."""
    return [
        name
        for name, value in vars(given).items()
        if value != getattr(settings, name) and (name, value) != ("num_classes", 0)
    ]


def fits(weights: dict[str, Tensor], settings: Settings) -> bool:
    """Whether settings build a classifier of exactly these names and shapes."""
    try:
        own = tensors_of(settings)
    except ValueError:
        return False
    return {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in weights.items()
    }


def tensors_of(settings: Settings) -> dict[str, Tensor]:
    """The state dict of a classifier of these settings, without storage.

    Raises ValueError for settings that build none.
    """
    with torch.device("meta"):
        return create_classifier(**settings.model_kwargs()).state_dict()


def _candidates(weights: dict[str, Tensor], given: Settings) -> list[Settings]:
    """Settings read off the tensors; several where levels and depth can be told apart only so far
    as that halving residual blocks look like others."""
    try:
        width = weights["time_embed.0.weight"].shape[1]
        in_channels = weights["input_blocks.0.0.weight"].shape[1]
        pool, num_classes, side = _head_of(weights)
        first_norm = weights["input_blocks.1.0.out_layers.0.weight"].shape[0]
        first_emb = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    except (KeyError, IndexError):
        return []
    blocks = len({name.split(".")[1] for name in weights if name.startswith("input_blocks.")})
    strided = sum(f"input_blocks.{i}.0.op.weight" in weights for i in range(blocks))
    found = []
    for levels in [strided + 1] if strided else range(1, blocks):
        # Of `blocks`, one is the first convolution and levels - 1 halve: levels * (depth + 1) all.
        if blocks % levels:
            continue
        depth = blocks // levels - 1
        image_size = side * 2 ** (levels - 1) if side else given.image_size
        firsts = [1 + level * (depth + 1) for level in range(levels)]
        norms = [weights.get(f"input_blocks.{i}.0.out_layers.0.weight") for i in firsts]
        if any(norm is None or norm.dim() == 0 for norm in norms):
            continue
        mult = tuple(norm.shape[0] / width for norm in norms)
        attended = [
            str(image_size // 2**level)
            for level, i in enumerate(firsts)
            if f"input_blocks.{i}.1.qkv.weight" in weights
        ]
        settings = given.replace(
            image_size=image_size,
            in_channels=in_channels,
            num_classes=num_classes,
            classifier_width=width,
            classifier_depth=depth,
            classifier_attention_resolutions=",".join(attended),
            classifier_use_scale_shift_norm=first_emb == 2 * first_norm,
            classifier_resblock_updown=not strided,
            classifier_pool=pool,
            classifier_channel_mult="",
        )
        try:
            usual = parse_channel_mult("", image_size) == mult
        except ValueError:
            usual = False
        if not usual:
            settings = settings.replace(classifier_channel_mult=",".join(f"{m:g}" for m in mult))
        found.append(settings)
    return found


def _head_of(weights: dict[str, Tensor]) -> tuple[str, int, int | None]:
    """The pool, the classes, and the side of the last feature map where the head tells it."""
    if "out.2.positional_embedding" in weights:
        tokens = weights["out.2.positional_embedding"].shape[1]
        return "attention", weights["out.2.c_proj.weight"].shape[0], math.isqrt(tokens - 1)
    if "out.3.weight" in weights:
        head = weights["out.3.weight"]
        return "adaptive" if head.dim() == 4 else "spatial_v2", head.shape[0], None
    return "spatial", weights["out.2.weight"].shape[0], None
