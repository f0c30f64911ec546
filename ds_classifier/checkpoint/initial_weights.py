"""Start a training from other weights (--init_from): guided-diffusion's file, an export or a run.

All weights are taken, with two exceptions: a head for another number of classes starts afresh, and
the positional embedding for another image size is interpolated. Of a diffusion model, a UNet, the
first half is taken, whose names are those of the classifier.

The architecture is never taken from the weights: training's settings are fixed before the ranks
meet and compared at every resume, and only rank 0 reads these weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_classifier.checkpoint.fitting import (
    ENCODER,
    differences,
    fitting_settings,
    misfit,
    nearest_tensors,
    tensors_of,
    without_head,
)
from ds_classifier.checkpoint.initial_own import load_own_weights
from ds_classifier.checkpoint.weights import (
    WeightsFile,
    find_recorded,
    read_recorded,
    read_weights,
    refuse_not_finite,
)
from ds_classifier.config import Settings
from ds_classifier.model import parse_channel_mult
from ds_classifier.model.encoder import HEAD_CHANNELS

SECOND_HALF = "output_blocks."  # of a UNet
NOT_TAKEN = ("output_blocks", "out", "label_emb")  # of a UNet
POSITIONAL_EMBEDDING = "out.2.positional_embedding"  # in the attention pool


def load_initial_weights(
    classifier: nn.Module,
    path: Path,
    settings: Settings,
    classes: list[str],
    arrays: dict[str, Any] | None = None,
    targets: dict[str, Any] | None = None,
) -> list[str]:
    """Load other weights into a classifier; return lines for the screen.

    path: a guided-diffusion .pt, of a classifier or a diffusion model, an export, a checkpoint or a
        run.
    settings, classes: the settings of `classifier` and the class names of its training data.
    arrays: what the manifest of these data records of arrays; None: images.
    targets: what it records of the targets; None: one class per image.
    The first line names the origin of the weights. The others say which weights were left out or
    changed, and how the earlier training differs from this one.
    Raises ValueError for weights of another architecture, naming the flags that would fit, and for
    weights that are not finite, with which training would skip every step.
    """
    if settings.classifier:
        return _load_own(classifier, path, settings, classes, arrays, targets)
    try:
        recorded = find_recorded(path)
        weights = read_recorded(recorded, "") if recorded else read_weights(path)
        refuse_not_finite(weights, path)
    except ValueError as error:
        raise ValueError(f"--init_from: {error}") from None
    if any(name.startswith(SECOND_HALF) for name in weights):
        return _load_first_half(classifier, weights, path, settings)
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
        needed = own if theirs else nearest_tensors(weights, settings)
        raise ValueError(
            _other_settings(path, theirs, settings)
            or f"--init_from: got {path}, {misfit(weights, needed, ENCODER)}"
        )
    classifier.load_state_dict(kept, strict=False)
    if head:
        notes.append(
            f"another number of classes, {len(weights[head[0]])} there and {len(classes)} here: "
            f"the head starts afresh ({', '.join(head)})"
        )
    notes += _differences(recorded, settings, classes, arrays, targets)
    origin = f"weights from {path}"
    return [f"{origin}, without its head" if head else origin, *notes]


def _load_first_half(
    classifier: nn.Module, unet: dict[str, Tensor], path: Path, settings: Settings
) -> list[str]:
    """Load what a diffusion model's UNet has in common with a classifier; return lines.

    Raises ValueError as `load_initial_weights` does.
    """
    taken = {name: v for name, v in unet.items() if name.partition(".")[0] not in NOT_TAKEN}
    own = without_head(classifier.state_dict())
    if taken.keys() != own.keys() or any(own[n].shape != v.shape for n, v in taken.items()):
        theirs = fitting_settings(taken, settings, head=False)
        nearest = nearest_tensors(taken, settings, head=False)
        raise ValueError(
            _flags_that_fit(f"the UNet in {path}", theirs, settings)
            or f"--init_from: got {path}, a UNet, "
            + misfit(taken, nearest, "guided-diffusion's UNetModel, time_embed to middle_block")
        )
    classifier.load_state_dict(taken, strict=False)
    tops = {name.partition(".")[0] for name in unet}
    left = [top for top in NOT_TAKEN if top in tops]
    return [
        f"the first half of the diffusion model {path}",
        f"taken: {len(taken)} tensors of time_embed, input_blocks and middle_block; left out: "
        f"{len(unet) - len(taken)} of {', '.join(left)}; the pool (out.*) starts afresh",
        f"{path.name} does not record its noise process, nor how its attention is divided; "
        f"assumed: the noise of this run, and {HEAD_CHANNELS} channels a head in the reference's "
        "legacy order (--use_new_attention_order False)",
    ]


def _load_own(
    classifier: nn.Module,
    path: Path,
    settings: Settings,
    classes: list[str],
    arrays: dict[str, Any] | None,
    targets: dict[str, Any] | None,
) -> list[str]:
    """Do the same as `load_initial_weights` for a network that is not the encoder."""
    try:
        recorded, origin, notes = load_own_weights(classifier, path, settings)
    except ValueError as error:
        raise ValueError(f"--init_from: {error}") from None
    return [origin, *notes, *_differences(recorded, settings, classes, arrays, targets)]


def _differences(
    recorded: WeightsFile | None,
    settings: Settings,
    classes: list[str],
    arrays: dict[str, Any] | None,
    targets: dict[str, Any] | None,
) -> list[str]:
    """Return lines on how the earlier training differs from this one; none for a bare file."""
    if recorded is None:
        return []
    there, here = _scaling(recorded.arrays), _scaling(arrays)
    notes = [f"another x_0: {there} there, {here} here"] if there != here else []
    theirs, own = (given or {"kind": "class"} for given in (recorded.targets, targets))
    if theirs["kind"] != own["kind"]:
        notes.append(f"other targets: {theirs['kind']} there, {own['kind']} here")
    elif theirs != own:
        notes.append(f"other bins of {own['name']}")
    return notes + _training_differences(recorded.settings, recorded.classes, settings, classes)


def interpolate_positional_embedding(embedding: Tensor, side: int) -> Tensor:
    """Return an attention pool's positional embedding for a feature map of another side.

    embedding: [C, 1 + S^2], for the mean token first, then for the pixels row by row.
    Returns [C, 1 + side^2]. The mean token's embedding is kept. The others are interpolated as an
    S x S image, as is usual for vision transformers (Dosovitskiy et al. 2021, section 3.2):
    bicubic, with antialiasing, as in open_clip and timm.
    """
    own_side = math.isqrt(embedding.shape[1] - 1)
    mean, grid = embedding[:, :1], embedding[:, 1:].unflatten(1, (own_side, own_side))
    grid = F.interpolate(
        grid[None].float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([mean, grid[0].flatten(1).to(embedding.dtype)], dim=1)


def _resize_positional_embedding(weights: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Interpolate the positional embedding in `weights` if its size differs; return whether it did.

    own: the state dict of the classifier to train.
    """
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
    """Return the names of the last layer's weight and bias if only the class count differs."""
    layer = list(own)[-1].rpartition(".")[0]  # out.2.c_proj, out.3 or out.2, by the pool
    head = [f"{layer}.weight", f"{layer}.bias"]
    if not weights.keys() >= set(head):
        return []
    theirs, ours = ([state[name].shape for name in head] for state in (weights, own))
    other_count = theirs[0][:1] != ours[0][:1] and theirs[1] == theirs[0][:1]
    return head if other_count and theirs[0][1:] == ours[0][1:] else []


