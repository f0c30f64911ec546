"""The report's parts on what happened and what ran: the time line, settings, environment."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from ds_classifier.config import Settings
from ds_classifier.config.settings import GROUPS
from ds_classifier.report import plots
from ds_classifier.report.data import Attempt, RunData, attempts_of
from ds_classifier.report.evaluation import table

ATTEMPTS_SHOWN, ROWS_SHOWN = 12, 60
MESSAGE = 400  # characters of a fault's message
END_COLORS = {
    "finished": plots.BLUE,
    "stopped": plots.GREEN,
    "running": plots.BLUE,
    "failed": plots.VERMILION,
    "killed": plots.VERMILION,
}
END_WORDS = {"killed": "ended without a word"}


# ------------------------------------------------------------------------------ time line


def time_line(run: RunData) -> str:
    """Jobs over steps, with what went wrong; a table of the same, with times."""
    attempts = attempts_of(run)
    rows = _happened(run, attempts)
    if not attempts and not rows:
        return '<div class="empty">Nothing is recorded: no events.jsonl, no faults.</div>'
    shown = rows[-ROWS_SHOWN:]
    left_out = ""
    if len(rows) > len(shown):
        left_out = f"<p>The last {len(shown)} of {len(rows):,} entries.</p>"
    return _strip(run, attempts) + left_out + table(["when", "step", "what"], shown, "words events")


def _strip(run: RunData, attempts: Sequence[Attempt]) -> str:
    """Return a bar per attempt, from its first step to its last, and marks of faults under them."""
    shown = attempts[-ATTEMPTS_SHOWN:]
    bars = [
        plots.Bar(f"attempt {n}", a.first, a.last, _ended(a), END_COLORS[a.end])
        for n, a in enumerate(shown, start=len(attempts) - len(shown) + 1)
    ]
    last_step = max([run.iterations, run.step, *(a.last for a in attempts), 1])
    before = ""
    if len(shown) < len(attempts):
        before = f"<p>The last {len(shown)} of {len(attempts)} attempts.</p>"
    svg = plots.time_line_svg(bars, _marks(run, attempts), last_step)
    return f'{before}<div class="strip">{svg}</div>'


def _marks(run: RunData, attempts: Sequence[Attempt]) -> list[plots.Marks]:
    """Return the steps of each kind of mishap that happened."""
    batch = run.global_batch
    bad = [r["position"] / batch for r in run.bad_samples if batch and "position" in r]
    failed = [e.get("step", 0) for e in run.events if e["event"] == "save failed"]
    faults = [_step_of(fault.time, attempts) for fault in run.faults]
    skipped = [r["step"] for r in run.skipped if "step" in r]
    kinds = [
        plots.Marks("skipped", skipped, "^", plots.ORANGE),
        plots.Marks("bad images", bad, "D", plots.VERMILION),
        plots.Marks("failed saves", failed, "x", plots.VERMILION),
        plots.Marks("faults", faults, "X", plots.VERMILION),
    ]
    return [kind for kind in kinds if kind.steps]


def _step_of(moment: float, attempts: Sequence[Attempt]) -> int:
    """The last step of the attempt under way then."""
    return next((attempt.last for attempt in reversed(attempts) if attempt.time <= moment), 0)


def _ended(attempt: Attempt) -> str:
    words = END_WORDS.get(attempt.end, attempt.end)
    return f"{words}, {_duration(attempt.time_end - attempt.time)}" if attempt.time_end else words


def _happened(run: RunData, attempts: Sequence[Attempt]) -> list[list[str]]:
    """When, step and what, by time; what has no time of its own stands last."""
    rows = [*_of_attempts(attempts), *_of_events(run, attempts)]
    for fault in run.faults:
        said = " / ".join(_last_error(message) for message in fault.messages) or "no message"
        what = f"{said} (errors/{fault.name}: {fault.ranks} rank files)"
        rows.append((fault.time, _when(fault.time), _step_of(fault.time, attempts), what))
    rows.sort(key=lambda row: row[0])
    told = [[when, f"{step:,}", what] for _, when, step, what in rows]
    return told + [["", *words] for words in _without_time(run)]


def _of_attempts(attempts: Sequence[Attempt]) -> Iterator[tuple[float, str, int, str]]:
    """Their beginnings; and the ends of those that were killed, of which nobody knows when."""
    later = [*(attempt.time for attempt in attempts[1:]), math.inf]
    for attempt, next_start in zip(attempts, later, strict=False):
        facts = attempt.facts
        what = "started" if facts["event"] == "start" else f"resumed from step {attempt.first:,}"
        lost = int(facts.get("reached") or 0) - attempt.first
        if facts["event"] == "resume" and lost > 0:
            what += f" ({lost:,} done again)"
        ranks = facts.get("world_size", 1)
        what += f" on {ranks} rank{'s' * (ranks != 1)}, "
        what += f"{facts.get('device', '')}, {facts.get('host', '')}"
        yield attempt.time, _when(attempt.time), attempt.first, what
        if attempt.end == "killed":
            yield next_start - 1e-3, "", attempt.last, "ended without a word: killed, or cut off"


def _of_events(run: RunData, attempts: Sequence[Attempt]) -> Iterator[tuple[float, str, int, str]]:
    words = {
        "finish": "finished",
        "stop": "stopped by {reason}",
        "save failed": "checkpoint not written: {message}",
        "failed": "{message}",
    }
    for event in run.events:
        moment, what = event["time"], words.get(event["event"])
        if what is not None:
            what = what.format_map(dict(reason="?", message="?") | event)
            yield moment, _when(moment), int(event.get("step", _step_of(moment, attempts))), what


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _without_time(run: RunData) -> list[tuple[str, str]]:
    """Skipped steps and bad samples, which are listed by step and place."""
    lines = []
    if run.skipped:
        steps = [row["step"] for row in run.skipped if "step" in row]
        what = f"{len(steps):,} skipped: gradient not finite (skipped_steps.jsonl)"
        lines.append((_range(steps), what))
    if run.bad_samples:
        batch = run.global_batch or 1
        steps = [r["position"] // batch for r in run.bad_samples if "position" in r]
        keys = [str(key) for key in dict.fromkeys(r.get("key") for r in run.bad_samples)]
        named = ", ".join(keys[:3] + ["..."] * (len(keys) > 3))
        what = f"{len(run.bad_samples):,} not decoded: {named} (bad_samples.rank*.jsonl)"
        lines.append((_range(steps), what))
    return lines


def _range(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    low, high = min(steps), max(steps)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _last_error(message: str) -> str:
    """The line that says what is wrong, of a message with a traceback above it."""
    lines = [line for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = (errors or lines or [""])[-1]
    return said if len(said) <= MESSAGE else said[: MESSAGE - 3] + "..."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# ------------------------------------------------------------------------------ settings


def settings(run: RunData) -> str:
    """Settings by group, those unlike their defaults in bold; the JSON; versions; the command."""
    if not run.settings and not run.environment:
        return '<div class="empty">No config.json: the run never started.</div>'
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    groups: dict[str, list[str]] = {group: [] for group in (*GROUPS, "other")}
    for name, value in run.settings.items():
        field = fields.get(name)
        group = next(
            (g for g, kind in GROUPS.items() if name in kind.__dataclass_fields__), "other"
        )
        own = field is None or value != field.default
        groups[group].append(_entry(name, value, own))
    lists = [
        f"<div><h3>{group}</h3><dl>{''.join(entries)}</dl></div>"
        for group, entries in groups.items()
        if entries
    ]
    facts = _environment(run.environment)
    if facts:
        lists.append(f"<div><h3>environment</h3><dl>{''.join(facts)}</dl></div>")
    parts = [
        "<p>In bold what is not the default.</p>",
        f'<div class="settings">{"".join(lists)}</div>',
    ]
    blocks = [
        ("Command", run.command.strip()),
        ("DeepSpeed JSON", json.dumps(run.deepspeed, indent=1) if run.deepspeed else ""),
    ]
    parts += [
        f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
        for title, text in blocks
        if text
    ]
    return "".join(parts)


def _entry(name: str, value: Any, own: bool) -> str:
    words = "default" if value is None else "" if value == "" else f"{value}"
    words = escape(words) or "&ndash;"
    return f"<dt>{escape(name)}</dt><dd>{f'<b>{words}</b>' if own else words}</dd>"


def _environment(environment: dict[str, Any]) -> list[str]:
    """Versions and places; nested facts by their own names."""
    entries = []
    for name, value in environment.items():
        if isinstance(value, dict):
            for key, fact in value.items():
                if name == "git" and key == "changes":
                    fact = f"{len((fact or '').splitlines())} files"
                label = f"git {key}" if name == "git" else key
                entries.append(_entry(label, fact or "", False))
        else:
            entries.append(_entry(name, value, False))
    return entries
