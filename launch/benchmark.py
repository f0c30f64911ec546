"""Measure this machine: `python launch/benchmark.py step IMAGES` and its other commands.

Every figure is the median of several repeats, and in `quality` the mean over several seeds. Runs
that are compared are interleaved, so ratios hold even if the machine's speed drifts. Prints a
table; --json FILE keeps the numbers. Flags of launch/train.py may follow those of `step`, `compare`
and `quality`, above all --deepspeed_config (zero1_fp32 if none is given).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier.common import files
from ds_classifier.config.parser import Parser

TRAIN = Path(__file__).with_name("train.py")
WITH_FLAGS = {"step", "compare", "quality"}  # commands that take flags of launch/train.py too
IMAGE_FOLDER = "what `ds-classifier convert` takes, such as a folder of images"
SHARDS = (
    "shards; or what `ds-classifier convert` takes, of which at most 2,000 images are converted"
)
TAKEN = {"step": SHARDS, "compare": SHARDS, "quality": "shards with a validation split"}
DEFAULT_CONFIG = "zero1_fp32"


def main(argv: list[str] | None = None, prog: str = "benchmark.py") -> int:
    """Run a command, print its table, and return the exit code."""
    parser = _parser(prog)
    arguments, words = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    keywords = vars(arguments)
    command, json_path = keywords.pop("command"), keywords.pop("json")
    if command in WITH_FLAGS:
        if "--deepspeed_config" not in words:
            words = ["--deepspeed_config", DEFAULT_CONFIG, *words]
        keywords["words"] = words
    # Imported here, so that --help answers at once.
    benchmarks = f"{__package__ or 'launch'}.benchmarks"  # ds_classifier.launch where installed
    measurement = importlib.import_module(f"{benchmarks}.{command}")
    print_table = importlib.import_module(f"{benchmarks}.measuring").print_table

    try:
        if json_path:
            files.refuse_unwritable_file("--json", json_path)
        if keywords.get("save"):
            files.refuse_unwritable("--save", keywords["save"])
        rows = measurement.measure(**keywords)
    except (ValueError, OSError) as error:
        print(f"error: {files.problem(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing is kept", file=sys.stderr)
        return 130
    for part in dict.fromkeys(row.get("part") for row in rows):  # gpu has several, a table for each
        print_table([row for row in rows if row.get("part") == part])
    if json_path:
        measured = {k: str(v) if isinstance(v, Path) else v for k, v in keywords.items()}
        facts = {"command": command, "settings": measured, **machine()}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_text(json_path, json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    return 0


def machine() -> dict[str, object]:
    """Return facts on the machine, the software and the time of the measurement."""
    import torch

    from ds_classifier.training.run_dir import environment

    gpu = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "device": torch.cuda.get_device_name() if gpu else processor(),
        "threads": torch.get_num_threads(),
        **environment(),
    }


def processor() -> str:
    """Return the name of the CPU's model, "CPU" if it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def _joined(words: list[str]) -> list[str]:
    """Join --way FLAGS into one word: argparse takes a value that begins with - for a flag."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--way":
            joined[-1] = f"--way={word}"
        else:
            joined.append(word)
    return joined


def _count(text: str) -> int:
    if not text.isdecimal():  # such as IMAGES after --ranks, which takes several
        raise argparse.ArgumentTypeError(f"got {text}; need a whole number; IMAGES stands first")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; need a whole number, at least 1")
    return int(text)


def _parser(prog: str) -> Parser:
    """Return the parser.

    A command is a module of launch/benchmarks; its flags are the keywords of `measure` there.
    """
    parser = Parser(prog=prog, passes_on=True, description=__doc__.partition("\n\n")[2])
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def add(name: str, text: str) -> Parser:
        training = " [flags of launch/train.py]" if name in WITH_FLAGS else ""
        usage = f"%(prog)s IMAGES [options]{training}"
        command = commands.add_parser(
            name, help=text, description=text, usage=usage, passes_on=name in WITH_FLAGS
        )
        repeats = (3, "seeds") if name == "quality" else (5, "repeats per figure")
        command.add_argument(
            "--repeats", type=_count, default=repeats[0], help=f"{repeats[1]} [{repeats[0]}]"
        )
        command.add_argument("--json", type=Path, help="write the numbers to this file")
        command.add_argument("images", help=TAKEN.get(name, IMAGE_FOLDER))
        return command

    step = add("step", "a training step: bare, in its engine, in the trainer")
    step.set_defaults(program=TRAIN)
    step.add_argument(
        "--ranks",
        type=_count,
        nargs="+",
        default=[1],
        help="numbers of ranks to run the trainer on [1]",
    )
    step.add_argument("--steps", type=_count, default=3, help="steps timed each time [3]")
    step.add_argument(
        "--save", type=Path, metavar="FOLDER", help="also measure steps while saving to this disk"
    )
    step.add_argument(
        "--reference", type=Path, help="a guided-diffusion checkout, whose trainer is run too"
    )
    compare = add("compare", "whole trainers with different flags, in turn")
    compare.set_defaults(program=TRAIN)
    _add_ways(compare, "flags of launch/train.py; once per way, ratios are to the first")
    compare.add_argument(
        "--ranks", type=_count, nargs="+", default=[1], help="numbers of ranks for each way [1]"
    )
    compare.add_argument("--steps", type=_count, default=5, help="steps timed each time [5]")
    _add_quality(add)
    gpu = commands.add_parser(
        "gpu",
        help="everything on this GPU, within minutes and without data",
        description="everything on this GPU, within minutes and without data",
    )
    gpu.add_argument("--minutes", type=float, default=8, help="to measure for, at most [8]")
    gpu.add_argument(
        "--peak_tflops", type=float, help="of this GPU in 16 bits, where its name does not tell"
    )
    gpu.add_argument("--json", type=Path, help="write the numbers to this file")
    data = add("data", "images per second and core, from shards and from a folder")
    data.add_argument(
        "--image_size",
        type=_count,
        nargs="+",
        default=[64, 256],
        dest="image_sizes",
        metavar="PIXELS",
        help="[64 256]",
    )
    data.add_argument("--count", type=_count, default=600, help="images per repeat [600]")
    return parser


def _add_ways(command: Parser, text: str) -> None:
    command.add_argument(
        "--way", action="append", required=True, dest="ways", metavar="'FLAGS'", help=text
    )


def _add_quality(add: Callable[..., Parser]) -> None:
    quality = add(
        "quality", "after how many images one way to train is as good as another at its end"
    )
    quality.set_defaults(program=TRAIN)
    _add_ways(quality, "flags of launch/train.py; once per way, the first sets the aim")
    quality.add_argument(
        "--reference",
        type=Path,
        help="a guided-diffusion checkout, whose trainer runs first and sets the aim",
    )
    quality.add_argument(
        "--classifier_scale",
        type=float,
        metavar="X",
        help="also draw 100 guided samples at this scale; the training set must fit in memory",
    )


if __name__ == "__main__":
    sys.exit(main())
