"""Files that version 0.1 wrote stay readable: shards, a run directory, a checkpoint, an export.

tests/golden/version-0.1.tar.xz has shards of 12 training and 6 validation digits, and a run of a
tiny classifier with its checkpoint of step 2, its evaluation and its export. The run's log
continues to step 4.
"""

import shlex
import tarfile

import pytest
import torch
from pages import python_blocks
from running import GOLDEN, ROOT, read_log, run_python

FLAGS = shlex.split(
    "--image_size 4 --classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1 "
    "--classifier_pool adaptive --classifier_attention_resolutions 2 --noise_schedule cosine "
    "--lr 1e-3 --log_interval 1 --workers 0 --batch_size 6 --iterations 4 --save_interval 2"
)
CONFIG = ROOT / "ds_configs" / "zero1_fp32.json"
# Runs launch/train.py with the timesteps of version 0.1, which drew each one for itself.
DRAWN_AS_BEFORE = f"""
import runpy
from ds_classifier.common.keyed_noise import keyed_uniform
from ds_classifier.training import step
step.stratified = lambda seed, positions, batch: keyed_uniform(seed, {{"t": positions}})[0]
runpy.run_path({str(ROOT / "launch" / "train.py")!r}, run_name="__main__")
"""


@pytest.fixture
def old(tmp_path):
    """The unpacked folder, with data/ and runs/old/."""
    with tarfile.open(GOLDEN / "version-0.1.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def test_shards_verify(old):
    for split in ("train", "val"):
        done = run_python(ROOT / "launch/make_shards.py", "verify", f"data/{split}", cwd=old)
        assert done.code == 0, done.output


def test_a_run_resumes_as_the_old_version_continued(old):
    expected = [row for row in read_log(old / "runs/old") if row["step"] > 2]
    data = ["--data_dir", "data/train", "--val_data_dir", "data/val", "--run_dir", "runs/old"]
    command = ["-c", DRAWN_AS_BEFORE, "--deepspeed_config", CONFIG, *FLAGS, *data]
    done = run_python(*command, cwd=old)
    assert done.code == 0, done.output
    assert "step-00000002, step 2" in done.output
    rows = [row for row in read_log(old / "runs/old") if row["step"] > 2]
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, before in zip(rows, expected, strict=True):
        for name in before.keys() & {"train_loss", "grad_norm", "val_loss", "lr"}:
            assert row[name] == pytest.approx(before[name], rel=1e-4), name


def test_a_run_is_evaluated_and_reported(old):
    done = run_python(
        ROOT / "launch/evaluate.py", "runs/old", "--timesteps", "0,500", "--out", "eval", cwd=old
    )
    assert done.code == 0, done.output
    done = run_python(ROOT / "launch/report.py", "runs/old", cwd=old)
    assert done.code == 0, done.output
    page = (old / "runs/old/report.html").read_text()
    assert "step-00000002" in page  # the old evaluation


def test_an_export_loads_and_its_card_is_true(old, monkeypatch):
    import ds_classifier

    export = old / "runs/old/export"
    predictor = ds_classifier.load(export)
    probabilities = predictor.predict(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), 0)
    assert probabilities.sum(dim=1).tolist() == pytest.approx([1, 1])
    monkeypatch.chdir(export)
    [snippet] = python_blocks((export / "README.md").read_text())
    names = {}
    exec(snippet, names)
    x_t, y = torch.zeros(1, 3, 4, 4), torch.tensor([2])
    assert torch.equal(
        names["cond_fn"](x_t, torch.tensor([500]), y=y), predictor.gradient(x_t, 500, y)
    )
