"""All programs under one name: `ds-classifier train ...`, `ds-classifier convert ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier.config.parser import Parser

NAME = "ds-classifier"
# Command -> the program in this folder, and what it does. make_shards has commands of its own.
COMMANDS = {
    "train": ("train", "train a classifier; the same command again continues the run"),
    "convert": ("make_shards", "write images as shards"),
    "index": ("make_shards", "use shards that another program made"),
    "merge": ("make_shards", "finish a conversion that was written in parts"),
    "verify": ("make_shards", "check shards against their manifest and index"),
    "evaluate": ("evaluate", "measure a classifier at a grid of noise levels"),
    "sample": ("sample", "draw guided samples, and measure how well a classifier guides"),
    "export": ("export", "write a classifier as guided-diffusion's file and as safetensors"),
    "report": ("report", "write a run's report, one HTML page"),
    "benchmark": ("benchmark", "measure this machine"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the program that the first word names, and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    command = _parser().parse_args(words[:1]).command
    program = COMMANDS[command][0]
    module = importlib.import_module(f"{__package__ or 'launch'}.{program}")
    if program == "make_shards":
        return module.main(words, prog=NAME)
    return module.main(words[1:], prog=f"{NAME} {command}")


def _parser() -> Parser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    parser = Parser(
        prog=NAME,
        usage=f"{NAME} COMMAND [arguments]",
        description="Train noise-aware image classifiers, and guide diffusion models with them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["commands:", *lines, "", f"The flags of each: {NAME} COMMAND --help"]),
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
