"""Bytes of an image -> uint8 pixels: decode, halve, resize, crop; the reference's pixels.

guided-diffusion `image_datasets.py`: halve with a box filter while the short side is at least twice
the target, then one bicubic resize, then crop. Its rounding is kept: sides are halved with //, and
resized to round(side * target / short side). What is left out here changes no pixel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow gives the same pixels, later
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow plugins that may open a sample
MAX_PIXELS = 2**27  # 134 megapixels; larger images are refused before they are decoded
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's mode of an image with so many channels
MIN_CROP_FRAC = 0.8  # the random crop keeps at least this much of the short side
WORTH_CUTTING = 0.9  # share of the rows; to leave out fewer costs more than it saves
FAST_TOLERANCE = 2  # of 255: the most that a value of a fast resize differs from the exact one's


def decode(data: bytes, channels: int = 3) -> Image.Image:
    """Decode an image to `channels` channels, by content whatever its name says.

    Raises ValueError for what is not a whole image in one of FORMATS, or one over MAX_PIXELS.
    """
    pixels = _plain_jpeg(data, channels)
    return _decode_any(data, channels) if pixels is None else Image.fromarray(pixels)


def decode_pixels(data: bytes, channels: int = 3) -> np.ndarray:
    """The same as uint8 [H, W, channels], which a fast resize begins with."""
    pixels = _plain_jpeg(data, channels)
    return _as_pixels(_decode_any(data, channels)) if pixels is None else pixels


def _plain_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """The pixels of a flawless colour or grey JPEG; None for all else, of which Pillow judges.

    Pillow's pixels, as both have them from libjpeg-turbo, in two thirds of its time.
    What Pillow refuses for a JFIF, Adobe or ICC segment that is shorter than its fields is read
    here: such an image has weight where simplejpeg is installed, and none elsewhere. To ask Pillow
    first would cost a fifth of the time of images halved for 64 px, 2 % of that of originals.
    """
    if simplejpeg is None or channels != 3 or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        if colours not in ("YCbCr", "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except MemoryError:
        raise
    except Exception:  # KeyError too, of samplings that it does not know (4:4:1)
        return None


def _decode_any(data: bytes, channels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(*image.size)
        image.load()
        return image if image.mode == MODES[channels] else image.convert(MODES[channels])
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError("no image in a known format") from None
    except Exception as error:  # Pillow's plugins let struct, zlib and other errors through
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)


def _as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """[H, W, C] uint8"""
    if isinstance(image, Image.Image):
        return np.array(image).reshape(image.height, image.width, -1)
    return image


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height)"""
    if isinstance(image, Image.Image):
        return image.size
    return image.shape[1], image.shape[0]


def _halve_to(image: Image.Image, short_side: int) -> Image.Image:
    """Halve with a box filter while the short side is at least twice as long as asked."""
    while min(image.size) >= 2 * short_side:
        image = _halve_once(image)
    return image


def _rows_first(image: Image.Image | np.ndarray) -> bool:
    """Whether Pillow's resize is two plain passes: along the rows, rounded, along the columns.

    Images more than twice as tall as wide it takes columns first; those with alpha it multiplies
    by alpha before, and divides after.
    """
    width, height = _size(image)
    if isinstance(image, Image.Image):
        alpha = image.mode in ("LA", "RGBA")
    else:
        alpha = image.shape[2] in (2, 4)
    return height <= 2 * width and not alpha


def _halve_once(image: Image.Image) -> Image.Image:
    """Pillow's box filter to half the sides, rounded down.

    Along an even side it is the rounded mean of two, which `reduce` takes several times faster.
    """
    half = image.width // 2, image.height // 2
    if _rows_first(image) and image.width % 2 == 0:
        image = image.reduce((2, 1))
        if image.height % 2 == 0:
            return image.reduce((1, 2))
    return image.resize(half, resample=Image.Resampling.BOX)


