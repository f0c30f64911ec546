"""Measure a classifier at a grid of noise levels: `python launch/evaluate.py RUN`.

Also through the deepspeed launcher or torchrun. Any number of ranks gives the same numbers, to the
last digit where each computes as the others do: on a CPU, with the same number of threads a rank
(OMP_NUM_THREADS); else the means agree to rounding.
What is read: a run (its newest checkpoint), a checkpoint, an export, or a file of weights such as
guided-diffusion's published .pt, whose settings the flags then tell.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.common.urls import shown, without_logins
from ds_classifier.config import RECIPES, Settings
from ds_classifier.config.command_line import add_setting_flags
from ds_classifier.distributed import failures
from ds_classifier.evaluation.record import (
    EVALUATION_FORMAT,
    EVALUATION_VERSION,
    PRECISIONS,
    evaluation_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ds_classifier.checkpoint.weights import WeightsFile
    from ds_classifier.evaluation.image_grid import ImageGrid

BATCH_PIXELS = 1 << 20  # of a batch where --batch_size says nothing; 64 images at most
OF_MODEL = ("classifier", "diffusion")  # groups of settings that a file of weights does not tell


def main(argv: list[str] | None = None) -> int:
    arguments, given = parse(sys.argv[1:] if argv is None else argv)
    distributed.quiet_libraries()
    try:
        run(arguments, given)
    except (ValueError, OSError) as error:
        return failures.report(error)
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """The arguments, and the settings that the recipe and flags give."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measure a classifier on a whole validation set at a grid of noise levels.",
        epilog="Writes RUN/eval/NAME.json, NAME.png, NAME.pictures.png; of several, series.json "
        "and series.png; and RUN/report.html.",
    )
    add = parser.add_argument
    add("source", nargs="?", type=Path, help="a run, a checkpoint, an export, or a file: .pt, "
        ".safetensors")  # fmt: skip
    add("--checkpoints", nargs="+", default=[], metavar="PATH", help="more of them, in a "
        "series; or all: those of the run")  # fmt: skip
    add("--val_data_dir", default="", help="shards, or their URL (default: those of the run)")
    add("--levels", type=int, default=20, metavar="N", help="noise levels beside t = 0 [20]")
    add("--timesteps", type=_timesteps, metavar="T,T", help="these levels instead, like 0,100,500")
    add("--class_timesteps", type=_timesteps, metavar="T,T", help=_CLASS_HELP)
    add(
        "--bayes",
        default="",
        metavar="SHARDS",
        help="training shards whose exact posterior is shown "
        "beside (default: the run's, if they have at most 10 million numbers)",
    )
    add("--precision", default=PRECISIONS[0], choices=PRECISIONS, help="[fp32]")
    add("--batch_size", type=int, default=0, metavar="N", help="images at a time (default: 64, "
        "fewer from 256 px on); the same for numbers to compare to the last digit")  # fmt: skip
    add("--out", type=Path, help="a directory (default: eval/ of the run)")
    add("--cache_dir", help="where a node keeps shards read by URL (default: as in training)")
    add("--cache_gb", type=float, help="gigabytes of them at most (default: as in training)")
    add("--workers", type=int, default=-1, metavar="N", help="loader processes a rank")
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


_CLASS_HELP = "levels with numbers per class (default: 0, and where signal equals noise)"


