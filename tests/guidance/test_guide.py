"""Test guidance at any noise level: exact conditional predictions, diffusers' schedulers, EDM."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from small_models import CLASSES, noisy, recorded_input, relative_error, training_set
from torch import nn

from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.guidance import Guide, classifier_gradient, guide_denoiser
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.guide import guide_scheduler_output
from ds_classifier.guidance.sampling import ReverseProcess, exact_denoiser, sample

# alpha and sigma of x = alpha x_0 + sigma noise, as samplers of each kind have it.
LEVELS = {
    "epsilon": (0.8, 0.6),
    "sample": (1.0, 3.0),  # EDM
    "v_prediction": (0.6, 0.8),
    "flow_prediction": (0.3, 0.7),
}


def normal(*shape):
    """Return standard normal numbers, the same in each call, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


class ExactGuide(Guide):
    """The gradient of the exact posterior of a training set."""

    def __init__(self, exact):
        self.exact = exact

    def __call__(self, x, alpha, sigma, y):
        scale = (alpha**2 + sigma**2) ** 0.5
        alpha_bar = torch.full((len(x),), (alpha / scale) ** 2, dtype=torch.float64)
        return self.exact.posterior(x / scale, alpha_bar, y).gradient / scale


class FormulaGuide(Guide):
    """A guide whose gradient is a function of x, alpha, sigma and y."""

    def __init__(self, formula):
        self.formula = formula

    def __call__(self, x, alpha, sigma, y):
        return self.formula(x, alpha, sigma, y)


SINE = FormulaGuide(lambda x, alpha, sigma, y: torch.sin(x))


class ExactClassifier(nn.Module):
    """The best classifier of two classes N(m_k, variance), at the times of one process.

    alpha_sigma: a function of the time that gives alpha and sigma of the process, by its formula.
    """

    means, variance = torch.tensor([[0.9, -0.4], [-0.3, 0.7]], dtype=torch.float64), 0.2

    def __init__(self, alpha_sigma):
        super().__init__()
        self.alpha_sigma = alpha_sigma

    def forward(self, x, times):
        alpha, sigma = (level[:, None] for level in self.alpha_sigma(times.double()))
        return self.logits(x.flatten(1), alpha, sigma)

    @classmethod
    def logits(cls, x, alpha, sigma):
        alpha, sigma = (torch.as_tensor(level, dtype=torch.float64) for level in (alpha, sigma))
        away = x[:, None] - alpha[..., None] * cls.means
        return -away.square().sum(-1) / (2 * (alpha**2 * cls.variance + sigma**2))

    @classmethod
    def gradient(cls, x, alpha, sigma, y):
        """Return the gradient of log p(y | x) in closed form."""
        total = alpha**2 * cls.variance + sigma**2
        p = cls.logits(x.flatten(1), alpha, sigma).softmax(1)
        return (alpha / total * (cls.means[y] - p @ cls.means)).view_as(x)

    @classmethod
    def x_start(cls, x, alpha, sigma, y):
        """Return E[x_0 | x, y]."""
        total = alpha**2 * cls.variance + sigma**2
        rest = x.flatten(1) - alpha * cls.means[y]
        return (cls.means[y] + alpha * cls.variance / total * rest).view_as(x)


def of_table(process):
    """Return alpha and sigma as functions of t, for a process with betas."""

    def alpha_sigma(t):
        between = np.interp(t.numpy(), np.arange(1000), process.log_snr)
        alpha_bar = torch.from_numpy(between).sigmoid()
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    return alpha_sigma


def of_edm(c_noise):
    sigma = torch.exp(4 * c_noise)
    return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()


def of_vp(label):
    u = label / 999
    alpha = torch.exp(-0.05 * u - 19.9 * u**2 / 4)
    return alpha, (1 - alpha**2).sqrt()


