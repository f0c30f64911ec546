"""The report page: well-formed, needs no network, escapes text, shows the numbers of the log."""

import dataclasses
import json
import math
import re
import time

import numpy as np
import pytest
from report_page import (
    HOSTILE,
    Page,
    opened,
    record,
    training_row,
    validation_row,
    write_log,
    write_record,
)
from running import ROOT, launch, read_log, run_python
from tiny_run import CONFIGS, TINY, TRACED

from ds_classifier.distributed import failures
from ds_classifier.evaluation.image_grid import (
    ImageGrid,
    Predictions,
    load_grid,
    save_grid,
)
from ds_classifier.evaluation.metrics import METRICS, Metric
from ds_classifier.report.data import read_run
from ds_classifier.report.page import page, unbroken_flags, write_report
from ds_classifier.training.logs.sanity import Guessing, SanityWatch
from ds_classifier.training.run_dir import append_event, read_events

REPORT = ROOT / "launch" / "report.py"


# ------------------------------------------------------------------------------ runs of all kinds


def test_a_run_that_logged_nothing(run):
    text = opened(run).text
    assert "No step is logged yet" in text
    assert "No evaluation yet" in text
    assert "of 1,000 steps" in text


def test_no_run_directory(tmp_path):
    with pytest.raises(ValueError, match=r"need a run directory, with one of config\.json"):
        write_report(tmp_path)
    done = run_python(REPORT, tmp_path / "gone", cwd=tmp_path)
    assert done.code == 2
    assert done.lines[0].startswith("error: got")
    assert len(done.lines) == 1


def test_one_row_without_validation(run):
    write_log(run, [training_row(10, 1.25)])
    parsed = opened(run)
    assert (
        "Accuracy 90 70 50 30 % by quartile of t, chance 10 %: learning at every noise level. "
        "Training loss 1.250, that of guessing 2.303." in parsed.text
    )
    assert "No validation" in parsed.text
    assert "training, no validation" in parsed.text


def test_the_report_judges_as_the_log_does(run):
    """Both use the label frequencies that the start recorded."""
    at_chance = {f"train_acc@1_q{q}": 0.5 for q in range(4)}
    rows = [training_row(10, 1.2, **at_chance)]
    write_log(run, rows)
    unknown = opened(run).text
    assert (
        "learning at every noise level" in unknown
    )  # true if the 10 classes were equally frequent
    guessing = Guessing(10, loss=1.2, accuracy=0.5)
    started = {"time": 1.0, "event": "start", "guessing": dataclasses.asdict(guessing)}
    (run / "events.jsonl").write_text(json.dumps(started) + "\n")
    (said,) = SanityWatch(guessing, val_samples=0).add(rows[0])
    assert said == "loss 1.20, near 1.20, that of guessing by class frequency: nothing learnt yet"
    assert said[1:] in opened(run).text


def test_alarms_of_the_log_are_in_the_report(run):
    rows = [training_row(step, 1.0 if step < 300 else 9.0) for step in range(10, 400, 10)]
    rows.append(validation_row(390, 3.0, 0.1))
    write_log(run, rows)
    started = {"time": 1.0, "event": "start", "val_samples": 1000}
    (run / "events.jsonl").write_text(json.dumps(started) + "\n")
    text = opened(run).text
    for text_part in (
        "worse than guessing; do: lower --lr",
        "diverging",
        "validation 10 %: overfitting",
    ):
        assert text_part in text


def test_headline_and_checks_agree_with_the_log(run):
    rows = [training_row(s, 2.0 / s) for s in range(10, 500, 10)]
    rows += [validation_row(200, 0.4, 0.7), validation_row(400, 0.7, 0.655)]
    write_log(run, sorted(rows, key=lambda row: row["step"]))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best").write_text("step-00000200 val_loss 0.4\n")
    text = opened(run).text
    for text_part in ("65.5 %", "490", "200", "its best is 0.400, at step 200: take"):
        assert text_part in text
    recent = sum(2.0 / s for s in (450, 460, 470, 480, 490)) / 5
    assert f"Training loss {recent:.3f}" in text