def _timesteps(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; need numbers like 0,100,500") from None


def run(arguments: argparse.Namespace, given: dict) -> None:
    """Evaluate every source; files and tables on rank 0. Raises ValueError for wrong use."""
    from ds_classifier.evaluation import table
    from ds_classifier.evaluation.image_grid import save_grid
    from ds_classifier.report import plots
    from ds_classifier.report.page import write_report

    device = distributed.init()
    same_numbers_every_time()
    records, runs, optima = [], set(), {}
    paths = distributed.on_rank_0(lambda: find_sources(arguments), device)
    for path in paths:
        record, grid, source = evaluate_source(Path(path), arguments, given, device, optima)
        folder = arguments.out or source.home / "eval"
        if source.kind == "checkpoint" and not arguments.out:
            runs.add(source.home)

        def write(record=record, grid=grid, folder=folder) -> str:
            folder.mkdir(parents=True, exist_ok=True)
            before = levels_before(folder / f"{record['name']}.json")
            files.replace_text(folder / f"{record['name']}.json", json.dumps(record, indent=1))
            plots.plot_evaluation(record, folder / f"{record['name']}.png")
            if grid is not None:
                save_grid(grid, folder / f"{record['name']}.pictures.png")
            fewer = before > len(record["classifier"]["levels"])
            return f", in the place of an evaluation at {before} levels" if fewer else ""

        replaced = distributed.on_rank_0(write, device)
        distributed.say("\n".join(table.level_table(record)))
        if len(paths) == 1:
            distributed.say("\n" + "\n".join(table.class_table(record)))
        distributed.say(f"\nwritten: {folder}/{record['name']}.json and .png{replaced}")
        records.append(record)
    if len(records) > 1:
        series = evaluation_name("series", arguments.precision)

        def write_series() -> None:
            files.replace_text(folder / f"{series}.json", json.dumps(records, indent=1))
            plots.plot_series(records, folder / f"{series}.png")

        distributed.on_rank_0(write_series, device)
        distributed.say("\n" + "\n".join(table.series_table(records)))
        distributed.say(f"\nwritten: {folder}/{series}.json and .png")
    distributed.finish()
    if distributed.rank() == 0:  # alone: nobody waits for it any more
        for run_dir in runs:
            if failures.tolerate("report.html", lambda run_dir=run_dir: write_report(run_dir)):
                print(f"written: {run_dir}/report.html")


def levels_before(path: Path) -> int:
    """How many noise levels the evaluation in a file has; 0 if there is none."""
    try:
        return len(json.loads(path.read_text())["classifier"]["levels"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def find_sources(arguments: argparse.Namespace) -> list[str]:
    """What to evaluate, in order; the checkpoints of a run from the oldest on.

    Raises ValueError before the first is evaluated if one of them is not there.
    """
    from ds_classifier.checkpoint import disk
    from ds_classifier.checkpoint.weights import find_recorded

    if arguments.checkpoints != ["all"]:
        named = [arguments.source] if arguments.source else []
        paths = [Path(path) for path in [*named, *arguments.checkpoints]]
        for path in paths:
            find_recorded(path)
        return list(map(str, paths))
    if arguments.source is None:
        raise ValueError("--checkpoints: got all; need the run too; do: evaluate.py RUN ...")
    found = []
    for path in reversed(disk.list_checkpoints(arguments.source / "checkpoints")):
        problem = disk.damage(path)
        if problem:
            distributed.say(f"passed over {path}: {problem}")
        else:
            found.append(str(path))
    if not found:
        raise ValueError(f"--checkpoints: got all; need a whole one in {arguments.source}")
    return found


def evaluate_source(
    path: Path, arguments: argparse.Namespace, given: dict, device, optima: dict[str, dict]
) -> tuple[dict, ImageGrid | None, WeightsFile]:
    """One classifier's record, rank 0's images, and whose weights it has.

    optima: what exact posteriors gave, by all that decides it; those of a series are the same.
    """
    import torch

    from ds_classifier.diffusion import create_gaussian_diffusion
    from ds_classifier.distributed import deepspeed_engine
    from ds_classifier.evaluation import evaluate
    from ds_classifier.evaluation.data import (
        create_validation_loader,
        open_training_set,
        open_validation_data,
    )
    from ds_classifier.evaluation.levels import Confusion
    from ds_classifier.evaluation.predictions import predict_grid

    source, weights = read_source(path, given, device)
    for note in source.notes():
        distributed.say(note)
    settings = source.settings
    location = arguments.val_data_dir
    if not location and source.kind == "checkpoint":
        location = settings.val_data_dir
    shards = open_validation_data(
        source,
        location,
        cache_dir=arguments.cache_dir,
        cache_gb=arguments.cache_gb,
        device=device,
    )
    diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
    levels, chosen = levels_of(arguments, diffusion)
    classifier = build_classifier(settings, weights, arguments.precision, device)

    samples = shards.manifest.samples
    side_by_side = max(1, min(64, BATCH_PIXELS // settings.image_size**2))
    batch_size = min(arguments.batch_size or side_by_side, samples)
    distributed.say(
        f"{source.path}: {sum(p.numel() for p in classifier.parameters()):,} parameters, "
        f"{settings.image_size} px, {settings.num_classes} classes"
    )
    distributed.say(f"{samples:,} images in {shown(location)}")
    distributed.say(
        f"at {len(levels)} noise levels and under uniform t, {arguments.precision}, on "
        f"{distributed.world_size()} x {deepspeed_engine.describe_device(device)}"
    )
    posteriors = [evaluate.classifier_posterior(classifier, diffusion)]
    training_set, denoiser = open_training_set(source, arguments.bayes, shards, device)
    fingerprint = shards.manifest.fingerprint
    pixels = dict(image_size=settings.image_size, channels=settings.in_channels)
    of_optimum = json.dumps(
        [training_set, fingerprint, levels, chosen, pixels, settings.diffusion_kwargs()]
    )
    if denoiser is not None:
        if of_optimum not in optima:
            posteriors.append(evaluate.bayes_posterior(denoiser, diffusion))
        distributed.say(
            f"beside it the exact posterior of the {len(denoiser):,} images in {training_set}, "
            "centre-cropped"
        )
    confusion = Confusion(samples, device)
    progress = Progress(samples, 1 + len(levels))
    (numbers, *optimum), bad = evaluate.evaluate_levels(
        posteriors,
        diffusion,
        create_validation_loader(
            shards, settings, batch_size=batch_size, workers=arguments.workers
        ),
        levels=levels,
        num_classes=settings.num_classes,
        samples=samples,
        device=device,
        confusion=confusion,
        progress=progress.add,
    )
    seconds = progress.end()
    if bad:
        distributed.say(
            f"{bad} images could not be decoded and are not counted; "
            "make_shards.py verify --decode names them"
        )
    record = {
        "format": EVALUATION_FORMAT,
        "version": EVALUATION_VERSION,
        "name": evaluation_name(source.name, arguments.precision),
        "weights": str(source.path),
        "weights_sha256": source.sha256,
        "step": source.step,
        "settings": settings.model_kwargs() | settings.diffusion_kwargs(),
        "classes": shards.manifest.classes,
        "data": {
            "location": without_logins(location),
            "fingerprint": fingerprint,
            "samples": samples,
            "bad_samples": bad,
        },
        "precision": arguments.precision,
        "batch_size": batch_size,
        "noise": f"keyed by ({evaluate.VALIDATION_SEED}, 'validation', position)",
        "classifier": evaluate.describe_levels(numbers, diffusion, levels, chosen=chosen),
        "confusion": {"t": levels[0], **confusion.read()},
        "machine": {
            "world_size": distributed.world_size(),
            "device": deepspeed_engine.describe_device(device),
            "torch": torch.__version__,
            "seconds": round(seconds, 3),
            "samples_per_sec": round(samples / seconds, 3),
        },
    }
    if denoiser is not None:
        if optimum:
            optima[of_optimum] = {
                "location": training_set,
                "pictures": len(denoiser),
                **evaluate.describe_levels(optimum[0], diffusion, levels, chosen=chosen),
            }
        record["bayes"] = optima[of_optimum]

    def images() -> ImageGrid | None:
        where = dict(device=device, step=source.step)
        return predict_grid(classifier, diffusion, shards, **pixels, **where)

    grid = failures.tolerate("the images", images) if distributed.rank() == 0 else None
    return record, grid, source


def read_source(path: Path, given: dict, device) -> tuple[WeightsFile, dict[str, Tensor]]:
    """Whose weights lie at a path, known to all ranks; and the weights, on rank 0 alone."""
    from ds_classifier.checkpoint.weights import WeightsFile, open_weights

    weights = {}

    def read() -> dict:
        source, tensors = open_weights(path, given)
        weights.update(tensors)
        source.refuse_contradicting_flags(given)
        return vars(source) | {"path": str(source.path), "settings": vars(source.settings)}

    answer = distributed.on_rank_0(read, device)
    paths = {"path": Path(answer["path"]), "settings": Settings(**answer["settings"])}
    return WeightsFile(**answer | paths), weights


def build_classifier(settings: Settings, weights: dict[str, Tensor], precision: str, device):
    """The classifier, to be asked only, with rank 0's weights on every rank."""
    from ds_classifier.distributed.deepspeed_engine import DTYPES
    from ds_classifier.model import create_classifier

    classifier = create_classifier(**settings.model_kwargs())
    if weights:
        classifier.load_state_dict(weights)
    classifier.to(device).eval().requires_grad_(False)
    for tensor in classifier.state_dict().values():
        distributed.broadcast(tensor)
    return classifier.to(DTYPES[precision])


def levels_of(arguments: argparse.Namespace, diffusion) -> tuple[list[int], list[int]]:
    """The noise levels to measure at, and those of them with numbers per class."""
    from ds_classifier.evaluation.evaluate import level_grid, middle_level

    asked = [*(arguments.timesteps or []), *(arguments.class_timesteps or [])]
    if asked and not 0 <= min(asked) <= max(asked) < diffusion.num_timesteps:
        raise ValueError(
            f"--timesteps, --class_timesteps: got {min(asked)} to {max(asked)}; need 0 to "
            f"{diffusion.num_timesteps - 1}"
        )
    levels = arguments.timesteps or level_grid(diffusion, arguments.levels)
    chosen = arguments.class_timesteps
    if chosen is None:
        chosen = sorted({levels[0], middle_level(diffusion, levels)})
    return sorted({*levels, *chosen}), chosen


def same_numbers_every_time() -> None:
    """Have the device compute in full fp32, and in the same order in every run."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.fp32_precision = "ieee"


class Progress:
    """How far rank 0 is: a line that is written over on a screen, a line every half minute else."""

    def __init__(self, samples: int, passes: int):
        self._samples, self._passes = samples, passes
        self._began = self._shown = time.perf_counter()
        self._done = 0
        self._screen = sys.stdout.isatty()

    def add(self, positions: int) -> None:
        """Rank 0 has done some positions; the others, as many each."""
        self._done += positions
        now = time.perf_counter()
        if distributed.rank() or now - self._shown < (0.5 if self._screen else 30):
            return
        self._shown = now
        done = min(self._done * distributed.world_size(), self._samples)
        rate = done / (now - self._began)
        line = (
            f"  {done:,} of {self._samples:,} images, {rate:,.1f}/s "
            f"({rate * self._passes:,.0f}/s through the network), "
            f"{(self._samples - done) / rate:,.0f} s to go"
        )
        print("\r" + line.ljust(98) if self._screen else line, end="" if self._screen else "\n")
        sys.stdout.flush()

    def end(self) -> float:
        """The seconds it took, also on the screen."""
        seconds = time.perf_counter() - self._began
        if self._screen and distributed.rank() == 0:
            print("\r" + " " * 98, end="\r")
        distributed.say(f"{self._samples:,} images in {seconds:.1f} s, "
                        f"{self._samples / seconds:,.1f}/s\n")  # fmt: skip
        return seconds


if __name__ == "__main__":
    sys.exit(main())
