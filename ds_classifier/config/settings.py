"""Settings, recipes and the command line: what is trained; the settings' owner of every number.

Three layers, later ones win: the defaults (guided-diffusion's), a recipe, flags. How it is trained
(micro-batch, precision, ZeRO, optimizer and schedule type, clipping) stands in the DeepSpeed JSON,
which `ds_config.py` checks and completes from these settings.

This module imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_classifier.common.urls import without_logins
from ds_classifier.diffusion import NOISE_SCHEDULES, SCHEDULE_SAMPLERS

SHIPPED_CONFIGS = ("zero2_fp16", "zero2_bf16", "zero1_fp16", "zero1_bf16", "zero1_fp32")


def _setting(default: Any, group: str, help: str, fixed: bool = True) -> Any:
    """A field of Settings. fixed: it shapes the training, so a resumed run may not change it."""
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, fixed=fixed))


@dataclass(frozen=True)
class Settings:
    """What is trained. Every field is a flag of the same name; the help strings are the docs."""

    data_dir: str = _setting("data/train", "data", "shards to train on, or their URL", fixed=False)
    val_data_dir: str = _setting(
        "",
        "data",
        "shards to validate on (default: data/val if data_dir is not given)",
        fixed=False,
    )
    cache_dir: str = _setting(
        "~/.cache/ds_classifier", "data", "where a node keeps shards read by URL", fixed=False
    )
    cache_gb: float = _setting(
        0.0, "data", "gigabytes of them at most (default: no limit)", fixed=False
    )
    random_crop: bool = _setting(True, "data", "random crops of 80 to 100 %% of the short side")
    random_flip: bool = _setting(True, "data", "mirror half of the training images")
    lanes: int = _setting(
        64, "data", "places of the data set read side by side, at most one a shard; see order.py"
    )
    shuffle_shards: str = _setting(
        "1", "data", "shards of a lane shuffled together, or: lane, all of them (class-sorted data)"
    )
    resize: str = _setting(
        "exact",
        "data",
        "exact: guided-diffusion's pixels in training; fast: at most 2 of 255 beside them",
    )
    workers: int = _setting(-1, "data", "loader processes a rank (default: by cores)", fixed=False)
    max_bad_samples: int = _setting(
        100, "data", "undecodable samples an epoch after which training stops", fixed=False
    )

    image_size: int = _setting(64, "classifier", "pixels of a side")
    in_channels: int = _setting(3, "classifier", "channels of an image, 1 to 4")
    num_classes: int = _setting(0, "classifier", "classes (default: those of the data)")
    classifier_width: int = _setting(128, "classifier", "channels at multiplier 1")
    classifier_depth: int = _setting(2, "classifier", "residual blocks a level")
    classifier_attention_resolutions: str = _setting(
        "32,16,8", "classifier", "sides of the feature maps that attend"
    )
    classifier_use_scale_shift_norm: bool = _setting(
        True, "classifier", "timesteps scale and shift the norms, else shift"
    )
    classifier_resblock_updown: bool = _setting(
        True, "classifier", "residual blocks halve the image, else strided convolutions"
    )
    classifier_pool: str = _setting(
        "attention", "classifier", "attention, adaptive, spatial or spatial_v2"
    )
    classifier_channel_mult: str = _setting(
        "", "classifier", "channel multipliers of the levels, like 1,2,4 (default: by image_size)"
    )

    noised: bool = _setting(True, "diffusion", "train on noisy images; False: clean ones, t = 0")
    diffusion_steps: int = _setting(1000, "diffusion", "noise levels T")
    noise_schedule: str = _setting("linear", "diffusion", " or ".join(NOISE_SCHEDULES))
    timestep_respacing: str = _setting("", "diffusion", "keep some levels only, like 250 or ddim25")
    rescale_timesteps: bool = _setting(False, "diffusion", "show the network t * 1000 / T")
    schedule_sampler: str = _setting(
        "uniform",
        "diffusion",
        f"how timesteps are drawn: {', '.join(SCHEDULE_SAMPLERS)}; noisy draws t in proportion "
        "to t and guides better",
    )

    iterations: int = _setting(150000, "training", "optimizer steps in all")
    lr: float = _setting(3e-4, "training", "learning rate, at its peak")
    weight_decay: float = _setting(0.0, "training", "decoupled decay, on every parameter")
    anneal_lr: bool | None = _setting(
        None,
        "training",
        "True: lr * (1 - step/iterations); False: constant (default: the JSON's scheduler)",
    )
    warmup_steps: int = _setting(
        -1,
        "training",
        "steps of the JSON's warm-up, in which the first two run at its warmup_min_lr (default: "
        "2 %% of iterations, 1000 at most)",
    )
    global_batch: int = _setting(
        0, "training", "images a step over all ranks (default: batch_size x ranks)"
    )
    batch_size: int = _setting(
        0,
        "training",
        "images a step and rank (default: what the JSON's numbers give, else 4)",
        fixed=False,
    )
    microbatch: int = _setting(
        -1, "training", "images a rank takes at a time where the JSON says auto", fixed=False
    )
    seed: int = _setting(0, "training", "of weights, order, crops, timesteps and noise")
    compile: bool = _setting(
        False, "training", "compile the classifier by torch.compile at the first step", fixed=False
    )
    activation_checkpointing: bool = _setting(
        False,
        "training",
        "keep few activations and compute the others again in the backward: less memory, slower",
        fixed=False,
    )
    max_skipped_steps: int = _setting(
        50,
        "training",
        "steps skipped in a row for non-finite losses or gradients before giving up",
        fixed=False,
    )

    run_dir: str = _setting("", "run", "where everything goes (default: runs/RECIPE)", fixed=False)
    resume_checkpoint: str = _setting(
        "", "run", "a checkpoint to continue from (default: the newest in run_dir)", fixed=False
    )
    init_from: str = _setting(
        "", "run", "weights to start from: a guided-diffusion .pt, an export or a run", fixed=False
    )
    log_interval: int = _setting(10, "run", "steps between log lines", fixed=False)
    wandb: str = _setting(
        "", "run", "a Weights & Biases project to log to as well (extra: wandb)", fixed=False
    )
    save_interval: int = _setting(10000, "run", "steps between checkpoints", fixed=False)
    eval_interval: int = _setting(
        0, "run", "steps between validations (default: save_interval)", fixed=False
    )
    keep_last: int = _setting(
        3, "run", "checkpoints kept, and the one that validated best", fixed=False
    )
    keep_every: int = _setting(
        0, "run", "checkpoints of every N-th step are kept for good (0: none)", fixed=False
    )
    max_failed_saves: int = _setting(
        1,
        "run",
        "checkpoints in a row that may fail to be written before training stops; the last may not",
        fixed=False,
    )
    max_minutes: float = _setting(
        0.0, "run", "stop, and save, so long after the start (default: no limit)", fixed=False
    )
    start_timeout: float = _setting(
        30.0,
        "run",
        "minutes until all ranks stand (half of them until all have come), and for the first step",
        fixed=False,
    )
    step_timeout: float = _setting(10.0, "run", "minutes for a step, data included", fixed=False)
    save_timeout: float = _setting(30.0, "run", "minutes for a checkpoint", fixed=False)
    validation_timeout: float = _setting(120.0, "run", "minutes for a validation", fixed=False)
    expect_world: int = _setting(
        0, "run", "ranks there must be, since the launcher forgives a wrong hostfile", fixed=False
    )

    def order_kwargs(self) -> dict[str, Any]:
        """The keywords of `data.order.SampleOrder`, but for the shards."""
        lane = self.shuffle_shards == "lane"
        return dict(
            seed=self.seed,
            lanes=self.lanes,
            shuffle_shards=None if lane else int(self.shuffle_shards),
        )

    def model_kwargs(self) -> dict[str, Any]:
        """The keywords of `model.create_classifier`."""
        names = [
            "image_size",
            "in_channels",
            "num_classes",
            *(name for name in vars(self) if name.startswith("classifier_")),
        ]
        return {name: getattr(self, name) for name in names}

    def diffusion_kwargs(self) -> dict[str, Any]:
        """The keywords of `diffusion.create_gaussian_diffusion`."""
        names = ["diffusion_steps", "noise_schedule", "timestep_respacing", "rescale_timesteps"]
        return {name: getattr(self, name) for name in names}

    def time_outs(self) -> dict[str, float]:
        """Minutes that a rank may spend in each activity before it counts as hung."""
        activities = ("start", "step", "save", "validation")
        return {name: getattr(self, f"{name}_timeout") for name in activities}

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
GROUPS = ("data", "classifier", "diffusion", "training", "run")


# Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", Table 12. Not run here.
def _imagenet(**own: Any) -> dict[str, Any]:
    return dict(
        classifier_width=128,
        classifier_depth=2,
        classifier_attention_resolutions="32,16,8",
        classifier_pool="attention",
        noise_schedule="linear",
        global_batch=256,
        lr=3e-4,
        weight_decay=0.05,
        **own,
    )


RECIPES: dict[str, dict[str, Any]] = {
    # guided-diffusion's training maths to the letter, with --anneal_lr True as its README trains.
    # The JSON must not clip, and lower the loss scale at every overflow: ds_config.py checks.
    "reference": dict(anneal_lr=True),
    "imagenet64": _imagenet(image_size=64, iterations=300_000)
    | dict(
        classifier_depth=4, noise_schedule="cosine", global_batch=1024, lr=6e-4, weight_decay=0.2
    ),
    "imagenet128": _imagenet(image_size=128, iterations=300_000),
    "imagenet256": _imagenet(image_size=256, iterations=500_000),
    "imagenet512": _imagenet(image_size=512, iterations=500_000),
    # CIFAR-10 and the like: 32 px colour images of things.
    "cifar32": dict(
        image_size=32,
        classifier_width=64,
        classifier_depth=2,
        classifier_attention_resolutions="16,8",
        noise_schedule="cosine",
        global_batch=128,
        iterations=20_000,
        lr=6e-4,
        weight_decay=0.05,
        save_interval=1000,
    ),
    # scikit-learn's handwritten digits, enlarged to 32 px; what `make quickstart` trains.
    "digits32": dict(
        image_size=32,
        classifier_width=32,
        classifier_depth=1,
        classifier_attention_resolutions="8",
        noise_schedule="cosine",
        schedule_sampler="noisy",
        random_flip=False,
        global_batch=64,
        iterations=500,
        lr=1e-3,
        weight_decay=0.05,
        log_interval=50,
        save_interval=250,
    ),
}

OVERFIT_STEPS = 500  # that --overfit_batch takes at most, where it says nothing

# Flags of guided-diffusion's script that change nothing in a classifier's training, there or here.
WITHOUT_EFFECT = ("learn_sigma", "use_kl", "predict_xstart", "rescale_learned_sigmas")


@dataclass(frozen=True)
class CommandLine:
    """A parsed command. given: the settings that the recipe or a flag named, not the defaults.

    dry_run, overfit_steps (0: no): what to do instead of training.
    """

    settings: Settings
    given: frozenset[str]
    deepspeed_config: Path
    recipe: str
    classifier_use_fp16: bool | None
    preflight: bool = False
    dry_run: bool = False
    overfit_steps: int = 0

    @property
    def instead(self) -> bool:
        """Whether something else is done than training, which leaves the run directory alone."""
        return self.preflight or self.dry_run or bool(self.overfit_steps)


def parse_training_command(argv: list[str]) -> CommandLine:
    """Parse train.py's arguments; malformed ones end the process with code 2."""
    parser = _training_parser()
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("recipe")
    config_path = flags.pop("deepspeed_config")
    use_fp16 = flags.pop("classifier_use_fp16")
    instead = (flags.pop("preflight"), flags.pop("dry_run"), flags.pop("overfit_batch"))
    for name in ("local_rank", *WITHOUT_EFFECT):
        flags.pop(name)
    given = {**RECIPES.get(recipe, {}), **flags}
    # One of the two ways to say the batch size replaces the recipe's.
    if "batch_size" in flags and "global_batch" not in flags:
        given.pop("global_batch", None)
    settings = Settings(**given)
    if "run_dir" not in given:
        name = recipe or f"classifier{settings.image_size}"
        settings = settings.replace(run_dir=f"runs/{name}")
    if "data_dir" not in given and "val_data_dir" not in given and Path("data/val").is_dir():
        settings = settings.replace(val_data_dir="data/val")
    if not settings.eval_interval:
        settings = settings.replace(eval_interval=settings.save_interval)
    return CommandLine(settings, frozenset(given), Path(config_path), recipe, use_fp16, *instead)


