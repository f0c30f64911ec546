"""A run directory as the report reads it: attempts, order of evaluations, thinned curves."""

import json
import math
import random
import time

import pytest
from report_page import opened, record, training_row, write_log, write_record

from ds_classifier.report.data import attempts_of, read_run, thin
from ds_classifier.training.run_dir import EVENTS, append_event, read_events


def test_evaluations_are_ordered_by_step_then_precision(run):
    """The last one, which the report shows first, is of the last step, in fp32 if there is one."""
    for step, precision in ((5, "fp32"), (10, "bf16"), (10, "fp32"), (20, "bf16")):
        made = record(step, ["a", "b"], {(0, 0): 4})
        name = made["name"] + ("" if precision == "fp32" else f"-{precision}")
        write_record(run, made | {"name": name, "precision": precision})
    read = [(e["step"], e["precision"]) for e in read_run(run).evaluations]
    assert read == [(5, "fp32"), (10, "bf16"), (10, "fp32"), (20, "bf16")]
    assert "step-00000020-bf16" in opened(run).sections["noise"]


def test_thinning_keeps_means_ends_spikes_and_gaps():
    rng = random.Random(0)
    points = [(step, rng.random()) for step in range(10, 300_001, 10)]
    points[12_345] = (points[12_345][0], 50.0)
    gap = range(20_000, 20_400)
    for i in gap:
        points[i] = (points[i][0], math.nan)
    thinned = thin(points, 300)
    assert 290 <= len(thinned.points) <= 300
    assert (thinned.points[0][0], thinned.points[-1][0]) == (10, 300_000)
    assert any(math.isnan(y) for _, y in thinned.points)
    assert max(high for _, _, high in thinned.band) == 50.0
    for x, y in thinned.points[50:60]:
        near = [v for s, v in points if abs(s - x) < 700 and math.isfinite(v)]
        assert y == pytest.approx(sum(near) / len(near), abs=0.1)
    assert thin(points[:7], 300).points == points[:7]


def test_attempts_of_a_run_that_was_killed_and_resumed(run, monkeypatch):
    moments = iter([100.0, 200.0, 300.0, 400.0, 500.0])
    monkeypatch.setattr(time, "time", lambda: next(moments))
    append_event(run, "start", step=0, world_size=2, host="a", device="CPU")
    append_event(run, "resume", step=50, reached=70, world_size=2, host="a", device="CPU")
    append_event(run, "save failed", step=60, message="disk full")
    append_event(run, "stop", step=80, reason="SIGTERM")
    of_last = dict(world_size=4, way="bf16, ZeRO 2, Lion", host="b", device="CPU")
    append_event(run, "resume", step=80, reached=80, **of_last)
    monkeypatch.undo()
    with open(run / EVENTS, "a") as file:
        file.write('{"time": 600, "eve')  # cut by a kill
    append_event(run, "finish", step=100)
    (run / "DONE").write_text("step 100\n")
    write_log(run, [training_row(100, 1.0)])
    attempts = attempts_of(read_run(run))
    assert [(attempt.first, attempt.last, attempt.end) for attempt in attempts] == [
        (0, 70, "killed"),
        (50, 80, "stopped"),
        (80, 100, "finished"),
    ]
    text = opened(run).sections["history"]
    assert "resumed from step 50 (20 steps repeated) on 2 ranks" in text
    assert "resumed from step 80 on 4 ranks, bf16, ZeRO 2, Lion, CPU, b" in text
    assert "ended without a message" in text
    assert "checkpoint not written: disk full" in text
    assert "stopped by SIGTERM" in text


def test_a_crash_is_known_from_errors(run):
    append_event(run, "start", step=0, world_size=2, host="a", device="CPU")
    errors = run / "errors" / "2026-01-01_00-00-00"
    errors.mkdir(parents=True)
    message = "Traceback\n  of a rank\nrank 1 at step 5, data; tracebacks in x/\nerror: it broke"
    (errors / "host.json").write_text(json.dumps({"message": message, "code": 1}))
    for rank in (0, 1):
        (errors / f"rank{rank}.txt").write_text("stacks")
    write_log(run, [training_row(5, 1.0)])
    (attempt,) = attempts_of(read_run(run))
    assert (attempt.end, attempt.last) == ("failed", 5)
    parsed = opened(run)
    assert "it broke (errors/2026-01-01_00-00-00: 2 rank files)" in parsed.sections["history"]
    assert "failed; the last checkpoint is kept" in parsed.text
    assert "1 of 1 attempt ended by a fault or a kill" in parsed.sections["working"]


def test_an_event_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    append_event(tmp_path / "gone", "start", step=0)
    assert "not written" in capsys.readouterr().out
    assert read_events(tmp_path / "gone") == []
