"""Test the exact denoiser against brute force in float64, and its gradient against autograd."""

import math

import numpy as np
import pytest
import torch
from small_models import CLASSES, noisy, training_set

from ds_classifier.data.images import center_crop, decode
from ds_classifier.data.shards import open_shards
from ds_classifier.guidance.exact_denoiser import ExactDenoiser, read_images

LEVELS = (1e-9, 0.02, 0.5, 0.9, 0.9999)  # alpha_bar, from nearly all noise to nearly none


def brute_log_weights(images, x, alpha_bar):
    """Return log p(i | x_t), [M], image by image; differentiable in x [C, S, S]."""
    clean = images.double() / 127.5 - 1
    distances = [((x - math.sqrt(alpha_bar) * c) ** 2).sum() for c in clean]
    return torch.stack([-d / (2 * (1 - alpha_bar)) for d in distances]).log_softmax(dim=0)


@pytest.mark.parametrize("alpha_bar", LEVELS)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_equals_brute_force_and_autograd(alpha_bar, chunk):
    images, labels = training_set()
    x = noisy(images, alpha_bar)
    y = torch.tensor([1, 2])
    denoiser = ExactDenoiser(images, labels, CLASSES, chunk=chunk)
    found = denoiser.posterior(x, torch.full((2,), alpha_bar, dtype=torch.float64), y)
    for n in range(2):
        x_n = x[n].clone().requires_grad_()
        log_weights = brute_log_weights(images, x_n, alpha_bar)
        log_class = torch.stack([log_weights[labels == k].logsumexp(0) for k in range(CLASSES)])
        (gradient,) = torch.autograd.grad(log_class[y[n]], x_n)
        x_start = sum(
            w * (i.double() / 127.5 - 1) for w, i in zip(log_weights.exp(), images, strict=True)
        )
        torch.testing.assert_close(found.x_start[n], x_start.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.log_class[n], log_class.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.gradient[n], gradient, rtol=1e-8, atol=1e-10)


def test_one_call_takes_a_noise_level_for_each_image():
    images, labels = training_set()
    denoiser = ExactDenoiser(images, labels, CLASSES)
    x = torch.cat([noisy(images, a)[:1] for a in LEVELS])
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    together = denoiser.posterior(x, levels).log_class
    alone = [denoiser.posterior(x[i : i + 1], levels[i : i + 1]).log_class for i in range(len(x))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_near_twins_are_told_apart_at_the_least_noise_in_float32():
    """Compare two images of 3072 numbers that differ by one grey level in one number.

    At t = 0 of the cosine schedule their distances differ by 6e-5 in 12,000, less than float32
    resolves.
    """
    alpha_bar = 1 - 4.1e-5
    twin = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    twin[1, 0, 0, 0] = 254
    denoiser = ExactDenoiser(twin, torch.tensor([0, 1]), 2)
    x = (math.sqrt(alpha_bar) * (twin.double() / 127.5 - 1)).float()
    found = denoiser.posterior(x, torch.full((2,), alpha_bar, dtype=torch.float64))
    apart = alpha_bar * (1 / 127.5) ** 2 / (2 * (1 - alpha_bar))  # 0.75 in the logit
    expected = torch.tensor([[0.0, -apart], [-apart, 0.0]], dtype=torch.float64).log_softmax(1)
    # The rest is the rounding of x itself to float32.
    torch.testing.assert_close(found.log_class, expected, rtol=0, atol=2e-5)
    assert found.x_start.dtype == torch.float32


def test_a_class_without_images_has_probability_0():
    images, labels = training_set()
    denoiser = ExactDenoiser(images, labels, CLASSES + 1)
    x, level = noisy(images, 0.5), torch.full((2,), 0.5)
    log_class = denoiser.posterior(x, level).log_class
    assert log_class[:, CLASSES].isneginf().all()
    torch.testing.assert_close(log_class.exp().sum(1), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="no image"):
        denoiser.posterior(x, level, torch.tensor([0, CLASSES]))


@pytest.mark.parametrize("level", [1.0, -0.1])
def test_refuses_wrong_noise_levels(level):
    images, labels = training_set()
    with pytest.raises(ValueError, match="alpha_bar"):
        ExactDenoiser(images, labels, CLASSES).posterior(
            noisy(images, 0.5), torch.full((2,), level)
        )


def test_reads_a_split(digits):
    shards = open_shards(digits / "val")
    images, labels = read_images(shards, image_size=32)
    assert images.shape == (360, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert shards.manifest.classes == list("0123456789")
    # Compare one image with the one that webdataset reads.
    import webdataset

    tar = next(iter(sorted((digits / "val").glob("*.tar"))))
    raw = list(webdataset.WebDataset(str(tar), shardshuffle=False))[7]
    pixels = center_crop(decode(raw["png"]), 32)
    assert np.array_equal(images[7].permute(1, 2, 0).numpy(), pixels)
    assert int(labels[7]) == int(raw["cls"])
