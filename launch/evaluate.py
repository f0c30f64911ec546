"""Measure a classifier at a grid of noise levels: `ds-classifier evaluate RUN`.

It also runs through the deepspeed launcher or torchrun. Any number of ranks gives the same numbers,
to the last digit where each rank computes as the others do: on a CPU, with the same number of
threads per rank (OMP_NUM_THREADS). Elsewhere the means agree up to rounding.

RUN may be a run (its newest checkpoint), a checkpoint, an export, or a file of weights such as
guided-diffusion's published .pt, whose settings the flags then give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.config import RECIPES
from ds_classifier.config.command_line import add_setting_flags
from ds_classifier.config.parser import Parser
from ds_classifier.distributed import failures
from ds_classifier.evaluation.format import PRECISIONS, evaluation_name

OF_MODEL = ("classifier", "diffusion")  # groups of settings that a bare file does not record
CLASS_HELP = "levels with numbers per class (default: 0, and where signal equals noise)"


def main(argv: list[str] | None = None, prog: str = "evaluate.py") -> int:
    """Evaluate as the command line says, and return the exit code."""
    arguments, given = parse(sys.argv[1:] if argv is None else argv, prog)
    distributed.quiet_libraries()
    try:
        run(arguments, given)
    except (ValueError, OSError) as error:
        return failures.report(error)
    except KeyboardInterrupt:
        return failures.interrupted()
    return 0


def parse(argv: list[str], prog: str = "evaluate.py") -> tuple[argparse.Namespace, dict]:
    """Return the arguments, and the settings that the recipe and the flags give."""
    parser = Parser(
        prog=prog,
        description="Measure a classifier on a whole validation set at a grid of noise levels.",
        epilog="Writes RUN/eval/NAME.json, NAME.png and NAME.pictures.png; for several sets of "
        "weights also series.json and series.png; and RUN/report.html.",
    )
    add = parser.add_argument
    add("source", nargs="?", type=Path, help="a run, a checkpoint, an export, or a file: .pt, "
        ".safetensors")  # fmt: skip
    add("--checkpoints", nargs="+", default=[], metavar="PATH", help="further "
        "weights to evaluate, as a series; all: every checkpoint of the run")  # fmt: skip
    add("--val_data_dir", default="", help="shards, or their URL (default: those of the run)")
    add("--levels", type=int, default=20, metavar="N", help="noise levels besides t = 0 [20]")
    add(
        "--timesteps",
        type=_timesteps,
        metavar="T,T",
        help="levels in place of --levels, like 0,500",
    )
    add("--class_timesteps", type=_timesteps, metavar="T,T", help=CLASS_HELP)
    add("--bayes", default="", metavar="SHARDS", help="training shards whose exact posterior is "
        "evaluated too (default: the run's, up to 10 million pixel values)")  # fmt: skip
    add("--precision", default=PRECISIONS[0], choices=PRECISIONS, help="[fp32]")
    add("--batch_size", type=int, default=0, metavar="N", help="images at a time (default: 64, "
        "fewer from 256 px on); use the same one to compare numbers to the last digit")  # fmt: skip
    add("--out", type=Path, help="a directory (default: eval/ of the run)")
    add("--cache_dir", help="where a node keeps shards read by URL (default: as in training)")
    add("--cache_gb", type=float, help="gigabytes of them at most (default: as in training)")
    add("--workers", type=int, default=-1, metavar="N", help="loader processes per rank")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    own = {action.dest for action in parser._actions}
    add_setting_flags(parser, OF_MODEL)
    arguments = parser.parse_args(argv)
    flags = {k: v for k, v in vars(arguments).items() if k not in own and k != "recipe"}
    if not arguments.source and not arguments.checkpoints:
        parser.error("got nothing to evaluate; need a run, a checkpoint or a file of weights")
    if arguments.levels < 1 or arguments.batch_size < 0:
        parser.error("--levels needs at least 1, --batch_size at least 0")
    return arguments, {**RECIPES.get(arguments.recipe, {}), **flags}


def _timesteps(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; need numbers like 0,100,500") from None


def run(arguments: argparse.Namespace, given: dict) -> None:
    """Evaluate every source, and write files and tables on rank 0. Raises ValueError for misuse."""
    from ds_classifier.checkpoint.weights import home_of
    from ds_classifier.evaluation import record, table
    from ds_classifier.evaluation.sources import find_sources
    from ds_classifier.report import plots
    from ds_classifier.report.page import write_report

    device = distributed.init()
    record.compute_reproducibly()
    words = {k: v for k, v in vars(arguments).items() if k in record.Request.__annotations__}
    evaluator = record.Evaluator(record.Request(given=given, **words), device)
    evaluated, runs = [], set()

    def find() -> list[str]:
        """Return the paths of the weights; what is made from each must find a place."""
        paths = find_sources(arguments.source, arguments.checkpoints)
        for folder in {arguments.out or home_of(Path(path)) / "eval" for path in paths}:
            files.refuse_unwritable("--out", folder)
        return paths

    paths = distributed.on_rank_0(find, device)
    for path in paths:
        evaluation = evaluator.evaluate(Path(path))
        found, source = evaluation.record, evaluation.source
        folder = arguments.out or source.home / "eval"
        if source.kind == "checkpoint" and not arguments.out:
            runs.add(source.home)

        def write(evaluation=evaluation, folder=folder) -> int:
            replaced = evaluation.write(folder)
            plots.plot_evaluation(evaluation.record, folder / f"{evaluation.record['name']}.png")
            return replaced

        replaced = distributed.on_rank_0(write, device)
        distributed.say("\n".join(table.level_table(found)))
        if bayes := found.get("bayes"):
            truth = "the distribution that the images were drawn from"
            if bayes["pictures"]:
                truth = "the training images; on others, too sure"
            distributed.say(f"Bayes: the exact posterior of {truth}")
        if len(paths) == 1:
            distributed.say("\n" + "\n".join(table.class_table(found)))
        fewer = replaced > len(found["classifier"]["levels"])
        note = f", in place of an evaluation at {replaced} levels" if fewer else ""
        distributed.say(f"\nwritten: {folder}/{found['name']}.json and .png{note}")
        evaluated.append(evaluation)
    if len(evaluated) > 1:
        series, records = (
            evaluation_name("series", arguments.precision),
            [e.record for e in evaluated],
        )

        def write_series() -> None:
            record.write_series(evaluated, folder / f"{series}.json")
            plots.plot_series(records, folder / f"{series}.png")

        distributed.on_rank_0(write_series, device)
        distributed.say("\n" + "\n".join(table.series_table(records)))
        distributed.say(f"\nwritten: {folder}/{series}.json and .png")
    distributed.finish()
    if distributed.rank() == 0:  # on its own, after all ranks have left
        for run_dir in runs:
            if failures.tolerate("report.html", lambda run_dir=run_dir: write_report(run_dir)):
                print(f"written: {run_dir}/report.html")


if __name__ == "__main__":
    sys.exit(main())
