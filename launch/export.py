"""Export a classifier: `ds-classifier export RUN`.

Writes guided-diffusion's modelNNNNNN.pt and its flags, safetensors with all settings as JSON, and a
model card; reads them back and compares them with the classifier.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree that it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier.config import RECIPES
from ds_classifier.config.command_line import add_setting_flags
from ds_classifier.config.parser import Parser
from ds_classifier.distributed import failures

CONTENTS = {
    ".pt": "guided-diffusion's state dict",
    ".safetensors": "the same weights",
    ".json": "settings, classes, accuracy by noise level",
    ".txt": "flags of classifier_sample.py",
    ".md": "a model card",
}


def main(argv: list[str] | None = None, prog: str = "export.py") -> int:
    """Export a classifier, print what was written, and return the exit code."""
    arguments, given = parse(sys.argv[1:] if argv is None else argv, prog)
    from ds_classifier.export.export import export

    try:
        exported = export(arguments.source, given, arguments.out)
    except (ValueError, OSError, RuntimeError) as error:
        return failures.report(error)
    except KeyboardInterrupt:
        return failures.interrupted()
    width = max(len(str(path)) for path in exported.paths)
    for path in exported.paths:
        print(f"{path!s:<{width}}  {CONTENTS[path.suffix]}, {path.stat().st_size:,} bytes")
    for note in exported.notes:
        print(note)
    if not exported.evaluated:
        print("no accuracies recorded: evaluate.py has not measured these weights and settings yet")
    t = ", ".join(map(str, exported.timesteps))
    print(
        f"read back: logits and input gradients at t = {t} differ by "
        f"{exported.largest_difference:.1g} at most"
    )
    print("loads in: ds_classifier.load, sample.py, diffusers' schedulers (docs/guidance.md)")
    if exported.obstacles is None:
        print("not in guided-diffusion, which has no such network")
    elif exported.obstacles:
        flags = next(path for path in exported.paths if path.suffix == ".txt")
        print(f"and in guided-diffusion after the edits to its code that {flags.name} lists, for:")
        for obstacle in exported.obstacles:
            print(f"  {obstacle.reason}")
    else:
        print("and in guided-diffusion as it is")
    return 0


def parse(argv: list[str], prog: str = "export.py") -> tuple[argparse.Namespace, dict]:
    """Return the arguments, and the settings that the recipe and flags give."""
    parser = Parser(
        prog=prog,
        description="Write a classifier as guided-diffusion's file, as safetensors with its "
        "settings, and a model card; read them back and compare.",
        epilog="The flags of classifier and diffusion are for a file that does not record its "
        "settings.",
    )
    add = parser.add_argument
    add("source", type=Path, help="a run, a checkpoint, or a .pt or .safetensors file")
    add("--out", type=Path, help="a directory (default: export/ of the run, or next to the file)")
    own = {action.dest for action in parser._actions}
    add_setting_flags(parser, ("classifier", "diffusion"))
    arguments = parser.parse_args(argv)
    flags = {k: v for k, v in vars(arguments).items() if k not in own and k != "recipe"}
    return arguments, {**RECIPES.get(arguments.recipe, {}), **flags}


if __name__ == "__main__":
    sys.exit(main())
