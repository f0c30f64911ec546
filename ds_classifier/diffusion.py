"""The forward diffusion process: noise schedules, respacing, q_sample; and how timesteps are drawn.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (Improved DDPM). Tables are float64 numpy, as in
guided-diffusion; q_sample computes in fp32.

t / timesteps: index of a noise level of the (respaced) process, 0 .. num_timesteps - 1; 0 is almost
clean, the last almost pure noise.

A new noise schedule is a function and a line in NOISE_SCHEDULES; a new way of drawing timesteps is
a class and a line in SCHEDULE_SAMPLERS. torch is imported where it is used, so that `--help` can
name both at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def linear_betas(steps: int) -> np.ndarray:
    """Return betas from 1e-4 to 0.02 at 1000 steps, scaled for other numbers (DDPM section 4)."""
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def cosine_betas(steps: int) -> np.ndarray:
    """Return the betas of alpha_bar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), at most 0.999
    (Improved DDPM Eq. 17)."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    ratio = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.minimum(1.0 - np.array(ratio, dtype=np.float64), 0.999)


# Each takes the number of steps T and returns beta_1 .. beta_T, [T] float64.
NOISE_SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def get_betas(noise_schedule: str, steps: int) -> np.ndarray:
    """Return beta_1 .. beta_T of a schedule by its name, [steps] float64.

    Raises ValueError for a name that NOISE_SCHEDULES does not have.
    """
    if noise_schedule not in NOISE_SCHEDULES:
        raise ValueError(
            f"noise_schedule: got {noise_schedule!r}; need one of {', '.join(NOISE_SCHEDULES)}"
        )
    return NOISE_SCHEDULES[noise_schedule](steps)


def space_timesteps(steps: int, respacing: str) -> list[int]:
    """Which timesteps of a process of `steps` a respaced one keeps, ascending.

    "": all. "250": that many, evenly. "10,15,20": the process cut in equal sections, so many from
    each. "ddim25": every k-th, k the whole number that gives exactly 25 (Song et al. 2021).
    """
    if not respacing:
        return list(range(steps))
    problem = ValueError(
        f"timestep_respacing: got {respacing!r} for {steps} steps; need counts that fit, like 250 "
        "or 10,15,20, or ddimN where N steps come of a whole stride; do: choose other counts"
    )
    try:
        if respacing.startswith("ddim"):
            wanted = int(respacing[len("ddim") :])
            for stride in range(1, steps):
                if len(range(0, steps, stride)) == wanted:
                    return list(range(0, steps, stride))
            raise problem
        counts = [int(part) for part in respacing.split(",")]
    except ValueError:
        raise problem from None
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise problem
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # The stride is added up, not multiplied: its rounding error decides ties, as recorded.
        at = 0.0
        for _ in range(count):
            kept.add(start + round(at))
            at += stride
        start += size
    return sorted(kept)


class GaussianDiffusion:
    """q(x_t | x_0) of a process that may keep only some timesteps of the one it was defined by.

    num_timesteps: T of the respaced process. betas, alphas_cumprod: [T] float64 numpy.
    timestep_map: [T] the timestep of the original process that each t stands for.
    """

    def __init__(self, *, original_betas: np.ndarray, kept: list[int], rescale_timesteps: bool):
        original_alphas_cumprod = np.cumprod(1.0 - original_betas)
        alphas_cumprod = original_alphas_cumprod[kept]
        # The betas whose products pass through the kept alpha_bars.
        self.betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        self.timestep_map = list(kept)
        self.num_timesteps = len(kept)
        self.original_num_timesteps = len(original_betas)
        self.rescale_timesteps = rescale_timesteps
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return, on a device, sqrt(alpha_bar) and sqrt(1 - alpha_bar), fp32, and timestep_map,
        int64, each [T]."""
        import torch

        if device not in self._tables:
            signal = torch.from_numpy(np.sqrt(self.alphas_cumprod)).float()
            noise = torch.from_numpy(np.sqrt(1.0 - self.alphas_cumprod)).float()
            mapped = torch.tensor(self.timestep_map)
            self._tables[device] = (signal.to(device), noise.to(device), mapped.to(device))
        return self._tables[device]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (DDPM Eq. 4), fp32.

        x_start, noise: [N, ...]; t: [N] int64 in 0 .. T-1.
        """
        signal_scale, noise_scale, _ = self._tables_on(x_start.device)
        shape = (-1,) + (1,) * (x_start.dim() - 1)
        return signal_scale[t].view(shape) * x_start + noise_scale[t].view(shape) * noise

    def scale_timesteps(self, t: Tensor) -> Tensor:
        """t as the reference's respaced process hands it on: unchanged, since it maps and rescales
        only around the network (`SpacedDiffusion`); kept so that the two can be compared."""
        return t

    def model_timesteps(self, t: Tensor) -> Tensor:
        """What the network is called with at t: the original process's timestep, [N] int64; if
        rescale_timesteps, that times 1000 / original T, [N] fp32."""
        mapped = self._tables_on(t.device)[2][t]
        if self.rescale_timesteps:
            return mapped.float() * (1000.0 / self.original_num_timesteps)
        return mapped


