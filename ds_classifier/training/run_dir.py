"""The files of a run directory: config.json, deepspeed.json, env.json, command.sh, events.jsonl.

events.jsonl records what happened to the run; rank 0 alone appends to it, one line per event,
{"time": seconds since 1970, "event": NAME, ...}:

    start, resume   a job began: step, iterations, world_size, host, device; guessing, the fields of
                    sanity.Guessing; targets, as the manifest has them; val_samples; resume also:
                    reached, the last step that the job before it had logged
    extend          the run, finished at this step, trains on: step, iterations: the new number of
                    steps in all
    save failed     a checkpoint could not be written: step, message
    failed          all ranks gave up for the same reason: samples trained on, message
    stop            a job ended on request: step, reason
    finish          the last step was done: step

A job that was killed adds nothing; the message of one that crashed is in errors/. This module
imports nothing heavy, since --help imports it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.common.urls import without_logins
from ds_classifier.common.version import __version__
from ds_classifier.config.deepspeed_json import Resolved

DONE = "DONE"  # marks a finished run: a launcher's exit code cannot be trusted
EVENTS = "events.jsonl"
LAST_BYTES = 1 << 16  # of log.jsonl, which hold several of its rows
PACKAGES = (
    "torch",
    "deepspeed",
    "webdataset",
    "torchvision",
    "numpy",
    "pillow",
    "simplejpeg",
    "safetensors",
)


def read_done(run_dir: Path) -> str | None:
    """Return the text that a finished run left in DONE, or None if it is not finished."""
    return (run_dir / DONE).read_text("utf-8").strip() if (run_dir / DONE).exists() else None


def write_run_files(run_dir: Path, resolved: Resolved, command: str) -> None:
    """Write what this start of the run was made of. command: shell lines that start it again."""
    run_dir.mkdir(parents=True, exist_ok=True)
    contents = {
        "config.json": resolved.settings.recorded(),
        "deepspeed.json": resolved.ds_config,
        "env.json": environment(),
    }
    for name, content in contents.items():
        (run_dir / name).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    with open(run_dir / "command.sh", "a", encoding="utf-8") as file:
        file.write(command)


def launch_lines(words: list[str], world_size: int) -> str:
    """Return shell lines that start a program again; several nodes need their hostfile added.

    words: the command line of the program.
    """
    arguments = [without_logins(word) for word in words if not word.startswith("--local_rank")]
    launcher = [sys.executable]
    if "LOCAL_RANK" in os.environ and world_size > 1:
        launcher = ["deepspeed", "--num_gpus", str(distributed.local_world_size())]
        if world_size > distributed.local_world_size():
            launcher = ["deepspeed", "--hostfile", "HOSTS"]
    folder = shlex.quote(os.getcwd())
    return f"# world size {world_size}\ncd {folder}\n{shlex.join([*launcher, *arguments])}\n"


def environment() -> dict[str, object]:
    """Return versions, the host's name, and the state of the source tree."""
    tree = Path(__file__).resolve().parents[2]
    git = {"commit": ["rev-parse", "HEAD"], "changes": ["status", "--short"]}
    return {
        "ds_classifier": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "git": {fact: _git(tree, arguments) for fact, arguments in git.items()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(tree: Path, arguments: list[str]) -> str | None:
    """Return git's answer about the source tree, or None if it is not a checkout."""
    command = ["git", "-C", str(tree), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.decode(errors="replace").strip() if answer.returncode == 0 else None


def append_event(run_dir: Path, event: str, **facts: Any) -> None:
    """Append an event, on rank 0 alone; a disk that refuses it does not end the run."""
    if distributed.rank() != 0:
        return
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n"
    try:
        files.append(run_dir / EVENTS, line)
    except OSError as error:
        distributed.say(f"{'':>6} {run_dir / EVENTS}: not written: {error.strerror}")


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events in the order in which they happened, without damaged lines."""
    events = files.read_jsonl(run_dir / EVENTS)
    return [e for e in events if isinstance(e.get("time"), (int, float)) and e.get("event")]


def last_logged_step(run_dir: Path) -> int:
    """Return the step of the last row in log.jsonl, or 0 if it has none."""
    try:
        with open(run_dir / "log.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut by a kill
            continue
    return 0
