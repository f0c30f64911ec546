"""Settings, recipes and the command line: what is trained; the settings' owner of every number.

Three layers, later ones win: the defaults (guided-diffusion's), a recipe, flags. How it is trained
(micro-batch, precision, ZeRO, optimizer and schedule type, clipping) stands in the DeepSpeed JSON,
which `ds_config.py` checks and completes from these settings.

This module imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from ds_classifier.common.urls import without_logins
from ds_classifier.diffusion import NOISE_SCHEDULES, SCHEDULE_SAMPLERS

SHIPPED_CONFIGS = ("zero2_fp16", "zero2_bf16", "zero1_fp16", "zero1_bf16", "zero1_fp32")


def _setting(default: Any, help: str, fixed: bool = True) -> Any:
    """Return a field of a settings class.

    fixed: the setting shapes the training, so a resumed run may not change it.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, fixed=fixed))


@dataclass(frozen=True)
class DataSettings:
    """Which images to train on, and how they are read."""

    data_dir: str = _setting("data/train", "shards to train on, or their URL", fixed=False)
    val_data_dir: str = _setting(
        "",
        "shards to validate on (default: data/val if data_dir is not given)",
        fixed=False,
    )
    cache_dir: str = _setting(
        "~/.cache/ds_classifier", "where a node keeps shards read by URL", fixed=False
    )
    cache_gb: float = _setting(0.0, "gigabytes of them at most (default: no limit)", fixed=False)
    random_crop: bool = _setting(True, "random crops of 80 to 100 %% of the short side")
    random_flip: bool = _setting(True, "mirror half of the training images")
    lanes: int = _setting(
        64, "places of the data set read side by side, at most one a shard; see order.py"
    )
    shuffle_shards: str = _setting(
        "1", "shards of a lane shuffled together, or: lane, all of them (class-sorted data)"
    )
    resize: str = _setting(
        "exact",
        "exact: guided-diffusion's pixels in training; fast: at most 2 of 255 beside them",
    )
    workers: int = _setting(-1, "loader processes a rank (default: by cores)", fixed=False)
    max_bad_samples: int = _setting(
        100, "undecodable samples an epoch after which training stops", fixed=False
    )