def test_one_accuracy_stands_in_the_headline(run):
    """The evaluation in fp32 replaces the validation in bf16, unless that is newer."""
    write_log(run, [training_row(20, 1.0), validation_row(20, 0.9, 0.61)])
    (run / "deepspeed.json").write_text('{"bf16": {"enabled": true}}')
    top = opened(run).sections[""]
    assert "61.0 %" in top
    assert "held out, while training in bf16" in top
    write_record(run, record(20, ["a", "b"], {(0, 0): 4}))
    parsed = opened(run)
    assert "50.0 %" in parsed.sections[""]
    assert "held out, evaluated in fp32" in parsed.sections[""]
    assert "61.0 %" not in parsed.sections[""]
    assert "computed here while training in bf16" in parsed.sections["curves"]
    write_log(run, [training_row(30, 1.0), validation_row(30, 0.9, 0.62)])
    assert "62.0 %" in opened(run).sections[""]


def test_a_log_cut_by_a_kill(run):
    write_log(run, [training_row(10, 1.0), training_row(20, None, grad_norm=None)])
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 30, "train_lo')
    text = opened(run).text
    assert "20 of 1,000 steps" in re.sub(r"\s+", " ", text)


def test_a_damaged_file_affects_one_section(run):
    write_log(run, [training_row(10, 1.0)])
    write_record(run, record(10, ["a", "b"], {(0, 0): 3, (1, 0): 1}))
    damaged = record(20, ["a", "b"], {(0, 0): 3}) | {"confusion": {"t": 0}}
    write_record(run, damaged)
    (run / "eval" / "other.json").write_text("[1, 2")
    (run / "eval" / "x.pictures.png").write_bytes(b"no image")
    parsed = Page(page(read_run(run)))
    assert "cannot be shown: KeyError" in parsed.sections["confusion"]
    assert "uniform t" in parsed.sections["noise"]


# ------------------------------------------------------------------------------ hostile text


