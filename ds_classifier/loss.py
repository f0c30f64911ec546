"""The module that DeepSpeed wraps: noise a batch of images, classify it, per-sample losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ds_classifier.config import Settings
from ds_classifier.diffusion import GaussianDiffusion, create_gaussian_diffusion
from ds_classifier.model import EncoderUNetModel


class NoisedClassifier(nn.Module):
    """A classifier behind a diffusion process.

    The pixels and the noise stay fp32 up to x_t, which the classifier casts to its own precision.
    """

    def __init__(self, classifier: nn.Module, diffusion: GaussianDiffusion):
        super().__init__()
        self.classifier = classifier
        self.diffusion = diffusion

    def forward(
        self, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Classify x_t of a batch.

        images [N, S, S, C] uint8; labels [N] int64; t [N] int64 in 0 .. T-1;
        noise [N, S, S, C] fp32, or None for clean images (t is then the t they are shown with).
        Returns cross-entropies [N] fp32 and logits [N, K] fp32.
        """
        x = images.float() / 127.5 - 1.0  # x_start in [-1, 1]
        if noise is not None:
            x = self.diffusion.q_sample(x, t, noise)
        x_t = x.permute(0, 3, 1, 2)  # [N, C, S, S], channels_last as it lies
        logits = self.classifier(x_t, self.diffusion.model_timesteps(t))
        return F.cross_entropy(logits, labels, reduction="none"), logits


def noised_classifier(classifier: EncoderUNetModel, settings: Settings) -> NoisedClassifier:
    """The classifier behind the settings' diffusion, computed in the way that they ask for."""
    classifier.activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        classifier.compile()  # in place: parameter names stay what they are
    return NoisedClassifier(classifier, create_gaussian_diffusion(**settings.diffusion_kwargs()))
