"""The classifier in Python: `ds_classifier.load(path)`, then pictures, noise and probabilities.

Two ways to use what is loaded: `predict` takes clean pictures and noises them itself, as evaluation
does; inside a sampler, `classifier(x_t, diffusion.model_timesteps(t))` takes noisy ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier.config import RECIPES, Settings
from ds_classifier.data import images
from ds_classifier.diffusion import GaussianDiffusion, create_gaussian_diffusion, keyed_noise
from ds_classifier.evaluation import VALIDATION_SEED
from ds_classifier.model import create_classifier
from ds_classifier.weights import open_weights


@dataclass(frozen=True)
class Predictor:
    """A trained classifier and the diffusion process that it was trained on.

    classifier: in eval mode, fp32; forward(x_t [N, C, S, S] in [-1, 1], timesteps [N]) -> logits
    [N, K] fp32. diffusion: q_sample, alphas_cumprod, model_timesteps, T = num_timesteps.
    classes: names in the order of the logits; None of a file of weights, which has none.
    step: that the checkpoint was taken at; None of a file.
    """

    classifier: nn.Module
    diffusion: GaussianDiffusion
    settings: Settings
    classes: list[str] | None
    step: int | None

    @property
    def device(self) -> torch.device:
        return next(self.classifier.parameters()).device

    def read(self, paths: Iterable[str | Path]) -> Tensor:
        """Picture files as validation sees them: whole, centre-cropped to S. [N, S, S, C] uint8.

        Raises ValueError for a file that does not decode, OSError for one that is not there.
        """
        size, channels = self.settings.image_size, self.settings.in_channels
        pixels = []
        for path in paths:
            try:
                with warnings.catch_warnings():  # Pillow's remarks on odd EXIF
                    warnings.simplefilter("ignore")
                    image = images.decode(Path(path).read_bytes(), channels)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            pixels.append(images.center_crop(image, size))
        return torch.from_numpy(np.stack(pixels))

    @torch.no_grad()
    def predict(self, pictures: Tensor, t: int | Tensor = 0, noise: Tensor | None = None) -> Tensor:
        """p(y | x_t) of clean pictures noised to level t, [N, K] fp32, on the classifier's device.

        pictures: [N, S, S, C] uint8. t: 0 (nearly clean) .. T - 1 (nearly noise), one for all or
        [N] int64. noise: [N, S, S, C] fp32 Gaussian; None draws that of evaluation's positions
        0 .. N - 1, the same at each call and level.
        Raises ValueError for other shapes, types or levels.
        """
        size, channels = self.settings.image_size, self.settings.in_channels
        if pictures.dtype != torch.uint8 or pictures.shape[1:] != (size, size, channels):
            raise ValueError(
                f"pictures: got {list(pictures.shape)} {pictures.dtype}; need "
                f"[N, {size}, {size}, {channels}] torch.uint8; do: take those of read()"
            )
        steps = self.diffusion.num_timesteps
        count, device = len(pictures), self.device
        levels = torch.as_tensor(t, device=device).long().expand(count)
        if count and not (int(levels.min()) >= 0 and int(levels.max()) < steps):
            raise ValueError(f"t: got {t}; need 0 to {steps - 1}, the process's noise levels")
        positions = torch.arange(count, device=device)
        if noise is None:
            noise = keyed_noise(VALIDATION_SEED, "validation", positions, (size, size, channels))
        elif noise.shape != pictures.shape:
            raise ValueError(f"noise: got {list(noise.shape)}; need {list(pictures.shape)}")
        x_start = pictures.to(device).float() / 127.5 - 1.0
        x_t = self.diffusion.q_sample(x_start, levels, noise.to(device).float())
        timesteps = self.diffusion.model_timesteps(levels)
        return self.classifier(x_t.permute(0, 3, 1, 2), timesteps).softmax(dim=1)


def load(
    path: str | Path, *, device: str | torch.device = "cpu", recipe: str = "", **settings: Any
) -> Predictor:
    """A classifier from a run (its newest checkpoint), a checkpoint, or a file of weights.

    path: the run's directory, the checkpoint's, or a .pt or .safetensors file such as guided-
    diffusion's published ones. recipe, settings: of such a file, by the names of the flags
    (classifier_depth=4); a run and a checkpoint bring their own.
    Raises ValueError for what is no classifier's, or for settings that do not fit the file.
    """
    if recipe and recipe not in RECIPES:
        raise ValueError(f"recipe: got {recipe!r}; need one of {', '.join(RECIPES)}")
    unknown = sorted(settings.keys() - vars(Settings()).keys())
    if unknown:
        raise ValueError(f"load: got {', '.join(unknown)}; need names of train.py's flags")
    given = Settings(**{**RECIPES.get(recipe, {}), **settings})
    source, weights = open_weights(Path(path), given)
    classifier = create_classifier(**source.settings.model_kwargs())
    classifier.load_state_dict(weights)
    diffusion = create_gaussian_diffusion(**source.settings.diffusion_kwargs())
    return Predictor(
        classifier.eval().requires_grad_(False).to(device),
        diffusion,
        source.settings,
        source.classes,
        source.step,
    )
