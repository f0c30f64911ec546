"""The forward diffusion process (noise schedules, respacing, q_sample), and samplers of timesteps.

t / timesteps: index of a noise level of the (respaced) process, 0 .. num_timesteps - 1; 0 is almost
clean, the last is almost pure noise.
"""

from ds_classifier.diffusion.process import GaussianDiffusion, create_gaussian_diffusion
from ds_classifier.diffusion.schedules import NOISE_SCHEDULES, space_timesteps
from ds_classifier.diffusion.timesteps import (
    SCHEDULE_SAMPLERS,
    LossSecondMomentSampler,
    NoisySampler,
    UniformSampler,
    create_schedule_sampler,
    high_noise_weights,
    range_in_words,
    stratified,
    timestep_range,
)

__all__ = [
    "NOISE_SCHEDULES",
    "SCHEDULE_SAMPLERS",
    "GaussianDiffusion",
    "LossSecondMomentSampler",
    "NoisySampler",
    "UniformSampler",
    "create_gaussian_diffusion",
    "create_schedule_sampler",
    "high_noise_weights",
    "range_in_words",
    "space_timesteps",
    "stratified",
    "timestep_range",
]