def test_all_text_from_data_is_escaped(run, tmp_path):
    hostile_run = run.rename(tmp_path / "a <script>run")
    classes = [HOSTILE, "</td><img src=http://evil/x>", "dog"]
    write_log(hostile_run, [training_row(10, 1.0), validation_row(10, 1.0)])
    write_record(hostile_run, record(10, classes, {(0, 1): 3, (1, 1): 2, (2, 0): 1}))
    settings = {"iterations": 10, "num_classes": 3, "data_dir": HOSTILE, HOSTILE: HOSTILE}
    (hostile_run / "config.json").write_text(json.dumps(settings))
    (hostile_run / "env.json").write_text(json.dumps({"host": HOSTILE, HOSTILE: {"x": HOSTILE}}))
    (hostile_run / "deepspeed.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (hostile_run / "command.sh").write_text(HOSTILE)
    (hostile_run / "checkpoints").mkdir()
    (hostile_run / "checkpoints" / "best").write_text(HOSTILE)
    append_event(hostile_run, "start", step=0, host=HOSTILE, device=HOSTILE, world_size=1)
    append_event(hostile_run, "save failed", step=3, message=HOSTILE)
    append_event(hostile_run, "stop", step=5, reason=HOSTILE)
    bad = {"position": 1, "key": HOSTILE, "error": HOSTILE}
    (hostile_run / "bad_samples.rank0.jsonl").write_text(json.dumps(bad))
    errors = hostile_run / "errors" / "2026-01-01_00-00-00"
    errors.mkdir(parents=True)
    (errors / "host.json").write_text(json.dumps({"message": f"error: {HOSTILE}", "code": 1}))
    tiles = np.zeros((2, 2, 4, 4, 3), np.uint8)
    predictions = Predictions(
        10, [0, 9], [1.0, -1.0], 1, [0, 1], [0, 1], [[0, 1], [1, 7]], [[0.5, None]] * 2
    )
    save_grid(ImageGrid(tiles, predictions), hostile_run / "eval" / "step-10.pictures.png")
    parsed = opened(hostile_run)
    for section in ("images", "confusion", "history", "settings"):
        assert HOSTILE in parsed.sections[section], section
    assert "class 7" in parsed.sections["images"]


# ------------------------------------------------------------------------------ evaluations


def test_noise_levels_and_earlier_evaluations(run):
    for step, accuracy in ((10, 0.5), (20, 0.75), (30, 0.875)):
        write_record(run, record(step, ["a", "b"], {(0, 0): 3, (0, 1): 1}, accuracy))
    html = write_report(run).read_text()
    parsed = opened(run)
    assert "step 30" in parsed.sections["noise"]
    assert "87.5 %" in parsed.sections["noise"]
    assert "Earlier evaluations are drawn faintly" in parsed.sections["noise"]
    chart = html.split('id="noise"')[1].split("</figure>")[0]
    lines = re.findall(
        r"<path [^>]*stroke: var\(--blue, #0072b2\); [^>]*stroke-width: ([\d.]+)", chart
    )
    assert sorted(lines) == ["1.3"] * (2 + 1) + ["2"] * (1 + 1)  # curves, and their legend
    assert "<title>step 30: 10, 87.5 %</title>" in chart


def test_a_matrix_of_few_classes(run):
    write_record(run, record(10, ["cat", "dog"], {(0, 0): 31, (0, 1): 17, (1, 1): 5}))
    parsed = opened(run)
    assert "17 of 53 images are taken for another class" in parsed.sections["confusion"]
    rows = re.findall(r"<tr>.*?</tr>", write_report(run).read_text().split('class="matrix')[1])
    cells = [re.sub("<.*?>", " ", row).split() for row in rows[1:3]]
    assert cells == [["cat", "31", "17", "48", "65", "%"], ["dog", "5", "5", "100", "%"]]


def test_the_worst_pairs_of_a_thousand_classes(run):
    classes = [f"class number {k}" for k in range(1000)]
    confusion = {(k, k): 40 for k in range(1000)}
    confusion |= {(k, (k + 1) % 1000): 1 + k // 100 for k in range(0, 1000, 7)}
    confusion[3, 900] = 25
    write_record(run, record(10, classes, confusion))
    parsed, html = opened(run), write_report(run).read_text()
    assert len(html) < 300_000
    assert "matrix" not in parsed.sections["confusion"]
    rows = re.findall(r"<tr><td>.*?</tr>", html.split('id="confusion"')[1])
    first = re.findall(r"<td>(.*?)</td>", rows[0])
    assert first == ["class number 3", "class number 900", "25", "38 %"]
    worst = re.findall(r"<td>(.*?)</td>", rows[20])
    assert worst == ["class number 3", "65", "62 %"]


# ------------------------------------------------------------------------------ a long run


def test_a_long_run_stays_small(run):
    with open(run / "log.jsonl", "w") as file:
        for step in range(10, 300_001, 10):
            file.write(json.dumps(training_row(step, 2 / math.log(step + 2))) + "\n")
            if step % 10_000 == 0:
                file.write(json.dumps(validation_row(step, 0.5)) + "\n")
    (run / "skipped_steps.jsonl").write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(1, 300_000, 5))
    )
    began = time.monotonic()
    parsed, size = opened(run), (run / "report.html").stat().st_size
    assert size < 1_000_000
    assert time.monotonic() - began < 30
    assert "60,000 skipped" in parsed.sections["history"]
    assert "q3" in parsed.sections["curves"]


