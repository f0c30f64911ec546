"""Runs of a network of the user's on two ranks: killed and resumed, ZeRO 3, exported, loaded."""

import json
import sys

import pytest
import torch
from own_networks import write_module
from running import ROOT, read_log, run_python
from tiny_run import CONFIGS, assert_same_run, losses, train

import ds_classifier

FLAGS = ["--global_batch", "16", "--iterations", "12", "--save_interval", "6"]


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    """A run with ZeRO 2 in the directory of its module: the run, its --classifier, its flags."""
    folder = tmp_path_factory.mktemp("own")
    name = write_module(folder, "own_run_module")
    flags = [*FLAGS, "--classifier", name, "--classifier_args", '{"width": 12}']
    flags += ["--val_data_dir", digits / "val"]
    done = train(2, "zero2_bf16", digits, folder / "golden", *flags)
    assert f"classifier  {name}, 8," in done.output
    assert "1 layer (Dropout) draws nothing" in done.output
    return folder / "golden", name, flags


@pytest.mark.slow
def test_a_killed_run_continues_bit_equal_and_its_export_loads(digits, uninterrupted, monkeypatch):
    golden, name, flags = uninterrupted
    folder = golden.parent
    killed = folder / "killed"
    kill = {"KILL_AT": "9:0"}.items()
    train(2, "zero2_bf16", digits, killed, *flags, environment=kill, expect=247, launcher=True)
    done = train(2, "zero2_bf16", digits, killed, *flags, launcher=True)
    assert "checkpoints/step-00000006, step 6" in done.output
    assert_same_run(golden, killed, 12)
    refused = train(1, "zero2_bf16", digits, killed, *FLAGS, "--extend", 20, expect=2)
    assert f"classifier: '{name}' in the checkpoint, '' now" in refused.output

    program = ROOT / "launch" / "export.py"
    refused = run_python(program, killed, cwd=folder)
    assert refused.code == 2
    assert f"--classifier: got none; need {name}" in refused.output
    done = run_python(program, killed, "--classifier", name, cwd=folder)
    assert done.code == 0, done.output
    assert "not in guided-diffusion, which has no such network" in done.output
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = ds_classifier.load(killed / "export", classifier=name)
    straight = ds_classifier.load(killed, classifier=name)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 500, 999])
    assert torch.equal(model.classifier(x, t), straight.classifier(x, t))
    assert model.gradient(x, t, 3).abs().sum() > 0
    evaluated = run_python(
        ROOT / "launch" / "evaluate.py",
        *(killed, "--classifier", name, "--levels", 2, "--val_data_dir", digits / "val"),
        cwd=folder,
    )
    assert evaluated.code == 0, evaluated.output
    last = [row for row in read_log(golden) if "val_loss" in row][-1]
    record = json.loads((killed / "eval" / "step-00000012.json").read_text())
    loss = record["classifier"]["uniform_t"]["loss"]
    assert loss == pytest.approx(last["val_loss"], rel=0.02)  # fp32 there, bf16 in the run


@pytest.mark.slow
def test_zero_3_trains_it_as_zero_2_does(digits, uninterrupted):
    """One step of rounding apart; the grid of validation images needs its whole weights."""
    two, _, flags = uninterrupted
    config = json.loads((CONFIGS / "zero2_bf16.json").read_text())
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 10}
    (two.parent / "zero3.json").write_text(json.dumps(config))
    three = two.parent / "three"
    train(2, two.parent / "zero3", digits, three, *flags)
    assert losses(three) == pytest.approx(losses(two), rel=2e-2)
    assert (three / "eval" / "validation.pictures.png").exists()


def test_a_network_that_does_not_work_ends_both_ranks_before_the_first_step(digits, tmp_path):
    text = "from torch import nn\ndef build():\n    return nn.Linear(8, 10)\n"
    name = write_module(tmp_path, "own_run_module", text)
    for flags in (FLAGS, [*FLAGS, "--preflight"]):
        done = train(
            2, "zero1_fp32", digits, tmp_path / "run", *flags, "--classifier", name, expect=2
        )
        assert done.output.count("error: ") == 1, done.output
        assert f"--classifier: got {name}, whose forward raised TypeError" in done.output
        assert not (tmp_path / "run").exists()
