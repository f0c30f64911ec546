"""Whole trainers as programs of their own: this one, and an unmodified guided-diffusion."""

from __future__ import annotations

import io
import json
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
from ds_classifier.export.reference_flags import classifier_flags, process_flags

MOST_CONVERTED = 2000  # images, which are read again and again
WARM_UP = 2  # steps that are not timed, at least: the first ones make buffers
REFERENCE_SCRIPT = Path("scripts", "classifier_train.py")
# Settings of a training command that a benchmark chooses itself.
OURS = ("data_dir", "val_data_dir", "run_dir", "iterations", "log_interval", "save_interval")
OURS += ("eval_interval", "num_classes", "resume_checkpoint", "init_from")


class ProgramFailed(ValueError):
    """A program that is measured did not run to its end; the last that it said."""


def training_command(words: list[str]) -> CommandLine:
    """A user's flags of launch/train.py. Raises ValueError for those that cannot be measured."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            command = parse_training_command(words)
    except SystemExit:
        problem = said.getvalue().strip().splitlines()[-1:] or ["--help"]
        problem = problem[0].removeprefix("train.py: error: ")
        raise ValueError(f"{problem} (flags of launch/train.py come after IMAGES)") from None
    flags = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    chosen = sorted(set(OURS) & flags)
    if chosen or command.skips_training:
        named = ", ".join(f"--{name}" for name in chosen) or "a rehearsal or a look"
        raise ValueError(f"got {named}; need flags of training alone, less what a benchmark sets")
    return command


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
    """classifier_train.py's images a second over `steps` steps, of its own loader and logging.

    runner: launch/benchmarks/run_reference.py. images: a folder whose files begin with their
    class and _.
    folder: for what it writes.
    """
    moments = folder / "moments.json"
    moments.unlink(missing_ok=True)
    flags = classifier_flags(settings) | process_flags(settings)
    flags |= dict(lr=settings.lr, weight_decay=settings.weight_decay, log_interval=10)
    flags |= dict(data_dir=images, batch_size=batch, microbatch=microbatch, iterations=10**6)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    _run(
        [sys.executable, runner, checkout, moments, WARM_UP + steps, *words],
        environment={"OPENAI_LOGDIR": str(folder / "log")},
    )
    seconds = json.loads(moments.read_text())
    return steps * batch / (seconds[-1] - seconds[WARM_UP - 1])


def resolve_words(words: list[str], ranks: int) -> Resolved:
    """What a training command asks for on so many ranks. Raises ValueError if it cannot be."""
    command = parse_training_command(words)
    return resolve(command, read_ds_config(command.deepspeed_config), world_size=ranks)


def split_of_shards(images: Path) -> Path | None:
    """Where images are shards already: their training split, or the split named."""
    splits = (images, images / "train")
    return next((split for split in splits if (split / MANIFEST).is_file()), None)


def shards_for(words: list[str], images: str, folder: Path) -> Path:
    """The training split of images; if they are no shards, at most MOST_CONVERTED of them,
    converted into the folder as the training command's image size asks for."""
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
    """What the trainer logs of `steps` steps. program: launch/train.py. words: its flags.

    It logs as often, and what is told comes after all that the loader had read ahead while the
    rest of the program started. run_dir: is emptied first.
    """
    resolved = resolve_words(words, ranks)
    workers = resolved.settings.workers
    ahead = PREFETCH * (default_workers(ranks) if workers < 0 else workers)
    warm_up = WARM_UP + -(-ahead // resolved.batch.accumulation)
    warm_up = -(-warm_up // steps) * steps
    shutil.rmtree(run_dir, ignore_errors=True)
    length = ["--run_dir", run_dir, "--iterations", warm_up + steps]
    length += ["--log_interval", steps, "--save_interval", 10**6, "--eval_interval", 10**6]
    _run([*launched(program, ranks), *words, *map(str, length)])
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "images_per_sec" in row][-1]


def launched(program: Path, ranks: int) -> list[str]:
    """The words that start launch/train.py on so many ranks of this machine."""
    if ranks == 1:
        return [sys.executable, str(program)]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    here = ["--quiet", "--num_gpus", str(ranks), "--master_port", str(distributed.free_port())]
    return [sys.executable, deepspeed, *here, str(program)]


def seconds_to_lines(words: list[str], marks: dict[str, str]) -> dict[str, float]:
    """Start a program; the seconds until it has printed a line with each of the marks, then end it.

    marks: name -> what the line begins with, in the order in which they come.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        words,
        env=_of_its_own(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    found, said = {}, []
    waiting = list(marks.items())
    for line in process.stdout:
        said.append(line)
        while waiting and line.startswith(waiting[0][1]):
            found[waiting.pop(0)[0]] = time.perf_counter() - began
        if not waiting:
            break
    process.terminate()
    process.communicate()
    if waiting:
        raise ProgramFailed("".join(said[-20:]))
    return found


def _run(words: list[object], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        list(map(str, words)),
        env=_of_its_own() | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ProgramFailed((done.stdout + done.stderr)[-3000:].removeprefix("error: "))


def _of_its_own() -> dict[str, str]:
    """The environment, without this process's place among ranks."""
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in place}
