"""Compute the gradient that steers a diffusion model to what is asked for (classifier guidance).

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", Alg. 1 and 2. A cond_fn has
guided-diffusion's signature, cond_fn(x [N, C, S, S], t [N], y=y) -> [N, C, S, S], so it fits the
p_sample and ddim loops there and those of `sampling.py`. t are the network's timesteps, of the
original process. What y asks for depends on the kind of the classifier's targets
(`data/labels/targets.py`):

    class, soft   y [N] int64, a class        log p(y | x_t) of the softmax
    classes       y [N, K] of 0 and 1,        sum of log p(k | x_t) of the sigmoids, over the
                  or [N] int64: one class     classes k with a 1; 0: not asked for, either way
    values        y [N] real, eta             log sum_k p(k | x_t) exp(eta v_k)

For values, eta is in 1 / unit of the value: above 0 it steers to larger values, below 0 to smaller
ones, and 0 nowhere. v_k is the mean value of bin k, so the sum is E[exp(eta v) | x_t] to the width
of a bin; added to the score it turns p(x_0) into p(x_0) exp(eta v(x_0)) (Lu et al. 2023,
"Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling", Theorem 3.1).

The cond_fn made here raise ValueError for other shapes or types of y. On a CPU they also check its
numbers; on a GPU that would wait for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot

from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser, ExactPosterior
from ds_classifier.guidance.known_distribution import KnownDistribution

CondFn = Callable[..., Tensor]  # cond_fn(x_t, timesteps, y=asked) -> gradient


def classifier_gradient(
    classifier: nn.Module,
    *,
    scale: float = 1.0,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 1.0,
    targets: Targets = ONE_CLASS,
) -> CondFn:
    """Return a cond_fn: scale * grad_x log p(y | x_t), in fp32.

    classifier: forward(x_t [N, C, S, S], timesteps [N]) -> logits [N, K], in fp32, bf16 or fp16.
    joint_temperature, marginal_temperature, targets: see `log_probability`.
    Where the classifier's numbers are not finite, as beyond 65504 in fp16, the gradient is nan.
    Finding that here would wait for the device in each step; `sampling.sample` looks for it.
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the gradient at x."""
        with torch.enable_grad():
            # In fp32 even for a 16-bit sampler, whose format may lose a pixel's small gradient.
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_(True)
            log_p = log_probability(
                classifier(x, t).float(),
                y,
                targets,
                joint_temperature=joint_temperature,
                marginal_temperature=marginal_temperature,
            )
            (gradient,) = torch.autograd.grad(log_p.sum(), x)
        return gradient * scale

    return cond_fn


def log_probability(
    logits: Tensor,
    y: Tensor | None,
    targets: Targets = ONE_CLASS,
    *,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 1.0,
) -> Tensor:
    """Return the log probability of what y asks for, [N]: see the head of this file.

    logits: [N, K] fp32. y, targets: what is asked for, and the kind of the classifier's targets.
    joint_temperature, marginal_temperature: with these it is joint * f_y - logsumexp_k(marginal *
        f_k) for the logits f (Ma et al. 2023, "Elucidating the Design Space of Classifier-Guided
        Diffusion Generation", section 4); with both 1 that is log p(y | x_t). A class of several
        has logsumexp(0, marginal * f_y) in place of the sum over all classes; values have
        logsumexp_k(joint * f_k + eta v_k) in place of joint * f_y.
    For values it is log sum_k p_k exp(eta (v_k - v)), with v the mean of all v_k: the same
    gradient, and no large numbers for values far from 0.
    Raises ValueError if y does not fit.
    """
    y = _asked(y, *logits.shape, targets.kind)
    if targets.kind == "classes":
        # joint * f - logsumexp(0, marginal * f), in a form that is exact for large f.
        log_p = logsigmoid(marginal_temperature * logits)
        log_p = log_p + (joint_temperature - marginal_temperature) * logits
        wanted = one_hot(y, logits.shape[1]) if y.dim() == 1 else y
        return (wanted * log_p).sum(dim=1)
    if targets.kind == "values":
        values = torch.tensor(targets.values, dtype=torch.float64)
        values = (values - values.mean()).to(logits)
        tilted = joint_temperature * logits + y.to(logits)[:, None] * values
        asked = torch.logsumexp(tilted, dim=1)
    else:
        asked = joint_temperature * logits.gather(1, y[:, None])[:, 0]
    return asked - torch.logsumexp(marginal_temperature * logits, dim=1)


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
        y = _asked(y, len(x), exact.num_classes)
        times = torch.from_numpy(diffusion.times).to(t.device)
        levels = torch.searchsorted(times, t.to(times.dtype)).clamp_max(len(times) - 1)
        return exact_posterior(exact, diffusion, x, levels, y).gradient * scale

    return cond_fn


def _asked(y: Tensor | None, n: int, num_classes: int, kind: str = "class") -> Tensor:
    """Return y. Raise ValueError unless it asks something of each of n images.

    kind: of the targets, see the head of this file.
    """
    what, need = "classes", f"need one for each of {n} images, [{n}] int64"
    if kind == "classes":
        need += f", or several, [{n}, {num_classes}] of 0 and 1"
    elif kind == "values":
        what, need = "eta", f"need a real number for each of {n} images, [{n}]"
    if y is None:
        raise ValueError(f"guidance: got no {what} y; {need}")
    several = kind == "classes" and y.shape == (n, num_classes)
    right = y.shape == (n,) and (y.dtype == torch.int64 or kind == "values")
    if not (several or right):
        raise ValueError(f"guidance: got {what} y {list(y.shape)} {y.dtype}; {need}")
    if y.device.type == "cpu":
        possible, numbers = (y >= 0) & (y < num_classes), f"0 to {num_classes - 1}"
        if several:
            possible, numbers = (y == 0) | (y == 1), "0 and 1"
        elif kind == "values":
            possible, numbers = y.isfinite(), "finite numbers"
        if not bool(possible.all()):
            raise ValueError(f"guidance: got {what} y {y.tolist()}; need {numbers}")
    return y
