"""Train a noise-aware classifier: `deepspeed launch/train.py --deepspeed_config JSON [flags]`.

The same command again continues the run. Where training starts, the first that applies:
1. --resume_checkpoint PATH;
2. the newest checkpoint in the run directory that verifies (all damaged: an error);
3. --init_from PATH, weights only;
4. fresh weights.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import distributed
from ds_classifier.config import CommandLine, parse_training_command
from ds_classifier.config.deepspeed_json import Resolved, read_ds_config, resolve
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.splits import open_splits
from ds_classifier.distributed import failures, launcher
from ds_classifier.distributed.stopping import StopRequests
from ds_classifier.distributed.watchdog import Watchdog


def main(argv: list[str] | None = None) -> int:
    """Train as the arguments say, and return the exit code."""
    with StopRequests() as requests:
        command = parse_training_command(sys.argv[1:] if argv is None else argv)
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
    resolved, shards, val_shards = open_all(command)
    run_dir = Path(resolved.settings.run_dir)
    home = run_dir  # of the records of errors, and of the file STOP
    if command.skips_training:
        home = Path(tempfile.gettempdir()) / f"ds_classifier-{os.getuid()}"
    requests.watch_also(max_minutes=resolved.settings.max_minutes, run_dir=home)
    with Watchdog(home, minutes=resolved.settings.time_outs()) as watch:
        from ds_classifier.training import run as training  # with it comes torch
        from ds_classifier.training.run_dir import launch_lines

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


def open_all(command: CommandLine) -> tuple[Resolved, ShardSet, ShardSet | None]:
    """Read the JSON, open the shards, and settle all numbers; a problem ends all ranks."""
    settings = command.settings
    if command.overfit_steps:
        # The schedule is that of the whole run; a few hundred steps may not leave its warm-up.
        settings = settings.replace(anneal_lr=False)
    command = dataclasses.replace(command, settings=settings)
    world_size = distributed.world_size()
    try:
        resolved = resolve(command, read_ds_config(command.deepspeed_config), world_size=world_size)
        shards, val_shards = open_splits(resolved.settings)
    except (ValueError, OSError) as error:
        if world_size > 1:  # the others may have none, and would wait
            distributed.refuse(failures.summary(error))
        raise
    return resolved.with_classes(len(shards.manifest.classes)), shards, val_shards


if __name__ == "__main__":
    sys.exit(main())