def resized_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) that an image of this size is shrunk or enlarged to, aspect ratio kept."""
    width, height = size
    while min(width, height) >= 2 * short_side:
        width, height = width // 2, height // 2
    scale = short_side / min(width, height)
    resized = round(width * scale), round(height * scale)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels at short side {short_side} are too many")
    return resized


def halve(image: Image.Image, size: int) -> Image.Image | None:
    """The halvings that every crop at `size` pixels, or fewer, begins with; None if there are none.

    The random crop's largest target is ceil(size / 0.8): while the short side is at least twice
    that, `resize_and_crop` would halve it first whatever it draws.
    """
    largest = math.ceil(size / MIN_CROP_FRAC)
    return None if min(image.size) < 2 * largest else _halve_to(image, largest)


def encode(image: Image.Image, form: str) -> bytes:
    """An image's bytes: "png", lossless, or "jpg", quality 95 without chroma subsampling."""
    data = io.BytesIO()
    if form == "png":
        image.save(data, format="PNG")
    else:
        image.save(data, format="JPEG", quality=95, subsampling=0)
    return data.getvalue()


def resize_and_crop(
    image: Image.Image | np.ndarray,
    short_side: int,
    size: int,
    top: int,
    left: int,
    *,
    fast: bool = False,
) -> np.ndarray:
    """Resize to the short side, then cut a square: uint8 [size, size, channels].

    image: decoded, or as uint8 [H, W, channels]; a fast resize takes that without a copy.
    fast: resize with torchvision, whose filter weights have fewer bits than Pillow's: no value
        differs by more than FAST_TOLERANCE. Images with alpha, and very tall ones, stay with
        Pillow.
    """
    resized = resized_size(_size(image), short_side)
    if min(_size(image)) >= 2 * short_side:
        image = _halve_to(_as_image(image), short_side)
    if fast and _rows_first(image):
        return _torch_crop(_as_pixels(image), resized, size, top, left)
    image = _as_image(image)
    if _rows_first(image):
        return _pillow_crop(image, resized, size, top, left)
    whole = image.resize(resized, resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(whole.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, -1)


def _pillow_crop(
    image: Image.Image, resized: tuple[int, int], size: int, top: int, left: int
) -> np.ndarray:
    """The bicubic resize's pixels, without most of the work for those that are cut away.

    The pass along the rows may leave out rows that no row of the crop needs, the pass along the
    columns those beside the crop. Pillow's `box` would leave out more, but its coordinates are
    fp32: some pixels would differ.
    """
    width, height = resized
    scale = image.height / height
    reach = 2 * max(scale, 1.0) + 2  # of the bicubic filter, in rows, and some to spare
    first = max(0, math.floor((top + 0.5) * scale - reach))
    last = min(image.height, math.ceil((top + size - 0.5) * scale + reach))
    if last - first > WORTH_CUTTING * image.height:
        first, last = 0, image.height
    rows = image if last - first == image.height else image.crop((0, first, image.width, last))
    rows = rows.resize((width, last - first), resample=Image.Resampling.BICUBIC)
    columns = rows.crop((left, 0, left + size, last - first))
    if last - first < image.height:  # back to where they were
        rows, columns = columns, Image.new(image.mode, (size, image.height))
        columns.paste(rows, (0, first))
    columns = columns.resize((size, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(columns)[top : top + size].reshape(size, size, -1)


def _torch_crop(
    pixels: np.ndarray, resized: tuple[int, int], size: int, top: int, left: int
) -> np.ndarray:
    import torch  # here: converting and verifying shards needs neither
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    width, height = resized
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # [C, H, W], channels last
    image = resize(image, [height, width], InterpolationMode.BICUBIC)
    return image[:, top : top + size, left : left + size].permute(1, 2, 0).numpy()


def center_crop(image: Image.Image | np.ndarray, size: int, *, fast: bool = False) -> np.ndarray:
    """The middle square at short side `size`: uint8 [size, size, channels]."""
    width, height = resized_size(_size(image), size)
    top, left = (height - size) // 2, (width - size) // 2
    return resize_and_crop(image, size, size, top, left, fast=fast)


def random_crop(
    image: Image.Image | np.ndarray,
    size: int,
    randrange: Callable[[int], int],
    *,
    fast: bool = False,
) -> np.ndarray:
    """A random square of size/target of the image: uint8 [size, size, channels].

    Draws, in the reference's order: target short side in [size, ceil(size / 0.8)], top, left.
    randrange(n): a random whole number in [0, n).
    """
    short_side = size + randrange(math.ceil(size / MIN_CROP_FRAC) - size + 1)
    width, height = resized_size(_size(image), short_side)
    top = randrange(height - size + 1)
    left = randrange(width - size + 1)
    return resize_and_crop(image, short_side, size, top, left, fast=fast)