def _training_parser() -> argparse.ArgumentParser:
    shipped = ", ".join(f"{name}.json" for name in SHIPPED_CONFIGS)
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a noise-aware image classifier with DeepSpeed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="deepspeed [launcher flags] launch/train.py --deepspeed_config JSON [flags]",
        epilog=textwrap.dedent(f"""\
            The JSON says how to train (micro-batch, precision, ZeRO, optimizer, schedule); "auto"
            in it stands for a number that these flags own. In ds_configs/:
            {shipped}.

            Examples:
              python launch/make_shards.py convert digits data
              deepspeed --num_gpus 2 launch/train.py \\
                  --deepspeed_config ds_configs/zero2_fp16.json --recipe digits32
              deepspeed --hostfile hosts launch/train.py \\
                  --deepspeed_config ds_configs/zero2_fp16.json --recipe imagenet64

            A command line written for guided-diffusion's classifier_train.py works behind
            --deepspeed_config. The same command again continues a stopped run.
            Stop it with SIGTERM, Ctrl-C, SIGUSR1, SIGHUP, or a file RUN/STOP: it saves and ends.
            Exit codes of a rank: 0 finished; 75 stopped on request, run it again; 70 no progress
            within a time-out; 2 wrong use; 1 failure; 130, 143 ended at once by a second signal.
            """),
    )
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="JSON", help="how to train; see below"
    )
    instead = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    instead.add_argument(
        "--preflight",
        action="store_true",
        help="look at all nodes, data and settings, and say what was found",
    )
    instead.add_argument(
        "--dry_run",
        action="store_true",
        help="check what a run would check, take a few steps, save and load, measure memory and "
        "time; the run directory stays as it is",
    )
    instead.add_argument(
        "--overfit_batch",
        nargs="?",
        const=OVERFIT_STEPS,
        default=0,
        type=_steps,
        metavar="STEPS",
        help="train on one fixed batch until its loss is near 0, so many steps at most "
        f"[{OVERFIT_STEPS}]; exit code 1 if it is not; the run directory stays as it is",
    )
    add_setting_flags(parser, GROUPS)
    parser.add_argument("--classifier_use_fp16", type=boolean, default=None, help=argparse.SUPPRESS)
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", type=boolean, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser


