"""Compute the gradient that steers a diffusion model to a class (classifier guidance).

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", Alg. 1 and 2. A cond_fn has
guided-diffusion's signature, cond_fn(x [N, C, S, S], t [N], y=[N]) -> [N, C, S, S], so it fits the
p_sample and ddim loops there and those of `sampling.py`. t are the network's timesteps, of the
original process; y are int64. The cond_fn made here raise ValueError unless y has one class per
image. On a CPU they also check that the classes exist; on a GPU that would wait for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser, ExactPosterior
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


def exact_posterior(
    exact: ExactDenoiser | KnownDistribution,
    diffusion: GaussianDiffusion,
    x_t: Tensor,
    t: Tensor,
    y: Tensor | None = None,
) -> ExactPosterior:
    """Return the exact posterior at x_t of any process; its gradient is with respect to x_t.

    x_t: [N, C, S, S]. t: [N] int64 in 0 .. T-1. y: see `ExactDenoiser.posterior`.
    """
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod).to(t.device)[t]
    scale = torch.from_numpy(diffusion.scale).to(t.device, x_t.dtype)[t][:, None, None, None]
    posterior = exact.posterior(x_t / scale, alpha_bar, y)
    if y is None:
        return posterior
    return dataclasses.replace(posterior, gradient=posterior.gradient / scale)


def bayes_gradient(
    exact: ExactDenoiser | KnownDistribution, diffusion: GaussianDiffusion, *, scale: float = 1.0
) -> CondFn:
    """Return a cond_fn: scale * grad_x log p(y | x_t) of the best classifier on a training set.

    diffusion: the original process, to whose levels the timesteps belong.
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the gradient at x."""
        y = _classes(y, len(x), exact.num_classes)
        times = torch.from_numpy(diffusion.times).to(t.device)
        levels = torch.searchsorted(times, t.to(times.dtype)).clamp_max(len(times) - 1)
        return exact_posterior(exact, diffusion, x, levels, y).gradient * scale

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
