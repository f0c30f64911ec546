"""What lies in a run directory: whether it is finished, where it goes on, what it was made of.

This module imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from ds_classifier import distributed
from ds_classifier.common.urls import shown
from ds_classifier.common.version import __version__
from ds_classifier.config.deepspeed_json import Resolved
from ds_classifier.config.settings import Settings, changed_settings
from ds_classifier.training import events

SAVED_BY = ("resume", "stop", "finish")  # events at a step that has, or had, a checkpoint
DONE = "DONE"  # marks a finished run: a launcher's exit code cannot be trusted


def read_done(run_dir: Path) -> str | None:
    """What a finished run left in DONE, or None."""
    return (run_dir / DONE).read_text().strip() if (run_dir / DONE).exists() else None


def find_checkpoint(settings: Settings, run_dir: Path, device) -> tuple[Path | None, dict | None]:
    """The checkpoint to continue from and its state.json, on all ranks; (None, None) for none."""
    from ds_classifier.checkpoint import disk

    def find() -> list | None:
        if settings.resume_checkpoint:
            found = disk.resolve_checkpoint(Path(settings.resume_checkpoint))
        else:
            found = disk.newest_valid(run_dir / "checkpoints", distributed.say)
            if found is None and read_done(run_dir) is None:
                refuse_lost_checkpoints(run_dir, distributed.say)
        return None if found is None else [str(found), disk.read_state(found)]

    answer = distributed.on_rank_0(find, device)
    return (None, None) if answer is None else (Path(answer[0]), answer[1])


def refuse_lost_checkpoints(run_dir: Path, say: Callable[[str], None]) -> None:
    """Raise ValueError if a run without a checkpoint is known to have had one.

    Deleted, or on a disk that is not mounted: starting anew in silence would throw the run away.
    A run that was killed before its first checkpoint starts anew, and is told so.
    """
    saved = max(
        (e.get("step", 0) for e in events.read(run_dir) if e["event"] in SAVED_BY), default=0
    )
    if saved:
        raise ValueError(
            f"{run_dir}/checkpoints: got no checkpoint; need one, for {events.FILE} tells that "
            f"step {saved} was saved; do: bring it back, or start afresh in another --run_dir"
        )
    if reached := events.last_logged_step(run_dir):
        say(f"no checkpoint in {run_dir}, whose log reaches step {reached}: it starts anew")


def refuse_changes(state: dict, settings: Settings, facts: dict) -> None:
    """Raise AgreedError if the checkpoint is of another training than the one asked for."""
    changes = changed_settings(state["settings"], settings)
    changes += [
        f"{key} of the JSON: {state['deepspeed'][key]} in the checkpoint, {value} now"
        for key, value in facts["deepspeed"].items()
        if state["deepspeed"][key] != value
    ]
    if state["classes"] != facts["classes"]:
        changes.append(
            f"classes: {len(state['classes'])} in the checkpoint, others in the data now"
        )
    elif state["data"] != facts["data"]:
        changes.append(
            f"data: {shown(settings.data_dir)} is not the data that the checkpoint was trained on"
        )
    if changes:
        raise distributed.AgreedError(
            f"{settings.resume_checkpoint or settings.run_dir} was trained otherwise:\n  "
            + "\n  ".join(changes)
            + "\ndo: give the settings as they were, or choose another --run_dir (with --init_from "
            "to start it from these weights)"
        )


def write_run_files(run_dir: Path, resolved: Resolved, ds_config: dict, command: str) -> None:
    """What this start of the run was made of. command: shell lines that start it again."""
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = resolved.settings.recorded()
    (run_dir / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (run_dir / "deepspeed.json").write_text(json.dumps(ds_config, indent=1) + "\n")
    (run_dir / "env.json").write_text(json.dumps(environment(), indent=1) + "\n")
    with open(run_dir / "command.sh", "a") as file:
        file.write(command)


def environment() -> dict[str, object]:
    """Versions, host, and the state of the source tree."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in (
        "torch",
        "deepspeed",
        "webdataset",
        "torchvision",
        "numpy",
        "pillow",
        "simplejpeg",
        "safetensors",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    tree = Path(__file__).resolve().parents[2]
    git = {}
    for fact, arguments in (("commit", ["rev-parse", "HEAD"]), ("changes", ["status", "--short"])):
        try:
            answer = subprocess.run(
                ["git", "-C", str(tree), *arguments], capture_output=True, text=True, timeout=10
            )
            git[fact] = answer.stdout.strip() if answer.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired):
            git[fact] = None
    return {
        "ds_classifier": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "host": platform.node(),
        "git": git,
    }
