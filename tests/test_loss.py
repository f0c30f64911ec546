"""The meaning of a pixel; losses by hand; posterior targets against the exact denoiser."""

import numpy as np
import pytest
import torch
from small_models import SMALL, training_set
from torch import nn

from ds_classifier.config import Settings
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.loss import (
    EMPTY,
    NoisedClassifier,
    RecentImages,
    binary_cross_entropy,
    cross_entropy,
    from_x_start,
    noised_classifier,
    to_x_start,
    users_loss,
)
from ds_classifier.model import create_classifier

CLASSES = 7


def test_all_pixel_values_go_there_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_x_start(pixels)
    assert x.dtype == torch.float32
    assert (float(x[0]), float(x[255])) == (-1.0, 1.0)
    assert torch.equal(from_x_start(x).round().to(torch.uint8), pixels)


def test_values_beyond_the_range_are_clipped():
    assert from_x_start(torch.tensor([-1.2, 1.5])).tolist() == [0.0, 255.0]


def test_floating_values_are_x_start_already():
    latents = torch.tensor([-3.0, 0.25])
    assert torch.equal(to_x_start(latents), latents)
    assert to_x_start(latents, torch.float64).dtype == torch.float64


def test_the_losses_of_several_classes_and_of_soft_vectors_are_those_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(9, 5, generator=generator)
    several = (torch.rand(9, 5, generator=generator) < 0.3).float()
    soft = torch.rand(9, 5, generator=generator).softmax(dim=1)
    t, f = torch.zeros(9, dtype=torch.int64), logits.double().numpy()
    p = 1 / (1 + np.exp(-f))
    found = binary_cross_entropy(logits, several, t)
    y = several.numpy()
    np.testing.assert_allclose(found, -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(1), rtol=1e-5)
    log_p = f - np.log(np.exp(f).sum(axis=1, keepdims=True))
    found = cross_entropy(logits, soft, t)
    np.testing.assert_allclose(found, -(soft.double().numpy() * log_p).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("t", [0, 500, 900])
def test_the_expectation_of_vectors_is_the_mean_over_images(t):
    """Vectors with one 1 have the posterior of classes; others the sum of w_i times theirs."""
    images, labels = images_and_labels(30)
    shape = tuple(images.shape[1:])
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    level, x_start = torch.full((5,), t), to_x_start(images[25:])
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(t))
    x_t = diffusion.q_sample(x_start, level, noise)
    alpha, sigma = diffusion.scales(level)
    several = (torch.rand(30, CLASSES, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    one = nn.functional.one_hot(labels, CLASSES).float()
    found = []
    for targets in (labels, one, several):
        recent = RecentImages(
            32, image_shape=shape, num_classes=CLASSES, device="cpu", vectors=targets.dim() == 2
        )
        told = targets[:25].clone()
        told[3] = EMPTY  # an image that did not decode
        recent.add(images[:25], told, torch.arange(25))
        found.append(recent.class_posterior(x_t, x_start, targets[25:], alpha, sigma))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)
    known = [i for i in range(25) if i != 3]
    for i in range(5):
        others = torch.cat([x_start[i : i + 1], to_x_start(images[known])]).double().flatten(1)
        far = (x_t[i].double().flatten() - alpha[i].double() * others).square().sum(dim=1)
        w = (-far / (2 * sigma[i].double() ** 2)).softmax(dim=0)
        expected = w @ torch.cat([several[25 + i : 26 + i], several[known]]).double()
        torch.testing.assert_close(found[2][i].double(), expected, atol=2e-5, rtol=0)


def images_and_labels(count):
    """Return smooth images, uint8 [n, S, S, C], and their classes."""
    images, labels = training_set(m=count)
    return images.permute(0, 2, 3, 1).contiguous(), labels


@pytest.mark.parametrize("t", [0, 500, 800, 900, 999])
def test_the_posterior_is_that_of_the_exact_denoiser(t):
    """Over the images that are left after the oldest went, and each image's own."""
    images, labels = images_and_labels(50)
    shape = tuple(images.shape[1:])
    recent = RecentImages(40, image_shape=shape, num_classes=CLASSES, device="cpu")
    for first in range(0, 45, 9):  # the first five leave again
        part = slice(first, first + 9)
        recent.add(images[part], labels[part], torch.arange(first, first + 9))
    own, y = images[45:], labels[45:]
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    level = torch.full((5,), t)
    x_start = to_x_start(own)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(t))
    x_t = diffusion.q_sample(x_start, level, noise)
    found = recent.class_posterior(x_t, x_start, y, *diffusion.scales(level))
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)[level[:1]]
    for i in range(5):
        known = torch.cat([images[5:45], own[i : i + 1]]).permute(0, 3, 1, 2)
        exact = ExactDenoiser(known, torch.cat([labels[5:45], y[i : i + 1]]), CLASSES)
        best = exact.posterior(x_t[i : i + 1].permute(0, 3, 1, 2), alpha_bar).log_class.exp()
        torch.testing.assert_close(found[i].double(), best[0], atol=2e-5, rtol=0)


