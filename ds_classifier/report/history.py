"""The report's sections on what happened and what ran: the timeline, settings, environment."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ds_classifier.common.text import count, duration
from ds_classifier.config import Settings
from ds_classifier.config.settings import GROUPS
from ds_classifier.report import plots
from ds_classifier.report.data import Attempt, RunData, attempts_of

ATTEMPTS_SHOWN, ROWS_SHOWN = 12, 60
MESSAGE = 400  # characters of a fault's message that are shown
END_COLORS = {
    "finished": plots.BLUE,
    "stopped": plots.GREEN,
    "running": plots.BLUE,
    "failed": plots.VERMILION,
    "killed": plots.VERMILION,
}
END_TEXTS = {"killed": "ended without a message"}


# ------------------------------------------------------------------------------ timeline


def timeline(run: RunData) -> dict[str, Any] | str:
    """Return the attempts over steps and what went wrong, as a figure and as a table."""
    attempts = attempts_of(run)
    rows = _rows(run, attempts)
    if not attempts and not rows:
        return "Nothing is recorded: no events.jsonl, no faults."
    notes = [
        f"The last {shown} of {total:,} {what}."
        for shown, total, what in (
            (ATTEMPTS_SHOWN, len(attempts), "attempts"),
            (ROWS_SHOWN, len(rows), "entries"),
        )
        if shown < total
    ]
    table = {"heads": ["time", "step", "event"], "rows": rows[-ROWS_SHOWN:]}
    strips = {name: _strip(run, attempts, narrow=name == "narrow") for name in ("wide", "narrow")}
    return {"notes": notes, **strips, "table": table}


def _strip(run: RunData, attempts: Sequence[Attempt], *, narrow: bool) -> str:
    """Return a bar per attempt, from its first step to its last, and marks of faults, as SVG."""
    bars = [
        plots.Bar(f"attempt {number}", a.first, a.last, _end(a), END_COLORS[a.end])
        for number, a in enumerate(attempts, start=1)
    ]
    last_step = max([run.iterations, run.step, *(a.last for a in attempts), 1])
    marks = _marks(run, attempts)
    return plots.timeline_svg(bars[-ATTEMPTS_SHOWN:], marks, last_step, narrow=narrow)


def _marks(run: RunData, attempts: Sequence[Attempt]) -> list[plots.Marks]:
    """Return the steps of each kind of fault that happened."""
    batch = run.global_batch
    skipped = [r["step"] for r in run.skipped if "step" in r]
    bad = [r["position"] / batch for r in run.bad_samples if batch and "position" in r]
    failed = [e.get("step", 0) for e in run.events if e["event"] == "save failed"]
    faults = [_step_at(fault.time, attempts) for fault in run.faults]
    kinds = [
        plots.Marks("skipped", skipped, "^", plots.ORANGE),
        plots.Marks("bad images", bad, "D", plots.VERMILION),
        plots.Marks("failed saves", failed, "x", plots.VERMILION),
        plots.Marks("faults", faults, "X", plots.VERMILION),
    ]
    return [kind for kind in kinds if kind.steps]


def _step_at(moment: float, attempts: Sequence[Attempt]) -> int:
    """Return the last step of the attempt that was running at a time."""
    return next((a.last for a in reversed(attempts) if a.time <= moment), 0)


def _end(attempt: Attempt) -> str:
    """Return how an attempt ended, and how long it ran."""
    text = END_TEXTS.get(attempt.end, attempt.end)
    return f"{text}, {duration(attempt.time_end - attempt.time)}" if attempt.time_end else text


def _rows(run: RunData, attempts: Sequence[Attempt]) -> list[list[str]]:
    """Return time, step and event by time; at the end those whose time is not known."""
    rows = [*_starts_and_kills(attempts), *_events(run, attempts)]
    for fault in run.faults:
        messages = " / ".join(_last_error(message) for message in fault.messages) or "no message"
        what = f"{messages} (errors/{fault.name}: {count(fault.ranks, 'rank file')})"
        rows.append((fault.time, _time(fault.time), _step_at(fault.time, attempts), what))
    rows.sort(key=lambda row: row[0])
    return [[when, f"{step:,}", what] for _, when, step, what in rows] + _without_time(run)


def _starts_and_kills(attempts: Sequence[Attempt]) -> Iterator[tuple[float, str, int, str]]:
    """Yield the start of each attempt, and the end of each killed one, whose time is not known."""
    next_starts = [*(a.time for a in attempts[1:]), math.inf]
    for attempt, next_start in zip(attempts, next_starts, strict=False):
        facts = attempt.facts
        resumed = facts["event"] == "resume"
        what = f"resumed from step {attempt.first:,}" if resumed else "started"
        lost = int(facts.get("reached") or 0) - attempt.first
        if resumed and lost > 0:
            what += f" ({count(lost, 'step')} repeated)"
        what += f" on {count(facts.get('world_size', 1), 'rank')}"
        # Version 0.1 did not record the way.
        known = (facts[name] for name in ("way", "device", "host") if name in facts)
        what = ", ".join([what, *known])
        yield attempt.time, _time(attempt.time), attempt.first, what
        if attempt.end == "killed":
            yield next_start - 1e-3, "", attempt.last, "ended without a message: killed or crashed"


def _events(run: RunData, attempts: Sequence[Attempt]) -> Iterator[tuple[float, str, int, str]]:
    """Yield the events other than starts."""
    texts = {
        "finish": "finished",
        "stop": "stopped by {reason}",
        "save failed": "checkpoint not written: {message}",
        "failed": "{message}",
        "extend": "extended to {iterations} steps",
    }
    for event in run.events:
        moment, text = event["time"], texts.get(event["event"])
        if text is not None:
            what = text.format_map(dict(reason="?", message="?", iterations="?") | event)
            yield moment, _time(moment), int(event.get("step", _step_at(moment, attempts))), what


def _time(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _without_time(run: RunData) -> list[list[str]]:
    """Return rows for skipped steps and bad samples, which are recorded without a time."""
    rows = []
    if run.skipped:
        steps = [row["step"] for row in run.skipped if "step" in row]
        what = f"{len(steps):,} skipped: gradient not finite (skipped_steps.jsonl)"
        rows.append(["", _range(steps), what])
    if run.bad_samples:
        batch = run.global_batch or 1
        steps = [r["position"] // batch for r in run.bad_samples if "position" in r]
        keys = [str(key) for key in dict.fromkeys(r.get("key") for r in run.bad_samples)]
        named = ", ".join(keys[:3] + ["..."] * (len(keys) > 3))
        what = f"{len(run.bad_samples):,} not decoded: {named} (bad_samples.rank*.jsonl)"
        rows.append(["", _range(steps), what])
    return rows


def _range(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    low, high = min(steps), max(steps)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _last_error(message: str) -> str:
    """Return the line that says what is wrong, from a message that begins with a traceback."""
    lines = [line for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    error = (errors or lines or [""])[-1]
    return error if len(error) <= MESSAGE else error[: MESSAGE - 3] + "..."


# ------------------------------------------------------------------------------ settings


def settings(run: RunData) -> dict[str, Any] | str:
    """Return settings by group, the environment, the command and the DeepSpeed JSON."""
    if not run.settings and not run.environment:
        return "No config.json: the run never started."
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    group_of = {f.name: group for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}
    groups: dict[str, list[dict]] = {group: [] for group in (*GROUPS, "other")}
    for name, value in run.settings.items():
        changed = name not in defaults or value != defaults[name]
        groups[group_of.get(name, "other")].append(_entry(name, value, bold=changed))
    groups["environment"] = _environment(run.environment)
    blocks = [
        {"name": "Command", "text": run.command.strip()},
        {
            "name": "DeepSpeed JSON",
            "text": json.dumps(run.deepspeed, indent=1) if run.deepspeed else "",
        },
    ]
    return {
        "groups": [{"name": name, "entries": some} for name, some in groups.items() if some],
        "blocks": [block for block in blocks if block["text"]],
    }


def _entry(name: str, value: Any, *, bold: bool = False) -> dict[str, Any]:
    text = "default" if value is None else "–" if value == "" else str(value)
    return {"name": name, "value": text, "bold": bold}


def _environment(environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Return versions and paths; facts in a nested object appear under their own names."""
    entries = []
    for name, value in environment.items():
        if isinstance(value, dict):
            for key, fact in value.items():
                if name == "git" and key == "changes":
                    fact = count(len((fact or "").splitlines()), "file")
                entries.append(_entry(f"git {key}" if name == "git" else key, fact or ""))
        else:
            entries.append(_entry(name, value))
    return entries
