"""The forward diffusion process (noise schedules, respacing, q_sample), and samplers of timesteps.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (Improved DDPM). Tables are float64 numpy, as in
guided-diffusion; q_sample computes in fp32.

t / timesteps: index of a noise level of the (respaced) process, 0 .. num_timesteps - 1; 0 is almost
clean, the last is almost pure noise.

To add a noise schedule, write a function and add it to NOISE_SCHEDULES; to add a way of drawing
timesteps, write a class and add it to SCHEDULE_SAMPLERS. torch is imported inside functions, so
that `--help` can list the names at once.
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
    """Return the timesteps of a process of `steps` that a respaced one keeps, ascending.

    respacing: "" keeps all; "250" keeps 250, evenly spaced; "10,15,20" divides the process into
    three equal sections and keeps 10, 15 and 20 of them; "ddim25" keeps every k-th, where the whole
    number k gives exactly 25 (Song et al. 2021).
    Raises ValueError for counts that do not fit.
    """
    if not respacing:
        return list(range(steps))
    problem = ValueError(
        f"timestep_respacing: got {respacing!r} for {steps} steps; need counts that fit, such as "
        "250 or 10,15,20, or ddimN where a whole stride gives N steps; do: choose other counts"
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
        # Add the stride up as the reference does: its rounding error decides ties.
        at = 0.0
        for _ in range(count):
            kept.add(start + round(at))
            at += stride
        start += size
    return sorted(kept)


class GaussianDiffusion:
    """The process q(x_t | x_0), which may keep only some timesteps of the original process.

    num_timesteps: T of the respaced process.
    betas, alphas_cumprod: [T] float64 numpy.
    timestep_map: [T] timesteps of the original process.
    """

    def __init__(self, *, original_betas: np.ndarray, kept: list[int], rescale_timesteps: bool):
        original_alphas_cumprod = np.cumprod(1.0 - original_betas)
        alphas_cumprod = original_alphas_cumprod[kept]
        # The betas with which the respaced process has the kept alpha_bars.
        self.betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        self.timestep_map = list(kept)
        self.num_timesteps = len(kept)
        self.original_num_timesteps = len(original_betas)
        self.rescale_timesteps = rescale_timesteps
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return sqrt(alpha_bar), sqrt(1 - alpha_bar), [T] fp32, and timestep_map, [T] int64."""
        import torch

        if device not in self._tables:
            signal = torch.from_numpy(np.sqrt(self.alphas_cumprod)).float()
            noise = torch.from_numpy(np.sqrt(1.0 - self.alphas_cumprod)).float()
            mapped = torch.tensor(self.timestep_map)
            self._tables[device] = (signal.to(device), noise.to(device), mapped.to(device))
        return self._tables[device]

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of x_t = alpha x_0 + sigma noise, [N] fp32 each, for t [N]."""
        signal_scale, noise_scale, _ = self._tables_on(t.device)
        return signal_scale[t], noise_scale[t]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, [N, ...] fp32.

        x_start, noise: [N, ...]; t: [N] int64 in 0 .. T-1. DDPM Eq. 4.
        """
        signal, sigma = self.scales(t)
        shape = (-1,) + (1,) * (x_start.dim() - 1)
        return signal.view(shape) * x_start + sigma.view(shape) * noise

    def scale_timesteps(self, t: Tensor) -> Tensor:
        """Return t unchanged, as the reference's `SpacedDiffusion` does.

        The reference maps and rescales t only around the network, like `model_timesteps`. This
        function exists so that the two can be compared.
        """
        return t

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Return the timesteps that the network gets: those of the original process, [N] int64.

        If rescale_timesteps is set, they are multiplied by 1000 / original T, [N] fp32.
        """
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
            f"diffusion_steps: got {diffusion_steps} with the {noise_schedule} schedule, whose "
            "betas then exceed 1; need more steps; do: use 1000"
        )
    return GaussianDiffusion(
        original_betas=betas,
        kept=space_timesteps(diffusion_steps, timestep_respacing),
        rescale_timesteps=rescale_timesteps,
    )


class UniformSampler:
    """Draws every timestep with the same probability; all loss weights are 1."""

    needs_losses = False

    def __init__(self, num_timesteps: int, *, device: torch.device | str = "cpu"):
        self.num_timesteps = num_timesteps

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N]."""
        import torch

        t = (uniform * self.num_timesteps).long()
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
        # The inverse of the CDF ((t + 1) / T)^2. The root of the largest number may round to 1.
        t, weights = super().sample(uniform.sqrt())
        return t.clamp_max(self.num_timesteps - 1), weights


class LossSecondMomentSampler:
    """Draws t with p(t) ~ sqrt(E[L_t^2]) over the last losses at t (Improved DDPM Eq. 18).

    The draw is uniform until every t has `history` losses. Losses are weighted by 1 / (T p(t)), so
    that the mean of the objective is that of uniform t, and only its variance changes. The
    reference has this sampler too, but in classifier training it neither feeds losses to it nor
    uses its weights.
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
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N].

        The timesteps are the inverse CDF of the numbers.
        """
        import torch

        p = self.probabilities()
        cdf = p.double().cumsum(0)
        t = torch.searchsorted(cdf, uniform * cdf[-1], right=True).clamp_max(self.num_timesteps - 1)
        return t, 1.0 / (self.num_timesteps * p[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Add the losses of a step. t, losses: [B], of all ranks, in order of position."""
        import torch

        finite = losses.isfinite()
        t, losses = t[finite], losses[finite].float()
        t, order = t.sort(stable=True)
        seen = torch.bincount(t, minlength=self.num_timesteps)  # [T] losses of this step at each t
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
    name: str, num_timesteps: int, device: torch.device | str
) -> UniformSampler | LossSecondMomentSampler:
    """Return a sampler of timesteps by its name.

    Raises ValueError for a name that SCHEDULE_SAMPLERS does not have.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(
            f"schedule_sampler: got {name!r}; need one of {', '.join(SCHEDULE_SAMPLERS)}"
        )
    return SCHEDULE_SAMPLERS[name](num_timesteps, device=device)
