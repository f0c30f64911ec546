"""Decide where a run begins: at the first of these that applies.

1. --resume_checkpoint PATH;
2. the newest checkpoint in the run directory that verifies (if all are damaged: an error);
3. --init_from PATH, weights only;
4. fresh weights.

Rank 0 alone looks, writes and decides; all ranks get its answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.initial_weights import load_initial_weights
from ds_classifier.checkpoint.writer import check_room
from ds_classifier.common.urls import shown
from ds_classifier.config import CommandLine
from ds_classifier.config.deepspeed_json import Resolved
from ds_classifier.config.settings import Settings, changed_settings
from ds_classifier.training.run_dir import (
    EVENTS,
    last_logged_step,
    read_done,
    read_events,
    write_run_files,
)
from ds_classifier.training.run_lock import RunLock

SAVED_BY = ("resume", "stop", "finish")  # events at a step that has, or had, a checkpoint


@dataclass(frozen=True)
class Start:
    """The point where a run begins.

    origin: where the weights are from, in words. checkpoint: its path on rank 0, and state: its
    state.json; None if it does not start from one. initialized: whether the weights are from
    --init_from. notes: what of those weights could not be kept.
    """

    origin: str
    checkpoint: str | None = None
    state: dict[str, Any] | None = None
    initialized: bool = False
    notes: Sequence[str] = ()


def open_run(
    command: CommandLine,
    resolved: Resolved,
    facts: dict[str, Any],
    *,
    classifier: nn.Module,
    shell_lines: str,
    release_at_end: Callable[[Callable[[], None]], None],
    device,
) -> Start | None:
    """Decide where the run begins, and take its directory; return None if it is finished.

    Every rank must call it. A rehearsal (--preflight, --dry_run) looks without writing, and
    --overfit_batch does not look for a checkpoint at all.

    facts: what a checkpoint of this run records. classifier: gets the weights of --init_from, on
    rank 0. shell_lines: start this program again, for command.sh. release_at_end: is given what
    releases the run directory.
    Raises AgreedError on all ranks if another job holds the directory, if a checkpoint is of
    another training or was lost, or if weights do not fit or nothing can be written.
    """
    settings, run_dir = resolved.settings, Path(resolved.settings.run_dir)

    def decide() -> dict[str, Any]:
        _take(run_dir, command, release_at_end)
        found = state = None
        if not command.overfit_steps:
            found, state = find_checkpoint(settings, run_dir)
            if state is not None:
                refuse_changes(state, settings, facts)
            if (done := read_done(run_dir)) is not None:
                return {"finished": done}
        if state is not None:
            origin = f"checkpoint {found}, step {state['step']}"
            start = Start(origin, str(found), state)
        elif settings.init_from and not command.preflight:
            source = Path(settings.init_from)
            origin, *notes = load_initial_weights(classifier, source, settings, facts["classes"])
            start = Start(origin, initialized=True, notes=notes)
        else:
            start = Start(f"seed {settings.seed}")
        if not command.skips_training:
            check_room(run_dir / "checkpoints", sum(p.numel() for p in classifier.parameters()))
            write_run_files(run_dir, resolved, shell_lines)
        return asdict(start)

    answer = distributed.on_rank_0(decide, device)
    if "finished" in answer:
        distributed.say(
            f"{run_dir} is finished ({answer['finished']}). To train again, choose another "
            "--run_dir."
        )
        return None
    return Start(**answer)


def _take(
    run_dir: Path, command: CommandLine, release_at_end: Callable[[Callable[[], None]], None]
) -> None:
    """Lock the run directory, or, for a rehearsal, raise ValueError if a job holds it."""
    lock = RunLock(run_dir)
    if not command.skips_training:
        lock.acquire(distributed.say)
        release_at_end(lock.release)
    elif not command.overfit_steps:
        lock.refuse_if_held()


def find_checkpoint(settings: Settings, run_dir: Path) -> tuple[Path | None, dict | None]:
    """Return the checkpoint to continue from and its state.json, or (None, None).

    Raises ValueError if the one asked for is damaged, if all are, or if the run lost them.
    """
    if settings.resume_checkpoint:
        found = disk.resolve_checkpoint(Path(settings.resume_checkpoint))
    else:
        found = disk.newest_valid(run_dir / "checkpoints", distributed.say)
        if found is None and read_done(run_dir) is None:
            refuse_lost_checkpoints(run_dir, distributed.say)
    return (None, None) if found is None else (found, disk.read_state(found))


def refuse_lost_checkpoints(run_dir: Path, say: Callable[[str], None]) -> None:
    """Raise ValueError if a run without a checkpoint is known to have had one.

    It may have been deleted, or lie on a disk that is not mounted; starting anew in silence would
    throw the run away. A run that was killed before its first checkpoint starts anew, which is
    reported.
    """
    saved = max(
        (e.get("step", 0) for e in read_events(run_dir) if e["event"] in SAVED_BY), default=0
    )
    if saved:
        raise ValueError(
            f"{run_dir}/checkpoints: got no checkpoint; need one, since {EVENTS} says that step "
            f"{saved} was saved; do: bring it back, or start afresh in another --run_dir"
        )
    if reached := last_logged_step(run_dir):
        say(f"no checkpoint in {run_dir}, whose log reaches step {reached}: it starts anew")


def refuse_changes(state: dict, settings: Settings, facts: dict) -> None:
    """Raise ValueError, with every change, if the checkpoint is of another training."""
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
        raise ValueError(
            f"{settings.resume_checkpoint or settings.run_dir} was trained with other settings:\n  "
            + "\n  ".join(changes)
            + "\ndo: give the settings as they were, or choose another --run_dir (with --init_from "
            "to start it from these weights)"
        )