# ------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_training_and_evaluation_write_the_report(digits, tmp_path, monkeypatch):
    """A run of two ranks is stopped, resumed and evaluated; the page agrees with the files."""
    run = tmp_path / "run"
    flags = ["--deepspeed_config", CONFIGS / "zero1_fp32.json", "--run_dir", run, *TINY]
    data = ["--data_dir", digits / "train", "--val_data_dir", digits / "val"]
    length = ["--iterations", 6, "--save_interval", 3, "--batch_size", 16]
    monkeypatch.setenv("TERM_AT", "3:1")
    done = launch(2, *flags, *data, *length, script=TRACED, cwd=tmp_path)
    monkeypatch.delenv("TERM_AT")
    assert done.code == 75, done.output
    parsed = Page((run / "report.html").read_text())
    assert "stopped on request" in parsed.text
    assert "stopped by SIGTERM" in parsed.sections["history"]
    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # no page can be written here
    done = launch(2, *flags, *data, *length, cwd=tmp_path)
    assert done.code == 0, done.output
    assert (run / "DONE").exists()
    (line,) = [line for line in done.lines if "report.html:" in line]
    assert "not made, and nothing else is lost" in line
    (run / "report.html").rmdir()
    done = run_python(REPORT, run, cwd=tmp_path)
    assert (done.code, done.output) == (0, f"{run}/report.html\n")
    rows = read_log(run)
    parsed = Page((run / "report.html").read_text())
    last = [row for row in rows if "val_loss" in row][-1]
    assert f"{100 * last['val_acc@1']:.1f} %" in parsed.text
    assert f"{last['val_loss']:.3f}" in parsed.text
    assert "No evaluation yet" in parsed.sections["noise"]
    assert "10 of 10" not in parsed.sections["images"]
    assert "Held-out images at step 6" in parsed.sections["images"]
    grid = load_grid(run / "eval" / "validation.pictures.png")
    assert grid.tiles.shape == (10, 8, 8, 8, 3)
    assert [e["event"] for e in read_events(run)] == ["start", "stop", "resume", "finish"]

    done = launch(1, run, "--levels", 3, script=ROOT / "launch" / "evaluate.py", cwd=tmp_path)
    assert done.code == 0, done.output
    assert f"written: {run}/report.html" in done.output
    made = json.loads((run / "eval" / "step-00000006.json").read_text())
    parsed = opened(run)
    assert f"{100 * made['classifier']['levels'][0]['acc@1']:.1f} %" in parsed.sections["noise"]
    confusion = made["confusion"]
    columns = (confusion[key] for key in ("label", "predicted", "samples"))
    pairs = zip(*columns, strict=True)
    right = sum(count for label, predicted, count in pairs if label == predicted)
    assert right == made["classifier"]["levels"][0]["correct@1"]
    assert f"{360 - right:,} of 360 images are taken" in parsed.sections["confusion"]
    flags = ["--classifier_path", run, "--data_dir", digits / "train", "--num_samples", 2]
    flags += ["--timestep_respacing", 2, "--classes", "3,8"]
    done = launch(1, *flags, script=ROOT / "launch" / "sample.py", cwd=tmp_path)
    assert done.code == 0, done.output
    assert f"written: {run}/report.html" in done.output
    assert "2 samples per scale" in opened(run).sections["guides"]
    # The evaluation shows the same images with the same noise as the validation.
    again = load_grid(run / "eval" / "step-00000006.pictures.png")
    assert (again.tiles == grid.tiles).all()
    assert (
        again.predictions == grid.predictions or again.predictions.labels == grid.predictions.labels
    )


def test_a_report_that_cannot_be_written_is_one_line(capsys):
    def broken():
        raise KeyError("x")

    assert failures.tolerate("report.html", broken) is None
    assert failures.tolerate("report.html", lambda: 3) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_a_new_metric_has_charts(run, monkeypatch):
    entry = Metric(name="entropy", title="Entropy", unit="nats", per_sample=None)
    monkeypatch.setitem(METRICS, "entropy", entry)
    write_log(run, [training_row(step, 1.0, train_entropy=0.5) for step in (10, 20)])
    write_record(run, record(20, ["a", "b"], {(0, 0): 4}))
    parsed = opened(run)
    assert "Entropy, nats, by quartile of t" in parsed.sections["curves"]
    assert "training 0.5" in parsed.sections["curves"]
    assert "Entropy, nats" in parsed.sections["noise"]


def test_no_line_ends_within_the_name_of_a_flag():
    expected = 'try <span class="flag">--lr</span> &lt;x&gt;, not a - b'
    assert unbroken_flags("try --lr <x>, not a - b") == expected
