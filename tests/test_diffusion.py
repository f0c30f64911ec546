"""Schedules and q_sample against recorded numbers; timesteps and noise against brute force."""

import json

import numpy as np
import pytest
import torch
from running import GOLDEN

from ds_classifier.common.keyed_noise import keyed_noise, keyed_uniform
from ds_classifier.diffusion import (
    SCHEDULE_SAMPLERS,
    LossSecondMomentSampler,
    UniformSampler,
    create_gaussian_diffusion,
    create_schedule_sampler,
    high_noise_weights,
    stratified,
    timestep_range,
)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["", "50", "ddim25"])
def test_agrees_with_the_golden_schedules(schedule, respacing):
    golden = np.load(GOLDEN / "schedules.npz")
    diffusion = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing=respacing)
    name = f"{schedule}_{respacing}"
    assert np.abs(diffusion.betas[::40] - golden[f"{name}_betas"]).max() < 1e-12
    assert np.abs(diffusion.alphas_cumprod[::40] - golden[f"{name}_alphas_cumprod"]).max() < 1e-12
    assert diffusion.timestep_map[::40] == golden[f"{name}_timestep_map"].tolist()


@pytest.mark.parametrize("case", range(4))
def test_agrees_with_the_recorded_schedules(reference, case):
    described = json.loads((reference / "cases.json").read_text())["schedules"][case]
    recorded = np.load(reference / "schedules.npz")
    flags = {k: v for k, v in described.items() if k not in ("input_seed", "q_sample")}
    diffusion = create_gaussian_diffusion(**flags)
    assert np.abs(diffusion.betas - recorded[f"s{case}_betas"]).max() < 1e-12
    assert np.abs(diffusion.alphas_cumprod - recorded[f"s{case}_alphas_cumprod"]).max() < 1e-12
    assert diffusion.timestep_map == recorded[f"s{case}_timestep_map"].tolist()
    t = torch.from_numpy(recorded[f"s{case}_t"])
    assert np.array_equal(diffusion.scale_timesteps(t).numpy(), recorded[f"s{case}_scaled_t"])
    draw = np.random.RandomState(described["input_seed"]).standard_normal
    x_start, noise = (torch.from_numpy(draw((4, 3, 8, 8)).astype(np.float32)) for _ in range(2))
    x_t = diffusion.q_sample(x_start, t, noise).numpy()
    assert np.abs(x_t - recorded[f"s{case}_q_sample"]).max() < 1e-6


def logit(p):
    return np.log(p) - np.log1p(-p)


def formula(name, steps):
    """Return alpha, sigma and the network's time of a process by its published formula.

    The levels are the quantiles (i + 0.5) / T of the noise level's distribution, which scipy has.
    """
    from scipy import stats

    quantile = (np.arange(steps) + 0.5) / steps
    if name.startswith("flow"):
        normal = stats.norm.ppf(quantile)
        s = np.exp(normal) / (1 + np.exp(normal)) if name == "flow_logit_normal" else quantile
        return 1 - s, s, 1000 * s
    if name.startswith("edm"):
        mean, std = {"edm": (-1.2, 1.2), "edm2": (-0.4, 1.0)}[name]
        sigma = stats.lognorm.ppf(quantile, s=std, scale=np.exp(mean))
        c_in, c_noise = 1 / np.sqrt(1 + sigma**2), np.log(sigma) / 4  # Karras et al., Table 1
        return c_in, c_in * sigma, c_noise
    u = 1e-5 + (1 - 1e-5) * quantile
    log_mean = -0.25 * u**2 * (20 - 0.1) - 0.5 * u * 0.1  # score_sde's VPSDE.marginal_prob
    return np.exp(log_mean), np.sqrt(-np.expm1(2 * log_mean)), 999 * u


