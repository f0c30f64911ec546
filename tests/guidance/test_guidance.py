"""Test the guidance gradient against recorded numbers, autograd and diffusers' schedulers."""

import inspect

import numpy as np
import pytest
import torch
from running import GOLDEN
from small_models import CLASSES, DEFAULT, filled, noisy, relative_error, training_set

from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.gradient import (
    bayes_gradient,
    classifier_gradient,
    guide_scheduler_output,
)
from ds_classifier.guidance.sampling import ReverseProcess, exact_denoiser, sample
from ds_classifier.model import create_classifier


@pytest.fixture
def classifier():
    model = create_classifier(**DEFAULT)
    model.load_state_dict(filled(model.state_dict()))
    return model.eval().requires_grad_(False)


def recorded_input():
    x = np.random.RandomState(7).standard_normal((2, 3, 16, 16)).astype(np.float32)
    return torch.from_numpy(x)


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
        cond_fn = bayes_gradient(exact, process.alphas_cumprod)
    with pytest.raises(ValueError, match=words):
        cond_fn(x, torch.tensor([3, 750]), y=y)


def test_the_best_guide_reaches_every_class():
    """Check that exact guidance at scale 1 makes the exact denoiser class-conditional."""
    images, labels = training_set(m=30)
    process = ReverseProcess(
        create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="50")
    )
    original = create_gaussian_diffusion(noise_schedule="cosine")
    exact = ExactDenoiser(images, labels, CLASSES)
    y = torch.arange(60) % CLASSES
    generator = torch.Generator().manual_seed(3)
    found = []
    for cond_fn in (None, bayes_gradient(exact, original.alphas_cumprod)):
        x, _ = sample(
            process,
            exact_denoiser(exact, process),
            lambda i: torch.randn(60, 2, 4, 4, generator=generator),
            y,
            cond_fn=cond_fn,
        )
        nearest = torch.cdist(x.flatten(1), images.flatten(1) / 127.5 - 1).argmin(dim=1)
        found.append((labels[nearest] == y).float().mean().item())
    assert found[0] < 0.6
    assert found[1] > 0.95


