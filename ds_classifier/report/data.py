"""Reads a run directory for its report. Files may be missing, or cut off by a kill."""

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
from ds_classifier.data.labels.targets import Targets
from ds_classifier.evaluation.format import EVALUATION_FORMAT, PRECISIONS
from ds_classifier.evaluation.image_grid import ImageGrid, load_grid
from ds_classifier.training.logs.sanity import Guessing, RecentRows
from ds_classifier.training.run_dir import EVENTS, read_done, read_events
from ds_classifier.training.run_lock import LOCK, STALE_SECONDS

RUN_FILES = ("config.json", "log.jsonl", EVENTS, "checkpoints")
RECENT = 5  # rows of the log whose mean stands for the present
FILE_CLOCK = 0.1  # seconds by which a file's time, from a coarser clock, may precede an event's


class Columns:
    """A table of numbers, stored as one column per key. A number that is missing or null is nan."""

    def __init__(self):
        self.rows = 0
        self._columns: dict[str, array] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; values other than numbers are left out."""
        for key, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                column = self._columns.setdefault(key, array("d"))
                column.extend([math.nan] * (self.rows - len(column)))
                column.append(value)
        self.rows += 1

    def __getitem__(self, key: str) -> array:
        """Return the column, [rows]."""
        column = self._columns.get(key, array("d"))
        return column + array("d", [math.nan] * (self.rows - len(column)))

    def last(self, key: str) -> float | None:
        """Return the last finite value, or None."""
        return next((v for v in reversed(self[key]) if math.isfinite(v)), None)

    def recent(self, key: str) -> float | None:
        """Return the mean over the last RECENT rows, or None if no value in them is finite."""
        known = [value for value in self[key][-RECENT:] if math.isfinite(value)]
        return sum(known) / len(known) if known else None

    def points(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of each row; the value may be nan."""
        return list(zip(self["step"], self[key], strict=True)) if key in self._columns else []


@dataclass(frozen=True)
class Fault:
    """A directory of errors/, written when ranks fail."""

    time: float  # when it was written
    name: str
    messages: list[str]  # one per host
    ranks: int  # number of ranks that left a file


@dataclass(frozen=True)
class GuidedSamples:
    """The facts of samples/, which sample.py draws, see guidance/sample_files.py.

    shares: by scale, the share of samples of the class asked for, or what is measured of other
        targets, see guidance/fidelity.py; empty if it was not measured.
    judge: what decided which class a sample shows.
    levels: the comparison with the best possible classifier, see guidance/fidelity.py.
    """

    scales: list[float]
    number: int  # of samples at each scale
    asked: int  # number of classes, or of other requests
    step: int | None  # of the classifier
    source: str  # the training set or the diffusion model that they were drawn from
    shares: dict[float, float]
    levels: list[dict[str, Any]]
    judge: str = "a support vector machine, trained on the clean images,"
    kind: str = "class"  # of the classifier's targets


