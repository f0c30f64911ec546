"""Train a noise-aware classifier: `deepspeed launch/train.py [flags]`.

The same command again continues the run. Where training starts, the first that applies:
1. --resume_checkpoint PATH;
2. the newest checkpoint in the run directory that verifies (all damaged: an error);
3. --init_from PATH, weights only;
4. fresh weights.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier import distributed
from ds_classifier.common.urls import without_logins
from ds_classifier.config import CommandLine, parse_training_command
from ds_classifier.config.deepspeed_json import Resolved, read_ds_config, resolve
from ds_classifier.config.settings_file import OF_ONE_RUN
from ds_classifier.config.shipped import choose_config
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.splits import open_splits, settled_by_data, with_validation
from ds_classifier.data.store import is_url
from ds_classifier.distributed import failures, launcher
from ds_classifier.distributed.stopping import StopRequests
from ds_classifier.distributed.watchdog import Watchdog


def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    """Train as the arguments say, and return the exit code."""
    with StopRequests() as requests:
        command = parse_training_command(sys.argv[1:] if argv is None else argv, prog)
        try:
            return run(command, requests)
        except (ValueError, OSError) as error:  # before the ranks met, or on all of them
            return failures.report(error)


def run(command: CommandLine, requests: StopRequests) -> int:
    """Check what can be checked at once, start the watchdog, and train.

    Raises ValueError and OSError for wrong use.
    """
    distributed.quiet_libraries()
    check_launch(command.settings.expect_world)
    if command.recorded:
        left_out = ", ".join(OF_ONE_RUN)
        say = distributed.say_labelled
        say(f"settings    {command.config}, a run's own, but not its {left_out}")
        if command.unknown:
            say(f"{'':12}unknown here, left out: {', '.join(command.unknown)}")
    resolved, shards, val_shards = open_all(command)
    for note in resolved.notes:
        distributed.say_labelled(f"JSON        {note}")
    run_dir = Path(resolved.settings.run_dir)
    home = run_dir  # of the records of errors, and of the file STOP
    if command.skips_training:
        home = Path(tempfile.gettempdir()) / f"ds_classifier-{os.getuid()}"
    requests.watch_also(max_minutes=resolved.settings.max_minutes, run_dir=home)
    with Watchdog(home, minutes=resolved.settings.time_outs()) as watch:
        from ds_classifier.training import run as training  # with it comes torch
        from ds_classifier.training.run_dir import launch_lines

        if advice := idle_gpus():
            distributed.say_labelled(advice)
        setup = training.build(
            command,
            resolved,
            shards,
            val_shards,
            watch=watch,
            requests=requests,
            shell_lines=launch_lines(sys.argv, resolved.batch.world_size),
        )
        code = training.run(command, setup) if setup is not None else 0
        watch.leave()
        distributed.finish()
    if setup is not None and not command.skips_training and distributed.rank() == 0:
        from ds_classifier.report.page import write_report  # no rank waits for this one any more

        failures.tolerate("report.html", lambda: write_report(run_dir))
    return code


def check_launch(expected: int) -> None:
    """Raise ValueError if the launcher started something else than it was asked for.

    expected: the number of ranks by --expect_world; 0 if it was not given.
    """
    distributed.check_launch()
    if expected not in (0, distributed.world_size()):
        raise ValueError(
            f"--expect_world: got world size {distributed.world_size()}; need {expected}; do: look "
            "at the hostfile's path: the launcher ignores one that does not exist"
        )
    if problem := launcher.hostfile_problem():
        raise ValueError(problem)


def idle_gpus() -> str:
    """Return a line that says how to use all GPUs, if this process is alone on several; else ""."""
    import torch

    if "RANK" in os.environ or (gpus := torch.cuda.device_count()) < 2:
        return ""
    program, *flags = sys.argv
    if program.endswith(".py") and not __package__:
        script = [program]
    else:  # installed; `ds-classifier train` has its own name before the flags
        script = ["--module", "ds_classifier.launch.train"]
        flags = flags[flags[:1] == ["train"] :]
    command = shlex.join(["deepspeed", *script, *map(without_logins, flags)])
    return f"gpus        1 of {gpus} is used; all of them: {command}"


def open_all(command: CommandLine) -> tuple[Resolved, ShardSet, ShardSet | None]:
    """Choose and read the JSON, open the shards, settle all numbers; a problem ends all ranks."""
    settings = with_validation(command.settings)
    found_beside = settings != command.settings
    if command.overfit_steps:
        if settings.loss:
            raise ValueError(
                f"--overfit_batch: got --loss {settings.loss}; need cross-entropy, whose least "
                "value is 0; do: leave --loss out"
            )
        # The schedule is that of the whole run; a few hundred steps may not leave its warm-up.
        settings = settings.replace(anneal_lr=False, lr_schedule="", warmup_steps=-1)
    command = dataclasses.replace(command, settings=settings)
    world_size = distributed.world_size()
    splits = None
    try:
        if command.epochs:
            raise ValueError(steps_of_epochs(command))
        if command.deepspeed_config is None:
            # First the data: no error of theirs should wait for torch, which the choice imports.
            splits = open_splits(settings, found_beside=found_beside)
            command = with_chosen_config(command)
        raw = read_ds_config(command.deepspeed_config)
        resolved = resolve(command, raw, world_size=world_size)
        shards, val_shards = splits or open_splits(settings, found_beside=found_beside)
        settled = settled_by_data(resolved.settings, shards.manifest, given=command.given)
    except (ValueError, OSError) as error:
        if world_size > 1:  # the others may have none, and would wait
            distributed.refuse(failures.summary(error))
        raise
    return resolved.with_settings(settled), shards, val_shards


def with_chosen_config(command: CommandLine) -> CommandLine:
    """Return the command with the shipped JSON that suits this machine, and print the choice."""
    chosen = choose_config()
    distributed.say_labelled(
        f"config      {chosen.name}, since {chosen.why}; another one: --deepspeed_config JSON"
    )
    return dataclasses.replace(command, deepspeed_config=Path(chosen.name))


def steps_of_epochs(command: CommandLine) -> str:
    """Return how many steps --epochs would be: the number, or without data the formula."""
    message = f"--epochs: got {command.epochs:g}; need a number of steps, "
    try:
        if is_url(command.settings.data_dir):
            raise ValueError("this is not worth a look over a network")
        # All shipped JSON files leave the batch to the settings.
        raw = read_ds_config(command.deepspeed_config or Path("zero1_fp32"))
        batch = resolve(command, raw, world_size=distributed.world_size()).batch.total
        images = open_splits(command.settings)[0].manifest.samples
    except (ValueError, OSError):
        return f"{message}epochs x images / global batch; do: --iterations STEPS"
    steps = math.ceil(command.epochs * images / batch)
    return (
        f"{message}{command.epochs:g} x {images:,} images / global batch {batch:,}; "
        f"do: --iterations {steps}"
    )


if __name__ == "__main__":
    sys.exit(main())
