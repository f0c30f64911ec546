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

from ds_classifier.config.other_names import EPOCHS, TRAINING_ADVICE
from ds_classifier.config.parser import Malformed, Once, Parser, boolean
from ds_classifier.config.recipes import RECIPES
from ds_classifier.config.settings import GROUPS, Settings
from ds_classifier.config.settings_file import SettingsFile, read_settings_file
from ds_classifier.config.shipped import SHIPPED_CONFIGS

OVERFIT_STEPS = 500  # default limit of --overfit_batch

# Flags of guided-diffusion's script that have no effect on a classifier's training, there or here.
WITHOUT_EFFECT = ("learn_sigma", "use_kl", "predict_xstart", "rescale_learned_sigmas")
OF_CODE = ("classifier", "loss", "augment")  # settings that may name a function of the user's
TORCHVISION = "torchvision:"  # a classifier of its name is no function of theirs
BATCHES = {"batch_size", "global_batch"}  # settings that say the same in two ways


@dataclass(frozen=True)
class CommandLine:
    """A parsed command.

    given: names of the settings that a recipe, a file or a flag set; the others have their
    defaults.
    deepspeed_config: a file, or the name of a shipped one; None: the one that suits the machine.
    classifier_use_fp16: the reference's flag, which must agree with the JSON; None: not given.
    preflight, dry_run, overfit_steps (0: no): ask for something else than training.
    epochs: asked for in place of iterations, which is refused; 0: not asked for.
    config: the file of --config; recorded: it is the config.json of a run; unknown: its keys that
        are no settings.
    """

    settings: Settings
    given: frozenset[str]
    deepspeed_config: Path | None
    recipe: str
    classifier_use_fp16: bool | None
    preflight: bool = False
    dry_run: bool = False
    overfit_steps: int = 0
    epochs: float = 0
    config: Path | None = None
    recorded: bool = False
    unknown: tuple[str, ...] = ()

    @property
    def skips_training(self) -> bool:
        """Returns True if the command does something else, which leaves the run directory as is."""
        return self.preflight or self.dry_run or bool(self.overfit_steps)


def parse_training_command(argv: list[str], prog: str = "train.py") -> CommandLine:
    """Parse train.py's arguments. Malformed ones end the process with exit code 2.

    prog: the name of the program in its messages.
    """
    parser = _training_parser(prog)
    flags = vars(parser.parse_args(argv))
    recipe, config_path = flags.pop("recipe"), flags.pop("deepspeed_config")
    use_fp16, epochs, config = (flags.pop(k) for k in ("classifier_use_fp16", "epochs", "config"))
    instead = (flags.pop("preflight"), flags.pop("dry_run"), flags.pop("overfit_batch"))
    for name in ("local_rank", "deepspeed", *WITHOUT_EFFECT):
        flags.pop(name)
    file = SettingsFile()
    if config is not None:
        try:
            file = read_settings_file(config)
        except ValueError as error:
            parser.error(f"--config: {error}")
    _refuse_code_of_file(parser, file, flags)
    if file.recorded and "data_dir" in flags:
        file.values.pop("val_data_dir", None)  # of other data
    recipe, config_path = recipe or file.recipe, config_path or file.deepspeed_config
    given: dict[str, Any] = {}
    for layer in (RECIPES.get(recipe, {}), file.values, flags):
        if BATCHES & layer.keys():
            given = {name: value for name, value in given.items() if name not in BATCHES}
        given |= layer
    settings = Settings(**given)
    if "run_dir" not in given:
        name = recipe or f"classifier{settings.image_size}"
        settings = settings.replace(run_dir=f"runs/{name}")
    if not settings.eval_interval:
        settings = settings.replace(eval_interval=settings.save_interval)
    return CommandLine(
        settings,
        frozenset(given),
        Path(config_path) if config_path else None,
        recipe,
        use_fp16,
        *instead,
        epochs=epochs,
        config=config,
        recorded=file.recorded,
        unknown=file.unknown,
    )


def _refuse_code_of_file(parser: Parser, file: SettingsFile, flags: dict[str, Any]) -> None:
    """End the process if a settings file names a function that no flag names.

    Such a file may be the config.json of someone else's run.
    """
    for name in OF_CODE:
        value = file.values.get(name, "")
        code = ":" in value and not value.startswith(TORCHVISION)
        if code and name not in flags:
            parser.error(
                f"--config: got {name} {value}, a function; need its flag too, since no file "
                f"chooses which code runs; do: add --{name} {value} if you know it"
            )


def _training_parser(prog: str) -> Parser:
    script = "launch/train.py" if prog == "train.py" else "--module ds_classifier.launch.train"
    parser = Parser(
        prog=prog,
        advice={name: text.replace("{script}", script) for name, text in TRAINING_ADVICE.items()},
        description="Train a noise-aware image classifier with DeepSpeed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{prog} [flags]\n       deepspeed [launcher flags] {script} [flags]",
        epilog=textwrap.dedent(f"""\
            The JSON says how to train (micro-batch, precision, ZeRO, optimizer, schedule). "auto"
            in it means that one of the flags sets the number. Those that come with the package:
            {", ".join(SHIPPED_CONFIGS)}.

            Examples:
              ds-classifier convert digits data
              deepspeed --num_gpus 2 {script} --recipe digits32
              deepspeed --hostfile hosts {script} --recipe imagenet64 \\
                  --deepspeed_config zero2_fp16

            The flags of guided-diffusion's classifier_train.py work here.
            The same command again continues a stopped run.
            To stop a run: SIGTERM, Ctrl-C, SIGUSR1, SIGHUP, or a file RUN/STOP. It saves and ends.
            Exit codes of a rank: 0 finished; 75 stopped on request, run it again; 70 no progress
            within a time-out; 2 wrong use; 1 failure; 130, 143 ended at once by a second signal.
            """),
    )
    parser.add_argument(
        "--deepspeed_config",
        metavar="JSON",
        help="how to train: a file, or the name of one that comes with the package, see below "
        "(default: one that suits this machine)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        action=Once,
        metavar="FILE",
        help="settings from a YAML or JSON file, such as the config.json of a run; it overrides "
        "the recipe, and flags override it (default: none)",
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
    # DeepSpeed's own helper for command lines has it, before --deepspeed_config.
    parser.add_argument("--deepspeed", nargs="?", type=_switch, help=argparse.SUPPRESS)
    epochs = [f"--{name}" for name in EPOCHS]
    parser.add_argument(*epochs, dest="epochs", type=_epochs, default=0, help=argparse.SUPPRESS)
    return parser


def add_setting_flags(parser: argparse.ArgumentParser, groups: Iterable[str]) -> None:
    """Add --recipe, and a flag for every setting of some groups, as a section of --help each.

    groups: names in `settings.GROUPS`.
    Flags that the user does not give are absent from the parsed arguments.
    """
    parser.add_argument(
        "--recipe",
        action=Once,
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


def _switch(text: str) -> bool:
    if text.lower() == "true":
        return True
    raise Malformed(
        f"got {text!r}; need no value, since DeepSpeed always trains; do: --deepspeed_config JSON "
        "to say how"
    )


def _epochs(text: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or not float(text):
        raise Malformed(f"got {text!r}; need a number of epochs, more than 0")
    return float(text)


def _steps(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise Malformed(f"got {text!r}; need a number of steps, 1 or more")
    return int(text)