def add_setting_flags(parser: argparse.ArgumentParser, groups: Sequence[str]) -> None:
    """Add --recipe, and a flag for every setting of some groups; only those given get parsed."""
    parser.add_argument(
        "--recipe",
        default="",
        choices=["", *RECIPES],
        metavar="NAME",
        help=f"settings that belong together: {', '.join(RECIPES)}; flags override them",
    )
    shown_groups = {name: parser.add_argument_group(name) for name in groups}
    for field in dataclasses.fields(Settings):
        if field.metadata["group"] not in groups:
            continue
        kind = _flag_type(field)
        shown = f" [{field.default}]" if "(default" not in field.metadata["help"] else ""
        shown_groups[field.metadata["group"]].add_argument(
            f"--{field.name}",
            type=kind,
            default=argparse.SUPPRESS,
            **(dict(nargs="?", const=True) if kind is boolean else {}),  # alone: True
            metavar={boolean: "BOOL", str: "TEXT", int: "N", float: "X"}[kind],
            help=field.metadata["help"] + shown,
        )


def _flag_type(field: dataclasses.Field) -> Any:
    return {"str": str, "int": int, "float": float}.get(str(field.type), boolean)


def _steps(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; need a number of steps, 1 or more")
    return int(text)


def boolean(text: str) -> bool:
    """The reference's spelling of truth: yes, true, t, y, 1 and their opposites."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"got {text!r}; need True or False")


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
