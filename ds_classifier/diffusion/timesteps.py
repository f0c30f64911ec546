"""Samplers of timesteps: which noise levels are trained how often.

A sampler maps numbers in [0, 1) to timesteps. `stratified` draws these numbers so that every step
trains all noise levels: of a global batch of B samples, one lies in each of B equal strata. A
sampler may be restricted to a range of levels: it then draws from its own distribution given that t
lies there, by the same numbers, whose strata so become strata of the range.

To add a way of drawing timesteps, write a class and add it to SCHEDULE_SAMPLERS. torch is imported
inside functions, so that `--help` can list the names at once.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ds_classifier.diffusion.process import GaussianDiffusion

LOG_SNR = "snr:"  # begins a range in log-SNR


def timestep_range(text: str, diffusion: GaussianDiffusion) -> range:
    """Return the timesteps that a --t_range names, ascending and without a gap; "" names all.

    text: "LOW:HIGH" names t with LOW <= t / T < HIGH, and "snr:LOW:HIGH" those whose log-SNR, the
        natural log(alpha^2 / sigma^2), is from LOW to HIGH.
    Raises ValueError for text of another form, for LOW >= HIGH, for shares outside of 0 to 1, and
    for a range without a level.
    """
    steps, snr = diffusion.num_timesteps, diffusion.log_snr
    if not text:
        return range(steps)
    in_snr = text.startswith(LOG_SNR)
    try:
        low, high = (Fraction(part) for part in text.removeprefix(LOG_SNR).split(":"))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--t_range: got {text!r}; need LOW:HIGH, such as 0.0:0.6, or snr:LOW:HIGH, such as "
            "snr:-4:4"
        ) from None
    if low >= high:
        raise ValueError(f"--t_range: got {text!r}; need LOW below HIGH")
    if in_snr:
        (inside,) = np.nonzero((snr >= float(low)) & (snr <= float(high)))
        levels = range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(0)
    elif low < 0 or high > 1:
        raise ValueError(
            f"--t_range: got {text!r}; need shares of the noise levels, from 0 to 1; do: write "
            "snr:LOW:HIGH for a range in log-SNR"
        )
    else:
        levels = range(math.ceil(low * steps), math.ceil(high * steps))
    if not levels:
        raise ValueError(
            f"--t_range: got {text!r}, in which no noise level lies; need one at least of the "
            f"{steps}, whose log-SNR falls from {snr[0]:.2f} to {snr[-1]:.2f}"
        )
    return levels


def range_in_words(levels: range, diffusion: GaussianDiffusion) -> str:
    """Return the first and the last of a range of timesteps, with their log-SNR, in words."""
    first, last = levels[0], levels[-1]
    return (
        f"t = {first} to {last} of 0 to {diffusion.num_timesteps - 1}, log-SNR "
        f"{diffusion.log_snr[first]:.1f} to {diffusion.log_snr[last]:.1f}"
    )


def stratified(seed: int, positions: Tensor, global_batch: int) -> Tensor:
    """Return the numbers in [0, 1), [N] float64, whose timesteps the samples at positions get.

    The numbers of a global batch have one in each of its strata, in the order of the positions,
    which a random number of the batch turns around. So each is uniform, and independent of those of
    other steps, whatever the place of an image in its batch.
    positions: [N] int64, in the training stream. The numbers depend on (seed, position) alone.
    """
    from ds_classifier.common.keyed_noise import keyed_uniform

    of_sample, of_batch = keyed_uniform(
        seed, {"t": positions, "t of batch": positions // global_batch}
    )
    return ((positions % global_batch + of_sample) / global_batch + of_batch) % 1.0


def high_noise_weights(diffusion: GaussianDiffusion, numbers: int, highest: float) -> Tensor:
    """Return the weights of the losses at all timesteps, [T] fp32, of which the mean is 1.

    They are proportional to 1 + (highest - 1) / (1 + D SNR(t) / 2) for images of D numbers. This
    rises from 1 to `highest`, and is half way where the energy of the signal, of numbers that have
    a variance of 1 / 2, is that of one number of the noise. At less signal p(class | x_t) hardly
    differs from the class frequencies: a classifier that is a little worse than these, with a
    gradient ten times too long, has next to no loss, and stays so. The weights do not move the
    minimum of the loss at any timestep. On labels they also enlarge its variance, since a label is
    luck there; a posterior is not.
    """
    import torch

    snr = torch.from_numpy(diffusion.log_snr).exp()
    weights = 1 + (highest - 1) / (1 + numbers * snr / 2)
    return (weights / weights.mean()).float()


class UniformSampler:
    """Draws every timestep with the same probability; all loss weights are 1.

    levels: the timesteps that are drawn, without a gap; None: all.
    """

    needs_losses = False

    def __init__(
        self,
        num_timesteps: int,
        *,
        levels: range | None = None,
        device: torch.device | str = "cpu",
    ):
        self.num_timesteps = num_timesteps
        self.levels = levels or range(num_timesteps)

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N]."""
        import torch

        t = self.levels[0] + (uniform * len(self.levels)).long()
        return t, torch.ones_like(t, dtype=torch.float32)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        assert not state