class OneScheduler:
    """A scheduler with only the attributes that the adapter reads."""

    class config:
        prediction_type = "epsilon"

    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_moves_the_same_x_start(kind, monkeypatch):
    """Check that x_0 moves by (1 - a) / sqrt(a) times the gradient (Tweedie) for each type."""
    monkeypatch.setattr(OneScheduler.config, "prediction_type", kind)
    x_t, x_start = noisy(training_set()[0], 0.5), noisy(training_set()[0], 0.9)
    a = torch.tensor(0.5, dtype=torch.float64)
    noise = (x_t - a.sqrt() * x_start) / (1 - a).sqrt()
    velocity = a.sqrt() * noise - (1 - a).sqrt() * x_start
    output = {"epsilon": noise, "sample": x_start, "v_prediction": velocity}[kind]
    variance = torch.ones_like(output)
    given = torch.cat([output, variance], dim=1)
    moved = guide_scheduler_output(
        OneScheduler, lambda x, t, y: torch.sin(x), given, 1, x_t, torch.tensor([0, 1])
    )
    assert torch.equal(moved[:, 2:], variance)
    moved = moved[:, :2]
    x_start_of = {
        "epsilon": lambda o: (x_t - (1 - a).sqrt() * o) / a.sqrt(),
        "sample": lambda o: o,
        "v_prediction": lambda o: a.sqrt() * x_t - (1 - a).sqrt() * o,
    }[kind]
    expected = x_start + (1 - a) / a.sqrt() * torch.sin(x_t)
    torch.testing.assert_close(x_start_of(moved), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_level_without_signal_is_not_guided(kind, monkeypatch):
    """Check that the output is returned unchanged where alpha_bar is 0.

    x_t is then pure noise and p(y | x_t) = p(y), whose gradient is 0, as the exact posterior's is.
    A classifier's gradient is never exactly 0 there, and Tweedie would move x_0 infinitely far.
    """
    monkeypatch.setattr(OneScheduler.config, "prediction_type", kind)
    monkeypatch.setattr(OneScheduler, "alphas_cumprod", torch.tensor([0.9, 0.5, 0.0]))
    images, labels = training_set()
    x_t, y = noisy(images, 0.0), torch.tensor([0, 1])
    exact = bayes_gradient(ExactDenoiser(images, labels, CLASSES), np.array([0.9, 0.5, 0.0]))
    assert not exact(x_t, torch.tensor([2, 2]), y=y).any()
    output = torch.sin(torch.cat([x_t, x_t], dim=1))
    moved = guide_scheduler_output(
        OneScheduler, lambda x, t, y: torch.ones_like(x), output, torch.tensor(2), x_t, y
    )
    assert torch.equal(moved, output)


def test_scheduler_misuse_is_told(monkeypatch):
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    for timestep in (torch.tensor(1.5), -1, 3, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"timestep: got .*0 to 2; do: .*leading"):
            guide_scheduler_output(OneScheduler, None, x, timestep, x, y)
    monkeypatch.setattr(OneScheduler.config, "prediction_type", "flow")
    with pytest.raises(ValueError, match="prediction_type"):
        guide_scheduler_output(OneScheduler, None, x, 1, x, y)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusers_ddim_ends_where_ours_does(classifier, kind):
    """Compare with a guided loop through diffusers' scheduler, with the exact denoiser as model."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (an extra)")
    original = create_gaussian_diffusion(noise_schedule="linear")
    process = ReverseProcess(create_gaussian_diffusion(timestep_respacing="ddim10"))
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)
    exact = ExactDenoiser(images, torch.arange(20) % 7, 7)
    cond_fn = classifier_gradient(classifier, scale=2.0)
    y, start = torch.tensor([1, 5]), recorded_input()
    ours = sample(
        process,
        exact_denoiser(exact, process),
        lambda i: start,
        y,
        cond_fn=cond_fn,
        ddim=True,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=kind,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(10)
    x = start
    for t in scheduler.timesteps:
        a = torch.tensor(original.alphas_cumprod[t])
        x_start = exact.posterior(x, a.expand(2)).x_start
        a = a.float()
        noise = (x - a.sqrt() * x_start) / (1 - a).sqrt()
        output = {
            "epsilon": noise,
            "sample": x_start,
            "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x_start,
        }[kind]
        output = guide_scheduler_output(scheduler, cond_fn, output, t, x, y)
        x = scheduler.step(output, t, x).prev_sample
    assert relative_error(x.numpy(), ours.numpy()) < 1e-3


SCHEDULERS = {
    "DDPMScheduler": {},
    "DDIMScheduler": {},
    "PNDMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler, SDE": {"algorithm_type": "sde-dpmsolver++"},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_best_guide_reaches_every_class_by_diffusers(name, kind):
    """Check that exact guidance makes each scheduler sample images of the asked class."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (an extra)")
    images, labels = training_set(m=30)
    exact = ExactDenoiser(images, labels, CLASSES)
    process = create_gaussian_diffusion(noise_schedule="linear")
    bayes = bayes_gradient(exact, process.alphas_cumprod)
    y = torch.arange(30) % CLASSES
    found = []
    for guided in (False, True):
        scheduler = getattr(diffusers, name.split(",")[0])(
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type=kind,
            timestep_spacing="leading",
            **SCHEDULERS[name],
        )
        scheduler.set_timesteps(40)
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(30, 2, 4, 4, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, t)
            a = torch.tensor(process.alphas_cumprod[int(t)])
            x_start = exact.posterior(x_t, a.expand(30)).x_start
            a = a.float()
            noise = (x_t - a.sqrt() * x_start) / (1 - a).sqrt()
            velocity = a.sqrt() * noise - (1 - a).sqrt() * x_start
            output = {"epsilon": noise, "v_prediction": velocity}[kind]
            if guided:
                output = guide_scheduler_output(scheduler, bayes, output, t, x_t, y)
            draws = {"generator": generator} if "generator" in takes(scheduler.step) else {}
            x = scheduler.step(output, t, x, **draws).prev_sample
        assert x.isfinite().all()
        nearest = torch.cdist(x.flatten(1), images.flatten(1) / 127.5 - 1).argmin(dim=1)
        found.append((labels[nearest] == y).float().mean().item())
    assert found[0] < 0.7
    assert found[1] > 0.95


def takes(function) -> set[str]:
    """Return the names of a function's parameters."""
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_diffusers_output_keeps_its_precision(classifier, dtype):
    """Check that a 16-bit UNet and classifier give an output in that dtype, near the fp32 one."""
    x, y = recorded_input(), torch.tensor([1, 5])
    output = torch.sin(3 * x)
    expected = guide_scheduler_output(
        OneScheduler, classifier_gradient(classifier, scale=20.0), output, 1, x, y
    )
    half = classifier_gradient(classifier.to(dtype), scale=20.0)
    assert half(x.to(dtype), torch.tensor([3, 750]), y=y).dtype == torch.float32
    got = guide_scheduler_output(OneScheduler, half, output.to(dtype), 1, x.to(dtype), y)
    assert got.dtype == dtype
    assert relative_error(got.float().numpy(), expected.numpy()) < 0.03
    assert relative_error(output.numpy(), expected.numpy()) > 0.1  # guidance has an effect