@dataclass(frozen=True)
class RunData:
    """The contents of a run directory."""

    path: Path
    settings: dict[str, Any]
    deepspeed: dict[str, Any]
    environment: dict[str, Any]
    command: str
    training: Columns
    validation: Columns
    recent: list[dict[str, Any]]  # the last rows of log.jsonl, of both kinds
    events: list[dict[str, Any]]
    faults: list[Fault]
    skipped: list[dict[str, Any]]
    bad_samples: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]  # the newest last, see _order
    grid: ImageGrid | None
    samples: GuidedSamples | None
    best: str  # checkpoints/best, "NAME val_loss LOSS"; "" if there is none
    latest: str  # checkpoints/latest, NAME; "" if there is none
    state: str  # see state_of

    @property
    def best_step(self) -> int | None:
        """The step of checkpoints/best; None if there is none."""
        return _step_named(self.best.partition(" ")[0])

    @property
    def latest_step(self) -> int | None:
        """The step of checkpoints/latest; None if there is none."""
        return _step_named(self.latest)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        logged = [self.training.last("step"), self.validation.last("step")]
        return int(max((step for step in logged if step is not None), default=0))

    @property
    def iterations(self) -> int:
        """The number of steps that the run was asked for; the last step if it is not known."""
        asked = [self.settings.get(name) or 0 for name in ("iterations", "extend")]
        return int(max(asked) or self.step)

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, from an evaluation or a checkpoint; None without either."""
        if self.evaluations:
            return self.evaluations[-1]["classes"]
        state = _json(self.path / "checkpoints" / self.latest / "state.json") if self.latest else {}
        return state.get("classes")

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 if it is not known."""
        return self.settings.get("num_classes") or len(self.classes or [])

    @property
    def named(self) -> str:
        """The run in a command, and the flag without which no program calls the user's network."""
        network = self.settings.get("classifier") or ""
        own = ":" in network and not network.startswith("torchvision:")
        return f"{self.path} --classifier {network}" if own else str(self.path)

    @property
    def targets(self) -> Targets:
        """The kind of the data's targets, as the last start or the newest evaluation has it."""
        noted = [record.get("targets") for record in self.evaluations[-1:]]
        noted += [event["targets"] for event in self.events if "targets" in event]
        return Targets.from_json(noted[-1] if noted else None)

    @property
    def guessing(self) -> Guessing | None:
        """The loss and accuracy of guessing, as the last start recorded them.

        If none did, those for equally frequent classes; None if their number is not known, or if
        the targets are vectors.
        """
        for event in reversed(self.events):
            try:
                return Guessing(**event["guessing"])
            except (KeyError, TypeError):
                continue
        classes = 0 if self.targets.vectors else self.num_classes
        return Guessing(classes, math.log(classes), 1 / classes) if classes else None

    @property
    def val_samples(self) -> int:
        """The number of validation images; 0 if it is not known."""
        noted = [event["val_samples"] for event in self.events if "val_samples" in event]
        return noted[-1] if noted and isinstance(noted[-1], int) else 0

    @property
    def global_batch(self) -> int:
        """The number of images per step, from the log; 0 if it is not known."""
        samples, steps = self.training.last("samples"), self.training.last("step")
        return round(samples / steps) if samples and steps else 0


def read_run(path: Path) -> RunData:
    """Read a run directory. A damaged file is treated as a missing one.

    Raises ValueError if path is not a run directory.
    """
    if not path.is_dir() or not any((path / name).exists() for name in RUN_FILES):
        raise ValueError(f"got {path}; need a run directory, with one of {', '.join(RUN_FILES)}")
    training, validation = Columns(), Columns()
    recent = RecentRows()
    for row in files.read_jsonl(path / "log.jsonl"):
        if isinstance(row.get("step"), int):
            (validation if "val_loss" in row else training).add(row)
            recent.add(row)
    evaluations = [r for r in map(_evaluation, sorted(_listed(path / "eval", ".json"))) if r]
    evaluations.sort(key=_order)
    recorded, faults = read_events(path), sorted(_faults(path), key=lambda fault: fault.time)
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
        events=recorded,
        faults=faults,
        skipped=list(files.read_jsonl(path / "skipped_steps.jsonl")),
        bad_samples=[row for name in sorted(ranks) for row in files.read_jsonl(name)],
        evaluations=evaluations,
        grid=_newest_grid(path / "eval"),
        samples=_samples(path / "samples"),
        best=_text(path / "checkpoints" / "best").strip(),
        latest=_text(path / "checkpoints" / "latest").strip(),
        state=state_of(path, recorded, faults),
    )


def state_of(path: Path, recorded: list[dict[str, Any]], faults: list[Fault]) -> str:
    """Return finished, running, stopped, failed, ended (without a message: killed) or not started.

    A run counts as running while its lock is touched.
    """
    if read_done(path) is not None:
        return "finished"
    try:
        if time.time() - (path / LOCK).stat().st_mtime < STALE_SECONDS:
            return "running"
    except OSError:
        pass
    last = recorded[-1] if recorded else {"event": "", "time": 0.0}
    if last["event"] == "failed" or (faults and faults[-1].time >= last["time"] - FILE_CLOCK):
        return "failed"
    if last["event"] == "stop":
        return "stopped"
    return "ended" if (path / "config.json").exists() else "not started"


