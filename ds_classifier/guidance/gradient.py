"""Classifier guidance: the gradient that steers a diffusion model to a class.

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", Alg. 1 and 2. A cond_fn has
guided-diffusion's signature, cond_fn(x [N, C, S, S], t [N], y=[N]) -> [N, C, S, S], so it fits the
p_sample and ddim loops there as well as those of `sampling.py`; t are the timesteps that a network
is shown, those of the original process; y are int64. Those here raise ValueError for classes that
are not one for each image and, on a CPU, which need not wait for it, that do not exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier.guidance.exact_denoiser import ExactDenoiser

CondFn = Callable[..., Tensor]  # cond_fn(x_t, timesteps, y=classes) -> gradient


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
        with torch.enable_grad():
            # A pixel's share of the gradient may be too small for a sampler's 16 bits.
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_(True)
            logits = classifier(x, t).float()  # [N, K]
            asked = logits.gather(1, _classes(y, *logits.shape)[:, None])[:, 0]
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
        y = _classes(y, len(x), exact.num_classes)
        return exact.posterior(x, table.to(x.device)[t.long()], y).gradient * scale

    return cond_fn


def _classes(y: Tensor | None, n: int, num_classes: int) -> Tensor:
    """y, one class for each of n images; else ValueError."""
    need = f"need one for each of {n} images, [{n}] int64"
    if y is None:
        raise ValueError(f"guidance: got no classes y; {need}")
    if y.shape != (n,) or y.dtype != torch.int64:
        raise ValueError(f"guidance: got classes y {list(y.shape)} {y.dtype}; {need}")
    if y.device.type == "cpu" and bool(((y < 0) | (y >= num_classes)).any()):
        raise ValueError(f"guidance: got classes y {y.tolist()}; need 0 to {num_classes - 1}")
    return y


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
    model_output: [N, C or 2C, S, S]; a learned variance passes through. timestep: one, whole.
    model_input: [N, C, S, S], what the model was shown, so x_t = sqrt(alpha_bar) x_0 + noise.
    Where alpha_bar is 0, as in the last level of a schedule of zero terminal SNR, x_t tells nothing
    of its class, p(y | x_t) has no gradient, and the output passes as it is.
    Raises ValueError for another prediction_type, or a timestep that the process does not have.
    """
    # Waits for the device only where the timestep or the table lies on it.
    steps, wanted = len(scheduler.alphas_cumprod), torch.as_tensor(timestep).tolist()
    if wanted not in range(steps):
        raise ValueError(
            f"timestep: got {wanted}; need a whole one of the process, 0 to {steps - 1}; do: build "
            "the scheduler with timestep_spacing='leading'"
        )
    t = int(wanted)
    alpha_bar = float(scheduler.alphas_cumprod[t])
    if alpha_bar == 0:
        return model_output
    # grad log p(y | x_t) moves the score; in the output's own terms that is (alpha_bar = a):
    shift = {
        "epsilon": -math.sqrt(1.0 - alpha_bar),  # score = -noise / sqrt(1 - a)
        # Tweedie: x_0 = (x_t + (1 - a) score) / sqrt(a)
        "sample": (1.0 - alpha_bar) / math.sqrt(alpha_bar),
        # v = sqrt(a) noise - sqrt(1 - a) x_0
        "v_prediction": -math.sqrt((1.0 - alpha_bar) / alpha_bar),
    }
    kind = scheduler.config.prediction_type
    if kind not in shift:
        raise ValueError(f"prediction_type: got {kind!r}; need one of {', '.join(shift)}")
    n, channels = model_input.shape[:2]
    timesteps = torch.full((n,), t, device=model_input.device)
    gradient = cond_fn(model_input, timesteps, y=y)
    moved = model_output[:, :channels] + shift[kind] * gradient
    return torch.cat([moved.to(model_output.dtype), model_output[:, channels:]], dim=1)