class NoisySampler(UniformSampler):
    """Draws t with p(t) = (2t + 1) / T^2: the noisiest levels twice as often as uniformly.

    All loss weights are 1, so the objective favours the noise levels at which a sampler decides
    what an image will show. The effect on guidance is measured in docs/guidance.md.
    """

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N]."""
        import torch

        # The inverse of the CDF ((t + 1) / T)^2, restricted to the levels. The root may round to a
        # neighbour of the first or the last one.
        low, high = ((t / self.num_timesteps) ** 2 for t in (self.levels.start, self.levels.stop))
        t = ((low + uniform * (high - low)).sqrt() * self.num_timesteps).long()
        t = t.clamp(self.levels[0], self.levels[-1])
        return t, torch.ones_like(t, dtype=torch.float32)


class LossSecondMomentSampler:
    """Draws t with p(t) ~ sqrt(E[L_t^2]) over the last losses at t (Improved DDPM Eq. 18).

    The draw is uniform until every t has `history` losses. Losses are weighted by 1 / (T p(t)), so
    that the mean of the objective is that of uniform t, and only its variance changes. The
    reference has this sampler too, but in classifier training it neither feeds losses to it nor
    uses its weights.

    levels: the timesteps that are drawn, without a gap; None: all. T is then their number.
    """

    needs_losses = True

    def __init__(
        self,
        num_timesteps: int,
        *,
        levels: range | None = None,
        device: torch.device | str = "cpu",
        history: int = 10,
        uniform_share: float = 0.001,
    ):
        import torch

        self.levels = levels or range(num_timesteps)
        self.history, self.uniform_share = history, uniform_share
        self._losses = torch.zeros(len(self.levels), history, device=device)
        self._counts = torch.zeros(len(self.levels), dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """Return p(t) of the levels, [T] fp32, which sums to 1."""
        import torch

        rms = self._losses.square().mean(dim=1).sqrt()
        learnt = rms / rms.sum().clamp_min(1e-12) * (1 - self.uniform_share)
        learnt = learnt + self.uniform_share / len(self.levels)
        warm = (self._counts >= self.history).all()
        return torch.where(warm, learnt, torch.full_like(learnt, 1 / len(self.levels)))

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N].

        The timesteps are the inverse CDF of the numbers.
        """
        import torch

        p = self.probabilities()
        cdf = p.double().cumsum(0)
        place = torch.searchsorted(cdf, uniform * cdf[-1], right=True).clamp_max(len(cdf) - 1)
        return self.levels[0] + place, 1.0 / (len(cdf) * p[place])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Add the losses of a step. t, losses: [B], of all ranks, in order of position."""
        import torch

        finite = losses.isfinite()
        t, losses = t[finite] - self.levels[0], losses[finite].float()
        t, order = t.sort(stable=True)
        seen = torch.bincount(t, minlength=len(self.levels))  # [T] losses of this step at each t
        nth = torch.arange(len(t), device=t.device) - (seen.cumsum(0) - seen)[t]
        last = nth >= seen[t] - self.history  # at most `history` losses per t are kept
        slot = (self._counts[t] + nth) % self.history
        self._losses[t[last], slot[last]] = losses[order][last]
        self._counts += seen

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        return {"losses": self._losses, "counts": self._counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self._losses.copy_(state["losses"])
        self._counts.copy_(state["counts"])


SCHEDULE_SAMPLERS = {
    "uniform": UniformSampler,
    "noisy": NoisySampler,
    "loss-second-moment": LossSecondMomentSampler,
}


def create_schedule_sampler(
    name: str, num_timesteps: int, device: torch.device | str, *, levels: range | None = None
) -> UniformSampler | LossSecondMomentSampler:
    """Return a sampler of timesteps by its name.

    levels: the timesteps that are drawn, without a gap; None: all.
    Raises ValueError for a name that SCHEDULE_SAMPLERS does not have.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(
            f"schedule_sampler: got {name!r}; need one of {', '.join(SCHEDULE_SAMPLERS)}"
        )
    return SCHEDULE_SAMPLERS[name](num_timesteps, levels=levels, device=device)
