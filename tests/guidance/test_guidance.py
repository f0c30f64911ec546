"""Test the guidance gradient against recorded numbers, autograd and diffusers' schedulers."""

import numpy as np
import pytest
import torch
from running import GOLDEN
from small_models import CLASSES, recorded_input, relative_error, training_set

from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.gradient import bayes_gradient, classifier_gradient
from ds_classifier.guidance.sampling import ReverseProcess, exact_denoiser, sample


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.01)],
)
def test_equals_the_recorded_gradient_in_every_precision(classifier, dtype, tolerance):
    recorded = np.load(GOLDEN / "model.npz")
    cond_fn = classifier_gradient(classifier.to(dtype), scale=2.5)
    t, y = torch.from_numpy(recorded["t"]), torch.from_numpy(recorded["y"])
    with torch.no_grad():  # as in the sampling loops
        gradient = cond_fn(recorded_input(), t, y=y)
    assert gradient.dtype == torch.float32
    assert relative_error(gradient.numpy(), 2.5 * recorded["input_grad"]) < tolerance


def test_temperatures(classifier):
    """Check with finite differences that marginal temperature 0 leaves one logit's gradient."""
    t, y = torch.tensor([3, 750]), torch.tensor([1, 5])
    x, step = recorded_input().double(), 1e-4
    classifier = classifier.double()
    logits_only = classifier_gradient(classifier, joint_temperature=2.0, marginal_temperature=0.0)
    direction = torch.from_numpy(np.random.RandomState(3).standard_normal(tuple(x.shape)))
    ahead, behind = (classifier(x + s * direction, t)[range(2), y] for s in (step, -step))
    slope = (logits_only(x, t, y=y) * direction).sum(dim=(1, 2, 3))
    torch.testing.assert_close(
        slope, (2.0 * (ahead - behind) / (2 * step)).to(slope.dtype), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("guide", ["classifier", "bayes"])
@pytest.mark.parametrize(
    ("y", "words"),
    [
        (None, "got no classes y; need one for each of 2 images"),
        (torch.tensor([1]), r"got classes y \[1\] torch.int64; need one for each of 2"),
        (torch.tensor([1, 2, 0]), r"got classes y \[3\]"),
        (torch.tensor([[1], [2]]), r"got classes y \[2, 1\]"),
        (torch.tensor([1.0, 2.0]), r"torch.float32; need .* int64"),
        (torch.tensor([1, 7]), r"got classes y \[1, 7\]; need 0 to "),
        (torch.tensor([-1, 1]), r"got classes y \[-1, 1\]; need 0 to "),
    ],
)
def test_a_class_is_needed_for_each_image(classifier, guide, y, words):
    x, process = recorded_input(), create_gaussian_diffusion()
    cond_fn = classifier_gradient(classifier)
    if guide == "bayes":
        exact = ExactDenoiser(x, torch.tensor([0, 3]), 4)
        cond_fn = bayes_gradient(exact, process)
    with pytest.raises(ValueError, match=words):
        cond_fn(x, torch.tensor([3, 750]), y=y)


@pytest.mark.parametrize("ddim", [False, True])
@pytest.mark.parametrize(
    "schedule", ["cosine", "scaled_linear_zero_snr", "flow", "flow_logit_normal", "edm", "vp"]
)
def test_the_best_guide_reaches_every_class(schedule, ddim):
    """Check that exact guidance at scale 1 makes the exact denoiser class-conditional."""
    images, labels = training_set(m=30)
    process = ReverseProcess(
        create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing="50")
    )
    original = create_gaussian_diffusion(noise_schedule=schedule)
    exact = ExactDenoiser(images, labels, CLASSES)
    y = torch.arange(60) % CLASSES
    generator = torch.Generator().manual_seed(3)
    found = []
    for cond_fn in (None, bayes_gradient(exact, original)):
        x, _ = sample(
            process,
            exact_denoiser(exact, process),
            lambda i: torch.randn(60, 2, 4, 4, generator=generator),
            y,
            cond_fn=cond_fn,
            ddim=ddim,
        )
        assert x.isfinite().all()
        nearest = torch.cdist(x.flatten(1), images.flatten(1) / 127.5 - 1).argmin(dim=1)
        found.append((labels[nearest] == y).float().mean().item())
    assert found[0] < 0.6
    assert found[1] > 0.95


def test_a_gradient_is_mapped_to_the_coordinates_of_the_sampler():
    """Compare with autograd of a log p of the flow's own x_t, which is scale * x."""
    diffusion = create_gaussian_diffusion(noise_schedule="flow", timestep_respacing="5")
    process, t = ReverseProcess(diffusion), torch.tensor([1, 3])
    seen = []

    def cond_fn(x_t, times, y):
        seen.append(times.tolist())
        return torch.cos(x_t)  # the gradient of sin

    x = recorded_input()[:, :1].requires_grad_()
    moved = process.guided_mean(torch.zeros_like(x), torch.ones(()), x, t, cond_fn, None)
    s = torch.tensor(seen[0])[:, None, None, None] / 1000
    log_p = torch.sin(((1 - s) ** 2 + s**2).sqrt() * x).sum()
    (expected,) = torch.autograd.grad(log_p, x)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
