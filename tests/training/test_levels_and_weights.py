"""Runs with a range of t, weights by class, a loss and an augmentation of the user's.

They train on three classes of 48, 24 and 8 images.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import ROOT, read_log, run_python
from tiny_run import TINY, assert_same_run, losses, train

from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.config import Settings, parse_training_command
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.order import SampleOrder
from ds_classifier.data.shards import open_shards
from ds_classifier.diffusion import create_gaussian_diffusion, stratified
from ds_classifier.evaluation.evaluate import spread_timesteps
from ds_classifier.loss import to_x_start
from ds_classifier.model import create_classifier
from ds_classifier.training.run import build_module

COUNTS = (48, 24, 8)
MODULE = """
import torch.nn.functional as F

def smoothed(logits, targets, t):
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
"""
SAMPLING = ["--t_range", "0.0:0.6", "--class_balance", "equal", "--loss", "my_loss:smoothed"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Return shards of three classes, train/ and val/, beside the module of a loss."""
    home = tmp_path_factory.mktemp("uneven")
    random = np.random.RandomState(0)
    for k, count in enumerate(COUNTS):
        for i in range(count):
            folder = home / "images" / ("val" if i % 8 == 7 else "train") / f"class_{k}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.randint(0, 120, (8, 8, 3)) + 60 * k
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    convert(open_source(str(home / "images")), home)
    (home / "my_loss.py").write_text(MODULE)
    return home


def test_validation_spreads_t_over_the_range():
    """The levels of a range get equal numbers of images, as even for neighbours in the set."""
    t = spread_timesteps(torch.arange(360), range(7, 19))
    counts = torch.bincount(t, minlength=20)
    assert counts.sum() == 360
    assert counts[7:19].sum() == 360
    assert (counts[7:19] - 30).abs().max() <= 1
    assert len(set(t[100:112].tolist())) >= 10
    golden = (np.sqrt(5) - 1) / 2
    over_all = [int((q + 0.5) * golden % 1 * 1000) for q in range(360)]
    assert spread_timesteps(torch.arange(360), range(1000)).tolist() == over_all


def test_three_steps_equal_those_by_hand(uneven, tmp_path):
    """Check label smoothing, weights by class and t below 0.6 T against torch and AdamW alone."""
    flags = ["--global_batch", "16", "--iterations", "3", "--lr_schedule", "constant"]
    flags += ["--random_crop", "False", *SAMPLING]
    (tmp_path / "my_loss.py").write_text(MODULE)
    done = train(1, "zero1_fp32", uneven, tmp_path / "run", *flags)
    shards = open_shards(uneven / "train")
    counts = torch.bincount(torch.from_numpy(shards.index["label"].astype(np.int64)))
    assert counts.tolist() == [42, 21, 7]
    weights = 70 / 3 / counts  # every class sums to a third of the images
    effective = 70**2 / float((counts * weights**2).sum())
    assert f"they count like {effective:.0f} of 70 images (Kish)" in " ".join(done.output.split())

    settings = parse_training_command([*TINY, *flags]).settings.replace(num_classes=3)
    torch.manual_seed(0)
    classifier = create_classifier(**settings.model_kwargs())
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    adam = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.0)
    order = SampleOrder([s.samples for s in shards.manifest.shards], **settings.order_kwargs())
    data = ShardDataset(shards, image_size=8, order=order)
    expected = []
    for step in range(3):
        positions = torch.arange(16 * step, 16 * step + 16)
        batch = data[positions.numpy()]
        t = (stratified(0, positions, 16) * 600).long()
        noise = keyed_noise(0, "noise", positions, (8, 8, 3))
        x_t = diffusion.q_sample(to_x_start(batch.images), t, noise).permute(0, 3, 1, 2)
        logits = classifier(x_t, t)
        log_p = logits.log_softmax(dim=1)
        right = log_p.gather(1, batch.labels[:, None])[:, 0]
        smoothed = -0.9 * right - 0.1 * log_p.mean(dim=1)
        expected.append(smoothed.mean().item())
        adam.zero_grad()
        (weights[batch.labels] * smoothed).mean().backward()
        adam.step()
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    plain = F.cross_entropy(logits, batch.labels).item()
    assert abs(plain - expected[-1]) > 1e-3  # what the third step would log without --loss


