"""Infer from its tensors which settings a classifier was built with.

A bare file of weights, such as guided-diffusion's published ones, does not record them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_classifier.common import text
from ds_classifier.config import Settings
from ds_classifier.model import create_without_storage, parse_channel_mult

ENCODER = "guided-diffusion's EncoderUNetModel"  # in errors
NAMED = 3  # tensors of a kind that an error names, at most
HEAD = "out."  # how the names of the pool and the last layer begin


def infer_settings(weights: dict[str, Tensor], given: dict[str, Any], path: Path) -> Settings:
    """Return the settings that build a classifier of exactly these tensors.

    weights: without empty dimensions, as `weights.read_weights` returns them.
    given: the settings that the user named; num_classes 0 stands for any number. They decide where
        the tensors leave a choice, and what the tensors do not show keeps its default.
    path: named in errors.
    Raises ValueError if the tensors are not a classifier's, if `given` contradicts them, or if they
    fit several classifiers and `given` does not decide between these.
    """
    named = Settings(**given)
    fitting = _fitting(weights, named)
    if not fitting:
        nearest = nearest_tensors(weights, named)
        raise ValueError(f"got {path}, {misfit(weights, nearest, ENCODER)}")
    wrong = [[n for n in differences(s, named) if n in given] for s in fitting]
    agreeing = [s for s, names in zip(fitting, wrong, strict=True) if not names]
    if not agreeing:
        names, nearest = min(zip(wrong, fitting, strict=True), key=lambda pair: len(pair[0]))
        lines = [f"  --{n}: got {given[n]!r}; need {getattr(nearest, n)!r}" for n in names]
        raise ValueError(
            f"the classifier in {path} was built with other settings:\n"
            + "\n".join(lines)
            + "\ndo: drop these flags, or the recipe that sets them: the tensors show the settings"
        )
    first, *others = agreeing
    needed = {
        name: [getattr(settings, name) for settings in agreeing]
        for name, value in vars(first).items()
        if any(getattr(other, name) != value for other in others)
    }
    lines = [f"  --{n}: need {' or '.join(map(repr, values))}" for n, values in needed.items()]
    if first.classifier_pool != "attention" and "image_size" not in given:
        lines.insert(0, "  --image_size: got none; need the side of its images in pixels")
    if lines:
        raise ValueError(
            f"the tensors in {path} fit several classifiers:\n"
            + "\n".join(lines)
            + "\ndo: give these flags"
        )
    return first


def fitting_settings(
    weights: dict[str, Tensor], near: Settings, *, head: bool = True
) -> Settings | None:
    """Return the settings nearest to `near` that build exactly these tensors; None if none do.

    head: False: the weights have none, as those of a diffusion model; it is that of `near`.
    """
    if fits(weights, near, head=head):
        return near
    fitting = _fitting(weights, near, head=head)
    return min(fitting, key=lambda s: len(differences(s, near)), default=None)


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors before the pool: time_embed, input_blocks and middle_block."""
    return {name: value for name, value in tensors.items() if not name.startswith(HEAD)}


def nearest_tensors(
    weights: dict[str, Tensor], near: Settings, *, head: bool = True
) -> dict[str, Tensor]:
    """Return the tensors, on the meta device, of the classifier most like these weights.

    Compared are `near` and the settings that can be read off the weights. head: False: only those
    before the pool.
    """

    def distance(needed: dict[str, Tensor]) -> int:
        """Return the number of names and shapes that differ."""
        return len(_names_and_shapes(weights) ^ _names_and_shapes(needed))

    built = []
    for settings in [*_candidates(weights, near, head=head), near]:
        try:
            tensors = tensors_of(settings)
            built.append(tensors if head else without_head(tensors))
        except ValueError:  # these settings build no classifier
            continue
    return min(built, key=distance, default={})


