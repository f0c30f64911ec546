"""The forward diffusion process: its tables, q_sample, and the timesteps that the network gets.

Tables are float64 numpy, as in guided-diffusion; q_sample computes in fp32. torch is imported
inside functions, so that `--help` can list the names of schedules and samplers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ds_classifier.diffusion.schedules import get_betas, space_timesteps

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
