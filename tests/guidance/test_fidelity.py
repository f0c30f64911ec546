"""Test the measures of guidance on cases with known values."""

import dataclasses

import numpy as np
import pytest
import torch
from small_models import CLASSES, training_set
from torch import nn

from ds_classifier import distributed
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.fidelity import Judge, compare_with_bayes, level_table, measure
from ds_classifier.guidance.guided_sampling import load_guided_sampling


class BayesModule(nn.Module):
    """The best classifier, differentiated by autograd; `sharper` multiplies its logits."""

    def __init__(self, images, labels, diffusion, sharper=1.0):
        super().__init__()
        self.clean = images.double().flatten(1) / 127.5 - 1
        self.labels, self.sharper = labels, sharper
        self.alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod)
        self.times, self.scale = (torch.from_numpy(n) for n in (diffusion.times, diffusion.scale))

    def forward(self, x, times):
        t = torch.searchsorted(self.times, times)
        x, a = x / self.scale[t][:, None, None, None], self.alphas_cumprod[t][:, None]
        distances = (x.double().flatten(1)[:, None] - a.sqrt()[..., None] * self.clean).square()
        log_weights = -distances.sum(-1) / (2 * (1 - a))
        of_class = [log_weights[:, self.labels == k].logsumexp(1) for k in range(CLASSES)]
        return (self.sharper * torch.stack(of_class, dim=1)).log_softmax(dim=1)


@pytest.fixture(scope="module")
def world():
    images, labels = training_set(m=40)
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    return images, labels, diffusion, ExactDenoiser(images, labels, CLASSES)


def test_the_best_classifier_is_found_to_be_the_best(world):
    images, labels, diffusion, exact = world
    rows = list(
        compare_with_bayes(
            BayesModule(images, labels, diffusion),
            exact,
            diffusion,
            images,
            labels,
            timesteps=[0, 700, 900, 999],
            seed=0,
            batch_size=16,
        )
    )
    assert [row.t for row in rows] == [0, 700, 900, 999]
    for row in rows:
        assert row.kl == pytest.approx(0, abs=1e-4)
        assert row.accuracy == row.bayes_accuracy
    assert rows[0].bayes_accuracy == 1
    assert rows[0].compared == 0
    assert rows[0].cosine is None
    assert rows[-1].bayes_accuracy < 0.7
    for row in rows[1:]:
        assert row.compared > 0.9
        assert row.cosine == pytest.approx(1, abs=1e-4)
        assert row.length_ratio == pytest.approx(1, abs=1e-3)
    table = level_table(rows)
    assert len(table) == 1 + len(rows)
    assert table[1].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize("schedule", ["flow", "edm", "scaled_linear_zero_snr"])
def test_the_best_classifier_of_any_process(world, schedule):
    """Check the exact posterior in each process's own coordinates, and a level without signal."""
    images, labels, _, exact = world
    diffusion = create_gaussian_diffusion(noise_schedule=schedule)
    best = BayesModule(images, labels, diffusion)
    levels = dict(timesteps=[800, 999], seed=0)
    noisy, last = compare_with_bayes(best, exact, diffusion, images, labels, **levels)
    for row in (noisy, last):
        assert row.kl == pytest.approx(0, abs=1e-4)
        assert row.accuracy == row.bayes_accuracy
        assert row.log_snr == diffusion.log_snr[row.t]
    assert noisy.cosine == pytest.approx(1, abs=1e-4)
    assert noisy.length_ratio == pytest.approx(1, abs=1e-3)
    if diffusion.alphas_cumprod[-1] == 0:
        assert (last.compared, last.cosine, last.length_ratio) == (0, None, None)


def test_an_ignorant_and_an_inverted_classifier(world):
    images, labels, diffusion, exact = world
    how = dict(timesteps=[900], seed=0)
    (inverted,) = compare_with_bayes(
        BayesModule(images, labels, diffusion, sharper=-1.0),
        exact,
        diffusion,
        images,
        labels,
        **how,
    )
    assert inverted.cosine < 0
    assert inverted.accuracy < inverted.bayes_accuracy
    (ignorant,) = compare_with_bayes(
        BayesModule(images, labels, diffusion, sharper=1e-9),
        exact,
        diffusion,
        images,
        labels,
        **how,
    )
    # For uniform answers KL is log K minus the entropy of the best answers.
    assert 0 < ignorant.kl < np.log(CLASSES)
    assert ignorant.length_ratio < 1e-6


