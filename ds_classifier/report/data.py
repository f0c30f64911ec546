"""A run directory, read for its report: whatever is there, in whatever state a kill left it."""

from __future__ import annotations

import json
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_classifier.common import files
from ds_classifier.evaluation.format import EVALUATION_FORMAT, PRECISIONS
from ds_classifier.evaluation.image_grid import ImageGrid, load_grid
from ds_classifier.training.run_dir import EVENTS, read_done, read_events
from ds_classifier.training.run_lock import LOCK, STALE_SECONDS
from ds_classifier.training.sanity import Guessing, RecentRows

RUN_FILES = ("config.json", "log.jsonl", EVENTS, "checkpoints")
FILE_CLOCK = 0.1  # seconds that a file's time may lie behind an event's, of a finer clock


class Columns:
    """Rows of numbers as a column a key; what a row lacks, or is null in it, is not-a-number."""

    def __init__(self):
        self.rows = 0
        self._columns: dict[str, array] = {}

    def add(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                column = self._columns.setdefault(key, array("d"))
                column.extend([math.nan] * (self.rows - len(column)))
                column.append(value)
        self.rows += 1

    def __getitem__(self, key: str) -> array:
        """The column, [rows]."""
        column = self._columns.get(key, array("d"))
        return column + array("d", [math.nan] * (self.rows - len(column)))

    def last(self, key: str) -> float | None:
        """The last finite value, or None."""
        return next((v for v in reversed(self[key]) if math.isfinite(v)), None)

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of each row; the value may be not-a-number."""
        return list(zip(self["step"], self[key], strict=True)) if key in self._columns else []


@dataclass(frozen=True)
class Fault:
    """One directory of errors/: when it was written, the message of each host, files of ranks."""

    time: float
    name: str
    messages: list[str]
    ranks: int


@dataclass(frozen=True)
class RunData:
    """What a report tells of."""

    path: Path
    settings: dict[str, Any]
    deepspeed: dict[str, Any]
    environment: dict[str, Any]
    command: str
    training: Columns
    validation: Columns
    recent: list[dict[str, Any]]  # the last rows of log.jsonl, of both
    events: list[dict[str, Any]]
    faults: list[Fault]
    skipped: list[dict[str, Any]]
    bad_samples: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]  # the oldest first
    grid: ImageGrid | None
    best: str  # checkpoints/best: a name, and its val_loss
    latest: str  # checkpoints/latest
    state: str  # see state_of

    @property
    def step(self) -> int:
        """The last step logged."""
        logged = [self.training.last("step"), self.validation.last("step")]
        return int(max((step for step in logged if step is not None), default=0))

    @property
    def iterations(self) -> int:
        return int(self.settings.get("iterations") or self.step)

    @property
    def classes(self) -> list[str] | None:
        """Their names, if an evaluation or a checkpoint tells them."""
        if self.evaluations:
            return self.evaluations[-1]["classes"]
        state = _json(self.path / "checkpoints" / self.latest / "state.json") if self.latest else {}
        return state.get("classes")

    @property
    def num_classes(self) -> int:
        """0 if nothing tells it."""
        return self.settings.get("num_classes") or len(self.classes or [])

    @property
    def guessing(self) -> Guessing | None:
        """What a classifier gets that sees no image: by the labels, as a start noted them, else
        for classes equally frequent; None if nothing tells how many there are."""
        for event in reversed(self.events):
            try:
                return Guessing(**event["guessing"])
            except (KeyError, TypeError):
                continue
        classes = self.num_classes
        return Guessing(classes, math.log(classes), 1 / classes) if classes else None

    @property
    def val_samples(self) -> int:
        """Images to validate on; 0 if nothing tells it."""
        noted = [event["val_samples"] for event in self.events if "val_samples" in event]
        return noted[-1] if noted and isinstance(noted[-1], int) else 0

    @property
    def global_batch(self) -> int:
        samples, steps = self.training.last("samples"), self.training.last("step")
        return round(samples / steps) if samples and steps else 0


def read_run(path: Path) -> RunData:
    """Raises ValueError if it is no run directory. A file that is damaged counts as absent."""
    if not path.is_dir() or not any((path / name).exists() for name in RUN_FILES):
        raise ValueError(f"got {path}; need a run directory, with one of {', '.join(RUN_FILES)}")
    training, validation = Columns(), Columns()
    recent = RecentRows()
    for row in files.read_jsonl(path / "log.jsonl"):
        if isinstance(row.get("step"), int):
            (validation if "val_loss" in row else training).add(row)
            recent.add(row)
    evaluations = [r for r in map(_evaluation, sorted(_listed(path / "eval", ".json"))) if r]
    evaluations.sort(key=_standing)
    happened, faults = read_events(path), sorted(_faults(path), key=lambda fault: fault.time)
    ranks = _listed(path, ".jsonl", "bad_samples.rank")
    return RunData(
        path=path,
        settings=_json(path / "config.json"),
        deepspeed=_json(path / "deepspeed.json"),
        environment=_json(path / "env.json"),
        command=_text(path / "command.sh"),
        training=training,
        validation=validation,
        recent=recent.together(),
        events=happened,
        faults=faults,
        skipped=list(files.read_jsonl(path / "skipped_steps.jsonl")),
        bad_samples=[row for name in sorted(ranks) for row in files.read_jsonl(name)],
        evaluations=evaluations,
        grid=_newest_grid(path / "eval"),
        best=_text(path / "checkpoints" / "best").strip(),
        latest=_text(path / "checkpoints" / "latest").strip(),
        state=state_of(path, happened, faults),
    )


def state_of(path: Path, happened: list[dict[str, Any]], faults: list[Fault]) -> str:
    """finished, running, stopped, failed, ended (without a word: killed), or not started."""
    if read_done(path) is not None:
        return "finished"
    try:
        if time.time() - (path / LOCK).stat().st_mtime < STALE_SECONDS:
            return "running"
    except OSError:
        pass
    last = happened[-1] if happened else {"event": "", "time": 0.0}
    if last["event"] == "failed" or (faults and faults[-1].time >= last["time"] - FILE_CLOCK):
        return "failed"
    if last["event"] == "stop":
        return "stopped"
    return "ended" if (path / "config.json").exists() else "not started"


def _evaluation(path: Path) -> dict[str, Any] | None:
    record = _json(path)
    if record.get("format") != EVALUATION_FORMAT or not record.get("classifier", {}).get("levels"):
        return None
    whole = isinstance(record.get("name"), str) and isinstance(record.get("step"), int | None)
    return record if whole and isinstance(record.get("classes"), list) else None


def _standing(evaluation: dict[str, Any]) -> tuple[int, bool, str]:
    """The report tells of the last: of the highest step, in full precision if there is one."""
    full = evaluation.get("precision") == PRECISIONS[0]
    return evaluation["step"] or 0, full, evaluation["name"]


def _newest_grid(folder: Path) -> ImageGrid | None:
    """Of the highest step; of those the one an evaluation made."""
    paths = _listed(folder, ".pictures.png")
    grids = [(path.name != "validation.pictures.png", load_grid(path)) for path in paths]
    found = [(grid.predictions.step or 0, made, grid) for made, grid in grids if grid]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def _faults(path: Path) -> Iterator[Fault]:
    for folder in _listed(path / "errors"):
        inside = _listed(folder)
        verdicts = [_json(name) for name in inside if name.suffix == ".json"]
        yield Fault(
            time=max(map(_modified, inside or [folder])),
            name=folder.name,
            messages=[str(v["message"]) for v in verdicts if v.get("message")],
            ranks=sum(name.suffix == ".txt" for name in inside),
        )


def _listed(folder: Path, suffix: str = "", prefix: str = "") -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    wanted = (n for n in names if n.startswith(prefix) and n.endswith(suffix) and n[0] != ".")
    return [folder / name for name in wanted]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------ fewer points


@dataclass(frozen=True)
class Thinned:
    """A curve in at most so many points. band: (x, least, most) of what each point stands for."""

    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]]


def thin(points: list[tuple[float, float]], most: int = 300) -> Thinned:
    """Means over equal stretches of x, in at most `most` of them, where there are more points.

    Not-a-number, on its own or a whole stretch of it, stays: a gap in the line. The first and the
    last x stay where they are.
    """
    if len(points) <= most:
        return Thinned(points, [])
    first, last = points[0][0], points[-1][0]
    width = (last - first) / most or 1.0
    stretches: list[list[tuple[float, float]]] = [[] for _ in range(most)]
    for x, y in points:
        stretches[min(most - 1, max(0, int((x - first) / width)))].append((x, y))
    thinned, band = [], []
    for stretch in filter(None, stretches):
        x = sum(x for x, _ in stretch) / len(stretch)
        x = first if not thinned else last if stretch[-1][0] == last else x
        known = [y for _, y in stretch if math.isfinite(y)]
        thinned.append((x, sum(known) / len(known) if known else math.nan))
        if known:
            band.append((x, min(known), max(known)))
    return Thinned(thinned, band)


# ------------------------------------------------------------------------------ attempts


@dataclass
class Attempt:
    """One start of the run, until its end. end: how it ended; time_end: None if nothing tells."""

    first: int
    last: int
    time: float
    time_end: float | None
    end: str  # finished, stopped, failed, killed, running
    facts: dict[str, Any]


def attempts_of(run: RunData, now: Callable[[], float] = time.time) -> list[Attempt]:
    """Return the starts of a run, from its events; one without an end was killed, or crashed."""
    attempts: list[Attempt] = []
    for event in run.events:
        kind, step = event["event"], int(event.get("step") or 0)
        if kind in ("start", "resume"):
            if attempts and attempts[-1].end == "killed":
                attempts[-1].last = max(attempts[-1].last, int(event.get("reached") or 0))
            attempts.append(Attempt(step, step, event["time"], None, "killed", event))
        elif attempts and kind in ("stop", "finish", "failed"):
            ends = {"stop": "stopped", "finish": "finished", "failed": "failed"}
            attempt = attempts[-1]
            attempt.end, attempt.time_end, attempt.last = (
                ends[kind],
                event["time"],
                max(attempt.last, step),
            )
    for attempt, later in zip(
        attempts, [*(attempt.time for attempt in attempts[1:]), math.inf], strict=False
    ):
        for fault in run.faults:
            if (
                attempt.end == "killed"
                and attempt.time - FILE_CLOCK <= fault.time < later - FILE_CLOCK
            ):
                attempt.end, attempt.time_end = "failed", fault.time
    if attempts and attempts[-1].end in ("killed", "failed"):
        attempts[-1].last = max(attempts[-1].last, run.step)
        if run.state == "running":
            attempts[-1].end, attempts[-1].time_end = "running", now()
    return attempts
