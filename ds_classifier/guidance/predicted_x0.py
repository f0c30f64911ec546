"""Guide by a classifier of clean images, shown the denoiser's prediction of x_0.

The gradient of log p(y | x_0(x_t)) with respect to x_t, through the denoiser (Ma et al. 2023,
"Elucidating the Design Space of Classifier-Guided Diffusion Generation"; Bansal et al. 2023,
"Universal Guidance for Diffusion Models", Eq. 6). It needs no noise-aware classifier, and a
backward through the denoiser in each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.gradient import CondFn, classifier_gradient
from ds_classifier.guidance.known_distribution import KnownDistribution
from ds_classifier.guidance.sampling import Denoiser, Prediction, ReverseProcess

STEP = 1e-4  # of the difference that stands for a derivative, in standard deviations of the noise


def predicted_x0_gradient(
    classifier: nn.Module,
    denoiser: Denoiser,
    process: ReverseProcess,
    clean: Tensor,
    **temperatures: float,
) -> CondFn:
    """Return a cond_fn: the gradient of log p(y | x_0(x_t)) with respect to x_t, in fp32.

    denoiser: differentiable with respect to x_t, see `differentiable`.
    process: the reverse process that is sampled. clean: the timestep of clean images, [1].
    temperatures: scale, joint_temperature and marginal_temperature of `classifier_gradient`.
    """
    of_clean = classifier_gradient(classifier, **temperatures)
    diffusion = process.diffusion

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the gradient at x, which a network of this process gets at its timesteps t."""
        times = torch.from_numpy(diffusion.times).to(t.device)
        levels = torch.searchsorted(times, t.to(times.dtype)).clamp_max(len(times) - 1)
        scale = torch.from_numpy(diffusion.scale).to(t.device, x.dtype)[levels]
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            x_start = denoiser(x / scale[:, None, None, None], levels, y).x_start.float()
            # The chain rule in two parts: through the classifier, then through the denoiser.
            gradient = of_clean(x_start.detach(), clean.to(t.device).expand(len(x)), y=y)
            (through,) = torch.autograd.grad(x_start, x, gradient)
        return through

    return cond_fn


def differentiable(
    exact: ExactDenoiser | KnownDistribution, diffusion: GaussianDiffusion
) -> Denoiser:
    """Return the exact denoiser of a process with a gradient.

    E[x_0 | x_t] is, up to factors, x_t plus the gradient of log p(x_t) (Tweedie), so its Jacobian
    is symmetric: a vector times it is the derivative along that vector, computed in fp64 as a
    central difference.
    """
    alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod)

    def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        """Return E[x_0 | x_t]."""
        alpha_bar = alphas_cumprod.to(t.device)[t]
        return Prediction(_ExactXStart.apply(x_t, exact, alpha_bar), None)

    return predict


class _ExactXStart(torch.autograd.Function):
    """The E[x_0 | x_t] of an exact denoiser, and the product of a vector and its Jacobian."""

    @staticmethod
    def forward(ctx, x_t: Tensor, exact: Any, alpha_bar: Tensor) -> Tensor:
        ctx.save_for_backward(x_t, alpha_bar)
        ctx.exact = exact
        return exact.posterior(x_t, alpha_bar).x_start

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        x_t, alpha_bar = ctx.saved_tensors
        x, direction = x_t.double(), gradient.double()
        length = direction.flatten(1).norm(dim=1).clamp_min(1e-300)
        step = (STEP * (1.0 - alpha_bar).sqrt().double() / length)[:, None, None, None]
        ahead, behind = (
            ctx.exact.posterior(x + sign * step * direction, alpha_bar).x_start for sign in (1, -1)
        )
        return ((ahead - behind) / (2 * step)).to(x_t.dtype), None, None