def misfit(weights: dict[str, Tensor], needed: dict[str, Tensor], network: str) -> str:
    """Return how the tensors of a file differ from those that a network needs, for an error.

    network: its name in the error.
    """
    if 2 * len(weights.keys() & needed.keys()) <= len(needed):
        fault = f"whose tensors ({', '.join(list(weights)[:2])}, ...) are not those of {network}"
        alike = any(name.startswith("input_blocks.") for name in weights)
        return fault + alike * "; do: give the flags that it was built with, to see what differs"
    misshapen = [
        f"{name}: got {list(weights[name].shape)}, need {list(value.shape)}"
        for name, value in needed.items()
        if name in weights and weights[name].shape != value.shape
    ]
    kinds = {
        "missing": [name for name in needed if name not in weights],
        "additional": [name for name in weights if name not in needed],
        "of another shape": misshapen,
    }
    parts = [
        f"{text.count(len(found), 'tensor')} {kind} ({', '.join(found[:NAMED])}"
        f"{', ...' if len(found) > NAMED else ''})"
        for kind, found in kinds.items()
        if found
    ]
    return f"with {'; '.join(parts)}; need the {len(needed)} of {network}"


def _names_and_shapes(tensors: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, value.shape) for name, value in tensors.items()}


def differences(settings: Settings, given: Settings) -> list[str]:
    """Return the names of the settings in which two differ; num_classes 0 in `given` fits any."""
    return [
        name
        for name, value in vars(given).items()
        if value != getattr(settings, name) and (name, value) != ("num_classes", 0)
    ]


def fits(weights: dict[str, Tensor], settings: Settings, *, head: bool = True) -> bool:
    """Return whether settings build a classifier of exactly these names and shapes.

    head: False: without its head.
    Raises ValueError if a network that is not the encoder cannot be built.
    """
    try:
        own = tensors_of(settings)
    except ValueError:
        if settings.classifier:
            raise
        return False
    own = own if head else without_head(own)
    return _names_and_shapes(own) == _names_and_shapes(weights)


def tensors_of(settings: Settings) -> dict[str, Tensor]:
    """Return the state dict of a classifier of these settings, on the meta device where it can be.

    Raises ValueError for settings that build no classifier.
    """
    return create_without_storage(**settings.model_kwargs()).state_dict()


def _fitting(weights: dict[str, Tensor], near: Settings, *, head: bool = True) -> list[Settings]:
    """Return all settings that build these tensors, each as near to `near` as it can be."""
    fitting = []
    for candidate in _candidates(weights, near, head=head):
        if not fits(weights, candidate, head=head):
            continue
        # A setting that the tensors do not decide keeps its value of `near`.
        for name, value in vars(near).items():
            nearer = candidate.replace(**{name: value})
            if nearer != candidate and fits(weights, nearer, head=head):
                candidate = nearer
        fitting.append(candidate)
    return fitting


def _candidates(weights: dict[str, Tensor], near: Settings, *, head: bool = True) -> list[Settings]:
    """Return settings read off the tensors, one per number of levels that their names allow.

    There are several where residual blocks halve the image: these have the names of other blocks.
    """
    try:
        width = weights["time_embed.0.weight"].shape[1]
        in_channels = weights["input_blocks.0.0.weight"].shape[1]
        pool, num_classes, side = near.classifier_pool, near.num_classes, None
        if head:
            pool, num_classes, side = _head_of(weights)
        first_norm = weights["input_blocks.1.0.out_layers.0.weight"].shape[0]
        first_emb = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    except (KeyError, IndexError):
        return []
    blocks = len({name.split(".")[1] for name in weights if name.startswith("input_blocks.")})
    strided = sum(f"input_blocks.{i}.0.op.weight" in weights for i in range(blocks))
    candidates = []
    for levels in [strided + 1] if strided else range(1, blocks):
        # The blocks are the first convolution, depth per level, and one halving between levels:
        # 1 + levels * depth + levels - 1 = levels * (depth + 1).
        if blocks % levels:
            continue
        depth = blocks // levels - 1
        image_size = side * 2 ** (levels - 1) if side else near.image_size
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
        settings = near.replace(
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
        candidates.append(settings)
    return candidates


def _head_of(weights: dict[str, Tensor]) -> tuple[str, int, int | None]:
    """Return the pool, the number of classes, and the side of the last feature map.

    The side is None if the head fits any (all pools but attention).
    """
    if "out.2.positional_embedding" in weights:
        tokens = weights["out.2.positional_embedding"].shape[1]
        return "attention", weights["out.2.c_proj.weight"].shape[0], math.isqrt(tokens - 1)
    if "out.3.weight" in weights:
        head = weights["out.3.weight"]
        return "adaptive" if head.dim() == 4 else "spatial_v2", head.shape[0], None
    return "spatial", weights["out.2.weight"].shape[0], None
