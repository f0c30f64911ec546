"""The forward diffusion process: its tables, q_sample, and the times that the network gets.

Tables are float64 numpy, as in guided-diffusion; q_sample computes in fp32. torch is imported
inside functions, so that `--help` can list the names of schedules and samplers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ds_classifier.diffusion.schedules import Levels, get_levels, space_timesteps

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class GaussianDiffusion:
    """The process q(x_t | x_0): x_t = alpha x_0 + sigma noise, at T levels of ascending noise.

    x_t / scale is a point of a variance-preserving process (DDPM Eq. 4): x_t / scale =
    sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.

    num_timesteps: T, the number of levels kept of the original process.
    betas, alphas_cumprod: [T] float64 numpy, of x_t / scale.
    scale: [T] float64 numpy, sqrt(alpha^2 + sigma^2); 1 except for flows.
    log_snr: [T] float64 numpy, log(alpha^2 / sigma^2), falling; finite for a level without signal.
    times: [T] numpy, what the network gets: int64, or fp32 in a continuous process.
    shown: what the network gets and is shown, in words.
    timestep_map: [T] levels of the original process.
    """

    def __init__(self, *, original: Levels, kept: list[int], rescale_timesteps: bool):
        alphas_cumprod = original.alphas_cumprod[kept]
        # The betas with which the respaced process has the kept alpha_bars.
        self.betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        self.scale, self.log_snr = original.scale[kept], original.log_snr[kept]
        self.timestep_map = list(kept)
        self.num_timesteps = len(kept)
        self.original_num_timesteps = len(original.times)
        self.times, self.shown = original.times[kept], original.shown
        if self.times.dtype != np.int64:
            self.times = self.times.astype(np.float32)
        if rescale_timesteps:
            factor = np.float32(1000.0 / self.original_num_timesteps)
            self.times, self.shown = self.times.astype(np.float32) * factor, "t * 1000 / T"
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha and sigma, [T] fp32, and the times, [T]."""
        import torch

        if device not in self._tables:
            signal = torch.from_numpy(self.scale * np.sqrt(self.alphas_cumprod)).float()
            noise = torch.from_numpy(self.scale * np.sqrt(1.0 - self.alphas_cumprod)).float()
            times = torch.from_numpy(self.times)
            self._tables[device] = (signal.to(device), noise.to(device), times.to(device))
        return self._tables[device]

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of x_t = alpha x_0 + sigma noise, [N] fp32 each, for t [N]."""
        signal_scale, noise_scale, _ = self._tables_on(t.device)
        return signal_scale[t], noise_scale[t]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = alpha x_0 + sigma noise, [N, ...] fp32.

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
        """Return what the network gets for levels t, [N] int64 or fp32 (see `times`)."""
        return self._tables_on(t.device)[2][t]


def create_gaussian_diffusion(
    *,
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    timestep_respacing: str = "",
    rescale_timesteps: bool = False,
) -> GaussianDiffusion:
    """Build the diffusion process that the reference's flags of the same names describe.

    noise_schedule: one of NOISE_SCHEDULES, of which linear and cosine are the reference's.
    Raises ValueError for a schedule or respacing that does not exist, or for rescaled timesteps of
    a continuous process.
    """
    if diffusion_steps < 1:
        raise ValueError(f"diffusion_steps: got {diffusion_steps}; need at least 1; do: use 1000")
    original = get_levels(noise_schedule, diffusion_steps)
    if rescale_timesteps and original.times.dtype != np.int64:
        raise ValueError(
            f"rescale_timesteps: got True for {noise_schedule}, whose network gets "
            f"{original.shown.split(',')[0]} with any number of steps; do: leave it out"
        )
    return GaussianDiffusion(
        original=original,
        kept=space_timesteps(diffusion_steps, timestep_respacing),
        rescale_timesteps=rescale_timesteps,
    )
