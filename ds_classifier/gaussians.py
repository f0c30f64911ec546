"""Made-up images whose class posterior, score and samples are known in closed form.

Class k is the normal distribution N(m_k, C) over images in [-1, 1]. The covariance C is the same for
all classes and diagonal in the orthonormal discrete cosine transform of each channel, with variances
that fall with the square of the frequency, as those of photographs do. So noised images are normal
too, with a diagonal covariance, x_t ~ N(alpha m_k, alpha^2 C + sigma^2), and everything that a
classifier or a diffusion model estimates is exact, for the distribution and not for a training set.

Shapes: N images, K classes, D = c*S*S numbers per image.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PREFIX = "gaussians"
PIXEL_STD = 0.15  # of a pixel around the mean image of its class, in units of [-1, 1]
SEPARATION = 1.0  # of class means along each of their directions, in standard deviations of images
DIRECTIONS = 24  # lowest frequencies of each channel in which the classes differ
FLOOR = 1e-3  # least share of the mean variance; far above that of rounding to 8 bits
ROUNDING = (1 / 127.5) ** 2 / 12  # variance of rounding to 8 bits, in [-1, 1]


@dataclass(frozen=True)
class Posterior:
    """What is known at x_t. Arrays are [N, D] in x_t's layout flattened, or [N, K].

    x_start: E[x_0 | x_t]. log_class: log p(y | x_t), float64.
    gradient: of log p(y | x_t) with respect to x_t, for the y that was given; None if none was.
    """

    x_start: Tensor
    log_class: Tensor
    gradient: Tensor | None


@dataclass(frozen=True)
class GaussianClasses:
    """The distribution. Equal fields mean the same distribution.

    classes: K, equally likely. size: S, pixels. channels: c. seed: of the class means.
    """

    classes: int = 10
    size: int = 32
    channels: int = 3
    seed: int = 0

    @classmethod
    def parse(cls, source: str) -> GaussianClasses | None:
        """Return the distribution that a source names, "gaussians" or "gaussians:size=64,...".

        None if it names something else. Raises ValueError for fields that do not exist.
        """
        name, _, fields = source.partition(":")
        if name != PREFIX:
            return None
        known = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for part in filter(None, fields.split(",")):
            key, _, value = part.partition("=")
            if key not in known or not value.isdigit():
                raise ValueError(
                    f"source: got {part!r} in {source!r}; need {PREFIX}:NAME=NUMBER,... with the "
                    f"names {', '.join(sorted(known))}"
                )
            values[key] = int(value)
        return cls(**values)

    def __str__(self) -> str:
        fields = (f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))
        return f"{PREFIX}:{','.join(fields)}"

    @functools.cached_property
    def variances(self) -> np.ndarray:
        """The variances of the cosine coefficients within a class, [c, S, S] float64."""
        i = np.arange(self.size)
        squared = (i[:, None] ** 2 + i[None, :] ** 2).astype(np.float64)
        one = 1.0 / (1.0 + squared)
        one = one / one.mean()
        one = np.maximum(one, FLOOR) * PIXEL_STD**2
        return np.broadcast_to(one, (self.channels, self.size, self.size)).copy()

    @functools.cached_property
    def means(self) -> np.ndarray:
        """The cosine coefficients of the class means, [K, c, S, S] float64."""
        rng = np.random.default_rng([self.seed, 1])
        draws = rng.standard_normal((self.classes, self.channels, self.size, self.size))
        i = np.arange(self.size)
        frequency = (i[:, None] ** 2 + i[None, :] ** 2).ravel()
        lowest = np.zeros(self.size**2, bool)
        lowest[np.argsort(frequency, kind="stable")[1 : DIRECTIONS + 1]] = True  # without the mean
        return draws * np.sqrt(self.variances) * SEPARATION * lowest.reshape(self.size, self.size)

    @functools.cached_property
    def transform(self) -> np.ndarray:
        """The orthonormal DCT-II matrix F, [S, S]: coefficients = F image F^T, per channel."""
        i = np.arange(self.size)
        matrix = np.cos(np.pi * (2 * i[None, :] + 1) * i[:, None] / (2 * self.size))
        matrix *= np.sqrt(2 / self.size)
        matrix[0] /= np.sqrt(2)
        return matrix

    def draw(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Draw an image of each class in `labels`, [N] -> [N, c, S, S] float64, not rounded."""
        rng = np.random.default_rng([self.seed, 2, seed])
        noise = rng.standard_normal((len(labels), self.channels, self.size, self.size))
        coefficients = self.means[labels] + noise * np.sqrt(self.variances)
        return self.transform.T @ coefficients @ self.transform

    def draw_pixels(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Draw images as uint8 [N, S, S, c]: rounded, and cut off at 0 and 255."""
        pixels = np.rint((self.draw(labels, seed) + 1) * 127.5).clip(0, 255).astype(np.uint8)
        return pixels.transpose(0, 2, 3, 1)

    def posterior(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None = None
    ) -> Posterior:
        """Return what is known at x_t, [N, c, S, S], of a process with alpha and sigma, [N] each.

        y: [N] int64, the classes to return the gradient for.
        """
        import torch

        f = torch.from_numpy(self.transform).to(x_t.device)
        means = torch.from_numpy(self.means).to(x_t.device).flatten(1)  # [K, D]
        variances = torch.from_numpy(self.variances + ROUNDING).to(x_t.device).flatten()  # [D]
        x = (f @ x_t.double() @ f.T).flatten(1)  # [N, D]
        a, s = alpha.double()[:, None], sigma.double()[:, None]
        total = a.square() * variances + s.square()  # [N, D]
        # -||x - a m||^2 / 2 in the metric of the covariance, without what is equal for all classes.
        scaled = a * x / total
        logits = scaled @ means.T - (a.square() / total) @ (means.square() / 2).T  # [N, K]
        log_class = logits.log_softmax(dim=1)
        average = log_class.exp() @ means  # [N, D] of the class means
        x_start = average + a * variances / total * (x - a * average)
        gradient = None
        if y is not None:
            gradient = self._image(a / total * (means[y] - average), f, x_t)
        return Posterior(self._image(x_start, f, x_t), log_class, gradient)

    @staticmethod
    def _image(coefficients: Tensor, f: Tensor, like: Tensor) -> Tensor:
        return (f.T @ coefficients.view(like.shape) @ f).to(like.dtype)
