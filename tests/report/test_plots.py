"""The figures: points are at the right places, gaps stay gaps, no screen is needed."""

import json
import math
import re
from functools import partial

import numpy as np
import pytest
from PIL import Image
from report_page import HOSTILE, Page, record
from running import ROOT, run_python

from ds_classifier.data.labels.targets import Targets
from ds_classifier.report.data import read_run
from ds_classifier.report.plots import (
    NAMED,
    Axis,
    Bar,
    Line,
    _reliability,
    _write_png,
    curves_svg,
    plot_evaluation,
    plot_series,
    timeline_svg,
    to_svg,
)
from ds_classifier.report.training import curves
from ds_classifier.training.logs.sanity import Guessing


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


def test_nan_interrupts_a_line():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 2.0)]
    svg = curves_svg("a", [Line("", points, "#123456")], Axis(), last_step=4)
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: #123456', svg).group(1)
    assert len(re.findall(r"M [\d.]+ [\d.]+L [\d.]+ [\d.]+", path)) == 2


def test_a_spike_does_not_flatten_the_curve():
    band = [(x, 0.9, 5000.0 if x == 60 else 1.1) for x in range(200)]
    line = Line("", [(x, 1.0) for x in range(200)], "#000", band=band)
    texts = Page(curves_svg("a", [line], Axis(0), last_step=200)).texts
    assert "1" in texts
    assert "200" in texts  # the last step
    assert max(float(word) for word in texts if re.fullmatch(r"[\d.]+", word)) == 200


def test_a_point_is_where_its_numbers_say():
    svg = curves_svg("a", [Line("b", [(25, 0.5)], "#123456")], Axis(0, 1), last_step=100)
    x, y = re.search(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: #123456', svg).groups()
    ticks = re.findall(r'text-anchor: (\w+)[^>]* x="([\d.]+)" y="([\d.]+)">([\d.]+)</text>', svg)
    at_x = {float(text): float(left) for side, left, _, text in ticks if side == "middle"}
    at_y = {float(text): float(top) for side, _, top, text in ticks if side == "end"}
    assert float(x) == pytest.approx(at_x[0] + (at_x[100] - at_x[0]) / 4, abs=0.2)
    half = (at_y[0] + at_y[1]) / 2
    assert half - 5 < float(y) < half  # the baseline of a tick label is below its middle
    assert "<title>b: 25, 0.5</title>" in svg


def test_the_style_may_change_every_color_of_a_figure():
    """Each color has another value in the dark; the one written beside its name is for light."""
    style = (ROOT / "ds_classifier" / "report" / "report.css").read_text()
    light, _, rest = style.partition("@media screen and (prefers-color-scheme: dark) {")
    dark = rest.partition("}")[0]
    for name, value in NAMED.items():
        assert f"--{name}: #" in dark, name
        assert f"--{name}: {value}" not in dark, name
        assert f"--{name}:" not in light or name == "ink"
    svg = curves_svg("a", [Line("b", [(0, 1.0), (1, 2.0)], NAMED["q3"])], Axis(), last_step=1)
    assert f"stroke: var(--q3, {NAMED['q3']})" in svg
    bare = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", svg)
    assert not re.search(r"#[0-9a-f]{6}", bare)


def test_a_narrow_timeline_names_how_each_attempt_ended():
    bars = [Bar("attempt 3", 0, 70, "ended without a message", NAMED["blue"])]
    bars += [Bar("attempt 4", 50, 100, "finished, 0:01:25", NAMED["blue"])]
    wide, narrow = (Page(timeline_svg(bars, [], 100, narrow=way)).texts for way in (False, True))
    assert {"attempt 3", "finished, 0:01:25"} <= set(wide)
    assert {"3: ended without a message", "4: finished"} <= set(narrow)
    assert 'viewBox="0 0 372 ' in timeline_svg(bars, [], 100, narrow=True)


def test_numbers_in_a_legend_keep_their_digits():
    svg = curves_svg("a", [Line("b", [(0, 1.0), (1, 0.0517)], "#000")], Axis(), last_step=1)
    assert "b 0.0517" in Page(svg).text


@pytest.mark.parametrize("backend", ["TkAgg", "module://gone", "inline", "not_installed_here"])
def test_figures_need_no_screen_and_no_backend(backend):
    code = (
        "from ds_classifier.report.plots import *\n"
        "print(curves_svg('a', [Line('b', [(0, 1.0)], INK)], Axis(), last_step=1)[:4])\n"
        "import os, sys; assert 'matplotlib.pyplot' not in sys.modules\n"
        "print(os.environ['MPLBACKEND'])"
    )
    done = run_python("-c", code, cwd=ROOT, MPLBACKEND=backend, DISPLAY="")
    assert (done.code, done.lines) == (0, ["<svg", backend]), done.output


def test_png_files_of_any_class_names(run):
    """Class names may look like formulas, or have no glyphs in the font."""
    made = record(10, ["$\\bad", "犬", HOSTILE], {(0, 0): 3, (0, 1): 1, (2, 2): 4})
    plot_evaluation(made, run / "one.png")
    plot_series([made, made | {"step": 20}], run / "series.png")
    plot_series([made, made | {"step": None, "name": "other"}], run / "names.png")
    for name in ("one", "series", "names"):
        with Image.open(run / f"{name}.png") as image:
            assert image.size[0] > 1500


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("class", "accuracy"),
        ("soft", "probability of the labels"),
        ("classes", "right answers"),
    ],
)
def test_the_chart_of_reliability_says_what_is_set_against_confidence(kind, words):
    made = record(10, ["a", "b", "c"], {(0, 0): 3}) | {"targets": {"kind": kind}}
    svg = to_svg(partial(_reliability, record=made))
    assert f'aria-label="Reliability: {words} by confidence"' in svg


@pytest.mark.parametrize(
    ("targets", "labels", "title", "numbers"),
    [
        (
            Targets("values", (0.0, 4.0), (2.0,), "age"),
            np.array([0, 1]),
            "Mean absolute error of age",
            {"train_mae": 1.0},
        ),
        (
            Targets("classes"),
            np.array([[1, 0], [0, 0]]),
            "Mean average precision",
            {"val_loss": 0.5, "val_mAP": 0.7},
        ),
    ],
)
def test_curves_of_other_targets_show_what_guessing_reaches(run, targets, labels, title, numbers):
    guessing = vars(Guessing.of(labels, 2, targets))
    started = {"time": 1.0, "event": "start", "guessing": guessing, "targets": targets.to_json()}
    (run / "events.jsonl").write_text(json.dumps(started) + "\n")
    (run / "log.jsonl").write_text(json.dumps({"step": 10, **numbers}) + "\n")
    charts = curves(read_run(run))["charts"]
    (chart,) = [svg for svg in charts if f'aria-label="{title}"' in svg]
    assert ">guessing<" in chart


def test_a_sheet_need_not_be_full(tmp_path):
    """One more metric than the panels of today makes a row that is not full."""
    drawn = []
    _write_png([drawn.append] * 4, tmp_path / "sheet.png", columns=3)
    assert len(drawn) == 4
    with Image.open(tmp_path / "sheet.png") as image:
        image.load()