FORMULAS = {
    "linear": None,
    "cosine": None,
    "flow": lambda t: (1 - t / 1000, t / 1000),
    "flow_logit_normal": lambda t: (1 - t / 1000, t / 1000),
    "edm": of_edm,
    "edm2": of_edm,
    "vp": of_vp,
}


@pytest.mark.parametrize("alpha_sigma", [(0.8, 0.6), (1.0, 0.4), (1.0, 5.0), (0.3, 0.7)])
@pytest.mark.parametrize("schedule", FORMULAS)
def test_a_classifier_of_any_process_guides_at_any_level(schedule, alpha_sigma):
    """Compare with the exact gradient at levels that the process was not trained at."""
    process = create_gaussian_diffusion(noise_schedule=schedule)
    guide = Guide(ExactClassifier(FORMULAS[schedule] or of_table(process)), process, scale=2.0)
    alpha, sigma = alpha_sigma
    x = alpha + sigma * normal(6, 2, 1, 1)
    y = torch.arange(6) % 2
    expected = 2 * ExactClassifier.gradient(x, alpha, sigma, y)
    assert relative_error(guide(x, alpha, sigma, y).numpy(), expected.numpy()) < 1e-3
    each = guide(x, torch.full((6,), alpha), torch.full((6,), sigma), y)
    torch.testing.assert_close(each, guide(x, alpha, sigma, y), rtol=1e-5, atol=1e-6)


def test_one_class_for_all_and_what_is_refused(classifier):
    """Give a number for y, as for `Predictor.gradient`, and inputs that do not fit."""
    guide, x = Guide(classifier, create_gaussian_diffusion()), recorded_input()
    each = torch.tensor([3, 3])
    assert torch.equal(guide(x, 0.8, 0.6, 3), guide(x, 0.8, 0.6, each))
    given = (guide_scheduler_output(OneScheduler, guide, x, 1, x, y) for y in (3, each))
    assert torch.equal(*given)
    with pytest.raises(ValueError, match=r"got classes y \[7, 7\]; need 0 to 6"):
        guide(x, 0.8, 0.6, 7)
    with pytest.raises(ValueError, match="prediction: got 'velocity'; need one of epsilon, sample"):
        guide.shift("velocity", x, 0.8, 0.6, 3)
    for wrong in (x[:, :1], x[..., :8, :8]):
        with pytest.raises(ValueError, match=r"x: got \[2, .*; need \[N, 3, 16, 16\]"):
            guide(wrong, 0.8, 0.6, 3)


def test_beyond_the_levels_of_the_process():
    """Compare with the exact gradient where the noise is stronger than any in training."""
    process = create_gaussian_diffusion(noise_schedule="edm")
    guide = Guide(ExactClassifier(of_edm), process)
    y = torch.arange(6) % 2
    for sigma in (30.0, 80.0, 1000.0):
        x = sigma * normal(6, 2, 1, 1)
        expected = ExactClassifier.gradient(x, 1.0, sigma, y)
        assert relative_error(guide(x, 1.0, sigma, y).numpy(), expected.numpy()) < 0.1
    x = normal(6, 2, 1, 1)
    assert not guide(x, 0.0, 1.0, y).any()
    cleanest = np.exp(-process.log_snr[0] / 2)  # nothing is cleaner than it
    x = x / 10
    torch.testing.assert_close(guide(x, 1.0, 0.0, y), guide(x, 1.0, cleanest, y), rtol=0.01, atol=0)


