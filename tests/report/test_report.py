"""The report page: well-formed, without network, escaped, and with the numbers of the log."""

import dataclasses
import json
import math
import random
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, launch, read_log, run_python
from tiny_run import CONFIGS, TINY, TRACED

from ds_classifier import distributed
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.shards import open_shards
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.distributed import failures
from ds_classifier.evaluation.image_grid import (
    ImageGrid,
    Predictions,
    load_grid,
    marked_sheet,
    save_grid,
)
from ds_classifier.evaluation.levels import Confusion
from ds_classifier.evaluation.predictions import choose_positions, predict_grid
from ds_classifier.report.data import attempts_of, read_run, thin
from ds_classifier.report.page import page, write_report
from ds_classifier.report.plots import Axis, Line, curves_svg, plot_evaluation, plot_series
from ds_classifier.training.log import RunLogger
from ds_classifier.training.run_dir import EVENTS, append_event, read_events
from ds_classifier.training.sanity import Guessing, SanityWatch

REPORT = ROOT / "launch" / "report.py"
HOSTILE = '<script>alert("x")</script>&"\''
VOID = {"meta", "link", "img", "br"}
SVG_ENDS_ITSELF = {"g", "path", "use", "rect"}


class Page(HTMLParser):
    """A page taken apart: its words, what it would fetch, and whether its tags match."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.addresses = [], [], [], []
        self.sections = {}  # id -> words
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        assert tag in SVG_ENDS_ITSELF

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "style" for tag, _ in self.open):
            assert "url(" not in data
            assert "@import" not in data
            return
        self.words.append(data)
        section = next((a["id"] for tag, a in self.open if tag == "section"), "")
        self.sections[section] = self.sections.get(section, "") + data + " "

    @property
    def text(self):
        return " ".join(self.words)


def opened(run) -> Page:
    """The page of a run directory, checked for what must hold of every page."""
    html = write_report(run).read_text()
    parsed = Page(html)
    assert "script" not in parsed.tags
    for address in parsed.addresses:
        assert address.startswith(("data:", "#")), address
    assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"base64,\S+", "", html))
    assert "cannot be shown" not in parsed.text
    return parsed


def training_row(step, loss, **more):
    row = {"step": step, "samples": 64 * step, "train_loss": loss, "train_acc@1": 0.5, "lr": 1e-3}
    row |= {f"train_acc@1_q{q}": 0.9 - 0.2 * q for q in range(4)}
    row |= {"grad_norm": 1.5, "lg_loss_scale": 0.0, "images_per_sec": 100.0, "skipped_steps": 0}
    row["window_samples"] = 640
    return row | {"data_wait_frac": 0.01, "bad_samples": 0} | more


def validation_row(step, loss, accuracy=0.6):
    row = {"step": step, "val_loss": loss, "val_acc@1": accuracy, "val_acc@5": 0.9}
    return row | {"val_acc@1_t0": 0.8, "val_loss_t0": 0.3, "val_seconds": 1.0}


def write_log(run, rows):
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """A run directory with settings, and nothing else yet."""
    folder = tmp_path / "a run"
    folder.mkdir()
    settings = {"iterations": 1000, "num_classes": 10, "lr": 1e-3, "data_dir": "data/train"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "deepspeed.json").write_text("{}")
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "git": {"changes": None}}))
    return folder


def record(step, classes, confusion, t0_accuracy=0.9):
    """An evaluation of three levels, as evaluate.py writes it."""
    samples = sum(confusion.values())
    level = dict(samples=samples, not_finite=0, loss=0.5, grad_norm=0.1, ece=0.02)
    level |= {"correct@1": 1, "correct@5": 1, "acc@1": 0.5, "acc@5": 0.8}
    levels = [
        level | {"t": t, "timestep": t, "log_snr": snr, "acc@1": accuracy}
        for t, snr, accuracy in ((0, 10.0, t0_accuracy), (500, 0.0, 0.5), (999, -10.0, None))
    ]
    counts = [0] * len(classes)
    for (label, _), count in confusion.items():
        counts[label] += count
    per_class = {"samples": counts, "correct@1": [c // 2 for c in counts]}
    bins = [{"bin": 3, "samples": 4, "correct": 1, "confidence": 0.25}]
    pairs = list(confusion)
    return {
        "format": "ds_classifier evaluation",
        "name": f"step-{step:08d}",
        "step": step,
        "precision": "fp32",
        "classes": classes,
        "data": {"samples": samples},
        "classifier": {
            "uniform_t": level,
            "levels": levels,
            "per_class": [{"t": None, **per_class}, {"t": 0, **per_class}],
            "reliability": [{"t": None, "bins": bins}, {"t": 0, "bins": []}],
        },
        "confusion": {
            "t": 0,
            "label": [label for label, _ in pairs],
            "predicted": [predicted for _, predicted in pairs],
            "samples": list(confusion.values()),
        },
    }


def write_record(run, made):
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{made['name']}.json").write_text(json.dumps(made))


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


def test_the_log_and_the_report_judge_alike(run):
    """Of the same rows, with the labels' own frequencies, as the start noted them."""
    at_chance = {f"train_acc@1_q{q}": 0.5 for q in range(4)}
    rows = [training_row(10, 1.2, **at_chance)]
    write_log(run, rows)
    unknown = opened(run).text
    assert "learning at every noise level" in unknown  # were the 10 classes equally frequent
    guessing = Guessing(10, loss=1.2, accuracy=0.5)
    started = {"time": 1.0, "event": "start", "guessing": dataclasses.asdict(guessing)}
    (run / "events.jsonl").write_text(json.dumps(started) + "\n")
    (said,) = SanityWatch(guessing, val_samples=0).add(rows[0])
    assert said == "loss 1.20 = 1.20, that of guessing by class frequency: nothing learnt yet"
    assert said[1:] in opened(run).text