@pytest.mark.parametrize("steps", [1, 10, 1000])
@pytest.mark.parametrize("name", ["flow", "flow_logit_normal", "edm", "edm2", "vp"])
def test_continuous_processes_follow_their_formulas(name, steps):
    diffusion = create_gaussian_diffusion(noise_schedule=name, diffusion_steps=steps)
    alpha, sigma, times = formula(name, steps)
    near = dict(rtol=0, atol=1e-12)
    np.testing.assert_allclose(diffusion.scale * np.sqrt(diffusion.alphas_cumprod), alpha, **near)
    np.testing.assert_allclose(
        diffusion.scale * np.sqrt(1 - diffusion.alphas_cumprod), sigma, **near
    )
    np.testing.assert_allclose(diffusion.log_snr, 2 * np.log(alpha / sigma), **near)
    assert (np.diff(diffusion.log_snr) < 0).all()
    t = torch.arange(steps)
    np.testing.assert_allclose(diffusion.model_timesteps(t).numpy(), times, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(torch.stack(diffusion.scales(t)), [alpha, sigma], atol=1e-7)
    x_start, noise = torch.randn(2, steps, 5, generator=torch.Generator().manual_seed(0))
    x_t = alpha[:, None] * x_start.numpy() + sigma[:, None] * noise.numpy()
    np.testing.assert_allclose(diffusion.q_sample(x_start, t, noise), x_t, atol=1e-6)


def test_uniform_t_draws_sigma_as_edm_does():
    """Compare the distribution of sigma under uniform t with EDM's own draw, a log-normal."""
    from scipy import stats

    diffusion = create_gaussian_diffusion(noise_schedule="edm")
    t, _ = UniformSampler(1000).sample(keyed_uniform(0, {"t": torch.arange(5000)})[0])
    log_sigma = 4 * diffusion.model_timesteps(t).numpy()
    drawn = np.random.RandomState(0).standard_normal(5000) * 1.2 - 1.2
    assert stats.ks_2samp(log_sigma, drawn).pvalue > 0.01


def test_betas_follow_their_formulas():
    """Compare with the recursion alpha_bar_t = alpha_bar_{t-1} (1 - beta_t), in plain numbers."""
    diffusion = create_gaussian_diffusion(noise_schedule="scaled_linear")
    zero = create_gaussian_diffusion(noise_schedule="scaled_linear_zero_snr")
    alpha_bar, all_bars = 1.0, []
    for i in range(1000):
        alpha_bar *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
        all_bars.append(alpha_bar)
    np.testing.assert_allclose(diffusion.alphas_cumprod, all_bars, rtol=1e-12)
    roots = np.sqrt(all_bars)
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    np.testing.assert_allclose(zero.alphas_cumprod, roots**2, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(diffusion.log_snr, logit(np.array(all_bars)), atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
def test_a_level_without_signal(name):
    """alpha is 0 there, and the log-SNR is a number lower than all others."""
    diffusion = create_gaussian_diffusion(noise_schedule=f"{name}_zero_snr")
    assert diffusion.alphas_cumprod[-1] == 0
    assert diffusion.betas[-1] == 1
    assert diffusion.alphas_cumprod[0] == pytest.approx(
        create_gaussian_diffusion(noise_schedule=name).alphas_cumprod[0], rel=1e-12
    )
    assert np.isfinite(diffusion.log_snr).all()
    assert diffusion.log_snr[-1] == -20 < diffusion.log_snr[-2]
    x_start, noise = torch.ones(1, 4), torch.tensor([[0.3, -1.0, 2.0, 0.0]])
    assert torch.equal(diffusion.q_sample(x_start, torch.tensor([999]), noise), noise)


TABLES = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (an extra)")
    theirs = diffusers.DDIMScheduler(**TABLES[name]).alphas_cumprod
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **TABLES[name]).alphas_cumprod
    ours = create_gaussian_diffusion(noise_schedule=name).alphas_cumprod
    ours_zero = create_gaussian_diffusion(noise_schedule=f"{name}_zero_snr").alphas_cumprod
    assert np.abs(theirs.numpy() - ours).max() < 1e-6
    assert np.abs(zero.numpy() - ours_zero).max() < 1e-6


def test_a_flow_is_that_of_diffusers():
    """Compare scale_noise at the flow's own timesteps with q_sample."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (an extra)")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusion = create_gaussian_diffusion(noise_schedule="flow")
    level = torch.tensor([999, 500, 0])
    times = diffusion.model_timesteps(level)
    scheduler.set_timesteps(sigmas=(times / 1000).tolist())
    assert np.abs(scheduler.timesteps.numpy() - times.numpy()).max() < 1e-3
    x_start, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = scheduler.scale_noise(x_start, scheduler.timesteps, noise)
    assert (theirs - diffusion.q_sample(x_start, level, noise)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["flow", "edm", "vp", "scaled_linear_zero_snr"])
def test_a_respaced_process_keeps_levels_of_the_original(name):
    whole = create_gaussian_diffusion(noise_schedule=name)
    few = create_gaussian_diffusion(noise_schedule=name, timestep_respacing="7")
    kept = few.timestep_map
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 7)
    t = torch.arange(7)
    for ours, theirs in zip(few.scales(t), whole.scales(torch.tensor(kept)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(few.model_timesteps(t), whole.model_timesteps(torch.tensor(kept)))
    assert np.array_equal(few.log_snr, whole.log_snr[kept])


def test_the_network_sees_the_original_timesteps():
    """t = 1 of ddim25 is timestep 40 of the original process, not 1 as in the reference."""
    respaced = create_gaussian_diffusion(timestep_respacing="ddim25")
    assert respaced.model_timesteps(torch.tensor([0, 1, 24])).tolist() == [0, 40, 960]
    rescaled = create_gaussian_diffusion(diffusion_steps=4000, rescale_timesteps=True)
    assert rescaled.model_timesteps(torch.tensor([0, 2000])).tolist() == [0.0, 500.0]


@pytest.mark.parametrize(
    "flags",
    [
        dict(noise_schedule="sine"),
        dict(timestep_respacing="ddim600"),
        dict(timestep_respacing="2000"),
        dict(timestep_respacing="ten"),
        dict(diffusion_steps=0),
        dict(diffusion_steps=4),
        dict(diffusion_steps=1, noise_schedule="cosine_zero_snr"),
        dict(rescale_timesteps=True, noise_schedule="flow"),
    ],
)
def test_refuses_schedules_that_do_not_exist(flags):
    name, value = next(iter(flags.items()))
    with pytest.raises(ValueError, match=name) as error:
        create_gaussian_diffusion(**flags)
    assert str(value) in str(error.value)


def test_noise_depends_only_on_the_position():
    positions = torch.tensor([5, 17, 1_000_003, 2**40])
    together = keyed_noise(0, "noise", positions, (8, 8, 3))
    for i, position in enumerate(positions):
        alone = keyed_noise(0, "noise", position[None], (8, 8, 3))
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together, keyed_noise(1, "noise", positions, (8, 8, 3)))
    assert not torch.equal(together, keyed_noise(0, "other", positions, (8, 8, 3)))


def test_noise_is_standard_normal():
    from scipy import stats

    noise = keyed_noise(3, "noise", torch.arange(200), (1000,)).double().numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    # Neighbouring positions and neighbouring pixels are independent.
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[:, :500].ravel(), noise[:, 500:].ravel())[0, 1]) < 0.01


def test_uniform_timesteps_cover_all_levels_evenly():
    t, weights = UniformSampler(50).sample(keyed_uniform(0, {"t": torch.arange(100_000)})[0])
    counts = torch.bincount(t, minlength=50)
    assert counts.shape == (50,)
    assert (counts.double() / 2000 - 1).abs().max() < 0.1
    assert torch.equal(weights, torch.ones(100_000))


def test_a_step_trains_a_timestep_in_each_stratum():
    batch, steps = 64, 5000
    u = stratified(3, torch.arange(batch * steps), batch).view(steps, batch)
    assert u.min() >= 0
    assert u.max() < 1
    gaps = u.sort(dim=1).values.diff(dim=1)  # of neighbours: at most two widths of a stratum
    assert gaps.max() < 2 / batch
    # No place in the batch, and so no lane of images, gets more of one noise level than of another.
    counts = torch.stack([torch.histc(place, 10, 0, 1) for place in u.T])  # [batch, 10]
    assert (counts / steps - 0.1).abs().max() < 5 * (0.1 * 0.9 / steps) ** 0.5
    # A place's numbers in successive steps are independent.
    assert abs(torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1]) < 0.05


def test_stratified_numbers_depend_on_the_position_alone():
    positions = torch.arange(640, 1280)
    whole = stratified(3, positions, 64)
    assert torch.equal(stratified(3, positions[100:107], 64), whole[100:107])
    assert not torch.equal(stratified(4, positions, 64), whole)


def test_noisy_timesteps_are_drawn_in_proportion_to_their_noise():
    t, weights = create_schedule_sampler("noisy", 50, "cpu").sample(
        keyed_uniform(0, {"t": torch.arange(100_000)})[0]
    )
    counts = torch.bincount(t, minlength=50).double()
    assert counts.shape == (50,)
    # The larger of two uniform draws has this distribution.
    pairs = torch.cartesian_prod(torch.arange(50), torch.arange(50)).amax(dim=1)
    expected = torch.bincount(pairs).double() * (100_000 / 2500)
    assert ((counts - expected) / expected.sqrt()).abs().max() < 4
    assert torch.equal(weights, torch.ones(100_000))


@pytest.mark.parametrize("name", ["uniform", "noisy"])
def test_the_largest_number_below_1_gives_the_last_timestep(name):
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    t, _ = create_schedule_sampler(name, 1000, "cpu").sample(largest)
    assert t.tolist() == [999]


class LossHistory:
    """A plain version of Improved DDPM's history: the last `length` losses at every t."""

    def __init__(self, steps, length):
        self.losses = [[] for _ in range(steps)]
        self.length = length

    def update(self, t, losses):
        for one_t, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if np.isfinite(loss):
                self.losses[one_t] = (self.losses[one_t] + [loss])[-self.length :]

    def probabilities(self, uniform_share):
        steps = len(self.losses)
        if any(len(at_t) < self.length for at_t in self.losses):
            return np.full(steps, 1 / steps)
        rms = np.array([np.sqrt(np.mean(np.square(at_t))) for at_t in self.losses])
        return (1 - uniform_share) * rms / rms.sum() + uniform_share / steps


def test_loss_second_moment_keeps_the_last_losses_of_each_timestep():
    sampler, by_hand = LossSecondMomentSampler(6, history=4), LossHistory(6, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        t = torch.randint(0, 6, (23,), generator=generator)
        losses = torch.rand(23, generator=generator) * (t + 1)
        losses[torch.rand(23, generator=generator) < 0.1] = float("nan")  # bad samples
        sampler.update(t, losses)
        by_hand.update(t, losses)
        assert np.allclose(sampler.probabilities().numpy(), by_hand.probabilities(0.001), atol=1e-6)


def test_loss_second_moment_leaves_the_mean_loss_unchanged():
    """Importance weights undo the sampling: E_p[w L] = E_uniform[L]."""
    sampler = LossSecondMomentSampler(20, history=2)
    loss_of_t = torch.arange(20.0) ** 2 + 1
    for _ in range(2):
        sampler.update(torch.arange(20), loss_of_t)
    t, weights = sampler.sample(keyed_uniform(0, {"t": torch.arange(200_000)})[0])
    assert (t > 10).float().mean() > 0.7  # it prefers large losses
    assert abs((weights * loss_of_t[t]).mean() / loss_of_t.mean() - 1) < 0.01


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow", "edm"])
@pytest.mark.parametrize("numbers", [1024, 3 * 256**2])
def test_high_noise_counts_more_the_fewer_numbers_an_image_has(schedule, numbers):
    """Compare with a count by hand at each level. A level without a signal counts the most."""
    diffusion = create_gaussian_diffusion(noise_schedule=schedule)
    weights = high_noise_weights(diffusion, numbers, 10).tolist()
    alphas, sigmas = diffusion.scales(torch.arange(diffusion.num_timesteps))
    by_hand = []
    for alpha, sigma in zip(alphas.tolist(), sigmas.tolist(), strict=True):
        signal = numbers * alpha**2 / 2
        by_hand.append((signal + 10 * sigma**2) / (signal + sigma**2))
    mean = sum(by_hand) / len(by_hand)
    assert weights == pytest.approx([weight / mean for weight in by_hand], rel=1e-3)
    assert weights == sorted(weights)


def test_sampler_state_round_trip_and_names():
    sampler = create_schedule_sampler("loss-second-moment", 10, "cpu")
    sampler.update(torch.arange(10), torch.rand(10))
    copy = create_schedule_sampler("loss-second-moment", 10, "cpu")
    copy.load_state(sampler.state())
    assert all(torch.equal(copy.state()[k], v) for k, v in sampler.state().items())
    with pytest.raises(ValueError, match="schedule_sampler: got 'best'"):
        create_schedule_sampler("best", 10, "cpu")


# ------------------------------------------------------------------------- a range of levels


def cosine(steps=50):
    return create_gaussian_diffusion(diffusion_steps=steps, noise_schedule="cosine")


def test_a_range_names_the_levels_that_a_count_by_hand_finds():
    diffusion = cosine(100)
    for low, high in ((0, 60), (7, 29), (50, 100), (0, 1), (99, 100)):  # hundredths
        by_hand = [t for t in range(100) if low <= t < high]
        assert list(timestep_range(f"{low / 100}:{high / 100}", diffusion)) == by_hand
    assert timestep_range("0.055:0.065", diffusion) == range(6, 7)
    by_hand = [t for t in range(100) if -4 <= diffusion.log_snr[t] <= 2.5]
    assert 0 < len(by_hand) < 100
    assert list(timestep_range("snr:-4:2.5", diffusion)) == by_hand
    assert timestep_range("", diffusion) == timestep_range("0:1", diffusion) == range(100)
    respaced = create_gaussian_diffusion(diffusion_steps=1000, timestep_respacing="10")
    assert timestep_range("0.0:0.6", respaced) == range(6)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0.5", "need LOW:HIGH"),
        ("0:0.5:1", "need LOW:HIGH"),
        ("a:b", "need LOW:HIGH"),
        ("nan:1", "need LOW:HIGH"),
        ("log:0:1", "need LOW:HIGH"),
        ("0.5:0.5", "need LOW below HIGH"),
        ("snr:4:-4", "need LOW below HIGH"),
        ("-0.1:0.5", "from 0 to 1"),
        ("0.5:600", "from 0 to 1"),
        ("0.501:0.509", "no noise level lies"),
        ("snr:50:60", "no noise level lies"),
    ],
)
def test_a_range_that_names_no_levels_is_refused(text, problem):
    with pytest.raises(ValueError, match=f"--t_range: got '{text}'.*{problem}"):
        timestep_range(text, cosine())


@pytest.mark.parametrize("name", list(SCHEDULE_SAMPLERS))
def test_a_range_restricts_a_samplers_own_distribution(name):
    """The histogram inside the range is that of the draws over all levels that fall into it."""
    levels, numbers = range(13, 31), keyed_uniform(0, {"t": torch.arange(200_000)})[0]

    def counts(levels):
        sampler = create_schedule_sampler(name, 50, "cpu", levels=levels)
        if sampler.needs_losses:
            t = torch.arange(levels.start, levels.stop).repeat(10)
            sampler.update(t, (t + 1).float())
        t, _ = sampler.sample(numbers)
        return torch.bincount(t, minlength=50).double()

    inside, everywhere = counts(levels), counts(range(50))
    assert inside.shape == (50,)
    assert inside[13:31].sum() == 200_000
    expected = everywhere[13:31] / everywhere[13:31].sum() * 200_000
    assert ((inside[13:31] - expected) / expected.sqrt()).abs().max() < 5


@pytest.mark.parametrize("name", list(SCHEDULE_SAMPLERS))
def test_stratified_numbers_stay_stratified_in_a_range(name):
    """Uniform t trains each of 18 levels about once in 18 samples; any sampler is monotone."""
    sampler = create_schedule_sampler(name, 50, "cpu", levels=range(13, 31))
    numbers = stratified(3, torch.arange(18 * 40), 18).view(40, 18)
    t = torch.stack([sampler.sample(row)[0] for row in numbers])
    assert ((t >= 13) & (t <= 30)).all()
    if name != "noisy":  # the loss-second-moment sampler begins uniformly
        assert (t.sort(dim=1).values.diff(dim=1) <= 2).all()
    by_number = t.flatten()[numbers.flatten().argsort()]
    assert (by_number.diff() >= 0).all()
    again, _ = sampler.sample(numbers[7, 3:5])  # a pure function of the numbers
    assert torch.equal(again, t[7, 3:5])
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sampler.sample(edges)[0].tolist() == [13, 30]


def test_loss_second_moment_in_a_range_keeps_the_mean_over_it():
    """E_p[w L] is the mean loss over the range; levels outside have no history to wait for."""
    sampler = create_schedule_sampler("loss-second-moment", 50, "cpu", levels=range(20, 40))
    loss_of_t = (torch.arange(50.0) - 15) ** 2
    for _ in range(10):
        sampler.update(torch.arange(20, 40), loss_of_t[20:40])
    t, weights = sampler.sample(keyed_uniform(0, {"t": torch.arange(200_000)})[0])
    assert (t > 30).float().mean() > 0.7
    assert abs((weights * loss_of_t[t]).mean() / loss_of_t[20:40].mean() - 1) < 0.01
