"""Schedules and q_sample against recorded numbers; timesteps and noise against brute force."""

import json

import numpy as np
import pytest
import torch
from running import GOLDEN

from ds_classifier.common.keyed_noise import keyed_noise, keyed_uniform
from ds_classifier.diffusion import (
    LossSecondMomentSampler,
    UniformSampler,
    create_gaussian_diffusion,
    create_schedule_sampler,
    stratified,
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
    t, weights = UniformSampler(50).sample(keyed_uniform(0, "t", torch.arange(100_000)))
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
        keyed_uniform(0, "t", torch.arange(100_000))
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
    t, weights = sampler.sample(keyed_uniform(0, "t", torch.arange(200_000)))
    assert (t > 10).float().mean() > 0.7  # it prefers large losses
    assert abs((weights * loss_of_t[t]).mean() / loss_of_t.mean() - 1) < 0.01


def test_sampler_state_round_trip_and_names():
    sampler = create_schedule_sampler("loss-second-moment", 10, "cpu")
    sampler.update(torch.arange(10), torch.rand(10))
    copy = create_schedule_sampler("loss-second-moment", 10, "cpu")
    copy.load_state(sampler.state())
    assert all(torch.equal(copy.state()[k], v) for k, v in sampler.state().items())
    with pytest.raises(ValueError, match="schedule_sampler: got 'best'"):
        create_schedule_sampler("best", 10, "cpu")
