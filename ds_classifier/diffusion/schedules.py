"""Noise schedules: betas, continuous processes at T levels, and which levels a respaced one keeps.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (Improved DDPM). Tables are float64 numpy, as in
guided-diffusion. A continuous process draws its noise level from a distribution in training. Here
it has the T levels at the quantiles (i + 0.5) / T of that distribution, so that uniform t draws
them as the process does. To add a noise schedule, write a function that returns its betas or its
Levels, and add it to NOISE_SCHEDULES.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# The log-SNR given for a level without signal, in place of minus infinity, which no plot and no
# JSON has; that of the level before it if that is lower.
NO_SIGNAL = -20.0


class Levels(NamedTuple):
    """The T noise levels of a process x_t = alpha x_0 + sigma noise, ascending in noise.

    alphas_cumprod: [T] float64, alpha^2 / (alpha^2 + sigma^2).
    scale: [T] float64, sqrt(alpha^2 + sigma^2), which is 1 in a variance-preserving process.
    log_snr: [T] float64, log(alpha^2 / sigma^2), finite (see NO_SIGNAL).
    times: [T] what the network gets: int64, or float64 in a continuous process.
    shown: what x_t and times are, in words.
    """

    alphas_cumprod: np.ndarray
    scale: np.ndarray
    log_snr: np.ndarray
    times: np.ndarray
    shown: str


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


def scaled_linear_betas(steps: int) -> np.ndarray:
    """Return betas from 0.00085 to 0.012 at 1000 steps, evenly spaced in their square roots.

    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models": those of
    Stable Diffusion. They are scaled for other numbers of steps, as linear ones are.
    """
    return np.linspace(math.sqrt(0.00085), math.sqrt(0.012), steps, dtype=np.float64) ** 2 * (
        1000 / steps
    )


def zero_snr_betas(betas: np.ndarray) -> np.ndarray:
    """Return betas changed so that the last level has no signal; beta_T is 1.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Alg. 1.
    """
    alpha = np.sqrt(np.cumprod(1.0 - betas))
    alpha_bar = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def levels_of_betas(betas: np.ndarray, *, zero_snr: bool = False) -> Levels:
    """Return the levels of a DDPM with these betas, [T] float64. The network gets t.

    zero_snr: change the betas as `zero_snr_betas` does.
    Raises ValueError for a beta above 1, as few steps have.
    """
    if betas.max() > 1 or (zero_snr and len(betas) == 1):
        raise ValueError(
            f"diffusion_steps: got {len(betas)}, too few for the noise schedule, whose betas may "
            "not exceed 1; need more steps; do: use 1000"
        )
    betas = zero_snr_betas(betas) if zero_snr else betas
    alphas_cumprod = np.cumprod(1.0 - betas)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    lowest = min(NO_SIGNAL, log_snr[np.isfinite(log_snr)].min(initial=0.0))
    return Levels(
        alphas_cumprod, np.ones(len(betas)), np.maximum(log_snr, lowest), np.arange(len(betas)), "t"
    )


def _quantiles(steps: int) -> np.ndarray:
    """Return (i + 0.5) / T, [T] float64."""
    return (np.arange(steps) + 0.5) / steps


def _normal_quantiles(steps: int) -> np.ndarray:
    """Return the quantiles (i + 0.5) / T of the standard normal distribution, [T] float64."""
    inverse = statistics.NormalDist().inv_cdf
    return np.array([inverse(u) for u in _quantiles(steps)])


def _of_log_snr(log_snr: np.ndarray, times: np.ndarray, shown: str, scale=1.0) -> Levels:
    """Return the levels of a continuous process, for arrays [T]."""
    return Levels(
        1.0 / (1.0 + np.exp(-log_snr)), np.broadcast_to(scale, log_snr.shape), log_snr, times, shown
    )


def _flow(odds: np.ndarray) -> Levels:
    """Return the levels of x_s = (1 - s) x_0 + s noise, for odds s / (1 - s), [T]."""
    s = odds / (1.0 + odds)
    shown = "1000 s, for x_t = (1 - s) x_0 + s noise"
    return _of_log_snr(-2.0 * np.log(odds), 1000.0 * s, shown, np.hypot(1.0 - s, s))


def flow_levels(steps: int) -> Levels:
    """Return a rectified flow with s uniform (Liu et al. 2023, "Flow Straight and Fast")."""
    s = _quantiles(steps)
    return _flow(s / (1.0 - s))


def flow_logit_normal_levels(steps: int) -> Levels:
    """Return a rectified flow whose s has a standard normal logit (Esser et al. 2024, "Scaling
    Rectified Flow Transformers for High-Resolution Image Synthesis", section 3.1)."""
    return _flow(np.exp(_normal_quantiles(steps)))


def edm_levels(p_mean: float, p_std: float) -> Callable[[int], Levels]:
    """Return a function of T: x_0 + sigma noise, for ln(sigma) normal with this mean and deviation.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    Table 1: the network gets ln(sigma) / 4. It is shown (x_0 + sigma noise) / sqrt(1 + sigma^2).
    """

    def levels(steps: int) -> Levels:
        """Return the levels."""
        log_sigma = p_mean + p_std * _normal_quantiles(steps)
        shown = "ln(sigma) / 4, for x_t = (x_0 + sigma noise) / sqrt(1 + sigma^2)"
        return _of_log_snr(-2.0 * log_sigma, log_sigma / 4.0, shown)

    return levels


def vp_levels(steps: int) -> Levels:
    """Return the VP SDE with beta from 0.1 to 20 and u uniform in [1e-5, 1].

    Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
    Eq. 33. As in its code, the network gets 999 u.
    """
    u = 1e-5 + (1.0 - 1e-5) * _quantiles(steps)
    integral = 0.1 * u + (20.0 - 0.1) * u**2 / 2.0  # of beta; alpha_bar is exp(-integral)
    shown = "999 u, for the time u of the VP SDE, from 1e-5 to 1"
    return _of_log_snr(-np.log(np.expm1(integral)), 999.0 * u, shown)


_BETAS = {"linear": linear_betas, "cosine": cosine_betas, "scaled_linear": scaled_linear_betas}

# Each takes the number of levels T and returns Levels.
NOISE_SCHEDULES: dict[str, Callable[[int], Levels]] = {
    **{name: lambda steps, f=f: levels_of_betas(f(steps)) for name, f in _BETAS.items()},
    **{
        f"{name}_zero_snr": lambda steps, f=f: levels_of_betas(f(steps), zero_snr=True)
        for name, f in _BETAS.items()
    },
    "flow": flow_levels,
    "flow_logit_normal": flow_logit_normal_levels,
    "edm": edm_levels(-1.2, 1.2),  # Karras et al. 2022, Table 1
    "edm2": edm_levels(-0.4, 1.0),  # Karras et al. 2024, EDM2Loss in its code
    "vp": vp_levels,
}


def get_levels(noise_schedule: str, steps: int) -> Levels:
    """Return the levels of a noise schedule by its name.

    Raises ValueError for a name that NOISE_SCHEDULES does not have, or too few steps for it.
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