def _size_note(settings: Settings, theirs: Settings | None, *, how: str) -> str:
    """Return a line on another image size. theirs: the settings of the weights; None if unknown."""
    size = f"{theirs.image_size} px" if theirs else "another size"
    return f"another image size, {size} there and {settings.image_size} px here: {how}"


def _scaling(arrays: dict[str, Any] | None) -> str:
    """Return how values become x_0. arrays: as a manifest records them; None: images."""
    if arrays is None or arrays["scale"] is None:
        return "pixels in [-1, 1]"
    shown = []
    for name in ("scale", "shift"):
        numbers = list(dict.fromkeys(arrays[name]))
        shown.append(f"{name} {numbers[0] if len(numbers) == 1 else arrays[name]}")
    return f"arrays with {' and '.join(shown)}"


def _training_differences(
    theirs: Settings, their_classes: list[str] | None, settings: Settings, classes: list[str]
) -> list[str]:
    """Return lines on how the earlier training differs from this one: noise, class names."""
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


def _other_settings(path: Path, theirs: Settings | None, settings: Settings) -> str:
    """Return the error for weights of other settings, with flags that would fit; "" if none do."""
    needed = None
    if theirs is not None:
        try:
            needed = fitting_settings(tensors_of(_at_size_of(theirs, settings)), settings)
        except ValueError:
            needed = None
    return _flags_that_fit(f"the classifier in {path}", needed, settings)


def _flags_that_fit(what: str, needed: Settings | None, settings: Settings) -> str:
    """Return the error for weights that need other settings; "" if that is not why."""
    flags = differences(needed, settings) if needed else []
    if not flags:
        return ""
    lines = [f"--{n}: got {getattr(settings, n)!r}; need {getattr(needed, n)!r}" for n in flags]
    return (
        f"--init_from: {what} was built with other settings:\n  "
        + "\n  ".join(lines)
        + "\ndo: give these flags"
    )


def _at_size_of(theirs: Settings, settings: Settings) -> Settings:
    """Return their settings for the image size and class count of `settings`, with same blocks."""
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
