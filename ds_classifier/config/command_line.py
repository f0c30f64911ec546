"""The command line: a flag for each setting, and the other arguments of train.py.

This module imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_classifier.config.recipes import RECIPES
from ds_classifier.config.settings import GROUPS, SHIPPED_CONFIGS, Settings

OVERFIT_STEPS = 500  # default limit of --overfit_batch

# Flags of guided-diffusion's script that have no effect on a classifier's training, there or here.
WITHOUT_EFFECT = ("learn_sigma", "use_kl", "predict_xstart", "rescale_learned_sigmas")


@dataclass(frozen=True)
class CommandLine:
    """A parsed command.

    given: names of the settings that the recipe or a flag set; the others have their defaults.
    classifier_use_fp16: the reference's flag, which must agree with the JSON; None: not given.
    preflight, dry_run, overfit_steps (0: no): ask for something else than training.
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
    def skips_training(self) -> bool:
        """Returns True if the command does something else, which leaves the run directory as is."""
        return self.preflight or self.dry_run or bool(self.overfit_steps)


def parse_training_command(argv: list[str]) -> CommandLine:
    """Parse train.py's arguments. Malformed ones end the process with exit code 2."""
    parser = _training_parser()
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("recipe")
    config_path = flags.pop("deepspeed_config")
    use_fp16 = flags.pop("classifier_use_fp16")
    instead = (flags.pop("preflight"), flags.pop("dry_run"), flags.pop("overfit_batch"))
    for name in ("local_rank", *WITHOUT_EFFECT):
        flags.pop(name)
    given = {**RECIPES.get(recipe, {}), **flags}
    # --batch_size replaces the global batch of a recipe.
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
            The JSON says how to train (micro-batch, precision, ZeRO, optimizer, schedule). "auto"
            in it means that one of the flags sets the number. In ds_configs/:
            {shipped}.

            Examples:
              python launch/make_shards.py convert digits data
              deepspeed --num_gpus 2 launch/train.py \\
                  --deepspeed_config ds_configs/zero2_fp16.json --recipe digits32
              deepspeed --hostfile hosts launch/train.py \\
                  --deepspeed_config ds_configs/zero2_fp16.json --recipe imagenet64

            The flags of guided-diffusion's classifier_train.py work after --deepspeed_config.
            The same command again continues a stopped run.
            To stop a run: SIGTERM, Ctrl-C, SIGUSR1, SIGHUP, or a file RUN/STOP. It saves and ends.
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
        help="check all nodes, the data and the settings, and print what was found",
    )
    instead.add_argument(
        "--dry_run",
        action="store_true",
        help="make the checks of a run, take a few steps, save and load, measure memory and time; "
        "the run directory stays as it is",
    )
    instead.add_argument(
        "--overfit_batch",
        nargs="?",
        const=OVERFIT_STEPS,
        default=0,
        type=_steps,
        metavar="STEPS",
        help="train on one fixed batch until its loss is near 0, for STEPS steps at most "
        f"[{OVERFIT_STEPS}]; exit code 1 if the loss stays high; the run directory stays as it is",
    )
    add_setting_flags(parser, GROUPS)
    parser.add_argument("--classifier_use_fp16", type=boolean, default=None, help=argparse.SUPPRESS)
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", type=boolean, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser


def add_setting_flags(parser: argparse.ArgumentParser, groups: Iterable[str]) -> None:
    """Add --recipe, and a flag for every setting of some groups, as a section of --help each.

    groups: names in `settings.GROUPS`.
    Flags that the user does not give are absent from the parsed arguments.
    """
    parser.add_argument(
        "--recipe",
        default="",
        choices=["", *RECIPES],
        metavar="NAME",
        help=f"settings that belong together: {', '.join(RECIPES)}; flags override them",
    )
    for name in groups:
        section = parser.add_argument_group(name)
        for field in dataclasses.fields(GROUPS[name]):
            kind = _flag_type(field)
            shown = f" [{field.default}]" if "(default" not in field.metadata["help"] else ""
            section.add_argument(
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
    """Read True or False as the reference spells them: yes, true, t, y, 1 and their opposites."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"got {text!r}; need True or False")