def test_alarms_of_the_log_stand_in_the_report(run):
    rows = [training_row(step, 1.0 if step < 300 else 9.0) for step in range(10, 400, 10)]
    rows.append(validation_row(390, 3.0, 0.1))
    write_log(run, rows)
    started = {"time": 1.0, "event": "start", "val_samples": 1000}
    (run / "events.jsonl").write_text(json.dumps(started) + "\n")
    text = opened(run).text
    for words in ("worse than guessing; do: lower --lr", "diverging", "overfitting; take"):
        assert words in text


def test_headline_and_checks_are_those_of_the_log(run):
    rows = [training_row(s, 2.0 / s) for s in range(10, 500, 10)]
    rows += [validation_row(200, 0.4, 0.7), validation_row(400, 0.7, 0.655)]
    write_log(run, sorted(rows, key=lambda row: row["step"]))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best").write_text("step-00000200 val_loss 0.4\n")
    text = opened(run).text
    for words in ("65.5 %", "490", "200", "its best is 0.400, at step 200: take"):
        assert words in text
    recent = sum(2.0 / s for s in (450, 460, 470, 480, 490)) / 5
    assert f"Training loss {recent:.3f}" in text


def test_a_log_cut_by_a_kill(run):
    write_log(run, [training_row(10, 1.0), training_row(20, None, grad_norm=None)])
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 30, "train_lo')
    text = opened(run).text
    assert "20 of 1,000 steps" in re.sub(r"\s+", " ", text)


def test_damaged_files_cost_their_part_alone(run):
    write_log(run, [training_row(10, 1.0)])
    write_record(run, record(10, ["a", "b"], {(0, 0): 3, (1, 0): 1}))
    damaged = record(20, ["a", "b"], {(0, 0): 3}) | {"confusion": {"t": 0}}
    write_record(run, damaged)
    (run / "eval" / "other.json").write_text("[1, 2")
    (run / "eval" / "x.pictures.png").write_bytes(b"no image")
    parsed = Page(page(read_run(run)))
    assert "cannot be shown: KeyError" in parsed.sections["confusion"]
    assert "uniform t" in parsed.sections["noise"]


# ------------------------------------------------------------------------------ hostile words


