"""What happened to a run, with times: runs/NAME/events.jsonl, appended to by rank 0 alone.

A line an event, {"time": seconds since 1970, "event": NAME, ...}:

    start, resume   a job began: step, iterations, world_size, host, device; guessing, the fields of
                    sanity.Guessing; val_samples; resume also: reached, the last step that the job
                    before it had logged
    save failed     a checkpoint could not be written: step, message
    failed          all ranks gave up for the same reason: samples trained on, message
    stop            a job ended on request: step, reason
    finish          the last step was done: step

A job that was killed leaves no last word; one that crashed has its in errors/.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ds_classifier import distributed
from ds_classifier.common import files

FILE = "events.jsonl"
LAST_BYTES = 1 << 16  # of log.jsonl: several of its rows


def append(run_dir: Path, event: str, **facts: Any) -> None:
    """Note an event; on rank 0 alone. Where that cannot be written, the run goes on without."""
    if distributed.rank() != 0:
        return
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n"
    try:
        files.append(run_dir / FILE, line)
    except OSError as error:
        distributed.say(f"{'':>6} {run_dir / FILE}: not written: {error.strerror}")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The events in the order they happened; lines that are none are passed over."""
    events = files.read_jsonl(run_dir / FILE)
    return [e for e in events if isinstance(e.get("time"), (int, float)) and e.get("event")]


def last_logged_step(run_dir: Path) -> int:
    """The step of the last row in log.jsonl; 0 if it has none."""
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
