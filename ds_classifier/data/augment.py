"""Augmentation of training images: torchvision's, or a function of the user's.

What an image becomes depends on (seed, position) alone. torchvision draws from torch's own
generator, so each image gets it seeded by its key, and the generator's state is put back; the same
for Python's `random` and NumPy, which a function of the user's may draw from.

trivialaugment: Müller & Hutter 2021, "TrivialAugment: Tuning-free Yet State-of-the-Art Data
Augmentation", in torchvision's wide range. randaugment: Cubuk et al. 2020, "RandAugment: Practical
Automated Data Augmentation with a Reduced Search Space", with torchvision's defaults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ds_classifier.common.keyed_random import fold, stream_key
from ds_classifier.common.user_code import described, load_function
from ds_classifier.config import Settings

TORCHVISION = {"trivialaugment": "TrivialAugmentWide", "randaugment": "RandAugment"}
COLOURS = (1, 3)  # channels for which torchvision's changes of colour are defined


class Augmentation:
    """A random change of images, keyed by their positions in the training stream.

    name: a key of TORCHVISION, or "package.module:function", a function of one image, uint8
        [C, S, S], that returns another one.
    seed: the seed of the run.
    Raises ValueError if the name is neither, or if the function cannot be imported.
    """

    def __init__(self, name: str, seed: int):
        self._name, self._key = name, stream_key(seed, "augment")
        self._change: Callable[[Tensor], Tensor]
        if name in TORCHVISION:  # imported before the loader's workers are forked
            from torchvision.transforms import v2

            self._change = getattr(v2, TORCHVISION[name])()
        elif ":" in name:
            self._change = load_function("--augment", name)
        else:
            raise ValueError(
                f"--augment: got {name!r}; need {', '.join(TORCHVISION)}, or "
                "package.module:function, a function of yours"
            )

    def __call__(self, image: Tensor, position: int) -> Tensor:
        """Return the image at a position, [S, S, C] uint8, as it is trained on.

        Raises ValueError if the function fails, or returns another shape or type.
        """
        given = image.permute(2, 0, 1)  # [C, S, S]
        with seeded(fold(self._key, position)):
            try:
                found = self._change(given.contiguous())
            except Exception as error:  # a function of the user's can raise anything
                raise ValueError(
                    f"--augment: {self._name} fails for an image {list(given.shape)}: "
                    f"{described(error)}"
                ) from error
        if not torch.is_tensor(found) or (found.dtype, found.shape) != (torch.uint8, given.shape):
            got = type(found).__name__
            if torch.is_tensor(found):
                got = f"{list(found.shape)} {str(found.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"--augment: {self._name} returns {got} for an image {list(given.shape)} uint8; "
                "need the same shape and type"
            )
        return found.permute(1, 2, 0)


def create_augmentation(settings: Settings) -> Augmentation | None:
    """Return the augmentation that the settings ask for, once it was tried on a made-up image.

    Raises ValueError if it cannot be imported, or cannot change images of these settings.
    """
    if not settings.augment:
        return None
    channels, size = settings.in_channels, settings.image_size
    if settings.augment in TORCHVISION and channels not in COLOURS:
        raise ValueError(
            f"--augment: got {settings.augment} for images of {channels} channels; need 1 or 3, "
            "for which torchvision's changes of colour are defined; do: name a function of yours"
        )
    augmentation = Augmentation(settings.augment, settings.seed)
    pixels = torch.arange(size * size * channels) % 256
    augmentation(pixels.view(size, size, channels).to(torch.uint8), 0)
    return augmentation


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Put the generators of torch (on the CPU), NumPy and Python into a state, and back at the end.

    key: 64 bits.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(key)  # torch.manual_seed would seed GPUs too
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    random.seed(key)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
