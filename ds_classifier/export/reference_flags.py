"""Write guided-diffusion's flags for a classifier, and list what its code cannot build.

All of this refers to guided-diffusion at commit 22e0df8, its last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_classifier.config import Settings
from ds_classifier.model import CHANNEL_MULT, parse_channel_mult

REFERENCE_SIZES = (64, 128, 256, 512)
REFERENCE_CLASSES = 1000
REFERENCE_CHANNELS = 3
REFERENCE_SCHEDULES = ("linear", "cosine")
SCRIPT_UTIL, SAMPLE = "guided_diffusion/script_util.py", "scripts/classifier_sample.py"


def classifier_flags(settings: Settings) -> dict[str, Any]:
    """Return the eight flags that build a classifier there, those of its `classifier_defaults`."""
    sides = [int(s) for s in settings.classifier_attention_resolutions.split(",") if s.strip()]
    # It cannot parse an empty list. No feature map is larger than the image, so this side matches
    # none.
    sides = [side for side in sides if side > 0] or [2 * settings.image_size]
    return {
        "image_size": settings.image_size,
        "classifier_use_fp16": False,
        "classifier_width": settings.classifier_width,
        "classifier_depth": settings.classifier_depth,
        "classifier_attention_resolutions": ",".join(map(str, sides)),
        "classifier_use_scale_shift_norm": settings.classifier_use_scale_shift_norm,
        "classifier_resblock_updown": settings.classifier_resblock_updown,
        "classifier_pool": settings.classifier_pool,
    }


def process_flags(settings: Settings) -> dict[str, Any]:
    """Return the flags of the classifier's noise process, which the diffusion model must share.

    timestep_respacing is among them only if training was respaced. In other cases sampling may
    choose any respacing.
    """
    flags = settings.diffusion_kwargs()
    if not settings.timestep_respacing:
        del flags["timestep_respacing"]
    return flags


@dataclass(frozen=True)
class Edit:
    """A change to guided-diffusion's code: replace `old` by `new` in a function of a file.

    function: "" means outside of all functions. `old` occurs there exactly once.
    """

    file: str
    function: str
    old: str
    new: str


@dataclass(frozen=True)
class Obstacle:
    """A reason why unmodified guided-diffusion cannot use a classifier, and edits that fix it."""

    reason: str
    edits: tuple[Edit, ...]


def reference_obstacles(settings: Settings, kind: str = "class") -> list[Obstacle]:
    """Return why unmodified guided-diffusion cannot use a classifier; empty if it can.

    kind: of its targets. Of values it takes the bins as classes, and guides to one of them.
    """
    obstacles = []
    if kind == "classes":
        obstacles.append(
            Obstacle(
                "several classes per image: the classifier's probabilities are sigmoids; cond_fn "
                "takes a softmax",
                (Edit(SAMPLE, "main", "F.log_softmax(logits, dim=-1)", "F.logsigmoid(logits)"),),
            )
        )
    if settings.num_classes != REFERENCE_CLASSES:
        obstacles.append(_other_classes(settings.num_classes))
    if settings.in_channels != REFERENCE_CHANNELS:
        obstacles.append(_other_channels(settings.in_channels))
    mult = parse_channel_mult(settings.classifier_channel_mult, settings.image_size)
    if settings.image_size not in REFERENCE_SIZES or mult != CHANNEL_MULT[settings.image_size]:
        obstacles.append(_other_levels(settings.image_size, mult))
    if settings.noise_schedule not in REFERENCE_SCHEDULES:
        obstacles.append(
            Obstacle(
                f"noise schedule {settings.noise_schedule}: get_named_beta_schedule in "
                f"guided_diffusion/gaussian_diffusion.py has {' and '.join(REFERENCE_SCHEDULES)} "
                "only, and its samplers need the same; in any other sampler, use "
                "ds_classifier.guidance.Guide",
                (),
            )
        )
    return obstacles


def _other_classes(classes: int) -> Obstacle:
    """Return the obstacle of another number of classes."""
    return Obstacle(
        f"{classes} classes: create_classifier always builds {REFERENCE_CLASSES}",
        (
            Edit(SCRIPT_UTIL, "create_classifier", "out_channels=1000", f"out_channels={classes}"),
            # The range of the classes drawn, and their number in a class-conditional UNet.
            Edit(SCRIPT_UTIL, "", "NUM_CLASSES = 1000", f"NUM_CLASSES = {classes}"),
        ),
    )


def _other_channels(channels: int) -> Obstacle:
    """Return the obstacle of another number of image channels."""
    read = ("in_channels=3", f"in_channels={channels}")
    return Obstacle(
        f"{channels} channels: create_classifier has in_channels=3",
        (
            Edit(SCRIPT_UTIL, "create_classifier", *read),
            Edit(SCRIPT_UTIL, "create_model", *read),
            Edit(
                SCRIPT_UTIL,
                "create_model",
                "(3 if not learn_sigma else 6)",
                f"({channels} if not learn_sigma else {2 * channels})",
            ),
            Edit(SAMPLE, "main", "(args.batch_size, 3, ", f"(args.batch_size, {channels}, "),
        ),
    )


def _other_levels(size: int, mult: tuple[float, ...]) -> Obstacle:
    """Return the obstacle of another image size or other channel multipliers."""
    shown = ", ".join(f"{m:g}" for m in mult)
    levels = f"({shown},)" if len(mult) == 1 else f"({shown})"
    first = "if image_size == 512:"
    own = f"if image_size == {size}:\n        channel_mult = {levels}\n    el{first}"
    return Obstacle(
        f"image_size {size} with multipliers {shown}: create_classifier has fixed multipliers for "
        f"{', '.join(map(str, REFERENCE_SIZES))} px only",
        (Edit(SCRIPT_UTIL, "create_classifier", first, own),),
    )


def flags_text(settings: Settings, name: str, kind: str = "class") -> str:
    """Return the text of a flags file for classifier_sample.py.

    Each line is a comment (#) or a flag with its value. name: the file name of the .pt. kind: of
    the targets.
    """
    obstacles = reference_obstacles(settings, kind)
    lines = [
        f"# Flags of guided-diffusion's scripts/classifier_sample.py for {name}:",
        f"#   python scripts/classifier_sample.py --classifier_path {name} \\",
        "#       --model_path DIFFUSION.pt MODEL_FLAGS $(grep -v '^#' THIS_FILE)",
        "# The diffusion model must have the same image_size and noise process.",
    ]
    if not settings.noised:
        lines.append("# This classifier was trained on clean images only, with t = 0.")
    if obstacles:
        lines.append("#")
        lines.append("# Unmodified guided-diffusion cannot use this classifier. It needs changes:")
    for obstacle in obstacles:
        lines.append(f"# {obstacle.reason}{':' if obstacle.edits else '.'}")
        lines += [f"#   {line}" for edit in obstacle.edits for line in edit_lines(edit)]
    if settings.image_size not in REFERENCE_SIZES:
        lines.append("# A diffusion model of this size needs its own --channel_mult, like 1,2,4.")
    flags = classifier_flags(settings) | process_flags(settings)
    lines += [f"--{flag} {value}" for flag, value in flags.items()]
    return "\n".join(lines) + "\n"


def edit_lines(edit: Edit) -> list[str]:
    """Return an edit as lines for people to read: the place, then - and + lines as in a diff."""
    place = f"{edit.file}, {edit.function}:" if edit.function else f"{edit.file}:"
    indent = " " * 4 if edit.function else ""
    return [
        place,
        f"- {indent}{edit.old}",
        *(f"+ {line}" for line in f"{indent}{edit.new}".splitlines()),
    ]
