"""Measure this machine: `python launch/benchmark.py step IMAGES` and its other commands.

Every figure is the median of several repeats; what is compared is interleaved, so that a machine
whose speed drifts still gives ratios. Prints a table; --json FILE keeps the numbers. Flags of
launch/train.py may follow those of `step`, `compare`, `start` and `checkpoint`: --deepspeed_config
above all (zero1_fp32.json where none is given).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier.common import files
from ds_classifier.config import Settings

TRAIN = Path(__file__).with_name("train.py")
WITH_FLAGS = {"step", "compare", "start", "checkpoint"}  # of launch/train.py too
WITHOUT_IMAGES = {"order", "cache", "memory", "checkpoint"}
IMAGE_FOLDER = "what make_shards.py converts, such as a folder of images"
SHARDS = "shards; or what make_shards.py takes, of which at most 2,000 images are converted"
DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "zero1_fp32.json"


def main(argv: list[str] | None = None) -> int:
    parser, training = _parser()
    arguments, words = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    keywords = vars(arguments)
    command, json_path = keywords.pop("command"), keywords.pop("json")
    if command in training:
        if "--deepspeed_config" not in words:
            words = ["--deepspeed_config", str(DEFAULT_CONFIG), *words]
        keywords["words"] = words
    elif words:
        parser.error(f"got {' '.join(words)}; need only flags that --help shows")
    if json_path and (json_path.is_dir() or not json_path.resolve().parent.is_dir()):
        parser.error(f"--json: got {json_path}; need a file, in a directory that is there")
    # Here, so that --help answers at once.
    benchmarks = f"{__package__ or 'launch'}.benchmarks"  # ds_classifier.launch where installed
    measurement = importlib.import_module(f"{benchmarks}.{command}")
    print_table = importlib.import_module(f"{benchmarks}.measuring").print_table

    try:
        rows = measurement.measure(**keywords)
    except (ValueError, OSError) as error:
        print(f"error: {files.problem(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing is kept", file=sys.stderr)
        return 130
    print_table(rows)
    if json_path:
        measured = {k: str(v) if isinstance(v, Path) else v for k, v in keywords.items()}
        facts = {"command": command, "settings": measured, **machine()}
        json_path.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    return 0


def machine() -> dict[str, object]:
    """What the numbers are of, and when they were taken."""
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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def _joined(words: list[str]) -> list[str]:
    """--way FLAGS as one word, for argparse takes a value that begins with - for a flag."""
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


def _parser() -> tuple[argparse.ArgumentParser, set[str]]:
    """The parser, and the commands that take flags of launch/train.py too.

    A command is a module of launch/benchmarks, its flags the keywords of `measure` there.
    """
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.partition("\n\n")[2])
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def add(name: str, text: str, *, repeats: bool = True) -> argparse.ArgumentParser:
        training = " [flags of launch/train.py]" if name in WITH_FLAGS else ""
        usage = f"%(prog)s{' IMAGES' * (name not in WITHOUT_IMAGES)} [options]{training}"
        command = commands.add_parser(name, help=text, description=text, usage=usage)
        if repeats:
            command.add_argument("--repeats", type=_count, default=5, help="of each figure [5]")
        command.add_argument("--json", type=Path, help="write the numbers to this file")
        return command

    def add_images(command: argparse.ArgumentParser, *, sizes: bool = False) -> None:
        command.add_argument("images", help=IMAGE_FOLDER if sizes else SHARDS)
        if sizes:
            sized = dict(type=_count, nargs="+", default=[64, 256], dest="image_sizes")
            command.add_argument("--image_size", metavar="PIXELS", help="[64 256]", **sized)

    step = add("step", "a training step: bare, in its engine, in the trainer")
    add_images(step)
    step.set_defaults(program=TRAIN)
    step.add_argument("--ranks", type=_count, nargs="+", default=[1], help="of the trainer [1]")
    step.add_argument("--steps", type=_count, default=3, help="timed of each in a repeat [3]")
    step.add_argument(
        "--reference", type=Path, help="a guided-diffusion checkout, whose trainer is run beside"
    )
    compare = add("compare", "whole trainers with different flags, in turn")
    add_images(compare)
    compare.set_defaults(program=TRAIN)
    compare.add_argument(
        "--way",
        action="append",
        required=True,
        dest="ways",
        metavar="'FLAGS'",
        help="flags of launch/train.py of one of them; once for each, the first is the measure",
    )
    compare.add_argument("--ranks", type=_count, nargs="+", default=[1], help="of each way [1]")
    compare.add_argument("--steps", type=_count, default=5, help="timed of each in a repeat [5]")
    start = add("start", "seconds from the command to the first step")
    add_images(start)
    start.set_defaults(program=TRAIN)
    start.add_argument("--ranks", type=_count, nargs="+", default=[1, 2], help="[1 2]")
    data = add("data", "images a second and core, from shards and from a folder")
    add_images(data, sizes=True)
    data.add_argument("--count", type=_count, default=600, help="images a repeat [600]")
    add_images(add("convert", "images a second and core written to shards"), sizes=True)
    add("order", "time and memory of the sample order")
    cache = add(
        "cache",
        "simulate an epoch of ImageNet from afar: what a node's cache must hold",
        repeats=False,
    )
    cache.add_argument("--lanes", type=int, nargs="+", default=[16, Settings().lanes, 256])
    cache.add_argument("--shuffle_shards", nargs="+", default=["1", "4"])
    cache.add_argument("--ranks", type=_count, nargs="+", default=[8, 64, 512], help="8 a node")
    add("memory", "memory of 8 loader workers, for large data sets")
    checkpoint = add(
        "checkpoint", "how long a save holds up training, written behind it or waited for"
    )
    checkpoint.add_argument("--folder", type=Path, help="on the disk to measure [a temporary one]")
    return parser, WITH_FLAGS


if __name__ == "__main__":
    sys.exit(main())