@pytest.mark.parametrize("prediction", LEVELS)
def test_shifts_make_predictions_conditional(prediction):
    """Guidance by the exact gradient gives E[prediction | x, y], for each kind of prediction."""
    alpha, sigma = LEVELS[prediction]
    x = alpha + sigma * normal(6, 2, 1, 1)
    y = torch.arange(6) % 2

    def predicted(x_start):
        noise = (x - alpha * x_start) / sigma
        return {
            "epsilon": noise,
            "sample": x_start,
            "v_prediction": alpha * noise - sigma * x_start,
            "flow_prediction": noise - x_start,
        }[prediction]

    exact = ExactClassifier
    weights = exact.logits(x.flatten(1), alpha, sigma).softmax(1).T[:, :, None, None, None]
    of_class = [exact.x_start(x, alpha, sigma, torch.full((6,), k)) for k in range(2)]
    unconditional = (weights * torch.stack(of_class)).sum(0)
    guide = FormulaGuide(exact.gradient)
    moved = predicted(unconditional) + guide.shift(prediction, x, alpha, sigma, y)
    expected = predicted(exact.x_start(x, alpha, sigma, y))
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-10)
    assert (moved - predicted(unconditional)).abs().max() > 0.01


@pytest.mark.parametrize("sigma", [2.0, torch.tensor([2.0, 2.0])])
def test_a_guided_denoiser(sigma):
    """Check a denoiser as k-diffusion and EDM call it, with arguments of its own."""
    x = normal(2, 3, 4, 4)

    def denoiser(x, sigma, label, *, cfg):
        return x / (1 + 2.0**2) + label + cfg

    guided = guide_denoiser(denoiser, SINE, torch.tensor([0, 1]))
    expected = denoiser(x, sigma, 0.5, cfg=3) + 4 * torch.sin(x)
    torch.testing.assert_close(guided(x, sigma, 0.5, cfg=3), expected)


def test_edm_samplers_reach_every_class():
    """Run Karras et al.'s Alg. 1 with the exact denoiser, guided by its posterior."""
    images, labels = training_set(m=30)
    exact = ExactDenoiser(images, labels, CLASSES)
    y = torch.arange(30) % CLASSES

    def denoiser(x, sigma):
        alpha_bar = torch.full((30,), float(1 / (1 + sigma**2)))
        return exact.posterior(x / (1 + sigma**2) ** 0.5, alpha_bar).x_start

    found = []
    for network in (denoiser, guide_denoiser(denoiser, ExactGuide(exact), y)):
        ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7
        sigmas = [*ramp.tolist(), 0.0]
        x = torch.randn(30, 2, 4, 4, generator=torch.Generator().manual_seed(3)) * sigmas[0]
        for sigma, following in itertools.pairwise(sigmas):
            slope = (x - network(x, sigma)) / sigma
            moved = x + (following - sigma) * slope
            if following:
                slope = (slope + (moved - network(moved, following)) / following) / 2
                moved = x + (following - sigma) * slope
            x = moved
        nearest = torch.cdist(x.flatten(1), images.flatten(1) / 127.5 - 1).argmin(dim=1)
        found.append((labels[nearest] == y).float().mean().item())
    assert found[0] < 0.7
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
    y = torch.tensor([0, 1])
    moved = guide_scheduler_output(OneScheduler, SINE, given, 1, x_t, y)
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
    assert not ExactGuide(ExactDenoiser(images, labels, CLASSES))(x_t, 0.0, 1.0, y).any()
    output = torch.sin(torch.cat([x_t, x_t], dim=1))
    moved = guide_scheduler_output(OneScheduler, SINE, output, torch.tensor(2), x_t, y)
    assert torch.equal(moved, output)


def test_scheduler_misuse_is_told(monkeypatch):
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    for timestep in (-1, 3, torch.tensor(2.5), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"timestep: got .*scheduler.timesteps, 0 to 2"):
            guide_scheduler_output(OneScheduler, SINE, x, timestep, x, y)
    monkeypatch.setattr(OneScheduler.config, "prediction_type", "flow")
    with pytest.raises(ValueError, match="prediction_type: got 'flow'"):
        guide_scheduler_output(OneScheduler, SINE, x, 1, x, y)
    monkeypatch.delattr(OneScheduler, "alphas_cumprod")
    with pytest.raises(ValueError, match="scheduler: got type; need one of diffusion, flow"):
        guide_scheduler_output(OneScheduler, SINE, x, 1, x, y)


