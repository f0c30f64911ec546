"""Bytes of a picture -> uint8 pixels: decode, halve, resize, crop, flip; the reference's pixels.

guided-diffusion `image_datasets.py`: halve with a box filter while the short side is at least twice
the target, then one bicubic resize, then crop. Its rounding is kept: sides are halved with //, and
resized to round(side * target / short side).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow plugins that may open a sample
MAX_PIXELS = 2**27  # 134 megapixels; larger pictures are refused before they are decoded
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's mode of a picture with so many channels
MIN_CROP_FRAC = 0.8  # the random crop keeps at least this much of the short side


def decode(data: bytes, channels: int = 3) -> Image.Image:
    """Decode a picture to `channels` channels, by content whatever its name says.

    Raises ValueError for what is not a whole picture in one of FORMATS, or one over MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
        return image.convert(MODES[channels])
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins let struct, zlib and other errors through
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _halve_to(image: Image.Image, short_side: int) -> Image.Image:
    """Halve with a box filter while the short side is at least twice as long as asked."""
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    return image


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Shrink or enlarge so that the shorter side has `short_side` pixels, aspect ratio kept."""
    image = _halve_to(image, short_side)
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels at short side {short_side} are too many"
        )
    return image.resize(size, resample=Image.Resampling.BICUBIC)


def halve(image: Image.Image, size: int) -> Image.Image | None:
    """The halvings that every crop at `size` pixels, or fewer, begins with; None if there are none.

    The random crop's largest target is ceil(size / 0.8): while the short side is at least twice
    that, `resize_short_side` would halve it first whatever it draws.
    """
    largest = math.ceil(size / MIN_CROP_FRAC)
    return None if min(image.size) < 2 * largest else _halve_to(image, largest)


def encode(image: Image.Image, form: str) -> bytes:
    """A picture's bytes: "png", lossless, or "jpg", quality 95 without chroma subsampling."""
    data = io.BytesIO()
    if form == "png":
        image.save(data, format="PNG")
    else:
        image.save(data, format="JPEG", quality=95, subsampling=0)
    return data.getvalue()


def _crop(image: Image.Image, size: int, top: int, left: int) -> np.ndarray:
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def resize_and_crop(
    image: Image.Image, short_side: int, size: int, top: int, left: int
) -> np.ndarray:
    """Resize to the short side, then cut a square: uint8 [size, size, channels]."""
    return _crop(resize_short_side(image, short_side), size, top, left)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The middle square at short side `size`: uint8 [size, size, channels]."""
    image = resize_short_side(image, size)
    return _crop(image, size, (image.height - size) // 2, (image.width - size) // 2)


def random_crop(image: Image.Image, size: int, randrange: Callable[[int], int]) -> np.ndarray:
    """A random square of size/target of the picture: uint8 [size, size, channels].

    Draws, in the reference's order: target short side in [size, ceil(size / 0.8)], top, left.
    randrange(n): a random whole number in [0, n).
    """
    short_side = size + randrange(math.ceil(size / MIN_CROP_FRAC) - size + 1)
    image = resize_short_side(image, short_side)
    top = randrange(image.height - size + 1)
    left = randrange(image.width - size + 1)
    return _crop(image, size, top, left)
