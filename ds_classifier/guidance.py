"""Classifier guidance: the gradient that steers a diffusion model to a class.

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", Alg. 1 and 2. A cond_fn has
guided-diffusion's signature, cond_fn(x [N, C, S, S], t [N], y=[N]) -> [N, C, S, S], so it fits the
p_sample and ddim loops there as well as those of `sampling.py`; t are the timesteps that a network
is shown, those of the original process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier.exact_denoiser import ExactDenoiser

CondFn = Callable[..., Tensor]


def classifier_gradient(
    classifier: nn.Module,
    *,
    scale: float = 1.0,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 1.0,
) -> CondFn:
    """scale * grad_x log p(y | x_t), in fp32, of a classifier in fp32, bf16 or fp16.

    With temperatures, scale * grad_x (joint * f_y - logsumexp_k(marginal * f_k)) of its logits f
    (Ma et al. 2023, "Elucidating the Design Space of Classifier-Guided Diffusion Generation",
    section 4); at 1 and 1 that is log p(y | x_t).
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            raise ValueError("guidance: got no classes y; need one for each picture")
        with torch.enable_grad():
            # A pixel's share of the gradient may be too small for a sampler's 16 bits.
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_(True)
            logits = classifier(x, t).float()  # [N, K]
            asked = logits.gather(1, y.view(-1, 1))[:, 0]
            marginal = torch.logsumexp(marginal_temperature * logits, dim=1)
            (gradient,) = torch.autograd.grad((joint_temperature * asked - marginal).sum(), x)
        return gradient * scale

    return cond_fn


def bayes_gradient(
    exact: ExactDenoiser, alphas_cumprod: np.ndarray, *, scale: float = 1.0
) -> CondFn:
    """scale * grad_x log p(y | x_t) of the best possible classifier on a training set.

    alphas_cumprod: [T] float64, of the original process, whose timesteps t are.
    """
    table = torch.from_numpy(np.asarray(alphas_cumprod, dtype=np.float64))

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            raise ValueError("guidance: got no classes y; need one for each picture")
        return exact.posterior(x, table.to(x.device)[t.long()], y).gradient * scale

    return cond_fn


def guide_scheduler_output(
    scheduler: Any,
    cond_fn: CondFn,
    model_output: Tensor,
    timestep: Tensor | int,
    model_input: Tensor,
    y: Tensor,
) -> Tensor:
    """What to give a diffusers scheduler's `step` instead of the model's output (Alg. 2).

        for t in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, t)
            output = guide_scheduler_output(scheduler, cond_fn, unet(x_t, t).sample, t, x_t, y)
            x = scheduler.step(output, t, x).prev_sample

    scheduler: one with `alphas_cumprod`, such as DDPM, DDIM, PNDM, DPMSolverMultistep; its
        prediction_type may be epsilon, v_prediction or sample.
    model_output: [N, C or 2C, S, S]; a learned variance passes through. timestep: whole.
    model_input: [N, C, S, S], what the model was shown, so x_t = sqrt(alpha_bar) x_0 + noise.
    Raises ValueError for another prediction_type, or a timestep between two of the process.
    """
    timestep = torch.as_tensor(timestep, device=model_input.device)
    index = timestep.round().long()
    if bool((index != timestep).any()):
        raise ValueError(
            f"timestep: got {timestep.tolist()}; need whole timesteps of the process; do: build "
            "the scheduler with timestep_spacing='leading'"
        )
    alpha_bar = scheduler.alphas_cumprod.to(model_input.device).double()[index]
    # grad log p(y | x_t) moves the score; in the output's own terms that is (alpha_bar = a):
    shift = {
        "epsilon": -(1.0 - alpha_bar).sqrt(),  # score = -noise / sqrt(1 - a)
        # Tweedie: x_0 = (x_t + (1 - a) score) / sqrt(a)
        "sample": (1.0 - alpha_bar) / alpha_bar.sqrt(),
        # v = sqrt(a) noise - sqrt(1 - a) x_0
        "v_prediction": -((1.0 - alpha_bar) / alpha_bar).sqrt(),
    }
    kind = scheduler.config.prediction_type
    if kind not in shift:
        raise ValueError(f"prediction_type: got {kind!r}; need one of {', '.join(shift)}")
    n, channels = model_input.shape[:2]
    gradient = cond_fn(model_input, index.expand(n), y=y)
    moved = model_output[:, :channels] + shift[kind].float() * gradient
    return torch.cat([moved.to(model_output.dtype), model_output[:, channels:]], dim=1)