def test_answers_that_are_not_finite_are_wrong_and_in_no_mean(world):
    """Check nan logits of 13 images, all of class 0, which argmax would take for class 0."""
    images, labels, diffusion, exact = world
    best = BayesModule(images, labels, diffusion)
    chosen = torch.arange(39)[labels[:39] == 0]

    def broken(x, t):
        logits = best(x, t)
        nan = torch.zeros(len(x), 1, dtype=logits.dtype)
        nan[chosen] = torch.nan
        return logits + nan

    def none_finite(x, t):
        return best(x, t) * torch.nan

    how = dict(timesteps=[900], seed=0)
    shown = images[:39], labels[:39]
    (whole,) = compare_with_bayes(best, exact, diffusion, *shown, **how)
    (row,) = compare_with_bayes(broken, exact, diffusion, *shown, **how)
    assert (whole.not_finite, row.not_finite) == (0, 13)
    assert row.accuracy <= 26 / 39
    assert row.bayes_accuracy == whole.bayes_accuracy
    assert row.kl == pytest.approx(0, abs=1e-4)
    assert (row.cosine, row.length_ratio) == (pytest.approx(1, abs=1e-4),) * 2
    (none,) = compare_with_bayes(none_finite, exact, diffusion, *shown, **how)
    assert (none.not_finite, none.kl, none.accuracy, none.cosine) == (39, None, 0, None)
    assert level_table([whole, row, none])[-2:] == [
        "t = 900: 13 not finite, counted as wrong, in no mean",
        "t = 900: 39 not finite, counted as wrong, in no mean",
    ]


def test_the_judge_classifies_digits(digits):
    pytest.importorskip("sklearn")
    from ds_classifier.data.shards import open_shards
    from ds_classifier.guidance.exact_denoiser import read_images

    images, labels = read_images(open_shards(digits / "val"), image_size=16)
    judge = Judge(images[:260], labels[:260])
    held_out, own = images[260:].permute(0, 2, 3, 1).numpy(), labels[260:].numpy()
    assert judge.share(held_out, own) > 0.9
    assert judge.share(held_out, (own + 1) % 10) < 0.1


def test_the_distribution_of_made_up_images_is_the_truth(tmp_path, monkeypatch):
    """Guided by it, samples show their class and are as near as exact ones; unguided, neither."""
    monkeypatch.setattr(distributed, "all_gather", lambda tensor: tensor[None])  # of one rank
    source = open_source("gaussians:size=8,channels=1,classes=4,images=64")
    convert(source, tmp_path)
    assert [len(source.splits[name]) for name in ("train", "val")] == [64, 16]
    guided = load_guided_sampling(
        None,
        dict(image_size=8, in_channels=1, noise_schedule="cosine", timestep_respacing="100"),
        data_dir=str(tmp_path / "train"),
        model_path="",
        unet={},
        classifier_fp16=False,
        unet_fp16=False,
        device=torch.device("cpu"),
    )
    labels = np.arange(600) % 4
    how = dict(joint_temperature=1.0, marginal_temperature=1.0, batch_size=600, use_ddim=False)
    how |= dict(clip_denoised=False, seed=0, progress=lambda done, total: None)
    samples = [guided.draw(labels, scale, **how) for scale in (0, 1)]
    measures = measure(guided, [0, 1], samples, labels, seed=0)
    assert measures.truth == "distribution"
    assert measures.shares["0"] == pytest.approx(0.25, abs=0.08)
    assert measures.shares["1"] > 0.97
    assert measures.frechet["1"] < 1.5 * measures.frechet["exact"] < 0.2 * measures.frechet["0"]
    lines = "\n".join(measures.lines())
    assert "best classifier of their distribution" in lines
    assert "exact samples" in lines


def test_a_classifier_is_compared_with_the_distribution_and_with_its_training_set(tmp_path):
    """The best classifier of the distribution is perfect by that truth, and not by the other."""
    convert(open_source("gaussians:size=8,channels=1,classes=4,images=64"), tmp_path)
    how = dict(model_path="", unet={}, classifier_fp16=False, unet_fp16=False)
    settings = dict(image_size=8, in_channels=1, noise_schedule="cosine")
    guided = load_guided_sampling(
        None, settings, data_dir=str(tmp_path / "train"), device=torch.device("cpu"), **how
    )
    alphas_cumprod = torch.from_numpy(guided.original.alphas_cumprod)

    class Best(nn.Module):
        def forward(self, x, t):
            # By the logits of the normal densities, since `posterior` has no gradient.
            exact = guided.exact
            a = alphas_cumprod[t][:, None]
            total = a * exact._variances + 1 - a
            away = exact._coefficients(x)[:, None] - a.sqrt()[..., None] * exact._means
            return -(away.square() / total[:, None]).sum(-1) / 2

    guided = dataclasses.replace(guided, classifier=Best())
    labels = np.arange(8) % 4
    samples = guided.exact.gaussians.draw(labels, 9)
    measures = measure(guided, [1], [samples], labels, seed=0)
    middle = [row for row in measures.levels if row.compared == 1 and row.t < 999]  # fp32
    assert middle
    assert all(row.kl < 1e-4 and row.cosine > 0.999 for row in middle)
    by_set = {row.t: row for row in measures.training_levels}
    assert max(by_set[row.t].kl for row in middle) > 0.01
    assert measures.as_json()["training_levels"][0]["t"] == 0
