"""Decide where a run begins: at the first of these that applies.

1. --resume_checkpoint PATH;
2. the newest checkpoint in the run directory that verifies (if all are damaged: an error);
3. --init_from PATH, weights only;
4. fresh weights.

Rank 0 alone looks, writes and decides; all ranks get its answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.initial_weights import load_initial_weights
from ds_classifier.checkpoint.writer import check_room, checkpoint_bytes
from ds_classifier.common.text import count
from ds_classifier.common.urls import shown
from ds_classifier.config import CommandLine
from ds_classifier.config.deepspeed_json import Resolved, meant
from ds_classifier.config.settings import Settings, changed_settings
from ds_classifier.data.labels.targets import Targets
from ds_classifier.training.run_dir import (
    DONE,
    EVENTS,
    last_logged_step,
    read_done,
    read_events,
    write_run_files,
)
from ds_classifier.training.run_lock import RunLock

# Parameters of the JSON's optimizer that choose how it is computed.
IMPLEMENTATION = ("torch_adam", "fused", "foreach", "fp32_optimizer_states")
SAVED_BY = ("resume", "stop", "finish")  # events at a step that has, or had, a checkpoint


@dataclass(frozen=True)
class Start:
    """The point where a run begins.

    origin: where the weights are from, in words. parts: part_ends and skipped_before_part of the
    checkpoints to come, see disk.py. checkpoint: its path on rank 0, and state: its state.json;
    None if it does not start from one. initialized: whether the weights are from --init_from.
    notes: what of those weights could not be kept.
    """

    origin: str
    parts: dict[str, Any]
    checkpoint: str | None = None
    state: dict[str, Any] | None = None
    initialized: bool = False
    notes: Sequence[str] = ()

    @property
    def part_begin(self) -> int:
        """The step after which the last part of the run begins; 0 if it was never extended."""
        return [0, *self.parts["part_ends"]][-2]

    @property
    def part_steps(self) -> int:
        """The number of steps of the last part."""
        return self.parts["part_ends"][-1] - self.part_begin


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
        parts: dict[str, Any] = {"part_ends": [settings.steps], "skipped_before_part": 0}
        if not command.overfit_steps:
            found, state = find_checkpoint(settings, run_dir)
            if state is not None:
                refuse_changes(state, resolved, facts)
            if (done := finished(settings, run_dir)) is not None:
                return {"finished": done}
            parts = parts_of(state, resolved)
        if state is not None:
            origin = f"checkpoint {found}, step {state['step']}"
            start = Start(origin, parts, str(found), state | parts)
        elif settings.init_from and not command.preflight:
            source = Path(settings.init_from)
            of_data = {name: facts.get(name) for name in ("arrays", "targets")}
            origin, *notes = load_initial_weights(
                classifier, source, settings, facts["classes"], **of_data
            )
            start = Start(origin, parts, initialized=True, notes=notes)
        else:
            start = Start(f"seed {settings.seed}", parts)
        if not command.skips_training:
            check_room(run_dir / "checkpoints", checkpoint_bytes(classifier))
            write_run_files(run_dir, resolved.with_part(start.part_steps), shell_lines)
            (run_dir / DONE).unlink(missing_ok=True)  # of the part before, if it is extended
        return asdict(start)

    answer = distributed.on_rank_0(decide, device)
    if "finished" in answer:
        distributed.say(
            f"{run_dir} is finished ({answer['finished']}). To train it on, give --extend N, the "
            "number of steps in all; to train again, choose another --run_dir."
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


def finished(settings: Settings, run_dir: Path) -> str | None:
    """Return the text that a finished run left in DONE; None if more steps are to be done.

    Raises ValueError if fewer steps than those done are asked for by --extend.
    """
    done = read_done(run_dir)
    step = re.search("[0-9]+", done or "")
    if step and 0 < settings.extend < int(step[0]):
        raise ValueError(
            f"--extend: got {settings.extend}; need more than the {step[0]} steps that {run_dir} "
            "has done"
        )
    return None if step and int(step[0]) < settings.steps else done


def find_checkpoint(settings: Settings, run_dir: Path) -> tuple[Path | None, dict | None]:
    """Return the checkpoint to continue from and its state.json, or (None, None).

    Raises ValueError if the one asked for is damaged, if all are, or if the run lost them.
    """
    if settings.resume_checkpoint:
        found = disk.resolve_checkpoint(Path(settings.resume_checkpoint))
    else:
        found = disk.newest_valid(run_dir / "checkpoints", distributed.say)
        if found is None and finished(settings, run_dir) is None:
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


def refuse_changes(state: dict, resolved: Resolved, facts: dict) -> None:
    """Raise ValueError, with every change, if the checkpoint is of another training."""
    settings, saved = resolved.settings, state["settings"]
    free = ("iterations",) if resolved.open_ended else ()
    changes = changed_settings(saved, settings, free=free)
    longer = "iterations" not in free and settings.iterations > saved["iterations"]
    changes += [
        f"{key} of the JSON: {was} in the checkpoint, {now} now"
        for key, now in facts["deepspeed"].items()
        if _differs(key, meant(key, was := state["deepspeed"].get(key, now)), meant(key, now))
    ]
    if state["classes"] != facts["classes"]:
        changes.append(
            f"classes: {len(state['classes'])} in the checkpoint, others in the data now"
        )
    elif state.get("targets") != facts.get("targets"):
        was, now = (Targets.from_json(f.get("targets")) for f in (state, facts))
        changes.append(f"targets: {was} in the checkpoint, {now} in the data now")
    elif state["data"] != facts["data"]:
        changes.append(
            f"data: {shown(settings.data_dir)} is not the data that the checkpoint was trained on"
        )
    if changes:
        raise ValueError(
            f"{settings.resume_checkpoint or settings.run_dir} was trained with other settings:\n  "
            + "\n  ".join(changes)
            + f"\ndo: {_longer(state, settings) if longer else ''}give the settings as they were, "
            "or choose another --run_dir (with --init_from to start it from these weights)"
        )


def _differs(key: str, was: Any, now: Any) -> bool:
    """Return whether a section of the JSON makes another training than it did in a checkpoint.

    Another implementation of the optimizer does not. Another optimizer may be wanted: its state
    starts anew, which `disk.load` reports.
    """
    if key != "optimizer" or not was or not now:
        return was != now
    (was_type, was_params), (now_type, now_params) = map(_optimizer, (was, now))
    another = was_type != now_type and {was_type, now_type} != {"adam", "adamw"}
    return not another and (was_type, was_params) != (now_type, now_params)


def _optimizer(section: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what decides the steps of a JSON's optimizer: its type and its parameters."""
    params = {k: v for k, v in (section.get("params") or {}).items() if k not in IMPLEMENTATION}
    name = str(section.get("type", "AdamW")).lower().replace("auto", "adamw")
    w_mode = params.pop("adam_w_mode", True)
    return ("adamw" if name == "adam" and w_mode else name), params


