"""The closed forms against full covariance matrices, autograd and many drawn images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ds_classifier.common.gaussians import ROUNDING, GaussianClasses
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.known_distribution import KnownDistribution, open_exact

GAUSSIANS = GaussianClasses(classes=4, size=8, channels=2)


@pytest.fixture(scope="module")
def known() -> KnownDistribution:
    return KnownDistribution(GAUSSIANS)


def matrices() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class means, [K, D], and the covariance, [D, D], over pixels."""
    pair = np.kron(GAUSSIANS.transform, GAUSSIANS.transform)
    one = pair.T @ np.diag(GAUSSIANS.variances.ravel() + ROUNDING) @ pair
    means = GAUSSIANS.transform.T @ GAUSSIANS.means @ GAUSSIANS.transform
    return torch.from_numpy(means).flatten(1), torch.from_numpy(np.kron(np.eye(2), one))


@pytest.mark.parametrize("alpha_bar", [0.999, 0.3, 0.01, 0.0])
def test_posterior_gradient_and_denoiser(known, alpha_bar):
    """All of them equal what autograd makes of the normal densities, written out."""
    means, covariance = matrices()
    labels = np.arange(6) % 4
    clean = torch.from_numpy(GAUSSIANS.draw(labels, 7).transpose(0, 3, 1, 2) / 127.5 - 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).double()
    x_t = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
    y = torch.from_numpy(labels)
    x = x_t.flatten(1).requires_grad_()
    total = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(len(covariance))
    away = x[:, None] - alpha_bar**0.5 * means
    log_densities = -(away @ torch.linalg.inv(total) * away).sum(-1) / 2
    log_class = log_densities.log_softmax(dim=1)
    (gradient,) = torch.autograd.grad(log_class.gather(1, y[:, None]).sum(), x, retain_graph=True)
    found = known.posterior(x_t, torch.full((6,), alpha_bar), y)
    torch.testing.assert_close(found.log_class, log_class.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.gradient.flatten(1), gradient, atol=1e-6, rtol=1e-5)
    if alpha_bar:  # Tweedie: E[x_0 | x_t] = (x_t + (1 - alpha_bar) score) / sqrt(alpha_bar)
        (score,) = torch.autograd.grad(log_densities.logsumexp(dim=1).sum(), x)
        x_start = (x + (1 - alpha_bar) * score) / alpha_bar**0.5
        torch.testing.assert_close(found.x_start.flatten(1), x_start.detach(), atol=1e-6, rtol=1e-5)


def test_a_large_training_set_comes_close_to_its_distribution(known):
    """The posterior of 20,000 images at much noise is nearly that of the distribution."""
    labels = np.arange(20_000) % 4
    images = torch.from_numpy(GAUSSIANS.draw(labels, 1)).permute(0, 3, 1, 2)
    exact = ExactDenoiser(images, torch.from_numpy(labels), 4)
    asked = np.arange(200) % 4
    clean = torch.from_numpy(GAUSSIANS.draw(asked, 2)).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    alpha_bar = torch.full((200,), 0.02)
    x_t = 0.02**0.5 * clean + 0.98**0.5 * noise
    of_set, truth = (d.posterior(x_t, alpha_bar).log_class.exp() for d in (exact, known))
    assert (of_set - truth).abs().mean() < 0.01 < (truth - 0.25).abs().mean()


def test_share_and_frechet_distance_of_samples(known):
    """Exact samples are right and near; those of another class are wrong and far."""
    asked = np.arange(4000) % 4
    exact = GAUSSIANS.draw(asked, 5)
    assert known.share(exact, asked) > 0.99
    assert known.share(exact, (asked + 1) % 4) < 0.01
    kept = np.broadcast_to(GAUSSIANS.lowest, (2, 8, 8))
    variances = np.broadcast_to(GAUSSIANS.variances, (2, 8, 8))[kept]
    assert known.frechet(exact, asked) < 0.01 * variances.sum()
    shifts = np.square(GAUSSIANS.means - np.roll(GAUSSIANS.means, 1, axis=0))[:, kept].sum(1)
    expected = shifts.mean()
    assert known.frechet(exact, (asked + 1) % 4) == pytest.approx(expected, rel=0.05)
    # Halved around the mean of the class: the distance of normals of half the deviation.
    means = GAUSSIANS.transform.T @ GAUSSIANS.means @ GAUSSIANS.transform
    middle = ((means[asked] + 1) * 127.5).transpose(0, 2, 3, 1)
    halved = np.rint((exact - middle) / 2 + middle).clip(0, 255).astype(np.uint8)
    assert known.frechet(halved, asked) == pytest.approx(variances.sum() / 4, rel=0.05)


def test_only_images_of_the_distribution_are_known():
    """Resized images have another distribution, and other sources have none."""
    images = torch.zeros(4, 2, 8, 8, dtype=torch.uint8)
    arguments = (torch.arange(4), torch.device("cpu"))
    made = SimpleNamespace(source=str(GAUSSIANS), classes=list("0123"))
    other = SimpleNamespace(source="digits", classes=list("0123"))
    assert isinstance(open_exact(made, images, *arguments), KnownDistribution)
    assert isinstance(open_exact(other, images, *arguments), ExactDenoiser)
    assert isinstance(open_exact(made, images[:, :, :4, :4], *arguments), ExactDenoiser)