def test_a_fractional_timestep_lies_between_its_neighbours():
    """Check diffusers' 'linspace' timesteps: alpha_bar is read off between the whole ones."""
    levels = []
    guide = FormulaGuide(lambda x, alpha, sigma, y: levels.append((alpha**2, sigma**2)) or x)
    x = torch.zeros(1, 1, 2, 2)
    for t in (0, 0.25, torch.tensor(1.5)):
        guide_scheduler_output(OneScheduler, guide, x, t, x, torch.tensor([0]))
    assert np.allclose(levels, [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusers_ddim_ends_where_ours_does(classifier, kind):
    """Compare with a guided loop through diffusers' scheduler, with the exact denoiser as model."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (an extra)")
    original = create_gaussian_diffusion(noise_schedule="linear")
    process = ReverseProcess(create_gaussian_diffusion(timestep_respacing="ddim10"))
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)
    exact = ExactDenoiser(images, torch.arange(20) % 7, 7)
    cond_fn, guide = (
        classifier_gradient(classifier, scale=2.0),
        Guide(classifier, original, scale=2.0),
    )
    y, start = torch.tensor([1, 5]), recorded_input()
    ours, _ = sample(
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
        output = guide_scheduler_output(scheduler, guide, output, t, x, y)
        x = scheduler.step(output, t, x).prev_sample
    assert relative_error(x.numpy(), ours.numpy()) < 1e-3


BETAS = dict(beta_start=1e-4, beta_end=0.02)
EDM = dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
SCHEDULERS = {  # by a name of the case: the class, arguments, predictions
    "DDPM": ("DDPMScheduler", BETAS, ("epsilon", "v_prediction")),
    "DDIM": ("DDIMScheduler", BETAS, ("epsilon", "v_prediction")),
    "DDIM, zero SNR": (
        "DDIMScheduler",
        BETAS | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        ("v_prediction",),
    ),
    "PNDM": ("PNDMScheduler", BETAS, ("epsilon", "v_prediction")),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", BETAS, ("epsilon", "v_prediction")),
    "DPM-Solver++, SDE": (
        "DPMSolverMultistepScheduler",
        BETAS | dict(algorithm_type="sde-dpmsolver++"),
        ("epsilon", "v_prediction"),
    ),
    "DPM-Solver++, flow": (
        "DPMSolverMultistepScheduler",
        dict(use_flow_sigmas=True),
        ("flow_prediction",),
    ),
    "UniPC": ("UniPCMultistepScheduler", BETAS, ("epsilon", "v_prediction")),
    "Euler": ("EulerDiscreteScheduler", BETAS, ("epsilon", "v_prediction")),
    "Euler, Karras's sigmas": (
        "EulerDiscreteScheduler",
        BETAS | dict(use_karras_sigmas=True),
        ("epsilon", "v_prediction"),
    ),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", BETAS, ("epsilon", "v_prediction")),
    "Heun": ("HeunDiscreteScheduler", BETAS, ("epsilon", "v_prediction")),
    "Euler, continuous": (
        "EulerDiscreteScheduler",
        BETAS | dict(timestep_type="continuous", sigma_min=0.002, sigma_max=80.0),
        ("v_prediction",),
    ),
    "flow": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0), ("flow_prediction",)),
    "flow, Heun": ("FlowMatchHeunDiscreteScheduler", {}, ("flow_prediction",)),
    "EDM": ("EDMEulerScheduler", EDM, ("epsilon", "v_prediction")),
    "EDM, DPM-Solver": ("EDMDPMSolverMultistepScheduler", EDM, ("epsilon", "v_prediction")),
}


@pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case in SCHEDULERS for kind in SCHEDULERS[case][2]]
)
def test_the_best_guide_reaches_every_class_by_diffusers(case, kind):
    """Check that exact guidance makes each scheduler sample images of the asked class.

    The exact denoiser is the model. Its level is read off the scheduler's sigmas where it has
    them, not off the timestep.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (an extra)")
    images, labels = training_set(m=30)
    exact = ExactDenoiser(images, labels, CLASSES)
    name, arguments, _ = SCHEDULERS[case]
    given = {} if name.startswith("FlowMatch") else dict(prediction_type=kind)
    y = torch.arange(30) % CLASSES
    found = []
    for guided in (False, True):
        scheduler = getattr(diffusers, name)(**given, **arguments)
        scheduler.set_timesteps(40)
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(30, 2, 4, 4, generator=generator)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for i, t in enumerate(scheduler.timesteps):
            x_t = x
            if hasattr(scheduler, "scale_model_input"):
                x_t = scheduler.scale_model_input(x, t)
            alpha, sigma = level_of(scheduler, case, i, t)
            scale = (alpha**2 + sigma**2) ** 0.5
            alpha_bar = torch.full((30,), (alpha / scale) ** 2, dtype=torch.float64)
            x_start = exact.posterior(x_t / scale, alpha_bar).x_start
            noise = (x_t - alpha * x_start) / sigma
            if case.startswith("EDM"):  # F of D = c_skip x + c_out F, for sigma_data 0.5
                s = sigma / alpha
                c_out = s * 0.5 / (s**2 + 0.25) ** 0.5 * (1 if kind == "epsilon" else -1)
                output = (x_start - 0.25 / (s**2 + 0.25) * x_t / alpha) / c_out
            else:
                output = {
                    "epsilon": noise,
                    "v_prediction": (alpha * noise - sigma * x_start) / scale,
                    "flow_prediction": noise - x_start,
                }[kind]
            if guided:
                output = guide_scheduler_output(scheduler, ExactGuide(exact), output, t, x_t, y)
            draws = {"generator": generator} if "generator" in takes(scheduler.step) else {}
            x = scheduler.step(output, t, x, **draws).prev_sample
        assert x.isfinite().all()
        nearest = torch.cdist(x.flatten(1).float(), images.flatten(1) / 127.5 - 1).argmin(dim=1)
        found.append((labels[nearest] == y).float().mean().item())
    assert found[0] < 0.7
    assert found[1] > 0.95


def level_of(scheduler, case, i, t):
    """Return alpha and sigma of the model's input in step i, from what the scheduler keeps."""
    sigmas = getattr(scheduler, "sigmas", None)
    if "flow" in case:
        sigma = float(sigmas[i])
        return 1 - sigma, sigma
    if sigmas is not None and case.startswith(("EDM", "Euler", "Heun")):
        sigma = float(sigmas[i])
        scale = (sigma**2 + (0.25 if case.startswith("EDM") else 1.0)) ** 0.5
        return 1 / scale, sigma / scale
    alpha_bar = float(scheduler.alphas_cumprod[int(t)])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def takes(function) -> set[str]:
    """Return the names of a function's parameters."""
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_diffusers_output_keeps_its_precision(classifier, dtype):
    """Check that a 16-bit UNet and classifier give an output in that dtype, near the fp32 one."""
    x, y = recorded_input(), torch.tensor([1, 5])
    output = torch.sin(3 * x)
    process = create_gaussian_diffusion()
    guide = Guide(classifier, process, scale=20.0)
    expected = guide_scheduler_output(OneScheduler, guide, output, 1, x, y)
    half = Guide(classifier.to(dtype), process, scale=20.0)
    assert half(x.to(dtype), 0.6, 0.8, y).dtype == torch.float32
    got = guide_scheduler_output(OneScheduler, half, output.to(dtype), 1, x.to(dtype), y)
    assert got.dtype == dtype
    assert relative_error(got.float().numpy(), expected.numpy()) < 0.03
    assert relative_error(output.numpy(), expected.numpy()) > 0.1  # guidance has an effect