@dataclass(frozen=True)
class ModelSettings:
    """The classifier: `model.create_classifier` takes all of these."""

    image_size: int = _setting(64, "pixels of a side")
    in_channels: int = _setting(3, "channels of an image, 1 to 4")
    num_classes: int = _setting(0, "classes (default: those of the data)")
    classifier_width: int = _setting(128, "channels at multiplier 1")
    classifier_depth: int = _setting(2, "residual blocks a level")
    classifier_attention_resolutions: str = _setting(
        "32,16,8", "sides of the feature maps that attend"
    )
    classifier_use_scale_shift_norm: bool = _setting(
        True, "timesteps scale and shift the norms, else shift"
    )
    classifier_resblock_updown: bool = _setting(
        True, "residual blocks halve the image, else strided convolutions"
    )
    classifier_pool: str = _setting("attention", "attention, adaptive, spatial or spatial_v2")
    classifier_channel_mult: str = _setting(
        "", "channel multipliers of the levels, like 1,2,4 (default: by image_size)"
    )

    def model_kwargs(self) -> dict[str, Any]:
        """Return the keywords of `model.create_classifier`."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(ModelSettings)
        }


@dataclass(frozen=True)
class DiffusionSettings:
    """The noise that the classifier is trained on, and how timesteps are drawn."""

    noised: bool = _setting(True, "train on noisy images; False: clean ones, t = 0")
    diffusion_steps: int = _setting(1000, "noise levels T")
    noise_schedule: str = _setting("linear", " or ".join(NOISE_SCHEDULES))
    timestep_respacing: str = _setting("", "keep some levels only, like 250 or ddim25")
    rescale_timesteps: bool = _setting(False, "show the network t * 1000 / T")
    schedule_sampler: str = _setting(
        "uniform",
        f"how timesteps are drawn: {', '.join(SCHEDULE_SAMPLERS)}; noisy draws t in proportion "
        "to t and guides better",
    )

    def diffusion_kwargs(self) -> dict[str, Any]:
        """Return the keywords of `diffusion.create_gaussian_diffusion`."""
        return dict(
            diffusion_steps=self.diffusion_steps,
            noise_schedule=self.noise_schedule,
            timestep_respacing=self.timestep_respacing,
            rescale_timesteps=self.rescale_timesteps,
        )


@dataclass(frozen=True)
class TrainingSettings:
    """The optimization: steps, rates, batch sizes."""

    iterations: int = _setting(150000, "optimizer steps in all")
    lr: float = _setting(3e-4, "learning rate, at its peak")
    weight_decay: float = _setting(0.0, "decoupled decay, on every parameter")
    anneal_lr: bool | None = _setting(
        None,
        "True: lr * (1 - step/iterations); False: constant (default: the JSON's scheduler)",
    )
    warmup_steps: int = _setting(
        -1,
        "steps of the JSON's warm-up, in which the first two run at its warmup_min_lr (default: "
        "2 %% of iterations, 1000 at most)",
    )
    global_batch: int = _setting(0, "images a step over all ranks (default: batch_size x ranks)")
    batch_size: int = _setting(
        0,
        "images a step and rank (default: what the JSON's numbers give, else 4)",
        fixed=False,
    )
    microbatch: int = _setting(
        -1, "images a rank takes at a time where the JSON says auto", fixed=False
    )
    seed: int = _setting(0, "of weights, order, crops, timesteps and noise")
    compile: bool = _setting(
        False, "compile the classifier by torch.compile at the first step", fixed=False
    )
    activation_checkpointing: bool = _setting(
        False,
        "keep few activations and compute the others again in the backward: less memory, slower",
        fixed=False,
    )
    max_skipped_steps: int = _setting(
        50,
        "steps skipped in a row for non-finite losses or gradients before giving up",
        fixed=False,
    )


@dataclass(frozen=True)
class RunSettings:
    """The run: where it is kept, what it logs and saves, how long it may take."""

    run_dir: str = _setting("", "where everything goes (default: runs/RECIPE)", fixed=False)
    resume_checkpoint: str = _setting(
        "", "a checkpoint to continue from (default: the newest in run_dir)", fixed=False
    )
    init_from: str = _setting(
        "", "weights to start from: a guided-diffusion .pt, an export or a run", fixed=False
    )
    log_interval: int = _setting(10, "steps between log lines", fixed=False)
    wandb: str = _setting(
        "", "a Weights & Biases project to log to as well (extra: wandb)", fixed=False
    )
    save_interval: int = _setting(10000, "steps between checkpoints", fixed=False)
    eval_interval: int = _setting(
        0, "steps between validations (default: save_interval)", fixed=False
    )
    keep_last: int = _setting(3, "checkpoints kept, and the one that validated best", fixed=False)
    keep_every: int = _setting(
        0, "checkpoints of every N-th step are kept for good (0: none)", fixed=False
    )
    max_failed_saves: int = _setting(
        1,
        "checkpoints in a row that may fail to be written before training stops; the last may not",
        fixed=False,
    )
    max_minutes: float = _setting(
        0.0, "stop, and save, so long after the start (default: no limit)", fixed=False
    )
    start_timeout: float = _setting(
        30.0,
        "minutes until all ranks stand (half of them until all have come), and for the first step",
        fixed=False,
    )
    step_timeout: float = _setting(10.0, "minutes for a step, data included", fixed=False)
    save_timeout: float = _setting(30.0, "minutes for a checkpoint", fixed=False)
    validation_timeout: float = _setting(120.0, "minutes for a validation", fixed=False)
    expect_world: int = _setting(
        0, "ranks there must be, since the launcher forgives a wrong hostfile", fixed=False
    )

    def time_outs(self) -> dict[str, float]:
        """Return the minutes that each activity may take before the rank counts as hung."""
        return dict(
            start=self.start_timeout,
            step=self.step_timeout,
            save=self.save_timeout,
            validation=self.validation_timeout,
        )


# Flag groups of --help and headings of the report, in their order.
GROUPS = {
    "data": DataSettings,
    "classifier": ModelSettings,
    "diffusion": DiffusionSettings,
    "training": TrainingSettings,
    "run": RunSettings,
}


# Fields come from the last base first: data, classifier, diffusion, training, run.
@dataclass(frozen=True)
class Settings(RunSettings, TrainingSettings, DiffusionSettings, ModelSettings, DataSettings):
    """All settings. Every field is a flag of the same name; the help strings are the docs."""

    def order_kwargs(self) -> dict[str, Any]:
        """The keywords of `data.order.SampleOrder`, but for the shards."""
        lane = self.shuffle_shards == "lane"
        return dict(
            seed=self.seed,
            lanes=self.lanes,
            shuffle_shards=None if lane else int(self.shuffle_shards),
        )

    def recorded(self) -> dict[str, Any]:
        """All settings as a run's files keep them: URLs without user and password."""
        values = dataclasses.asdict(self).items()
        return {k: without_logins(v) if isinstance(v, str) else v for k, v in values}

    def replace(self, **changes: Any) -> Settings:
        return dataclasses.replace(self, **changes)


