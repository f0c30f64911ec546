"""Compute what is known of the made-up images of `common.gaussians` at any noise level.

For classes N(m_k, C), equally likely, and x_t = alpha x_0 + sigma noise, with the covariance
S = alpha^2 C + sigma^2, which like C is diagonal in the cosine transform:

    log p(k | x_t) = -(x_t - alpha m_k)^T S^-1 (x_t - alpha m_k) / 2 + const
    grad log p(y | x_t) = alpha S^-1 (m_y - sum_k p(k | x_t) m_k)
    E[x_0 | x_t] = sum_k p(k | x_t) (m_k + alpha C S^-1 (x_t - alpha m_k))

It has the interface of `ExactDenoiser`. That one knows a training set; this one the distribution
that it was drawn from, which is what a classifier should learn.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ds_classifier.common.gaussians import ROUNDING, GaussianClasses
from ds_classifier.data.shards import Manifest
from ds_classifier.guidance.exact_denoiser import ExactDenoiser, ExactPosterior
from ds_classifier.loss import to_x_start


class KnownDistribution:
    """The posterior of x_0 and its class given x_t, over the whole distribution.

    Precision: float64 inside, whatever the dtype of x_t.
    """

    def __init__(self, gaussians: GaussianClasses, *, device: torch.device | str = "cpu"):
        self.gaussians = gaussians
        self.shape = (gaussians.channels, gaussians.size, gaussians.size)
        self.num_classes = gaussians.classes
        self._transform = torch.from_numpy(gaussians.transform).to(device)
        self._means = torch.from_numpy(gaussians.means).to(device).flatten(1)  # [K, D]
        variances = torch.from_numpy(gaussians.variances + ROUNDING).to(device)
        self._variances = variances.expand(self.shape).flatten()  # [D]

    def __str__(self) -> str:
        return f"the distribution of the images ({self.gaussians})"

    @torch.no_grad()
    def posterior(self, x_t: Tensor, alpha_bar: Tensor, y: Tensor | None = None) -> ExactPosterior:
        """Return the posterior at x_t.

        x_t: [N, C, S, S]. alpha_bar: [N] in [0, 1], the noise level of each image (DDPM Eq. 4).
        y: [N] int64, the classes to return the gradient for; None means no gradient.
        """
        alpha_bar = alpha_bar.to(x_t.device, torch.float64)[:, None]
        alpha = alpha_bar.sqrt()
        x = self._coefficients(x_t)
        total = alpha_bar * self._variances + (1.0 - alpha_bar)  # [N, D]
        # What is equal for all classes is left out of the logits.
        half_squares = self._means.square().T / 2
        logits = (alpha * x / total) @ self._means.T - (alpha_bar / total) @ half_squares
        log_class = logits.log_softmax(dim=1)
        mean = log_class.exp() @ self._means  # [N, D]
        x_start = mean + alpha * self._variances / total * (x - alpha * mean)
        gradient = None
        if y is not None:
            gradient = self._images(alpha / total * (self._means[y] - mean), x_t)
        return ExactPosterior(self._images(x_start, x_t), log_class, gradient)

    def share(self, samples: np.ndarray, asked: np.ndarray) -> float:
        """Return the share of samples, uint8 [N, S, S, C], whose likeliest class was asked for."""
        clean = self.posterior(_clean(samples), torch.ones(len(samples)))
        return float((clean.log_class.argmax(dim=1).numpy() == asked).mean())

    def frechet(self, samples: np.ndarray, asked: np.ndarray) -> float:
        """Return the Frechet distance of samples to the classes that were asked for.

        samples: uint8 [N, S, S, C]. asked: [N].
        Over the coefficients in which classes differ: the mean, over the classes, of the squared
        distance of the samples' mean to m_k, and the distance of their covariance within classes to
        C (Dowson & Landau 1982; Heusel et al. 2017, Eq. 6). Its unit is a variance. It is not 0 for
        exact samples, of which there are finitely many: compare it with `frechet` of `draw`.
        """
        kept = torch.from_numpy(self.gaussians.lowest).expand(self.shape).flatten()
        rest = (self._coefficients(_clean(samples)) - self._means[asked])[:, kept]
        true = self._variances[kept]
        labels = torch.from_numpy(asked)
        shifts = []
        for k in labels.unique().tolist():
            of_class = labels == k
            shift = rest[of_class].mean(dim=0)
            shifts.append(shift.square().sum())
            rest[of_class] -= shift
        covariance = rest.T @ rest / max(1, len(rest) - len(shifts))
        root = true.sqrt()
        cross = torch.linalg.eigvalsh(root[:, None] * covariance * root).clamp_min(0).sqrt().sum()
        distance = torch.stack(shifts).mean() + covariance.trace() + true.sum() - 2 * cross
        return float(distance)

    def _coefficients(self, x: Tensor) -> Tensor:
        """Return the cosine coefficients of images, [N, D] float64."""
        return (self._transform @ x.double() @ self._transform.T).flatten(1)

    def _images(self, coefficients: Tensor, like: Tensor) -> Tensor:
        """Return the images of coefficients, in the shape and dtype of `like`."""
        images = self._transform.T @ coefficients.view(like.shape) @ self._transform
        return images.to(like.dtype)


def _clean(samples: np.ndarray) -> Tensor:
    """Return x_0 of samples, uint8 [N, S, S, C], as [N, C, S, S] float64."""
    return to_x_start(torch.from_numpy(samples).permute(0, 3, 1, 2), torch.float64)


def open_exact(
    manifest: Manifest, images: Tensor, labels: Tensor, device: torch.device
) -> ExactDenoiser | KnownDistribution:
    """Return the distribution that images were drawn from, if known, else their exact denoiser.

    manifest: of the shards. images: [M, C, S, S]. labels: [M].
    """
    known = GaussianClasses.parse(manifest.source)
    if known is not None and images.shape[1:] == (known.channels, known.size, known.size):
        return KnownDistribution(known, device=device)
    return ExactDenoiser(images, labels, len(manifest.classes), device=device)