def test_every_word_from_data_is_escaped(run, tmp_path):
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
    told = Predictions(
        10, [0, 9], [1.0, -1.0], 1, [0, 1], [0, 1], [[0, 1], [1, 7]], [[0.5, None]] * 2
    )
    save_grid(ImageGrid(tiles, told), hostile_run / "eval" / "step-10.pictures.png")
    parsed = opened(hostile_run)
    for section in ("images", "confusion", "history", "settings"):
        assert HOSTILE in parsed.sections[section], section
    assert "class 7" in parsed.sections["images"]


# ------------------------------------------------------------------------------ evaluations


def test_noise_levels_and_those_before(run):
    for step, accuracy in ((10, 0.5), (20, 0.75), (30, 0.875)):
        write_record(run, record(step, ["a", "b"], {(0, 0): 3, (0, 1): 1}, accuracy))
    html = write_report(run).read_text()
    parsed = opened(run)
    assert "step 30" in parsed.sections["noise"]
    assert "87.5 %" in parsed.sections["noise"]
    assert "Earlier evaluations are drawn faintly" in parsed.sections["noise"]
    chart = html[html.index("Top-1 accuracy against noise") :].split("</figure>")[0]
    lines = re.findall(r"<path [^>]*stroke: #0072b2; [^>]*stroke-width: ([\d.]+)", chart)
    assert sorted(lines) == ["1.3"] * (2 + 1) + ["2"] * (1 + 1)  # curves, and their legend
    assert "<title>step 30: 10, 87.5 %</title>" in chart


def test_few_classes_have_a_matrix(run):
    write_record(run, record(10, ["cat", "dog"], {(0, 0): 31, (0, 1): 17, (1, 1): 5}))
    parsed = opened(run)
    assert "17 of 53 images are taken for another class" in parsed.sections["confusion"]
    rows = re.findall(r"<tr>.*?</tr>", write_report(run).read_text().split('class="matrix')[1])
    cells = [re.sub("<.*?>", " ", row).split() for row in rows[1:3]]
    assert cells == [["cat", "31", "17", "48", "65", "%"], ["dog", "5", "5", "100", "%"]]


def test_a_thousand_classes_have_their_worst_pairs(run):
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


def test_confusion_counts_each_sample_once(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (50,), generator=generator)
    log_p = torch.randn(50, 4, generator=generator).log_softmax(dim=1)
    weights = (torch.rand(50, generator=generator) < 0.8).float()
    log_p[weights == 0] = math.nan
    expected = {}
    for label, row, weight in zip(labels.tolist(), log_p.tolist(), weights.tolist(), strict=True):
        if weight:
            pair = (label, max(range(4), key=row.__getitem__))
            expected[pair] = expected.get(pair, 0) + 1
    counted = Confusion(50, "cpu")
    for part in torch.randperm(50, generator=generator).split(7):
        padded = torch.cat([part, part[:2]])  # padding repeats a sample, at position -1
        positions = torch.cat([part, torch.full((len(part[:2]),), -1)])
        counted.add(
            log_p=log_p[padded],
            labels=labels[padded],
            positions=positions,
            weights=weights[padded],
        )
    told = counted.read()
    pairs = zip(told["label"], told["predicted"], strict=True)
    assert dict(zip(pairs, told["samples"], strict=True)) == expected


# ------------------------------------------------------------------------------ images


class Brightness(torch.nn.Module):
    """Takes an image for the class that its mean and t say."""

    def forward(self, x, timesteps):
        scores = x.mean(dim=(1, 2, 3))[:, None] * torch.arange(10.0) + timesteps[:, None] / 1000
        return scores * torch.tensor([1.0, -1.0] * 5)


def test_of_a_steps_evaluations_the_one_in_full_precision_leads(run):
    """And of all, one of the last step, in whatever precision there is."""
    for step, precision in ((5, "fp32"), (10, "bf16"), (10, "fp32"), (20, "bf16")):
        made = record(step, ["a", "b"], {(0, 0): 4})
        name = made["name"] + ("" if precision == "fp32" else f"-{precision}")
        write_record(run, made | {"name": name, "precision": precision})
    read = [(e["step"], e["precision"]) for e in read_run(run).evaluations]
    assert read == [(5, "fp32"), (10, "bf16"), (10, "fp32"), (20, "bf16")]
    assert "step-00000020-bf16" in opened(run).sections["noise"]


