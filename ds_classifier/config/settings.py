"""The settings: what is trained. This file owns every number that a flag can set.

Four layers, later ones win: the defaults (guided-diffusion's), a recipe, a file (--config), flags.
The DeepSpeed JSON says how it is trained (micro-batch, precision, ZeRO, optimizer and schedule
type, clipping), and `deepspeed_json` checks it and completes it from these settings.

This module imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ds_classifier.common.urls import scheme, without_logins
from ds_classifier.common.user_code import json_object
from ds_classifier.diffusion import NOISE_SCHEDULES, SCHEDULE_SAMPLERS

NO_VALIDATION = "none"  # in place of shards to validate on


def _setting(default: Any, help: str, fixed: bool = True) -> Any:
    """Return a field of a settings class.

    fixed: the setting shapes the training, so a resumed run may not change it.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, fixed=fixed))


@dataclass(frozen=True)
class DataSettings:
    """The images to train on, and how they are read."""

    data_dir: str = _setting("data/train", "shards to train on, or their URL", fixed=False)
    val_data_dir: str = _setting(
        "",
        "shards to validate on, or their URL; none: do not validate (default: D/val, if it is a "
        "split and data_dir is D/train, a directory and no URL)",
        fixed=False,
    )
    cache_dir: str = _setting(
        "~/.cache/ds_classifier", "where a node keeps shards read by URL", fixed=False
    )
    cache_gb: float = _setting(
        0.0, "gigabytes of cached shards at most (default: no limit)", fixed=False
    )
    random_crop: bool = _setting(
        True,
        "crop training images at random to 80 to 100 %% of the short side (default: True; for "
        "arrays, which are not resized, False)",
    )
    random_flip: bool = _setting(
        True,
        "mirror half of the training images (default: True; for arrays False, since a latent that "
        "is mirrored is not the latent of the mirrored image)",
    )
    lanes: int = _setting(
        64, "parts of the data set that are read in turn, at most one per shard; see docs/data.md"
    )
    shuffle_shards: str = _setting(
        "1", "shards of a lane that are shuffled together; lane: all of them, for class-sorted data"
    )
    resize: str = _setting(
        "exact",
        "how training images are resized. exact: to guided-diffusion's pixels; fast: within 2 of "
        "255 of them",
    )
    workers: int = _setting(
        -1, "loader processes per rank (default: by the number of cores)", fixed=False
    )
    max_bad_samples: int = _setting(
        100, "undecodable samples per epoch above which training stops", fixed=False
    )
    augment: str = _setting(
        "",
        "augmentation of training images after crop and flip: trivialaugment, randaugment, or "
        "package.module:function of yours, uint8 [C, S, S] -> the same (default: none)",
    )


