"""Made-up images whose distribution is known: each class is a normal distribution over images.

Class k is N(m_k, C) over images in [-1, 1]. The covariance C is the same for all classes and
diagonal in the orthonormal discrete cosine transform (DCT-II) of each channel, with variances that
fall with the square of the frequency, as those of photographs do. So a noised image is normal too,
x_t ~ N(alpha m_k, alpha^2 C + sigma^2), with a diagonal covariance: `guidance.known_distribution`
has the class posterior, its gradient and the denoiser in closed form.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

NAME = "gaussians"
PIXEL_STD = 0.15  # of a pixel around the mean image of its class, where images are in [-1, 1]
DIRECTIONS = 24  # lowest frequencies of a channel, without the mean, in which the classes differ
SEPARATION = 1.0  # standard deviation of the class means in these, in units of that of the images
FLOOR = 1e-3  # least variance, as a share of the mean one; far above that of rounding to 8 bits
ROUNDING = (1 / 127.5) ** 2 / 12  # variance of rounding to 8 bits
LIMITS = {"classes": (2, 1000), "size": (8, 512), "channels": (1, 4), "images": (8, 100_000)}


@dataclass(frozen=True)
class GaussianClasses:
    """The distribution, and the size of a data set drawn from it.

    classes: K, equally likely. size: S, pixels. channels: c. seed: of the class means.
    images: number of training images; a quarter as many are for validation.
    """

    classes: int = 10
    size: int = 32
    channels: int = 3
    images: int = 2000
    seed: int = 0

    @classmethod
    def parse(cls, source: str) -> GaussianClasses | None:
        """Return what a source asks for: "gaussians", or "gaussians:size=64,classes=5" and so on.

        None if it names something else. Raises ValueError for names or numbers that cannot be.
        """
        name, _, fields = source.partition(":")
        if name != NAME:
            return None
        known = [field.name for field in dataclasses.fields(cls)]
        values = {}
        for part in filter(None, fields.split(",")):
            key, _, value = part.partition("=")
            if key not in known or not value.isdecimal():
                raise ValueError(
                    f"source: got {part!r} in {source}; need {NAME}:NAME=NUMBER,... with names of "
                    f"{', '.join(known)}"
                )
            values[key] = int(value)
            least, most = LIMITS.get(key, (0, 2**32))
            if not least <= values[key] <= most:
                raise ValueError(f"source: got {part} in {source}; need {least} to {most:,}")
        return cls(**values)

    def __str__(self) -> str:
        fields = (f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))
        return f"{NAME}:{','.join(fields)}"

    @functools.cached_property
    def transform(self) -> np.ndarray:
        """The DCT-II as a matrix F, [S, S]: coefficients = F image F^T."""
        i = np.arange(self.size)
        matrix = np.cos(np.pi * (2 * i[None, :] + 1) * i[:, None] / (2 * self.size))
        matrix *= np.sqrt(2 / self.size)
        matrix[0] /= np.sqrt(2)
        return matrix

    @functools.cached_property
    def _frequencies(self) -> np.ndarray:
        """The squared frequencies of the coefficients, [S, S]."""
        i = np.arange(self.size)
        return i[:, None] ** 2 + i[None, :] ** 2

    @functools.cached_property
    def lowest(self) -> np.ndarray:
        """The coefficients in which the classes differ, [S, S] bool."""
        lowest = np.zeros(self.size**2, bool)
        lowest[np.argsort(self._frequencies, axis=None, kind="stable")[1 : DIRECTIONS + 1]] = True
        return lowest.reshape(self.size, self.size)

    @functools.cached_property
    def variances(self) -> np.ndarray:
        """The variances of the coefficients within a class, before rounding, [S, S] float64."""
        shape = 1.0 / (1.0 + self._frequencies)
        return np.maximum(shape / shape.mean(), FLOOR) * PIXEL_STD**2

    @functools.cached_property
    def means(self) -> np.ndarray:
        """The coefficients of the class means, [K, c, S, S] float64."""
        shape = (self.classes, self.channels, self.size, self.size)
        draws = np.random.default_rng([self.seed, 0]).standard_normal(shape)
        return draws * np.sqrt(self.variances) * self.lowest * SEPARATION

    def draw(self, labels: np.ndarray, stream: int) -> np.ndarray:
        """Draw an image of the class of each label, uint8 [N, S, S, c].

        stream: 0 or more; others give other images. They are rounded, and cut off at 0 and 255,
        which happens to 2 pixels of a million.
        """
        rng = np.random.default_rng([self.seed, 1, stream])
        noise = rng.standard_normal((len(labels), self.channels, self.size, self.size))
        coefficients = self.means[labels] + noise * np.sqrt(self.variances)
        images = self.transform.T @ coefficients @ self.transform
        pixels = np.rint((images + 1) * 127.5).clip(0, 255).astype(np.uint8)
        return pixels.transpose(0, 2, 3, 1)
