"""Noise schedules, and which timesteps a respaced process keeps.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (Improved DDPM). Tables are float64 numpy, as in
guided-diffusion. To add a noise schedule, write a function and add it to NOISE_SCHEDULES.
"""

from __future__ import annotations

import math

import numpy as np


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
