"""Run whole trainers as separate programs: this one, and an unmodified guided-diffusion."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

from ds_classifier import distributed
from ds_classifier.config import CommandLine, Settings, parse_training_command
from ds_classifier.config.deepspeed_json import Resolved, read_ds_config, resolve
from ds_classifier.data.convert.convert import Encoding, convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.loader import PREFETCH, default_workers
from ds_classifier.data.shards import MANIFEST
from ds_classifier.distributed.engine.deepspeed_versions import quiet_flag
from ds_classifier.export.reference_flags import (
    REFERENCE_CLASSES,
    classifier_flags,
    process_flags,
    reference_obstacles,
)

MOST_CONVERTED = 2000  # images; a benchmark reads them again and again
WARM_UP = 2  # least number of steps that are not timed: the first ones allocate buffers
FIRST_LINE = "run  "  # begins the last line of the header, printed when a run is ready to train
REFERENCE_SCRIPT = Path("scripts", "classifier_train.py")
# Settings of a training command that the benchmark chooses itself.
OURS = ("data_dir", "val_data_dir", "run_dir", "iterations", "log_interval", "save_interval")
OURS += ("eval_interval", "num_classes", "resume_checkpoint", "init_from")
OURS_OF_QUALITY = tuple(name for name in OURS if name not in ("iterations", "eval_interval"))


class ProgramFailed(ValueError):
    """A measured program failed; the message is the end of its output."""


def training_command(words: list[str], ours: tuple[str, ...] = OURS) -> CommandLine:
    """Parse flags of launch/train.py. Raises ValueError for those that cannot be measured.

    ours: the settings that the benchmark chooses itself.
    """
    output = io.StringIO()
    try:
        with redirect_stderr(output):
            command = parse_training_command(words)
    except SystemExit:
        problem = output.getvalue().strip().splitlines()[-1:] or ["--help"]
        problem = problem[0].removeprefix("error: ")
        raise ValueError(f"{problem} (flags of launch/train.py come after IMAGES)") from None
    flags = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    chosen = sorted(set(ours) & flags)
    if chosen or command.skips_training:
        named = ", ".join(f"--{name}" for name in chosen) or "a command that does not train"
        raise ValueError(f"got {named}; need flags of training that the benchmark does not set")
    return command


def check_reference(checkout: Path, settings: Settings) -> None:
    """Raise ValueError if the reference is not there, or cannot train with these settings."""
    if not (checkout / REFERENCE_SCRIPT).is_file():
        raise ValueError(f"--reference: got {checkout}; need a checkout with {REFERENCE_SCRIPT}")
    # The number of classes changes only its last layer.
    obstacles = reference_obstacles(settings.replace(num_classes=REFERENCE_CLASSES))
    if obstacles:
        raise ValueError(
            f"--reference: got {obstacles[0].reason}; need a classifier that it can build"
        )


def reference_images_per_sec(
    runner: Path,
    checkout: Path,
    images: Path,
    folder: Path,
    settings: Settings,
    *,
    batch: int,
    microbatch: int,
    steps: int,
) -> float:
    """Return classifier_train.py's images per second over `steps` steps, loader and log included.

    The arguments are those of `run_reference`.
    """
    seconds = run_reference(
        runner,
        checkout,
        images,
        folder,
        settings,
        batch=batch,
        microbatch=microbatch,
        stop_after=WARM_UP + steps,
        iterations=10**6,
    )
    return steps * batch / (seconds[-1] - seconds[WARM_UP - 1])


def run_reference(
    runner: Path,
    checkout: Path,
    images: Path,
    folder: Path,
    settings: Settings,
    *,
    batch: int,
    microbatch: int,
    stop_after: int,
    **flags: object,
) -> list[float]:
    """Run classifier_train.py, and return the time at which each step ended, in seconds.

    runner: launch/benchmarks/run_reference.py. checkout: of guided-diffusion.
    images: a folder of files named CLASS_*. folder: where it may write; its log and its weights
    are in folder/log. settings: those that it has flags for, and the seed. stop_after: end it after
    so many steps; 0: let it end by itself, and save its weights. flags: more flags of the script.
    """
    moments = folder / "moments.json"
    moments.unlink(missing_ok=True)
    flags = classifier_flags(settings) | process_flags(settings) | flags
    flags |= dict(lr=settings.lr, weight_decay=settings.weight_decay, log_interval=10)
    flags |= dict(data_dir=images, batch_size=batch, microbatch=microbatch)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run_program(
        [sys.executable, runner, checkout, moments, stop_after, settings.seed, *words],
        environment={"OPENAI_LOGDIR": str(folder / "log")},
    )
    return json.loads(moments.read_text(encoding="utf-8"))


def resolve_words(words: list[str], ranks: int) -> Resolved:
    """Resolve a training command on a number of ranks. Raises ValueError if it is impossible."""
    command = parse_training_command(words)
    return resolve(command, read_ds_config(command.deepspeed_config), world_size=ranks)


def resolve_way(name: str, words: list[str], ranks: int, ours: tuple[str, ...] = OURS) -> Resolved:
    """Check and resolve the flags of one of several ways to train.

    name: of the way, for errors. ours: see `training_command`, whose errors this raises.
    """
    try:
        training_command(words, ours)
        return resolve_words(words, ranks)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def split_of_shards(images: Path) -> Path | None:
    """Return the training split of shards, or the split itself; None if images are no shards."""
    splits = (images, images / "train")
    return next((split for split in splits if (split / MANIFEST).is_file()), None)


def shards_for(words: list[str], images: str, folder: Path) -> Path:
    """Return the training split of images.

    Of images that are no shards, up to MOST_CONVERTED are converted into `folder`, for the image
    size of the training command.
    """
    if (split := split_of_shards(Path(images))) is not None:
        return split.resolve()
    source = open_source(images)
    samples = source.splits["train"]
    samples = samples[:: -(-len(samples) // MOST_CONVERTED)]
    encoding = Encoding(parse_training_command(words).settings.image_size, "jpg")
    convert(replace(source, splits={"train": samples}), folder / "data", encoding=encoding)
    return folder / "data" / "train"


def trainer_row(
    program: Path, words: list[str], run_dir: Path, *, ranks: int, steps: int
) -> dict[str, float]:
    """Train, and return the log row of the last `steps` steps, with start_s added.

    The steps before them use up what the loader read ahead while the program started.
    start_s: seconds from the command until the program was ready to train.
    program: launch/train.py. words: its flags. run_dir: emptied first.
    """
    resolved = resolve_words(words, ranks)
    workers = resolved.settings.workers
    ahead = PREFETCH * (default_workers(ranks) if workers < 0 else workers)
    warm_up = WARM_UP + -(-ahead // resolved.batch.accumulation)
    warm_up = -(-warm_up // steps) * steps
    length = ["--iterations", warm_up + steps, "--log_interval", steps]
    length += ["--save_interval", 10**6, "--val_data_dir", "none"]
    rows, start_s = run_trainer(program, [*words, *map(str, length)], run_dir, ranks=ranks)
    return [row for row in rows if "images_per_sec" in row][-1] | {"start_s": start_s}


def run_trainer(
    program: Path, words: list[str], run_dir: Path, *, ranks: int
) -> tuple[list[dict], float]:
    """Train to the end; return the rows of the log, and the seconds until it was ready to train.

    program: launch/train.py. words: its flags. run_dir: emptied first.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    with distributed.keep_port() as port:
        start_s = run_program([*launched(program, ranks, port), *words, "--run_dir", run_dir])
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], start_s


def launched(program: Path, ranks: int, port: int) -> list[str]:
    """Return the words that start launch/train.py on a number of ranks of this machine.

    port: where rank 0 of several serves their meeting.
    """
    if ranks == 1:
        return [sys.executable, str(program)]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    here = [*quiet_flag(), "--num_gpus", str(ranks), "--master_port", str(port)]
    return [sys.executable, deepspeed, *here, str(program)]


def run_program(words: list[object], environment: dict[str, str] | None = None) -> float:
    """Run a program to its end. Returns the seconds until it printed FIRST_LINE, nan if it did not.

    Raises ProgramFailed unless it exits with 0.
    """
    began, first, output = time.perf_counter(), math.nan, []
    with subprocess.Popen(
        list(map(str, words)),
        env=_without_rank() | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            output.append(line)
            if math.isnan(first) and line.startswith(FIRST_LINE):
                first = time.perf_counter() - began
    if process.returncode:
        raise ProgramFailed("".join(output)[-3000:].removeprefix("error: "))
    return first


def _without_rank() -> dict[str, str]:
    """Return the environment without this process's place among ranks."""
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in place}