def _longer(state: dict, settings: Settings) -> str:
    """Return the advice to someone who gives more --iterations than a run was planned for."""
    ends = disk.part_ends(state)
    flags = f"--iterations {ends[0]} --extend {max(settings.steps, ends[-1])}"
    if state["step"] >= ends[-1]:
        return (
            f"to train longer, {flags}: the learning rate, which has decayed to 0 at step "
            f"{ends[-1]}, begins anew; or "
        )
    return (
        f"to train longer, first finish the {ends[-1]} steps, over which the learning rate decays "
        f"to 0, then {flags}, with which it begins anew; or "
    )


def parts_of(state: dict | None, resolved: Resolved) -> dict[str, Any]:
    """Return the parts of the run, as checkpoints record them; the last one is to be trained now.

    state: of the checkpoint that the run continues from; None: it starts anew.
    The learning rate begins anew in each part, unless it is constant; all else goes on.
    Raises ValueError if the run cannot go on to the number of steps that is asked for.
    """
    steps = resolved.settings.steps
    if state is None:
        if resolved.settings.extend:
            raise ValueError(
                f"--extend: got {steps}; need a finished run in {resolved.settings.run_dir}, which "
                "has no checkpoint; do: train it without the flag first"
            )
        return {"part_ends": [steps], "skipped_before_part": 0}
    step, ends = state["step"], disk.part_ends(state)
    if resolved.open_ended:
        if steps < step:
            raise ValueError(
                f"--iterations: got {steps}; need {step} or more, since that many steps are done"
            )
    else:
        _refuse_unplanned(step, ends, resolved.settings)
    if resolved.open_ended and not resolved.constant_rate:
        ends = []  # its schedule goes on, whatever the number of steps was
    begins = step in ends and step < steps
    skipped = state["skipped_steps"] if begins else state.get("skipped_before_part", 0)
    warm_up = max(2, resolved.settings.warm_up(steps - step))  # 2: DeepSpeed's least
    if begins and "scheduler" in resolved.ds_config and steps - step <= warm_up:
        raise ValueError(
            f"--extend: got {steps}, which adds {count(steps - step, 'step')}; need more than the "
            f"{warm_up} steps of the learning rate's warm-up; do: give {step + warm_up + 1} or more"
        )
    kept = [end for end in ends if end <= step and end < steps]
    return {"part_ends": [*kept, steps], "skipped_before_part": skipped}


def _refuse_unplanned(step: int, ends: Sequence[int], settings: Settings) -> None:
    """Raise ValueError unless the learning rate is planned for this length, or has decayed.

    step: the number of steps done. ends: those at which the parts of the run so far end.
    """
    steps, planned = settings.steps, ends[-1]
    how = f"with --extend {planned}" if len(ends) > 1 else "without the flag"
    if steps < planned:
        raise ValueError(
            f"--extend: got {settings.extend or 'none'}; need {planned}, since {settings.run_dir} "
            f"was extended to {planned} steps, of which {step} are done; do: continue it {how}"
        )
    if steps > planned and step < planned:
        done = Path(settings.run_dir) / DONE
        stale = f"delete {done}, whose checkpoint is gone, and " if done.exists() else ""
        raise ValueError(
            f"--extend: got {steps}; need a finished run, and {step} of {planned} steps are done; "
            f"do: {stale}continue it {how} first"
        )