def test_the_mean_loss_is_that_of_the_labels():
    """Posterior targets change the variance of the loss and not its mean (Rao-Blackwell).

    Every image of a set in turn is the own one, and the others are the recent ones.
    """
    images, labels = images_and_labels(30)
    shape = tuple(images.shape[1:])
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")

    class Linear(nn.Module):
        def forward(self, x, t):
            return 3 * x.flatten(1)[:, :CLASSES]

    module = NoisedClassifier(Linear(), diffusion)
    level = torch.full((400,), 900)
    hard, soft = [], []
    for i in range(len(images)):
        others = torch.arange(len(images)) != i
        recent = RecentImages(len(images) - 1, image_shape=shape, num_classes=CLASSES, device="cpu")
        recent.add(images[others], labels[others], torch.arange(len(images) - 1))
        noise = torch.randn((400, *shape), generator=torch.Generator().manual_seed(i))
        batch = images[i].expand(400, *shape), labels[i].expand(400), level, noise
        hard.append(module(*batch)[0])
        soft.append(module(*batch, recent)[0])
    hard, soft = torch.cat(hard), torch.cat(soft)
    error = (hard - soft).std() / len(hard) ** 0.5
    assert abs(float(hard.mean() - soft.mean())) < 4 * float(error)
    assert soft.var() < 0.8 * hard.var()


def test_images_that_did_not_decode_are_no_reference():
    """The posterior is as without them, and as without the places not yet filled."""
    images, labels = images_and_labels(6)
    shape = tuple(images.shape[1:])
    few = RecentImages(8, image_shape=shape, num_classes=CLASSES, device="cpu")
    few.add(images[:4], labels[:4], torch.arange(4))
    with_bad = RecentImages(8, image_shape=shape, num_classes=CLASSES, device="cpu")
    bad = torch.zeros_like(images[:2])
    with_bad.add(bad, torch.tensor([EMPTY] * 2), torch.arange(2))
    with_bad.add(images[:4], labels[:4], torch.arange(2, 6))
    x_start = to_x_start(images[4:])
    arguments = (x_start * 0.1, x_start, labels[4:], torch.full((2,), 0.1), torch.ones(2))
    expected = few.class_posterior(*arguments)
    torch.testing.assert_close(with_bad.class_posterior(*arguments), expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(2))


def test_more_images_than_places_leave_the_last():
    images, labels = images_and_labels(10)
    recent = RecentImages(4, image_shape=tuple(images.shape[1:]), num_classes=CLASSES, device="cpu")
    recent.add(images, labels, torch.arange(10))
    assert sorted(recent._labels.tolist()) == sorted(labels[6:].tolist())
    assert {*map(tuple, recent._images.tolist())} == {*map(tuple, images[6:].flatten(1).tolist())}


# ------------------------------------------------------------------------- a loss of the user's

MODULE = """
import torch
import torch.nn.functional as F

weight = torch.ones(1, requires_grad=True)

def by_hand(logits, targets, t):
    return F.cross_entropy(logits, targets, reduction="none") * (1 + 0 * t)

def scalar(logits, targets, t):
    return F.cross_entropy(logits, targets)

def per_class(logits, targets, t):
    return logits.mean(dim=0)

def detached(logits, targets, t):
    return F.cross_entropy(logits.detach(), targets, reduction="none") * weight

def listed(logits, targets, t):
    return list(F.cross_entropy(logits, targets, reduction="none"))

def failing(logits, targets, t):
    return logits @ targets

def labels_only(logits, targets, t):
    return F.nll_loss(logits.log_softmax(1), targets, reduction="none")

def not_finite(logits, targets, t):
    return by_hand(logits, targets, t) * (t / t)

def bent(logits, targets, t):
    return ((logits - logits.detach()) ** 2).sum(dim=1).sqrt()

def writing(logits, targets, t):
    loss = by_hand(logits, targets.clone(), t)
    targets.zero_()
    return loss
"""


@pytest.fixture
def my_losses(tmp_path, monkeypatch):
    """Write a module of the user's, and return its name."""
    (tmp_path / "my_losses.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_losses"


@pytest.mark.parametrize("vectors", [False, True])
def test_a_loss_of_the_users_is_used(my_losses, vectors):
    loss = users_loss(f"{my_losses}:by_hand", CLASSES, vectors=vectors)
    logits, labels = torch.randn(5, CLASSES), torch.tensor([0, 6, 3, 3, 1])
    found = loss(logits, labels, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(found, cross_entropy(logits, labels, labels))
    settings = Settings(**SMALL, loss=f"{my_losses}:by_hand")
    module = noised_classifier(create_classifier(**settings.model_kwargs()), settings, "classes")
    assert module.loss.__name__ == "by_hand"  # it wins over that of the data's targets


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("scalar", r"returns the shape \[\] for logits \[4, 3\], targets \[4\] and t \[4\]; need"),
        ("per_class", r"returns the shape \[3\] for logits \[4, 3\]"),
        ("detached", "returns a loss without a gradient with respect to the logits"),
        ("listed", "returns a list"),
        ("failing", r"fails for .*: RuntimeError: .*\(my_losses.py, line 23\)"),
        ("absent", "no such name"),
        ("not_finite", r"returns \[nan, nan, nan, nan\] or a gradient that is not finite"),
        ("bent", r"returns \[0.0, 0.0, 0.0, 0.0\] or a gradient that is not finite"),
        ("writing", "changes its targets or t in place"),
    ],
)
def test_a_loss_that_cannot_train_is_refused(my_losses, name, problem):
    with pytest.raises(ValueError, match=f"--loss: got 'my_losses:{name}'.*{problem}"):
        users_loss(f"{my_losses}:{name}", 3, vectors=False)


def test_a_loss_of_labels_is_refused_for_vectors(my_losses):
    assert users_loss(f"{my_losses}:labels_only", 3, vectors=False)
    with pytest.raises(ValueError, match=r"targets \[4, 3\] and t \[4\]: RuntimeError"):
        users_loss(f"{my_losses}:labels_only", 3, vectors=True)
