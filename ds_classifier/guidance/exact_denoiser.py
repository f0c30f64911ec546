"""Compute the exact denoiser of a small training set, and its exact class posterior.

For images x_1 .. x_M, each equally likely, noised to x_t = sqrt(alpha_bar) x_0 + sqrt(1 -
alpha_bar) noise, the optimal estimate of x_0 is an average of the images (Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models", appendix B.3):

    w_i = softmax_i( -||x_t - sqrt(alpha_bar) x_i||^2 / (2 (1 - alpha_bar)) )      p(i | x_t)
    E[x_0 | x_t] = sum_i w_i x_i
    p(y | x_t) = sum_{i in class y} w_i
    grad log p(y | x_t) = sqrt(alpha_bar) / (1 - alpha_bar) (E[x_0 | x_t, y] - E[x_0 | x_t])

With it, guidance can be tried and measured without a trained diffusion model, and a trained
classifier can be compared with the Bayes-optimal one at every noise level.

Shapes: N noisy images, M training images, K classes, D = C*S*S numbers per image.
Precision: float64 inside, whatever the dtype of x_t. At t = 0 the squared distances, up to 4 D, are
divided by about 1e-4. The rounding errors of float32 would exceed the differences that decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.shards import ShardSet
from ds_classifier.loss import to_x_start

CHUNK_NUMBERS = 1 << 24  # float64 numbers of training images in memory at a time: 128 MiB
READ_BATCH = 256  # images decoded at a time
LOWEST = -1e300  # stands for a logit of -inf; finite, so that differences are not nan


@dataclass(frozen=True)
class ExactPosterior:
    """The posterior of x_0 and its class given x_t and the training set.

    x_start: [N, C, S, S] E[x_0 | x_t], in the dtype of x_t.
    log_class: [N, K] log p(y | x_t), float64; -inf for a class without images.
    gradient: [N, C, S, S] of log p(y | x_t) with respect to x_t, in its dtype, for the y that was
        given; None if none was.
    """

    x_start: Tensor
    log_class: Tensor
    gradient: Tensor | None


class ExactDenoiser:
    """The posterior over a training set, computed in chunks of it.

    images: [M, C, S, S] uint8, or floating and in [-1, 1] already (see `loss.to_x_start`).
    labels: [M] int64 in 0 .. num_classes - 1. Images and labels are moved to `device`.
    chunk: training images at a time; None means as many as take 128 MiB.
    Raises ValueError for other shapes or labels, or no images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        device: torch.device | str = "cpu",
        chunk: int | None = None,
    ):
        if len(images) == 0 or images.dim() != 4 or labels.shape != (len(images),):
            raise ValueError(
                f"got images {tuple(images.shape)} and labels {tuple(labels.shape)}; need "
                "[M, C, S, S] and [M] with at least one image"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"got labels {labels.min()} to {labels.max()}; need 0 to {num_classes - 1}"
            )
        self.shape = tuple(images.shape[1:])
        self.num_classes = num_classes
        self._images = images.flatten(1).to(device)  # [M, D]
        self._labels = labels.to(device)
        self._chunk = chunk or max(1, CHUNK_NUMBERS // self._images.shape[1])
        self._half_norms = torch.cat([(x * x).sum(1) / 2 for x, _ in self._chunks()])  # [M]

    def __len__(self) -> int:
        """Return the number of training images."""
        return len(self._images)

    def __str__(self) -> str:
        if self._images.is_floating_point():
            return f"the {len(self):,} training arrays"
        return f"the {len(self):,} training images, centre-cropped"

    def _chunks(self):
        """Yield x_0 of the images, [m, D] float64, with their slice, in order."""
        for start in range(0, len(self), self._chunk):
            part = slice(start, start + self._chunk)
            yield to_x_start(self._images[part], torch.float64), part

    @torch.no_grad()
    def posterior(self, x_t: Tensor, alpha_bar: Tensor, y: Tensor | None = None) -> ExactPosterior:
        """Return the posterior at x_t.

        x_t: [N, C, S, S].
        alpha_bar: [N] in [0, 1), the noise level of each image (DDPM Eq. 4).
        y: [N] int64, the classes to return the gradient for; None means no gradient.
        Raises ValueError for other shapes or noise levels, or a class without training images.
        """
        n = len(x_t)
        if x_t.shape[1:] != self.shape or alpha_bar.shape != (n,):
            raise ValueError(
                f"got x_t {tuple(x_t.shape)} and alpha_bar {tuple(alpha_bar.shape)}; need "
                f"[N, {', '.join(map(str, self.shape))}] and [N]"
            )
        alpha_bar = alpha_bar.to(x_t.device, torch.float64)
        if bool((alpha_bar < 0).any() or (alpha_bar >= 1).any()):
            raise ValueError("got alpha_bar outside [0, 1); need some noise, so below 1")
        x = x_t.flatten(1).double()  # [N, D]
        signal, variance = alpha_bar.sqrt()[:, None], (1.0 - alpha_bar)[:, None]  # [N, 1]
        every = _Average(x)
        of_class = None if y is None else _Average(x)
        # Each class has its own largest logit, so that log p of an unlikely class is exact too.
        largest = x.new_full((n, self.num_classes), LOWEST)
        mass = x.new_zeros(n, self.num_classes)
        for images, part in self._chunks():
            labels = self._labels[part]
            # ||x_t||^2 is the same for every image and cancels in the softmax.
            logits = x @ images.T - signal * self._half_norms[part]
            logits *= signal / variance  # [N, m]
            before = largest
            largest = before.scatter_reduce(1, labels.expand(n, -1), logits, "amax")
            mass *= (before - largest).exp_()
            mass.index_add_(1, labels, (logits - largest[:, labels]).exp_())
            every.add(logits, images)
            if of_class is not None:
                others = labels != y[:, None]
                of_class.add(logits.masked_fill(others, LOWEST), images)
        if y is not None and bool((mass.gather(1, y[:, None]) == 0).any()):
            raise ValueError("got a class y that has no image in the training set")
        log_mass = largest + mass.log()
        gradient = None
        if of_class is not None:
            gradient = signal / variance * (of_class.mean() - every.mean())
            gradient = gradient.view_as(x_t).to(x_t.dtype)
        return ExactPosterior(
            x_start=every.mean().view_as(x_t).to(x_t.dtype),
            log_class=log_mass - log_mass.logsumexp(dim=1, keepdim=True),
            gradient=gradient,
        )


class _Average:
    """A softmax-weighted average of images that arrive in chunks (online softmax).

    Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", Alg. 3.
    """

    def __init__(self, x: Tensor):
        self.largest = x.new_full((len(x), 1), LOWEST)
        self.total = x.new_zeros(len(x), 1)
        self.sum = torch.zeros_like(x)

    def add(self, logits: Tensor, images: Tensor) -> None:
        """Add a chunk. logits: [N, m], LOWEST for an excluded image; images: [m, D].

        As long as all images are excluded, each has weight 1. The first image that is not excluded
        shrinks these weights to 0.
        """
        largest = torch.maximum(self.largest, logits.amax(dim=1, keepdim=True))
        weights = (logits - largest).exp_()
        shrink = (self.largest - largest).exp_()
        self.total = self.total * shrink + weights.sum(dim=1, keepdim=True)
        self.sum = torch.addmm(self.sum * shrink, weights, images)
        self.largest = largest

    def mean(self) -> Tensor:
        """Return the average, [N, D]."""
        return self.sum / self.total


def read_images(shards: ShardSet, *, image_size: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Read a whole split, centre-cropped: images [M, C, S, S] uint8 and labels [M] int64, or [M, K]
    fp32 where targets are several classes or soft.

    Of arrays that are no pixels: x_0, fp32. Images that do not decode are left out, as in training.
    Raises ValueError if none decodes.
    """
    dataset = ShardDataset(shards, image_size=image_size, channels=channels)
    parts, labels = [], []
    for start in range(0, len(shards.index), READ_BATCH):
        batch = dataset[np.arange(start, min(start + READ_BATCH, len(shards.index)))]
        decoded = batch.weights > 0
        parts.append(batch.images[decoded].permute(0, 3, 1, 2).contiguous())
        labels.append(batch.labels[decoded])
    images = torch.cat(parts) if parts else torch.empty(0)
    if len(images) == 0:
        raise ValueError(
            f"{shards.manifest.location or shards.folder}: none of its {len(shards.index)} images "
            "decodes"
        )
    return images, torch.cat(labels)