def _evaluation(path: Path) -> dict[str, Any] | None:
    """Return the evaluation in a file, or None if there is none that a report can show."""
    record = _json(path)
    if record.get("format") != EVALUATION_FORMAT or not record.get("classifier", {}).get("levels"):
        return None
    whole = isinstance(record.get("name"), str) and isinstance(record.get("step"), int | None)
    return record if whole and isinstance(record.get("classes"), list) else None


def _samples(folder: Path) -> GuidedSamples | None:
    """Return the facts of the samples in a folder, or None without a whole samples.json."""
    facts, measured = _json(folder / "samples.json"), _json(folder / "fidelity.json")
    try:
        denoiser = facts["denoiser"]
        step, shares = facts["classifier"].get("step"), measured.get("shares", {})
        known = measured.get("truth") == "distribution"
        judge = {"judge": "the best classifier of their distribution"} if known else {}
        return GuidedSamples(
            scales=[float(scale) for scale in facts["classifier_scale"]],
            number=int(facts["num_samples"]),
            asked=len(facts["classes"]) or 1,
            step=step if isinstance(step, int) else None,
            source=str(denoiser.get("data_dir") or denoiser.get("model_path") or ""),
            shares={float(scale): float(share) for scale, share in shares.items()},
            levels=[level for level in measured.get("levels", []) if isinstance(level, dict)],
            kind=str(measured.get("kind", "class")),
            **judge,
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def _order(evaluation: dict[str, Any]) -> tuple[int, bool, str]:
    """Return a sort key: by step, and fp32 last. The report shows the last evaluation first."""
    full = evaluation.get("precision") == PRECISIONS[0]
    return evaluation["step"] or 0, full, evaluation["name"]


def _newest_grid(folder: Path) -> ImageGrid | None:
    """Return the images of the highest step; if two files have them, those of an evaluation."""
    paths = _listed(folder, ".pictures.png")
    grids = [(path.name != "validation.pictures.png", load_grid(path)) for path in paths]
    found = [(grid.predictions.step or 0, made, grid) for made, grid in grids if grid]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def _faults(path: Path) -> Iterator[Fault]:
    """Yield the faults that are recorded in errors/."""
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
    """Return the paths in a folder that are not hidden; none if the folder does not exist."""
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


def _step_named(checkpoint: str) -> int | None:
    """Return the step in the name of a checkpoint; None for another name."""
    step = checkpoint.removeprefix("step-")
    return int(step) if step.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace", encoding="utf-8")
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
    """A curve with fewer points than were logged."""

    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]]  # (x, least, most) of the logged points per point


def thin(points: list[tuple[float, float]], most: int = 300) -> Thinned:
    """Return the means over at most `most` equal intervals of x; fewer points stay as they are.

    An interval in which all values are nan stays nan, a gap in the line. The first and the last x
    do not move.
    """
    if len(points) <= most:
        return Thinned(points, [])
    first, last = points[0][0], points[-1][0]
    width = (last - first) / most or 1.0
    intervals: list[list[tuple[float, float]]] = [[] for _ in range(most)]
    for x, y in points:
        intervals[min(most - 1, max(0, int((x - first) / width)))].append((x, y))
    thinned, band = [], []
    for interval in filter(None, intervals):
        x = sum(x for x, _ in interval) / len(interval)
        x = first if not thinned else last if interval[-1][0] == last else x
        known = [y for _, y in interval if math.isfinite(y)]
        thinned.append((x, sum(known) / len(known) if known else math.nan))
        if known:
            band.append((x, min(known), max(known)))
    return Thinned(thinned, band)


# ------------------------------------------------------------------------------ attempts


@dataclass
class Attempt:
    """One start of a run, until it ended."""

    first: int  # step that it began at
    last: int  # last step that it is known to have reached
    time: float
    time_end: float | None  # None: not known
    end: str  # finished, stopped, failed, killed, running
    facts: dict[str, Any]  # the event that recorded the start


def attempts_of(run: RunData, now: Callable[[], float] = time.time) -> list[Attempt]:
    """Return the attempts of a run, from its events. One without an end was killed, or crashed."""
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