def test_images_are_those_of_the_evaluation(digits):
    shards = open_shards(digits / "val")
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    model = Brightness()
    where = dict(image_size=8, channels=3, device=torch.device("cpu"), step=7)
    grid = predict_grid(model, diffusion, shards, **where)
    told = grid.predictions
    assert model.training  # as before
    assert told.labels == list(range(10))
    assert [told.t[0], told.t[-1]] == [0, 999]
    labels = shards.index["label"].tolist()
    assert told.positions == [labels.index(k) for k in range(10)]
    for row in (0, 9):
        position, t = told.positions[row], told.t[3]
        noise = keyed_noise(0, "validation", torch.tensor([position]), (8, 8, 3))[0]
        # The clean image, but for the noise of t = 0.
        alpha = diffusion.alphas_cumprod[t]
        clean = torch.from_numpy(grid.tiles[row, 0].copy()).double() / 127.5 - 1
        x_t = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise.double()
        shown = grid.tiles[row, 3].astype(float)
        assert np.abs(shown - ((x_t + 1) * 127.5).clamp(0, 255).numpy()).max() < 9
        scores = model(x_t.permute(2, 0, 1)[None].float(), torch.tensor([float(t)]))[0]
        assert told.predicted[row][3] == int(scores.argmax())
        assert told.confidence[row][3] == pytest.approx(float(scores.softmax(0).max()), abs=0.02)


def test_images_are_of_classes_far_apart(digits):
    shards = open_shards(digits / "val")
    labels = shards.index["label"]
    assert labels[choose_positions(shards, rows=3)].tolist() == [0, 4, 9]
    assert labels[choose_positions(shards, rows=1)].tolist() == [0]


def test_a_grid_comes_back_as_it_was(tmp_path):
    tiles = np.random.RandomState(0).randint(0, 256, (3, 2, 5, 5, 3)).astype(np.uint8)
    told = Predictions(
        None, [0, 9], [1.0, -1.0], 1, [4, 5, 6], [0, 1, 2], [[0, 1]] * 3, [[0.5, None]] * 3
    )
    save_grid(ImageGrid(tiles, told), tmp_path / "x.pictures.png")
    again = load_grid(tmp_path / "x.pictures.png")
    assert (again.tiles == tiles).all()
    assert again.predictions == told
    sheet = marked_sheet(again, ["a long name indeed", "", "c"])
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3
    frames = {tuple(pixel) for pixel in sheet.reshape(-1, 3)[::1].tolist()}
    assert {(0, 114, 178), (213, 94, 0)} <= frames
    assert load_grid(tmp_path / "none.png") is None
    (tmp_path / "text.png").write_text("x")
    assert load_grid(tmp_path / "text.png") is None


# ------------------------------------------------------------------------------ thinning


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


# ------------------------------------------------------------------------------ charts


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [1e-9, 5e9], [-3.0, 2.0], [math.nan, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_a_chart_of_anything(values, log):
    points = list(enumerate(values))
    svg = curves_svg("a", [Line("b", points, "#000")], Axis(log=log), last_step=2)
    Page(svg)
    assert "nan" not in svg


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_a_chart_of_nothing_says_so(points):
    svg = curves_svg("a", [Line("b", points, "#000")], Axis(), last_step=2)
    assert "nothing to show yet" in Page(svg).text


def test_a_line_stops_at_what_is_no_number():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 2.0)]
    svg = curves_svg("a", [Line("", points, "#123456")], Axis(), last_step=4)
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: #123456', svg).group(1)
    assert len(re.findall(r"M [\d.]+ [\d.]+L [\d.]+ [\d.]+", path)) == 2