FIXED_SETTINGS = tuple(f.name for f in dataclasses.fields(Settings) if f.metadata["fixed"])
# What a node may have otherwise than the others: where its data lies, and how it reads them.
OF_A_NODE = ("data_dir", "val_data_dir", "cache_dir", "cache_gb", "workers")
RESIZES = ("exact", "fast")


def check_settings(settings: Settings) -> list[str]:
    """What is wrong with the settings; model and diffusion check their own."""
    problems = []
    least = dict(
        iterations=1,
        log_interval=1,
        save_interval=1,
        eval_interval=1,
        keep_last=1,
        keep_every=0,
        max_failed_saves=0,
        lanes=1,
        max_bad_samples=0,
        cache_gb=0,
        max_skipped_steps=1,
        max_minutes=0,
        global_batch=0,
        batch_size=0,
        num_classes=0,
        workers=-1,
    )
    for name, minimum in least.items():
        if getattr(settings, name) < minimum:
            problems.append(f"--{name}: got {getattr(settings, name)}; need at least {minimum}")
    if settings.shuffle_shards != "lane" and not re.fullmatch(
        "[1-9][0-9]*", settings.shuffle_shards
    ):
        problems.append(
            f"--shuffle_shards: got {settings.shuffle_shards!r}; need a number from 1, or lane"
        )
    for activity, minutes in settings.time_outs().items():
        if not minutes > 0:
            problems.append(f"--{activity}_timeout: got {minutes}; need a positive time in minutes")
    if settings.wandb and importlib.util.find_spec("wandb") is None:
        problems.append(
            f"--wandb: got {settings.wandb!r}; need the package wandb; do: pip install "
            "'ds-classifier[wandb]', or drop the flag"
        )
    if not settings.lr > 0:
        problems.append(f"--lr: got {settings.lr}; need a positive learning rate")
    if not settings.weight_decay >= 0:
        problems.append(f"--weight_decay: got {settings.weight_decay}; need 0 or more")
    if settings.resize not in RESIZES:
        problems.append(f"--resize: got {settings.resize!r}; need {' or '.join(RESIZES)}")
    if settings.microbatch == 0 or settings.microbatch < -1:
        problems.append(f"--microbatch: got {settings.microbatch}; need a positive number, or -1")
    return problems


def changed_settings(saved: dict[str, Any], now: Settings) -> list[str]:
    """Lines that say which settings that shape the training differ from a checkpoint's."""
    return [
        f"{name}: {saved[name]!r} in the checkpoint, {getattr(now, name)!r} now"
        for name in FIXED_SETTINGS
        if name in saved and saved[name] != getattr(now, name)
    ]
