"""The exact denoiser of a small training set, and its exact class posterior, in closed form.

Of images x_1 .. x_M, each equally likely, noised to x_t = sqrt(alpha_bar) x_0 + sqrt(1 -
alpha_bar) noise, the optimal estimate of x_0 is an average of the images (Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models", appendix B.3):

    w_i = softmax_i( -||x_t - sqrt(alpha_bar) x_i||^2 / (2 (1 - alpha_bar)) )      p(i | x_t)
    E[x_0 | x_t] = sum_i w_i x_i
    p(y | x_t) = sum_{i in class y} w_i
    grad log p(y | x_t) = sqrt(alpha_bar) / (1 - alpha_bar) (E[x_0 | x_t, y] - E[x_0 | x_t])

So guidance can be tried and measured with no trained diffusion model, and a trained classifier be
compared with the Bayes-optimal one at every noise level.

Shapes: N noisy images, M training images, K classes, D = C*S*S numbers an image.
Precision: float64 inside, whatever x_t has. At t = 0 the squared distances, up to 4 D, are divided
by 1e-4: float32 would err by more than the differences that decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.shards import open_shards
from ds_classifier.loss import to_x_start

CHUNK_NUMBERS = 1 << 24  # float64 numbers of training images in memory at a time: 128 MiB
READ_BATCH = 256  # images decoded at a time
LOWEST = -1e300  # of a logit; finite, so that the difference of two is a number


@dataclass(frozen=True)
class ExactPosterior:
    """What x_t says of x_0 and its class, given the training set.

    x_start: [N, C, S, S] E[x_0 | x_t]; in x_t's dtype, as gradient is.
    log_class: [N, K] log p(y | x_t), float64; -inf for a class without images.
    gradient: [N, C, S, S] of log p(y | x_t) with respect to x_t, for the y asked for, else None.
    """

    x_start: Tensor
    log_class: Tensor
    gradient: Tensor | None


class ExactDenoiser:
    """The posterior over a training set, streamed over it in chunks.

    images: [M, C, S, S] uint8, shown as u / 127.5 - 1 as the classifier sees them; or floating,
        taken as they are. labels: [M] int64 in 0 .. num_classes - 1; both move to `device`.
    chunk: training images at a time; None: as many as take 128 MiB.
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
        return len(self._images)

    def _chunks(self):
        """(images [m, D] float64 as the process sees them, their slice), in order."""
        for start in range(0, len(self), self._chunk):
            part = slice(start, start + self._chunk)
            yield to_x_start(self._images[part], torch.float64), part

    @torch.no_grad()
    def posterior(self, x_t: Tensor, alpha_bar: Tensor, y: Tensor | None = None) -> ExactPosterior:
        """Everything the training set says of x_t.

        x_t: [N, C, S, S]. alpha_bar: [N] in [0, 1), the noise level of each (DDPM Eq. 4).
        y: [N] int64, the class whose gradient is wanted; None: no gradient.
        """
        n = len(x_t)
        if x_t.shape[1:] != self.shape or alpha_bar.shape != (n,):
            raise ValueError(
                f"got x_t {tuple(x_t.shape)} and alpha_bar {tuple(alpha_bar.shape)}; need "
                f"[N, {', '.join(map(str, self.shape))}] and [N]"
            )
        alpha_bar = alpha_bar.to(x_t.device, torch.float64)
        if bool((alpha_bar < 0).any() or (alpha_bar >= 1).any()):
            raise ValueError("got alpha_bar outside [0, 1); at 1 there is no noise to take away")
        x = x_t.flatten(1).double()  # [N, D]
        signal, variance = alpha_bar.sqrt()[:, None], (1.0 - alpha_bar)[:, None]  # [N, 1]
        every = _Average(x)
        of_class = None if y is None else _Average(x)
        # Each class has its own largest logit, so that log p of the unlikeliest is exact too.
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
            raise ValueError("got a class y of which the training set has no image")
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
    """A softmax-weighted average of images that come in chunks (online softmax).

    Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", Alg. 3.
    """

    def __init__(self, x: Tensor):
        self.largest = x.new_full((len(x), 1), LOWEST)
        self.total = x.new_zeros(len(x), 1)
        self.sum = torch.zeros_like(x)

    def add(self, logits: Tensor, images: Tensor) -> None:
        """logits: [N, m], LOWEST for an image left out; images: [m, D].

        While all are left out each weighs 1; the first that is not shrinks that to 0.
        """
        largest = torch.maximum(self.largest, logits.amax(dim=1, keepdim=True))
        weights = (logits - largest).exp_()
        shrink = (self.largest - largest).exp_()
        self.total = self.total * shrink + weights.sum(dim=1, keepdim=True)
        self.sum = torch.addmm(self.sum * shrink, weights, images)
        self.largest = largest

    def mean(self) -> Tensor:
        """[N, D]"""
        return self.sum / self.total


def read_images(
    folder: Path | str, *, image_size: int, channels: int = 3
) -> tuple[Tensor, Tensor, int]:
    """A whole split, centre-cropped: [M, C, S, S] uint8, [M] int64 labels, and the class count.

    Images that do not decode are left out, as they are from training.
    Raises ValueError where there are no shards, or none of their images decodes.
    """
    shards = open_shards(folder)
    dataset = ShardDataset(shards, image_size=image_size, channels=channels)
    parts, labels = [], []
    for start in range(0, len(shards.index), READ_BATCH):
        batch = dataset[np.arange(start, min(start + READ_BATCH, len(shards.index)))]
        decoded = batch.weights > 0
        parts.append(batch.images[decoded].permute(0, 3, 1, 2).contiguous())
        labels.append(batch.labels[decoded])
    images = torch.cat(parts) if parts else torch.empty(0)
    if len(images) == 0:
        raise ValueError(f"{folder}: none of its {len(shards.index)} images decodes")
    return images, torch.cat(labels), len(shards.manifest.classes)
