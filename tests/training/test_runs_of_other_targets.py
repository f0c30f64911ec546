"""Runs whose targets are several classes, soft vectors or bins: trained, evaluated, reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
from other_targets import HAS, PROPERTIES, with_targets
from running import ROOT, launch, read_log
from tiny_run import losses, train

from ds_classifier.data.shards import open_shards
from ds_classifier.report.data import read_run
from ds_classifier.report.page import SECTIONS

SHORT = ["--global_batch", "16", "--iterations", "4"]
# Per kind: the accuracy, what a validation measures, words of the report, words of others' reports.
MEASURED = {
    "classes": ("acc", {"loss", "acc", "mAP"}, "Mean average precision", "Top-1"),
    "soft": ("acc@1", {"loss", "acc@1", "acc@5"}, "Top-1 accuracy", "Mean average precision"),
    "values": (
        *("acc@1", {"loss", "acc@1", "acc@5", "mae"}),
        *("Mean absolute error of square", "Mean average precision"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MEASURED)
def test_a_run_is_validated_evaluated_and_reported(digits, tmp_path, kind):
    data, run = with_targets(digits, tmp_path / "data", kind), tmp_path / "run"
    how = [*SHORT, "--iterations", "20", "--log_interval", "20"]
    how += ["--val_data_dir", data / "val", "--eval_interval", "20"]
    done = train(2, "zero1_fp32", data, run, *how, launcher=True)
    accuracy, measured, words, others = MEASURED[kind]
    *_, row, validated = read_log(run)
    assert measured <= {name.removeprefix("val_") for name in validated}
    assert row["train_loss_q0"] > 0
    assert 0 <= row[f"train_{accuracy}_q0"] <= 1
    done = launch(
        2, run, "--timesteps", "0,300", cwd=tmp_path, script=ROOT / "launch" / "evaluate.py"
    )
    assert done.code == 0, done.output
    record = json.loads((run / "eval" / "step-00000020.json").read_text())
    overall, clean = record["classifier"]["uniform_t"], record["classifier"]["levels"][0]
    for name in measured:
        # The sums of training are rounded in another order; and average precision has bins.
        near = dict(abs=5e-3) if name == "mAP" else dict(rel=1e-4)
        assert overall[name] == pytest.approx(validated[f"val_{name}"], **near)
        assert clean[name] == pytest.approx(validated[f"val_{name}_t0"], **near)
    assert record["targets"]["kind"] == kind
    assert ("confusion" in record) == (kind != "classes")
    assert ("bayes" in record) == (kind == "values")
    assert (run / "eval" / "step-00000020.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert words in page
    for absent in (others, "cannot be shown", "cannot be judged"):
        assert absent not in page
    if kind == "classes":
        assert all(name in done.output for name in PROPERTIES)
        shares = HAS[open_shards(digits / "val").index["label"]].mean(axis=0)
        guess = -(shares * np.log(shares) + (1 - shares) * np.log(1 - shares)).mean()
        assert record["data"]["guessing"]["loss"] == pytest.approx(guess)
    for _, compute in SECTIONS.values():
        compute(read_run(run))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_the_loss_is_the_same_on_any_number_of_ranks(digits, tmp_path, kind):
    """The targets are the expectation over recent images, or the own ones of an image."""
    data = with_targets(digits, tmp_path / "data", kind)
    flags = [*SHORT, "--posterior_images", "40"]
    train(1, "zero1_fp32", data, tmp_path / "one", *flags)
    train(2, "zero1_fp32", data, tmp_path / "two", *flags, "--microbatch", "4")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    train(1, "zero1_fp32", data, tmp_path / "own", *SHORT)
    assert losses(tmp_path / "own")[2:] != pytest.approx(losses(tmp_path / "one")[2:], rel=1e-6)


@pytest.mark.slow
def test_a_batch_of_soft_vectors_is_overfitted_down_to_their_entropy(digits, tmp_path):
    data = with_targets(digits, tmp_path / "data", "soft")
    flags = ["--global_batch", "8", "--lr", "3e-3", "--overfit_batch", "150"]
    done = train(2, "zero1_fp32", data, tmp_path / "run", *flags, expect=(0, 1))
    # The entropy of (0.8, 0.2) is 0.5004, and a hundredth of ln 10 is 0.0230.
    assert "near 0.5004 is 0.5234 or less" in done.output
