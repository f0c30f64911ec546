"""Compute the gradient that steers a diffusion model to a class (classifier guidance).

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", Alg. 1 and 2. A cond_fn has
guided-diffusion's signature, cond_fn(x [N, C, S, S], t [N], y=[N]) -> [N, C, S, S], so it fits the
p_sample and ddim loops there and those of `sampling.py`. t are the network's timesteps, of the
original process; y are int64. The cond_fn made here raise ValueError unless y has one class per
image. On a CPU they also check that the classes exist; on a GPU that would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.known_distribution import KnownDistribution

CondFn = Callable[..., Tensor]  # cond_fn(x_t, timesteps, y=classes) -> gradient


def classifier_gradient(
    classifier: nn.Module,
    *,
    scale: float = 1.0,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 1.0,
) -> CondFn:
    """Return a cond_fn: scale * grad_x log p(y | x_t), in fp32.

    classifier: forward(x_t [N, C, S, S], timesteps [N]) -> logits [N, K], in fp32, bf16 or fp16.
    joint_temperature, marginal_temperature: with these the cond_fn is
        scale * grad_x (joint * f_y - logsumexp_k(marginal * f_k)) for the logits f (Ma et al. 2023,
        "Elucidating the Design Space of Classifier-Guided Diffusion Generation", section 4); with
        both 1 that is grad_x log p(y | x_t).
    Where the classifier's numbers are not finite, as beyond 65504 in fp16, the gradient is nan.
    Finding that here would wait for the device in each step; `sampling.sample` looks for it.
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the gradient at x."""
        with torch.enable_grad():
            # In fp32 even for a 16-bit sampler, whose format may lose a pixel's small gradient.
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_(True)
            logits = classifier(x, t).float()  # [N, K]
            asked = logits.gather(1, _classes(y, *logits.shape)[:, None])[:, 0]
            marginal = torch.logsumexp(marginal_temperature * logits, dim=1)
            (gradient,) = torch.autograd.grad((joint_temperature * asked - marginal).sum(), x)
        return gradient * scale

    return cond_fn


def bayes_gradient(
    exact: ExactDenoiser | KnownDistribution, alphas_cumprod: np.ndarray, *, scale: float = 1.0
) -> CondFn:
    """Return a cond_fn: scale * grad_x log p(y | x_t) of the best classifier on a training set.

    alphas_cumprod: [T] float64, of the original process. The timesteps are indices in it.
    """
    table = torch.from_numpy(np.asarray(alphas_cumprod, dtype=np.float64))

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the gradient at x."""
        y = _classes(y, len(x), exact.num_classes)
        return exact.posterior(x, table.to(x.device)[t.long()], y).gradient * scale

    return cond_fn


def _classes(y: Tensor | None, n: int, num_classes: int) -> Tensor:
    """Return y. Raise ValueError unless it has one class for each of n images."""
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
    """Return the guided output to give to a diffusers scheduler's `step` (Alg. 2).

        for t in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, t)
            output = guide_scheduler_output(scheduler, cond_fn, unet(x_t, t).sample, t, x_t, y)
            x = scheduler.step(output, t, x).prev_sample

    scheduler: one with `alphas_cumprod`, such as DDPM, DDIM, PNDM, DPMSolverMultistep; its
        prediction_type may be epsilon, v_prediction or sample.
    model_output: [N, C or 2C, S, S]; a learned variance is returned unchanged.
    timestep: one whole number for all images.
    model_input: [N, C, S, S], the model's input x_t = sqrt(alpha_bar) x_0 + noise.
    y: [N] int64, the classes asked for.
    If alpha_bar is 0, as at the last level of a schedule with zero terminal SNR, x_t holds no
    information on the class, p(y | x_t) has no gradient, and model_output is returned unchanged.
    Raises ValueError for another prediction_type, or a timestep that the process does not have.
    """
    # This waits for the device only if the timestep or the table is on it.
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
    # grad log p(y | x_t) is added to the score. In the model's output this is (a = alpha_bar):
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