def test_a_changed_range_loss_or_weight_does_not_resume(uneven, tmp_path):
    (tmp_path / "my_loss.py").write_text(MODULE)
    flags = ["--global_batch", "16", "--iterations", "2", "--augment", "trivialaugment"]
    run = tmp_path / "run"
    train(1, "zero1_fp32", uneven, run, *flags, *SAMPLING)
    (run / "DONE").unlink()
    done = train(1, "zero1_fp32", uneven, run, *flags[:4], expect=2)
    for name in ("t_range", "class_balance", "loss", "augment"):
        assert f"{name}: '" in done.output


@pytest.mark.slow
def test_all_of_it_together_on_other_ranks_and_after_a_kill(uneven, tmp_path):
    """The same losses on 1 and 2 ranks; a killed run ends bit-equal to one that was not."""
    (tmp_path / "my_loss.py").write_text(MODULE)
    flags = ["--global_batch", "16", "--iterations", "24", "--save_interval", "12"]
    flags += ["--schedule_sampler", "loss-second-moment", "--diffusion_steps", "20"]
    flags += [*SAMPLING, "--augment", "trivialaugment", "--val_data_dir", uneven / "val"]
    train(1, "zero1_fp32", uneven, tmp_path / "one", *flags, "--workers", "0")
    train(2, "zero1_fp32", uneven, tmp_path / "two", *flags, "--microbatch", "4")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    rows = read_log(tmp_path / "one")
    assert all("train_loss_q3" not in row and "val_loss_q3" not in row for row in rows)  # t < 12
    assert any("val_loss_q1" in row for row in rows)

    killed = tmp_path / "killed"
    how = ("zero1_fp32", uneven, killed, *flags, "--microbatch", "4")
    train(2, *how, environment={"KILL_AT": "15:0"}.items(), expect=247, launcher=True)
    assert (killed / "checkpoints" / "latest").read_text() == "step-00000012\n"
    train(2, *how)
    assert_same_run(tmp_path / "two", killed, 24)


@pytest.mark.slow
def test_what_comes_after_knows_what_was_trained(uneven, tmp_path):
    """Report, evaluation, samples and card name the range; the loss is called what it is."""
    (tmp_path / "my_loss.py").write_text(MODULE)
    run = tmp_path / "run"
    flags = ["--global_batch", "16", "--iterations", "20", "--diffusion_steps", "20"]
    train(1, "zero1_fp32", uneven, run, *flags, *SAMPLING, "--val_data_dir", uneven / "val")
    page = (run / "report.html").read_text()
    assert "Cross-entropy" not in page
    assert "guessing" not in page
    (start,) = (json.loads(x) for x in (run / "events.jsonl").read_text().splitlines()[:1])
    assert start["guessing"]["loss"] is None

    trained = "Trained at t = 0 to 11 alone (--t_range 0.0:0.6)."
    evaluated = run_python(ROOT / "launch" / "evaluate.py", run, "--levels", "6", cwd=tmp_path)
    assert trained in evaluated.output
    assert (
        "the loss is cross-entropy, and not training's --loss my_loss:smoothed" in evaluated.output
    )
    (record,) = (json.loads(file.read_text()) for file in (run / "eval").glob("step*.json"))
    assert record["trained"] == {"t_range": "0.0:0.6", "first": 0, "last": 11}
    assert record["classifier"]["levels"][-1]["t"] == 19  # all levels are evaluated
    page = (run / "report.html").read_text()
    assert trained in page
    (tmp_path / "my_loss.py").unlink()  # what reads weights needs no code of the user's
    run_python(ROOT / "launch" / "export.py", run, cwd=tmp_path)
    card = (run / "export" / "README.md").read_text()
    assert "- trained at: t = 0 to 11 of 0 to 19" in card
    assert 'loss: "my_loss:smoothed"' in card
    sampled = run_python(
        *[ROOT / "launch" / "sample.py", "--classifier_path", run, "--data_dir", uneven / "train"],
        *["--num_samples", "2"],
        cwd=tmp_path,
    )
    assert sampled.output.count("the classifier was trained at t = 0 to 11 of 0 to 19") == 1


def test_what_is_wrong_with_loss_levels_and_augmentation_is_said_at_once():
    small = dict(image_size=8, num_classes=3, classifier_width=32, classifier_depth=1)
    small |= dict(classifier_channel_mult="1,2", classifier_attention_resolutions="4")
    wrong = Settings(**small, loss="math:sqrt", t_range="0.5:0.5", augment="paint")
    resolved = SimpleNamespace(settings=wrong, ds_config={"optimizer": {"type": "AdamW"}})
    with pytest.raises(ValueError, match=r"--loss: got .*\n  --t_range: got .*\n  --augment: got "):
        build_module(resolved, "class")