@dataclass(frozen=True)
class ModelSettings:
    """The arguments of `model.create_classifier`."""

    image_size: int = _setting(
        64, "side of the square images, in pixels (default: 64; for arrays, theirs)"
    )
    in_channels: int = _setting(
        3, "channels, 1 to 4 of images, 1 to 64 of arrays (default: 3; for arrays, theirs)"
    )
    num_classes: int = _setting(0, "number of classes (default: that of the data)")
    classifier_width: int = _setting(128, "channels at multiplier 1")
    classifier_depth: int = _setting(2, "residual blocks per level")
    classifier_attention_resolutions: str = _setting(
        "32,16,8", "sides of the feature maps that have attention, in pixels"
    )
    classifier_use_scale_shift_norm: bool = _setting(
        True, "the timestep scales and shifts the norms; False: it only shifts them"
    )
    classifier_resblock_updown: bool = _setting(
        True, "residual blocks halve the feature maps; False: strided convolutions do"
    )
    classifier_pool: str = _setting(
        "attention", "how logits are pooled: attention, adaptive, spatial or spatial_v2"
    )
    classifier_channel_mult: str = _setting(
        "", "channel multipliers of the levels, like 1,2,4 (default: by image_size)"
    )
    classifier: str = _setting(
        "",
        "another network: package.module:factory, a function of yours, or torchvision:NAME, such "
        "as torchvision:resnet50; see docs/extending.md (default: the encoder that the flags above "
        "describe)",
    )
    classifier_args: str = _setting(
        "", "keywords of that function, as a JSON object (default: none)"
    )

    def model_kwargs(self) -> dict[str, Any]:
        """Return the keywords of `model.create_classifier`."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(ModelSettings)
        }


@dataclass(frozen=True)
class DiffusionSettings:
    """The noise that the classifier is trained on, and the choice of timesteps."""

    noised: bool = _setting(True, "train on noisy images; False: on clean ones, at t = 0")
    diffusion_steps: int = _setting(1000, "number of noise levels T")
    noise_schedule: str = _setting("linear", f"noise schedule: {', '.join(NOISE_SCHEDULES)}")
    timestep_respacing: str = _setting(
        "", "noise levels to keep, such as 250 or ddim25 (default: all)"
    )
    rescale_timesteps: bool = _setting(False, "give the network t * 1000 / T in place of t")
    schedule_sampler: str = _setting(
        "uniform",
        f"how timesteps are drawn: {', '.join(SCHEDULE_SAMPLERS)}. noisy draws t in proportion "
        "to t, and guides better",
    )
    t_range: str = _setting(
        "",
        "noise levels to train and validate on: LOW:HIGH, such as 0.0:0.6, as shares of the "
        "levels from nearly clean to nearly noise, or snr:LOW:HIGH, such as snr:-4:4, in natural "
        "log-SNR (default: all)",
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
    """The optimization: steps, rates, batch sizes, seed."""

    iterations: int = _setting(150000, "total number of optimizer steps")
    extend: int = _setting(
        0,
        "train a finished run on, to this number of steps in all; the learning rate begins anew "
        "(default: do not)",
        fixed=False,
    )
    lr: float = _setting(3e-4, "peak learning rate")
    muon_lr_scale: float = _setting(
        0.0,
        "train the weights inside the network by Muon, in place of the JSON's AdamW, at this many "
        "times lr (0: all by the JSON's optimizer)",
    )
    weight_decay: float = _setting(
        0.0, "decoupled weight decay, on every parameter that --no_decay does not name"
    )
    anneal_lr: bool | None = _setting(
        None, "True: --lr_schedule linear, from lr to 0; False: constant (default: neither)"
    )
    lr_schedule: str = _setting(
        "",
        "linear or cosine, from lr to 0 at the last step, or constant, in place of the JSON's "
        "scheduler (default: the JSON's)",
    )
    warmup_steps: int = _setting(
        -1,
        "steps of the warm-up, in which the rate rises to lr (default: where the JSON says auto, "
        "2 %% of iterations, 1000 at most; with --lr_schedule none)",
    )
    posterior_images: int = _setting(
        0,
        "train on the class posterior over this many of the last training images, in place of the "
        "label (0: on the label)",
    )
    high_noise_weight: float = _setting(
        1.0,
        "how many times as much the loss counts at timesteps where noise hides the whole image "
        "(1: as at the others); for training with --posterior_images",
    )
    global_batch: int = _setting(0, "images per step over all ranks (default: batch_size x ranks)")
    batch_size: int = _setting(
        0,
        "images per step and rank (default: from the JSON's numbers, else 4)",
        fixed=False,
    )
    microbatch: int = _setting(
        -1, "images per rank and forward pass, if the JSON says auto", fixed=False
    )
    seed: int = _setting(0, "seed of weights, order, crops, timesteps and noise")
    compile: bool = _setting(
        False, "compile the classifier with torch.compile at the first step", fixed=False
    )
    activation_checkpointing: bool = _setting(
        False,
        "recompute most activations in the backward pass: less memory, slower",
        fixed=False,
    )
    max_skipped_steps: int = _setting(
        50,
        "consecutive steps that may be skipped, for non-finite losses or gradients, before "
        "training stops",
        fixed=False,
    )
    class_balance: str = _setting(
        "",
        "how much an image counts in the loss by the frequency f of its class: equal, in "
        "proportion to 1 / f, or sqrt, to 1 / sqrt(f) (default: all count the same)",
    )
    loss: str = _setting(
        "",
        "package.module:function of yours, (logits, targets, t) -> a loss per image, in place of "
        "cross-entropy; see docs/training.md (default: none)",
    )
    freeze: str = _setting(
        "",
        "parameters that are not trained: trunk (all but the head), or patterns of their names, "
        "separated by commas (default: none)",
    )
    lr_scale: str = _setting(
        "",
        "PATTERN=FACTOR[,PATTERN=FACTOR]: multiply the learning rate of the parameters whose names "
        "match; the first match counts (default: none)",
    )
    no_decay: str = _setting(
        "",
        "parameters without weight decay: norms, biases, or patterns of their names, separated by "
        "commas (default: none)",
    )


@dataclass(frozen=True)
class RunSettings:
    """The run: its directory, what it logs and saves, how long it may take."""

    run_dir: str = _setting(
        "", "directory of all that the run writes (default: runs/RECIPE)", fixed=False
    )
    resume_checkpoint: str = _setting(
        "", "checkpoint to continue from (default: the newest in run_dir)", fixed=False
    )
    init_from: str = _setting(
        "",
        "weights to start from: a guided-diffusion .pt file, of a classifier or a UNet, an "
        "export or a run; for a network of "
        "torchvision also its file of weights, or torchvision, which downloads them (default: "
        "none)",
        fixed=False,
    )
    log_interval: int = _setting(10, "steps between log lines", fixed=False)
    wandb: str = _setting(
        "",
        "also log to this Weights & Biases project; needs the extra wandb (default: none)",
        fixed=False,
    )
    profile: int = _setting(
        0,
        "record this step and the 3 after it: a trace and a table of the dearest operations in the "
        "run directory (default: none)",
        fixed=False,
    )
    save_interval: int = _setting(10000, "steps between checkpoints", fixed=False)
    eval_interval: int = _setting(
        0, "steps between validations (default: save_interval)", fixed=False
    )
    keep_last: int = _setting(
        3, "checkpoints to keep, in addition to the one with the best validation loss", fixed=False
    )
    keep_every: int = _setting(
        0, "keep the checkpoints of every N-th step for good (0: none)", fixed=False
    )
    max_failed_saves: int = _setting(
        1,
        "consecutive checkpoints that may fail before training stops; the last one may not fail",
        fixed=False,
    )
    max_minutes: float = _setting(
        0.0, "save and stop after this many minutes (default: no limit)", fixed=False
    )
    start_timeout: float = _setting(
        30.0,
        "minutes for all ranks to start (half of that to connect), and for the first step",
        fixed=False,
    )
    step_timeout: float = _setting(10.0, "minutes for a step, including its data", fixed=False)
    save_timeout: float = _setting(30.0, "minutes for a checkpoint", fixed=False)
    validation_timeout: float = _setting(120.0, "minutes for a validation", fixed=False)
    expect_world: int = _setting(
        0,
        "number of ranks there must be, since the launcher ignores a wrong hostfile (0: any)",
        fixed=False,
    )

    def time_outs(self) -> dict[str, float]:
        """Return for each activity the minutes after which a rank in it counts as hung."""
        return dict(
            start=self.start_timeout,
            step=self.step_timeout,
            save=self.save_timeout,
            validation=self.validation_timeout,
        )


# Sections of --help and headings of the report, in this order.
GROUPS = {
    "data": DataSettings,
    "classifier": ModelSettings,
    "diffusion": DiffusionSettings,
    "training": TrainingSettings,
    "run": RunSettings,
}


# Dataclass fields come from the last base first: data, classifier, diffusion, training, run.
@dataclass(frozen=True)
class Settings(RunSettings, TrainingSettings, DiffusionSettings, ModelSettings, DataSettings):
    """The settings. Every field is a flag of the same name; the help strings document them."""

    @property
    def steps(self) -> int:
        """The number of steps of the run in all, with --extend."""
        return max(self.iterations, self.extend)

    @property
    def schedule(self) -> str:
        """The learning rate's schedule that a flag asks for; "" for the JSON's."""
        if self.anneal_lr is None:
            return self.lr_schedule
        return "linear" if self.anneal_lr else "constant"

    def warm_up(self, steps: int) -> int:
        """Return the steps of the JSON's warm-up, where it schedules a number of steps."""
        return self.warmup_steps if self.warmup_steps >= 0 else max(1, min(1000, steps // 50))

    @property
    def validation(self) -> str:
        """The shards to validate on; "" for none."""
        return "" if self.val_data_dir == NO_VALIDATION else self.val_data_dir

    def order_kwargs(self) -> dict[str, Any]:
        """Return the keywords of `data.order.SampleOrder`, without the shards."""
        lane = self.shuffle_shards == "lane"
        return dict(
            seed=self.seed,
            lanes=self.lanes,
            shuffle_shards=None if lane else int(self.shuffle_shards),
        )

    def recorded(self) -> dict[str, Any]:
        """Return all settings as a run's files keep them: URLs without user and password."""
        values = dataclasses.asdict(self).items()
        return {k: without_logins(v) if isinstance(v, str) else v for k, v in values}

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with other values for some settings."""
        return dataclasses.replace(self, **changes)


FIXED_SETTINGS = tuple(f.name for f in dataclasses.fields(Settings) if f.metadata["fixed"])
# Settings that may differ between nodes: where the data is, and how it is read.
PER_NODE_SETTINGS = ("data_dir", "val_data_dir", "cache_dir", "cache_gb", "workers")
RESIZES = ("exact", "fast")
PROFILED = 4  # steps that --profile records; a trace of many is too large to open
CLASS_BALANCES = ("sqrt", "equal")
LR_SCHEDULES = ("linear", "cosine", "constant")


def check_settings(settings: Settings) -> list[str]:
    """Return the problems with the settings, one message each.

    The values that only the model or the diffusion use are checked there.
    """
    problems = []
    least = dict(
        iterations=1,
        extend=0,
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
        profile=0,
        posterior_images=0,
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
    if settings.profile + PROFILED - 1 > settings.steps and settings.profile:
        problems.append(
            f"--profile: got {settings.profile}; need {PROFILED} steps from there on, and the run "
            f"has {settings.steps}"
        )
    problems += _sampling_problems(settings)
    if settings.classifier_args and not settings.classifier:
        problems.append(
            f"--classifier_args: got {settings.classifier_args!r}; need --classifier, the network "
            "that takes them"
        )
    try:
        json_object("--classifier_args", settings.classifier_args)
    except ValueError as error:
        problems.append(str(error))
    if settings.posterior_images and not settings.noised:
        problems.append(
            f"--posterior_images: got {settings.posterior_images} with --noised False; need noise, "
            "without which no image can be another one; do: give --posterior_images 0"
        )
    for activity, minutes in settings.time_outs().items():
        if not minutes > 0:
            problems.append(f"--{activity}_timeout: got {minutes}; need more than 0 minutes")
    if settings.wandb and importlib.util.find_spec("wandb") is None:
        problems.append(
            f"--wandb: got {settings.wandb!r}; need the package wandb; do: pip install "
            "'ds-classifier[wandb]', or drop the flag"
        )
    problems += _rates_and_weights(settings)
    if scheme(settings.run_dir):
        problems.append(
            f"--run_dir: got {without_logins(settings.run_dir)}; need a directory; do: copy it to "
            "a bucket when the run has ended"
        )
    if settings.resize not in RESIZES:
        problems.append(f"--resize: got {settings.resize!r}; need {' or '.join(RESIZES)}")
    if settings.lr_schedule not in ("", *LR_SCHEDULES):
        problems.append(
            f"--lr_schedule: got {settings.lr_schedule!r}; need {', '.join(LR_SCHEDULES[:-1])} or "
            f"{LR_SCHEDULES[-1]}"
        )
    elif settings.lr_schedule and settings.schedule != settings.lr_schedule:
        problems.append(
            f"--lr_schedule {settings.lr_schedule}, --anneal_lr {settings.anneal_lr}: they "
            "disagree; do: give one of them"
        )
    if settings.microbatch == 0 or settings.microbatch < -1:
        problems.append(f"--microbatch: got {settings.microbatch}; need a positive number, or -1")
    return problems


def _rates_and_weights(settings: Settings) -> list[str]:
    """Return the problems with the learning rates and the weights of the loss."""
    infinite = float("inf")
    allowed = {
        "lr": (settings.lr > 0, "a positive learning rate"),
        "muon_lr_scale": (0 <= settings.muon_lr_scale < infinite, "0, or a factor above"),
        "high_noise_weight": (1 <= settings.high_noise_weight < infinite, "1, or a factor above"),
        "weight_decay": (settings.weight_decay >= 0, "0 or more"),
    }
    return [
        f"--{name}: got {getattr(settings, name)}; need {need}"
        for name, (fine, need) in allowed.items()
        if not fine
    ]


def _sampling_problems(settings: Settings) -> list[str]:
    """Return the problems with what is drawn, and how much it counts."""
    problems = []
    if settings.t_range and not settings.noised:
        problems.append(
            f"--t_range: got {settings.t_range!r} with --noised False, which trains at t = 0 "
            "alone; do: drop one of them"
        )
    if settings.class_balance not in ("", *CLASS_BALANCES):
        problems.append(
            f"--class_balance: got {settings.class_balance!r}; need {' or '.join(CLASS_BALANCES)}"
        )
    return problems


def changed_settings(
    saved: dict[str, Any], now: Settings, *, free: Collection[str] = ()
) -> list[str]:
    """Return a line for each setting that shapes the training and differs from a checkpoint's.

    free: names of settings that may differ in this run.
    """
    saved = dataclasses.asdict(Settings()) | saved  # older versions did not have all of them
    return [
        f"{name}: {saved[name]!r} in the checkpoint, {getattr(now, name)!r} now"
        for name in FIXED_SETTINGS
        if name not in free and saved[name] != getattr(now, name)
    ]