def create_gaussian_diffusion(
    *,
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    timestep_respacing: str = "",
    rescale_timesteps: bool = False,
) -> GaussianDiffusion:
    """Build the diffusion process that the reference's flags of the same names describe.

    Raises ValueError for a schedule or respacing that does not exist.
    """
    if diffusion_steps < 1:
        raise ValueError(f"diffusion_steps: got {diffusion_steps}; need at least 1; do: use 1000")
    betas = get_betas(noise_schedule, diffusion_steps)
    if betas.max() > 1:
        raise ValueError(
            f"diffusion_steps: got {diffusion_steps} with the linear schedule, whose betas then "
            "exceed 1; need at least 20; do: use 1000"
        )
    return GaussianDiffusion(
        original_betas=betas,
        kept=space_timesteps(diffusion_steps, timestep_respacing),
        rescale_timesteps=rescale_timesteps,
    )


class UniformSampler:
    """Every timestep equally likely; all losses count alike."""

    needs_losses = False

    def __init__(self, num_timesteps: int, *, device: torch.device | str = "cpu"):
        self.num_timesteps = num_timesteps

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N]."""
        import torch

        t = (uniform * self.num_timesteps).long()
        return t, torch.ones_like(t, dtype=torch.float32)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        assert not state


class NoisySampler(UniformSampler):
    """p(t) = (2t + 1) / T^2: the noisiest levels twice as often as uniformly, the cleanest rarely.

    Losses count alike, so the objective leans to the noise levels at which a sampler decides what
    an image will be. README's "Does it guide?" tells what that brings.
    """

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        # The inverse of the cumulative ((t + 1) / T)^2; the largest number's root is rounded to 1.
        t, weights = super().sample(uniform.sqrt())
        return t.clamp_max(self.num_timesteps - 1), weights


class LossSecondMomentSampler:
    """p(t) proportional to sqrt(E[L_t^2]) over the last losses seen at t (Improved DDPM Eq. 18).

    Uniform until every t has `history` losses. Losses are weighted by 1 / (T p(t)), so that the
    objective's mean stays that of uniform t and only its variance changes. The reference has this
    sampler too, but neither feeds it losses nor uses its weights in classifier training.
    """

    needs_losses = True

    def __init__(
        self,
        num_timesteps: int,
        *,
        device: torch.device | str = "cpu",
        history: int = 10,
        uniform_share: float = 0.001,
    ):
        self.num_timesteps, self.history, self.uniform_share = num_timesteps, history, uniform_share
        import torch

        self._losses = torch.zeros(num_timesteps, history, device=device)
        self._counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """Return p(t), [T] fp32, which sums to 1."""
        import torch

        rms = self._losses.square().mean(dim=1).sqrt()
        learnt = rms / rms.sum().clamp_min(1e-12) * (1 - self.uniform_share)
        learnt = learnt + self.uniform_share / self.num_timesteps
        warm = (self._counts >= self.history).all()
        return torch.where(warm, learnt, torch.full_like(learnt, 1 / self.num_timesteps))

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps by inverse CDF, [N] int64, and loss weights, [N] fp32, for numbers in
        [0, 1), [N]."""
        import torch

        p = self.probabilities()
        cdf = p.double().cumsum(0)
        t = torch.searchsorted(cdf, uniform * cdf[-1], right=True).clamp_max(self.num_timesteps - 1)
        return t, 1.0 / (self.num_timesteps * p[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses of a step: t and losses, [B], of all ranks in order of position."""
        import torch

        finite = losses.isfinite()
        t, losses = t[finite], losses[finite].float()
        t, order = t.sort(stable=True)
        seen = torch.bincount(t, minlength=self.num_timesteps)  # [T] losses of this step at each t
        nth = torch.arange(len(t), device=t.device) - (seen.cumsum(0) - seen)[t]
        last = nth >= seen[t] - self.history  # of very many at one t, only the last fit
        slot = (self._counts[t] + nth) % self.history
        self._losses[t[last], slot[last]] = losses[order][last]
        self._counts += seen

    def state(self) -> dict[str, Tensor]:
        return {"losses": self._losses, "counts": self._counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._losses.copy_(state["losses"])
        self._counts.copy_(state["counts"])


SCHEDULE_SAMPLERS = {
    "uniform": UniformSampler,
    "noisy": NoisySampler,
    "loss-second-moment": LossSecondMomentSampler,
}


def create_schedule_sampler(
    name: str, num_timesteps: int, device: torch.device | str
) -> UniformSampler | LossSecondMomentSampler:
    """Return the sampler of timesteps by its name in SCHEDULE_SAMPLERS; raises ValueError."""
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(
            f"schedule_sampler: got {name!r}; need one of {', '.join(SCHEDULE_SAMPLERS)}"
        )
    return SCHEDULE_SAMPLERS[name](num_timesteps, device=device)
