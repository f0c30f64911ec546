"""Compute the loss per sample: images -> x_start -> x_t -> logits -> loss.

`NoisedClassifier` is the module that DeepSpeed wraps. Only `to_x_start` and its inverse decide how
pixel values become x_0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function as span

from ds_classifier.config import Settings
from ds_classifier.diffusion import GaussianDiffusion, create_gaussian_diffusion
from ds_classifier.model import EncoderUNetModel

if TYPE_CHECKING:
    from ds_classifier.posterior import RecentImages


def to_x_start(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return x_0 for images in any layout: uint8 values 0 .. 255 become -1 .. 1.

    Floating values are x_0 already, and only change their dtype.
    """
    x = images.to(dtype)
    return x if images.is_floating_point() else x / 127.5 - 1.0


def from_x_start(x: Tensor) -> Tensor:
    """Return pixel values 0 .. 255, floating, for x in -1 .. 1; x beyond that is clipped."""
    return ((x + 1.0) * 127.5).clamp(0, 255)


class NoisedClassifier(nn.Module):
    """A classifier of images that a diffusion process has noised.

    Pixels and noise stay fp32 up to x_t, which the classifier casts to its own precision.
    """

    def __init__(self, classifier: nn.Module, diffusion: GaussianDiffusion):
        super().__init__()
        self.classifier = classifier
        self.diffusion = diffusion

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        t: Tensor,
        noise: Tensor | None,
        recent: RecentImages | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Classify x_t of a batch.

        images: [N, S, S, C] uint8. labels: [N] int64. t: [N] int64 in 0 .. T - 1.
        noise: [N, S, S, C] fp32; None for clean images, which the network sees with timestep t.
        recent: the images whose posterior is the target in place of the labels, see `posterior`.
        Returns cross-entropies [N] fp32 and logits [N, K] fp32.
        """
        with span("model: forward"):
            x_start = to_x_start(images)
            x_t = x_start if noise is None else self.diffusion.q_sample(x_start, t, noise)
            targets = labels
            if recent is not None:
                scales = self.diffusion.scales(t)
                targets = recent.class_posterior(x_t, x_start, labels, *scales)
            x_t = x_t.permute(0, 3, 1, 2)  # [N, C, S, S]; in memory this is channels_last already
            logits = self.classifier(x_t, self.diffusion.model_timesteps(t))
            return self.loss(logits, targets), logits

    @staticmethod
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy per sample, [N] fp32, of logits [N, K].

        targets: labels [N] int64, or probabilities [N, K] fp32.
        """
        return F.cross_entropy(logits, targets, reduction="none")


def noised_classifier(classifier: EncoderUNetModel, settings: Settings) -> NoisedClassifier:
    """Return the classifier with the settings' diffusion, compilation and checkpointing."""
    classifier.activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        classifier.compile()  # in place: the parameters keep their names
    return NoisedClassifier(classifier, create_gaussian_diffusion(**settings.diffusion_kwargs()))
