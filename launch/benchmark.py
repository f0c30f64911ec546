"""Measure this machine: `python launch/benchmark.py step PICTURES` and its other commands.

Every figure is the median of several repeats; what is compared is interleaved, so that a machine
whose speed drifts still gives ratios. Prints a table; --json FILE keeps the numbers. Flags of
launch/train.py may follow those of `step`, `start` and `checkpoint`: --deepspeed_config above all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import files
from ds_classifier.config import Settings

TRAIN = Path(__file__).with_name("train.py")
DEFAULT_CONFIG = "ds_configs/zero1_fp32.json"


def main(argv: list[str] | None = None) -> int:
    parser, training = _parser()
    arguments, words = parser.parse_known_args(argv)
    if words and arguments.run not in training:
        parser.error(f"got {' '.join(words)}; need only flags that --help shows")
    if arguments.run in training and "--deepspeed_config" not in words:
        words = ["--deepspeed_config", DEFAULT_CONFIG, *words]
    try:
        rows = arguments.run(arguments, words)
    except (ValueError, OSError) as error:
        print(f"error: {files.problem(error)}", file=sys.stderr)
        return 2
    from ds_classifier.benchmarks.measuring import print_table

    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _parser() -> tuple[argparse.ArgumentParser, list]:
    """The parser, and the commands that take flags of launch/train.py too."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("--repeats", type=int, default=5, help="of each figure [5]")
        command.add_argument("--json", type=Path, help="write the numbers to this file")
        return command

    def add_pictures(command: argparse.ArgumentParser) -> None:
        command.add_argument("pictures", help="an image folder, as make_shards.py takes it")

    step = add("step", _step, "a training step: bare, in its engine, in the trainer")
    add_pictures(step)
    step.add_argument("--ranks", type=int, nargs="+", default=[1], help="of the trainer [1]")
    step.add_argument("--steps", type=int, default=3, help="timed of each in a repeat [3]")
    step.add_argument(
        "--reference", type=Path, help="a guided-diffusion checkout, whose trainer is run beside"
    )
    start = add("start", _start, "seconds from the command to the first step")
    add_pictures(start)
    start.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    data = add("data", _data, "pictures a second and core, from shards and from a folder")
    add_pictures(data)
    data.add_argument("--image_size", type=int, nargs="+", default=[64, 256])
    data.add_argument("--count", type=int, default=600, help="pictures a repeat [600]")
    convert = add("convert", _convert, "pictures a second and core written to shards")
    add_pictures(convert)
    convert.add_argument("--image_size", type=int, nargs="+", default=[64, 256])
    add("order", _order, "time and memory of the sample order")
    cache = add(
        "cache", _cache, "simulate an epoch of ImageNet from afar: what a node's cache must hold"
    )
    cache.add_argument("--lanes", type=int, nargs="+", default=[16, Settings().lanes, 256])
    cache.add_argument("--shuffle_shards", nargs="+", default=["1", "4"])
    cache.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="8 a node")
    add("memory", _memory, "memory of 8 loader workers, for large data sets")
    checkpoint = add(
        "checkpoint",
        _checkpoint,
        "how long a save holds up training, written behind it or waited for",
    )
    checkpoint.add_argument("--folder", type=Path, help="on the disk to measure [a temporary one]")
    return parser, [_step, _start, _checkpoint]


# Each imports what it needs, so that --help answers at once.


def _step(arguments: argparse.Namespace, words: list[str]) -> list[dict]:
    from ds_classifier.benchmarks import step

    return step.measure(
        words,
        program=TRAIN,
        pictures=arguments.pictures,
        reference=arguments.reference,
        ranks=arguments.ranks,
        steps=arguments.steps,
        repeats=arguments.repeats,
    )


def _start(arguments: argparse.Namespace, words: list[str]) -> list[dict]:
    from ds_classifier.benchmarks import start

    return start.measure(
        words,
        program=TRAIN,
        pictures=arguments.pictures,
        ranks=arguments.ranks,
        repeats=arguments.repeats,
    )


def _data(arguments: argparse.Namespace, words: list[str]) -> list[dict]:
    from ds_classifier.benchmarks import data

    return data.measure(
        arguments.pictures,
        image_sizes=arguments.image_size,
        count=arguments.count,
        repeats=arguments.repeats,
    )


def _convert(arguments: argparse.Namespace, words: list[str]) -> list[dict]:
    from ds_classifier.benchmarks import convert

    return convert.measure(
        arguments.pictures, image_sizes=arguments.image_size, repeats=arguments.repeats
    )


def _order(arguments: argparse.Namespace, words: list[str]) -> list[dict]:
    from ds_classifier.benchmarks import order

    return order.measure(repeats=arguments.repeats)


def _cache(arguments: argparse.Namespace, words: list[str]) -> list[dict]:
    from ds_classifier.benchmarks import cache

    return cache.measure(
        lanes=arguments.lanes, shuffle_shards=arguments.shuffle_shards, ranks=arguments.ranks
    )


def _memory(arguments: argparse.Namespace, words: list[str]) -> list[dict]:
    from ds_classifier.benchmarks import workers

    return workers.measure(repeats=arguments.repeats)


def _checkpoint(arguments: argparse.Namespace, words: list[str]) -> list[dict]:
    from ds_classifier.benchmarks import checkpoint

    return checkpoint.measure(words, folder=arguments.folder, repeats=arguments.repeats)


if __name__ == "__main__":
    sys.exit(main())
