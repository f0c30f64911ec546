"""Guidance by a classifier that is shown the predicted x_0, against autograd through a softmax."""

import pytest
import torch
from torch import nn

from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.predicted_x0 import differentiable, predicted_x0_gradient
from ds_classifier.guidance.sampling import Prediction, ReverseProcess

SHAPE = (2, 4, 4)


class Linear(nn.Module):
    """A classifier that counts on its timestep being that of clean images."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 3)
        self.seen = []

    def forward(self, x, t):
        self.seen.append(t.tolist())
        return self.head(x.flatten(1)).tanh()


@pytest.mark.parametrize("schedule", ["linear", "flow", "edm"])
@pytest.mark.parametrize("respacing", ["", "20"])
def test_it_is_the_gradient_through_denoiser_and_classifier(schedule, respacing):
    torch.manual_seed(0)
    diffusion = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing=respacing)
    process = ReverseProcess(diffusion)
    images = torch.rand(12, *SHAPE) * 2 - 1
    exact = ExactDenoiser(images, torch.arange(12) % 3, 3)
    classifier, y = Linear(), torch.tensor([0, 2, 1])
    levels = torch.tensor([2, 9, diffusion.num_timesteps - 2])
    clean = torch.zeros(1, dtype=torch.int64)
    x = diffusion.q_sample(images[:3], levels, torch.randn(3, *SHAPE)).float()
    cond_fn = predicted_x0_gradient(
        classifier, differentiable(exact, diffusion), process, clean, scale=2.0
    )
    got = cond_fn(x, diffusion.model_timesteps(levels), y=y)
    assert classifier.seen == [[0, 0, 0]]

    x_64 = x.double().requires_grad_()
    alpha, sigma = (v.double()[:, None] for v in diffusion.scales(levels))
    distances = (x_64.flatten(1)[:, None] - alpha[..., None] * images.flatten(1).double()).square()
    weights = (-distances.sum(2) / (2 * sigma**2)).softmax(dim=1)
    x_start = (weights @ images.flatten(1).double()).view(3, *SHAPE)
    logits = classifier.double()(x_start, torch.zeros(3))
    log_p = logits.log_softmax(dim=1)[torch.arange(3), y]
    (expected,) = torch.autograd.grad(2.0 * log_p.sum(), x_64)
    assert expected[2].abs().max() > 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-6)


def test_a_networks_own_backward_is_used():
    """The x_0 of a network is 3 x_t here, so that the gradient has that factor."""
    process = ReverseProcess(create_gaussian_diffusion())
    classifier, x, y = Linear(), torch.randn(2, *SHAPE), torch.tensor([0, 1])
    cond_fn = predicted_x0_gradient(
        classifier,
        lambda x_t, t, y: Prediction(3 * x_t, None),
        process,
        torch.zeros(1, dtype=torch.int64),
    )
    x_start = (3 * x).requires_grad_()
    log_p = classifier(x_start, torch.zeros(2)).log_softmax(dim=1)[torch.arange(2), y]
    (of_x_start,) = torch.autograd.grad(log_p.sum(), x_start)
    torch.testing.assert_close(cond_fn(x, torch.tensor([5, 900]), y=y), 3 * of_x_start)