def test_a_spike_does_not_flatten_the_curve():
    band = [(x, 0.9, 5000.0 if x == 60 else 1.1) for x in range(200)]
    line = Line("", [(x, 1.0) for x in range(200)], "#000", band=band)
    words = Page(curves_svg("a", [line], Axis(0), last_step=200)).words
    assert "1" in words
    assert "200" in words  # the last step
    assert max(float(word) for word in words if re.fullmatch(r"[\d.]+", word)) == 200


def test_a_point_lies_where_its_numbers_say():
    svg = curves_svg("a", [Line("b", [(25, 0.5)], "#123456")], Axis(0, 1), last_step=100)
    x, y = re.search(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: #123456', svg).groups()
    ticks = re.findall(r'text-anchor: (\w+)[^>]* x="([\d.]+)" y="([\d.]+)">([\d.]+)</text>', svg)
    at_x = {float(words): float(left) for side, left, _, words in ticks if side == "middle"}
    at_y = {float(words): float(top) for side, _, top, words in ticks if side == "end"}
    assert float(x) == pytest.approx(at_x[0] + (at_x[100] - at_x[0]) / 4, abs=0.2)
    half = (at_y[0] + at_y[1]) / 2
    assert half - 5 < float(y) < half  # the baseline of a tick's text lies under its middle
    assert "<title>b: 25, 0.5</title>" in svg


def test_numbers_in_a_legend_keep_their_digits():
    svg = curves_svg("a", [Line("b", [(0, 1.0), (1, 0.0517)], "#000")], Axis(), last_step=1)
    assert "b 0.0517" in Page(svg).text


@pytest.mark.parametrize("backend", ["TkAgg", "module://gone"])
def test_figures_need_no_screen_and_no_backend(tmp_path, backend):
    code = (
        "from ds_classifier.report.plots import *\n"
        "print(curves_svg('a', [Line('b', [(0, 1.0)], INK)], Axis(), last_step=1)[:4])\n"
        "import sys; assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = run_python("-c", code, cwd=ROOT, MPLBACKEND=backend, DISPLAY="")
    assert (done.code, done.lines) == (0, ["<svg"]), done.output


def test_a_png_has_the_same_panels(run):
    """Class names that matplotlib would take for formulas or has no glyphs for do no harm."""
    made = record(10, ["$\\bad", "犬", HOSTILE], {(0, 0): 3, (0, 1): 1, (2, 2): 4})
    plot_evaluation(made, run / "one.png")
    plot_series([made, made | {"step": 20}], run / "series.png")
    plot_series([made, made | {"step": None, "name": "other"}], run / "names.png")
    for name in ("one", "series", "names"):
        with Image.open(run / f"{name}.png") as image:
            assert image.size[0] > 1500


# ------------------------------------------------------------------------------ the time line


def test_attempts_of_a_run_that_was_killed_and_went_on(run, monkeypatch):
    moments = iter([100.0, 200.0, 300.0, 400.0, 500.0])
    monkeypatch.setattr(time, "time", lambda: next(moments))
    append_event(run, "start", step=0, world_size=2, host="a", device="CPU")
    append_event(run, "resume", step=50, reached=70, world_size=2, host="a", device="CPU")
    append_event(run, "save failed", step=60, message="disk full")
    append_event(run, "stop", step=80, reason="SIGTERM")
    append_event(run, "resume", step=80, reached=80, world_size=4, host="b", device="CPU")
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
    assert "ended without a message" in text
    assert "checkpoint not written: disk full" in text
    assert "stopped by SIGTERM" in text


def test_a_crash_is_told_by_its_errors(run):
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


def test_events_are_no_reason_to_stop(tmp_path, capsys):
    append_event(tmp_path / "gone", "start", step=0)
    assert "not written" in capsys.readouterr().out
    assert read_events(tmp_path / "gone") == []


# ------------------------------------------------------------------------------ whole runs


def test_training_and_evaluation_make_it(digits, tmp_path, monkeypatch):
    """Two ranks, stopped, resumed, evaluated: what the page says is what the files say."""
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
    (run / "report.html").mkdir()  # where no page can be written
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
    told = made["confusion"]
    pairs = zip(told["label"], told["predicted"], told["samples"], strict=True)
    right = sum(count for label, predicted, count in pairs if label == predicted)
    assert right == made["classifier"]["levels"][0]["correct@1"]
    assert f"{360 - right:,} of 360 images are taken" in parsed.sections["confusion"]
    # The same images at the same noise: what a validation saw, the evaluation sees.
    again = load_grid(run / "eval" / "step-00000006.pictures.png")
    assert (again.tiles == grid.tiles).all()
    assert (
        again.predictions == grid.predictions or again.predictions.labels == grid.predictions.labels
    )


def test_a_report_that_fails_is_one_line(capsys):
    def broken():
        raise KeyError("x")

    assert failures.tolerate("report.html", broken) is None
    assert failures.tolerate("report.html", lambda: 3) == 3
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------ elsewhere


def tensorboard_values(run):
    """(step, value) of all that TensorBoard would show."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (run / "tb").iterdir()
    data = file.read_bytes()
    while data:  # a TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        yield from ((event.step, value) for value in event.summary.value)


def test_tensorboard_has_the_images(tmp_path):
    logger = RunLogger(tmp_path, first_step=0)
    logger.image("val_pictures", np.zeros((20, 30, 3), np.uint8), 5)
    logger.close()
    found = [
        (step, v.tag, v.image.height, v.image.width) for step, v in tensorboard_values(tmp_path)
    ]
    assert found == [(5, "val_pictures", 20, 30)]


def test_tensorboard_has_the_losses_of_each_quartile(tmp_path):
    logger = RunLogger(tmp_path, first_step=0)
    logger.histogram("train_losses_q0", [0, 3, 0, 1], [1.0, 2.0, 4.0], 5)
    logger.histogram("train_losses_q1", [0, 0, 0, 0], [1.0, 2.0, 4.0], 5)  # no sample: no image
    logger.close()
    ((step, value),) = tensorboard_values(tmp_path)
    shown = value.histo
    assert (step, value.tag, shown.num, shown.min, shown.max) == (5, "train_losses_q0", 4, 1, 8)
    bars = dict(zip(shown.bucket_limit, shown.bucket, strict=True))
    assert bars == {1: 0, 2: 3, 4: 0, 8: 1}


def leveldb_records(data: bytes):
    """The records of a log in LevelDB's format: blocks of 32 KiB, the first 7 bytes cut off."""
    place, record = 7, b""
    while place + 7 <= 7 + len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        head = data[place - 7 : place]
        length, kind = int.from_bytes(head[4:6], "little"), head[6]  # 1: whole; 2, 3, 4: its parts
        record += data[place : place + length]
        if kind in (1, 4):
            yield record
            record = b""
        place += 7 + length


def test_wandb_has_the_rows_under_the_same_keys(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.5}))
    rows = [training_row(10, 1.25), validation_row(10, 1.5), training_row(20, math.nan)]
    ids = []
    for first, some in ((0, rows[:2]), (10, rows[2:])):
        logger = RunLogger(tmp_path, first_step=first, wandb="a project")
        ids.append(logger._wandb.id)
        assert logger._wandb.config["lr"] == 0.5
        for row in some:
            logger.write(row)
        logger.close()
        time.sleep(1.1)  # its directories are named by the second
    assert ids[0] == ids[1]  # resumed, not begun anew
    from wandb.proto.wandb_internal_pb2 import Record

    logged = {}
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()[7:]):
            for item in Record.FromString(data).history.item:
                key = item.key or ".".join(item.nested_key)
                logged.setdefault(key, []).append(json.loads(item.value_json))
    assert logged["train_loss"][0] == 1.25
    assert logged["val_loss"] == [1.5]
    assert logged["_step"] == [10, 20]
    assert wandb.run is None


def test_wandb_that_is_not_there_is_told_before_anything_starts(monkeypatch):
    import importlib.util

    from ds_classifier.config.settings import Settings, check_settings

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else found(n))
    (problem,) = check_settings(Settings(wandb="x", eval_interval=1))
    assert problem.startswith("--wandb: got 'x'; need the package wandb; do: pip install")
    assert check_settings(Settings(eval_interval=1)) == []
