"""The commands of the benchmark, at small sizes; their figures are not judged."""

import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import parts_to_run
import psutil
import pytest
import torch
from PIL import Image
from running import ROOT, environment

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.shards import open_shards
from launch.benchmark import main
from launch.benchmarks import parts, programs, quality, step
from launch.benchmarks.parts import rows_of
from launch.benchmarks.programs import shards_for, training_command

TINY = ["--image_size", "8", "--classifier_width", "32", "--classifier_channel_mult", "1,2"]
TINY += ["--classifier_depth", "1", "--classifier_attention_resolutions", "4"]
TINY += [
    "--batch_size",
    "4",
    "--workers",
    "0",
    "--deepspeed_config",
    str(ROOT / "ds_configs" / "zero1_bf16.json"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Write twelve images of two classes, named as guided-diffusion needs them."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{'ab'[number % 2]}_{number}.png")
    return folder


def benchmark(*words: object) -> list[dict]:
    """Run a command whose last word is the path of its JSON, and return the rows."""
    out = Path(str(words[-1]))
    subprocess.run(
        [sys.executable, ROOT / "launch" / "benchmark.py", *map(str, words[:-1]), "--json", out],
        env=environment(),
        check=True,
    )
    record = json.loads(out.read_text())
    assert record["packages"]["torch"]
    return record["rows"]


@pytest.mark.slow
def test_step_and_its_layers(images, tmp_path):
    rows = benchmark(
        *("step", images, "--repeats", 1, "--steps", 2, "--ranks", 1, "--save", tmp_path, *TINY),
        tmp_path / "json",
    )
    peak, *rows = rows
    assert peak["layer"] == "matrix product"
    assert [row["layer"] for row in rows] == [
        "bare model + AdamW",
        "engine",
        "trainer's step",
        "trainer's step while saving",
        "whole trainer",
    ]
    assert all(row["images/s"] > 0 for row in rows)
    assert 0 < rows[-2]["snapshot, s"] <= rows[-2]["written after, s"]
    assert [path.name for path in tmp_path.iterdir()] == ["json"]  # the checkpoints are gone
    assert rows[-1]["start-up, s"] > 0
    # The operations of an image are the same for all layers.
    flops = [row["GFLOP/s"] / row["images/s"] for row in rows]
    assert np.allclose(flops, flops[0])
    before = [None, 0, 1, 2, 2]  # the rows that ratios are to, of one repeat
    for above, row in zip(before, rows, strict=True):
        assert np.isclose(row["of GEMM peak"], row["GFLOP/s"] / peak["GFLOP/s"])
        if above is not None:
            assert np.isclose(row["of the layer above"], row["images/s"] / rows[above]["images/s"])


def test_a_slow_matrix_product_is_not_tried_at_larger_sizes(monkeypatch):
    """Leave out 2048 x 2048, which takes minutes where bf16 is emulated."""
    monkeypatch.setattr(step, "SLOW_S", 0.0)
    products = step.matrix_products(torch.float32, torch.device("cpu"))
    assert list(products) == ["matrix product 512, False", "matrix product 512, True"]
    assert all(product() == 10 * 2 * 512**3 for product in products.values())


def test_step_beside_the_reference(images, tmp_path):
    checkout = os.environ.get("GUIDED_DIFFUSION", "")
    if not checkout:
        pytest.skip("GUIDED_DIFFUSION names no checkout of guided-diffusion")
    words = ["--repeats", 1, "--steps", 2, "--reference", checkout, "--image_size", "64"]
    rows = benchmark(
        *("step", images, *words, "--classifier_width", 64, "--classifier_depth", 1),
        *("--batch_size", 4, "--workers", 0),
        tmp_path / "json",
    )
    assert rows[-1]["layer"] == "guided-diffusion, fp32"
    assert rows[-1]["images/s"] > 0


@pytest.mark.slow
def test_ways_to_train_are_compared(images, tmp_path):
    ways = ["--microbatch 4", "--microbatch 1 --activation_checkpointing"]
    rows = benchmark(
        *("compare", images, "--repeats", 1, "--steps", 2, "--ranks", 1, 2),
        *("--way", ways[0], "--way", ways[1], *TINY),
        tmp_path / "json",
    )
    assert [(row["way"], row["ranks"]) for row in rows] == [(w, n) for n in (1, 2) for w in ways]
    assert rows[0]["x the first"] == 1
    for row in rows:
        assert np.isclose(row["images/s"], row["x the first"] * rows[0]["images/s"])
        assert 0 <= row["waiting for data, %"] <= 100
        assert row["GiB of rank 0"] > 0.1
        assert row["start-up, s"] > 0


@pytest.mark.slow
def test_ways_to_train_are_compared_by_quality(digits, tmp_path):
    fp32 = TINY[:-2]
    rows = benchmark(
        *("quality", digits, "--repeats", 1, "--way", "", "--way", "--lr 1e-2"),
        *("--classifier_scale", 1, *fp32, "--iterations", 12, "--eval_interval", 3),
        tmp_path / "json",
    )
    first, second = rows
    assert [row["way"] for row in rows] == ["''", "'--lr 1e-2'"]
    for row in rows:
        assert row["images"] == 48
        (curve,) = row["validations"]
        assert [images for images, _, _ in curve] == [12, 24, 36, 48]
        # The trainer's own last validation, of the weights that the checkpoint holds.
        assert np.isclose(row["cross-entropy"], curve[-1][2], rtol=1e-6)
        assert np.isclose(row["seconds"], curve[-1][1])
        assert 0 <= row["class asked for at scale 1, %"] <= 100
    met = [images for images, _, loss in second["validations"][0] if loss <= first["cross-entropy"]]
    assert second["as good"] == f"{len(met[:1])} of 1"
    assert [second["images needed"]] == met[:1] if met else "images needed" not in second


def test_the_first_validation_that_is_as_good_counts():
    def run(loss: float) -> dict:
        return {"images": 100, "seconds": 10.0, "cross-entropy": loss}

    rows = quality._rows(
        {"A": [run(0.5), run(0.7)], "B": [run(0.4), run(0.8)], "C": [run(0.9), run(0.9)]},
        {
            "A": [[], []],
            "B": [[(20, 2.0, 0.7), (40, 4.0, 0.6), (60, 6.0, 0.8), (100, 10.0, 0.4)], [(9, 1, 1)]],
            "C": [[(100, 10.0, 0.9)]] * 2,
        },
    )
    assert "as good" not in rows[0]  # it sets the aim: 0.6
    assert rows[1]["as good"] == "1 of 2"
    assert (rows[1]["images needed"], rows[1]["seconds needed"]) == (40, 4.0)
    assert rows[1]["of row 1's images"] == 0.4
    assert rows[2]["as good"] == "0 of 2"
    assert "images needed" not in rows[2]


def test_quality_beside_the_reference(digits, tmp_path):
    checkout = os.environ.get("GUIDED_DIFFUSION", "")
    if not checkout:
        pytest.skip("GUIDED_DIFFUSION names no checkout of guided-diffusion")
    rows = benchmark(
        *("quality", digits, "--repeats", 1, "--reference", checkout, "--way", ""),
        *("--classifier_width", 32, "--classifier_depth", 1, "--batch_size", 4),
        *("--classifier_attention_resolutions", 8, "--workers", 0),
        *("--iterations", 3, "--eval_interval", 3),
        tmp_path / "json",
    )
    theirs, ours = rows
    assert theirs["way"] == "guided-diffusion"
    assert theirs["images"] == ours["images"] == 12
    assert theirs["seconds"] > 0
    # Of its 1,000 outputs those of the ten classes count: log(10) is 2.3, log(1000) is 6.9.
    assert abs(theirs["cross-entropy"] - np.log(10)) < 0.7
    assert not theirs["validations"][0]


def test_the_reference_reads_the_images_of_the_shards(digits, tmp_path):
    shards = open_shards(digits / "train")
    quality._write_images(shards, tmp_path / "images")
    paths = sorted((tmp_path / "images").iterdir())
    classes = sorted({path.name.split("_")[0] for path in paths})  # as guided-diffusion does it
    found = Counter(
        (classes.index(path.name.split("_")[0]), Image.open(path).tobytes()) for path in paths
    )
    source = open_source("digits")
    expected = Counter(
        (sample.label, Image.open(io.BytesIO(sample.read())).tobytes())
        for sample in source.splits["train"]
    )
    assert found == expected


def test_a_part_hands_over_its_rows_whatever_becomes_of_it(tmp_path):
    zero = {"number": 0}
    assert list(rows_of(parts_to_run.ends, (2,), 60)) == [zero, {"number": 1}]
    assert list(rows_of(parts_to_run.fails, (), 60)) == [zero, {"note": "failed: no memory"}]
    assert list(rows_of(parts_to_run.dies, (), 60)) == [zero, {"note": "ended with code 3"}]
    assert list(rows_of(parts_to_run.ends, (2,), -3)) == [{"note": "not measured: the time is up"}]


def test_a_part_whose_time_is_up_ends_with_the_programs_it_started(tmp_path):
    pid = tmp_path / "pid"
    *_, last = rows_of(parts_to_run.hangs, (pid,), 1)
    assert last == {"note": "stopped after 1 s"}
    rows = rows_of(parts_to_run.hangs, (pid,), 600)
    next(rows)
    sleeper = _running(int(pid.read_text()))
    assert len(sleeper) == 1
    rows.close()  # as when the time is up
    assert psutil.wait_procs(sleeper, timeout=5)[1] == []


def test_a_part_whose_time_is_up_before_it_begins_is_ended():
    """A part that still imports has no process group of its own."""
    began = time.monotonic()
    rows = list(rows_of(parts_to_run.ends, (parts_to_run.SlowToImport(),), 1.5))
    assert rows == [{"note": "stopped after 2 s"}]
    assert time.monotonic() - began < 30


def test_a_part_that_does_not_end_after_its_last_row_is_ended(monkeypatch):
    monkeypatch.setattr(parts, "LEAVING", 1.0)
    assert list(rows_of(parts_to_run.hangs_at_its_end, (), 600)) == [{"number": 0}]


def _running(pid: int) -> list[psutil.Process]:
    """Return the process, unless it has ended."""
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return []
    return [] if process.status() == psutil.STATUS_ZOMBIE else [process]


def test_a_gpu_that_has_no_time_has_a_table(tmp_path):
    rows = benchmark("gpu", "--minutes", 0, tmp_path / "json")
    assert {row["part"] for row in rows} == {
        *("fidelity", "eager", "compiled", "trainer", "resume", "inference"),
        *("noise", "decoding"),
    }
    assert {row["note"] for row in rows} == {"not measured: the time is up"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it takes its time on a GPU")
def test_a_gpu_is_measured_in_every_part(tmp_path):
    """Rehearse it at tiny sizes on the CPU."""
    rows = benchmark("gpu", "--minutes", 60, tmp_path / "json")
    assert not [row for row in rows if "failed" in row.get("note", "")]
    parts = {row["part"]: [r for r in rows if r["part"] == row["part"]] for row in rows}
    fp32, *others = parts["fidelity"]
    assert max(fp32["error of logits"], fp32["of gradients"]) < 1e-5
    assert all(0 < row["error of logits"] < 0.05 for row in others)
    steps = parts["eager"] + parts["compiled"]
    assert {row["way"] for row in steps} == {
        f"{how}, {layout}"
        for how in ("eager", "compiled")
        for layout in ("contiguous", "channels_last", "contiguous, bare")
    }
    measured = [*steps, *parts["trainer"], *parts["inference"]]
    assert all(row["images/s"] > 0 for row in measured)
    assert {row["precision"] for row in steps} == {"bf16", "fp16"}
    assert 0 <= parts["trainer"][0]["waits for data, %"] <= 100
    assert [row["note"] for row in parts["resume"]] == ["bit-equal", "bit-equal"]
    eager, compiled = parts["noise"]
    assert eager["of the step, %"] > 0
    assert compiled["timesteps"] == "bit-equal"
    assert compiled["noise differs by"] < 1e-5
    (worker,) = parts["decoding"]
    assert worker["images/s"] > 0
    (choice,) = parts["choice"]
    flags = choice["note"].partition(",")[0]
    assert training_command(flags.split()).settings.compile == ("compiled" in choice["way"])
    assert choice["images/s"] == max(
        row["images/s"]
        for row in steps
        if row["precision"] == "bf16" and not row["way"].endswith("bare")
    )


def test_shards_are_taken_as_they_are(images, tmp_path):
    shards = tmp_path / "data"
    convert(open_source(str(images)), shards)
    assert shards_for([], str(shards), tmp_path / "made") == shards / "train"
    assert shards_for([], str(shards / "train"), tmp_path / "made") == shards / "train"
    assert not (tmp_path / "made").exists()


def test_a_part_of_many_images_is_converted(images, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MOST_CONVERTED", 5)
    words = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1_bf16.json")]
    made = open_shards(shards_for(words, str(images), tmp_path))
    assert made.manifest.samples == 4  # every third of 12
    assert made.manifest.classes == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "IMAGES", "--ranks", "0"], "--ranks: got 0; need a whole number, at least 1"),
        (["compare", "IMAGES", "--way", "--compile", "--steps", "0"], "--steps: got 0"),
        (["data", "IMAGES", "--json", "/proc/x/y.json"], "--json: got /proc/x; need a place where"),
        (["data", "IMAGES", "--json", "IMAGES"], "which is no regular file; do: name a file"),
        (["compare", "IMAGES", "--way", "--microbatch 3"], "--way '--microbatch 3', --ranks 1:"),
        (["compare", "IMAGES", "--way", "--dry_run"], "--way '--dry_run', --ranks 1: got a"),
        (
            ["compare", "IMAGES", "--way", "--bogus"],
            "--ranks 1: --bogus: unknown flag",
        ),
        (
            ["quality", "IMAGES", "--way", "", "--iterations", "9"],
            "need a directory of shards with",
        ),
        (
            ["quality", "DIGITS", "--way", "", "--way", "--classifier_width 32"],
            "--way '--classifier_width 32': classifier_attention_resolutions: got",
        ),
        (["quality", "DIGITS", "--way", "", "--save_interval", "9"], "ways: got --save_interval;"),
        (
            ["quality", "DIGITS", "--way", "", "--way", "--noise_schedule cosine"],
            "--way '--noise_schedule cosine': got --noise_schedule cosine; need linear",
        ),
        (["step", "IMAGES", "--data_dir", "x"], "got --data_dir; need flags of training"),
        (["step", "--lr", "1", "IMAGES"], "flags of launch/train.py come after IMAGES"),
        (["step", "IMAGES", "--save", "nowhere"], "--save: got nowhere, which is no directory"),
        (["step", "--ranks", "1", "IMAGES"], "need a whole number; IMAGES stands first"),
        (["step", "IMAGES", "--reference", "nowhere"], "--reference: got nowhere; need"),
        (["step", "digits", "--reference", "CHECKOUT"], "--reference: got the images digits;"),
        (
            ["step", "IMAGES", "--classifier_channel_mult", "1,1", "--reference", "CHECKOUT"],
            "--reference: got image_size 64 with multipliers 1, 1",
        ),
    ],
)
def test_wrong_use_is_reported_before_anything_is_measured(
    images, digits, tmp_path, words, message, monkeypatch, capsys
):
    script = tmp_path / "checkout" / "scripts" / "classifier_train.py"
    script.parent.mkdir(parents=True)
    script.touch()
    names = {"IMAGES": images, "DIGITS": digits, "CHECKOUT": tmp_path / "checkout"}
    monkeypatch.chdir(tmp_path)
    try:
        code = main([str(names.get(word, word)) for word in words])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_flags_of_the_trainer_belong_to_commands_that_train():
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "benchmark.py", "data", "digits", "--lr", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--lr: unknown flag" in done.stderr
