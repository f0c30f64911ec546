"""Bytes of an image -> uint8 pixels: decode, halve, resize, crop, with the reference's result.

guided-diffusion `image_datasets.py`: halve with a box filter while the short side is at least twice
the target, then one bicubic resize, then crop. Its rounding is kept: sides are halved with //, and
resized to round(side * target / short side). The shortcuts taken here change no pixel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow gives the same pixels, but is slower
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow plugins that may open a sample
MAX_PIXELS = 2**27  # 134 megapixels; larger images are refused before they are decoded
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # number of channels -> Pillow's mode
MIN_CROP_FRAC = 0.8  # the random crop keeps at least this share of the short side
WORTH_CUTTING = 0.9  # rows are cut away only if at most this share of them remains
FAST_TOLERANCE = 2  # of 255: largest difference between a fast and an exact resize


def decode(data: bytes, channels: int = 3) -> Image.Image:
    """Decode an image to `channels` channels; the format is recognized by content, not by name.

    Raises ValueError if the data is not a complete image in one of FORMATS, or over MAX_PIXELS.
    """
    pixels = _plain_jpeg(data, channels)
    return _decode_any(data, channels) if pixels is None else Image.fromarray(pixels)


def decode_pixels(data: bytes, channels: int = 3) -> np.ndarray:
    """Decode an image to uint8 [H, W, channels], the input of a fast resize. See `decode`."""
    pixels = _plain_jpeg(data, channels)
    return _as_pixels(_decode_any(data, channels)) if pixels is None else pixels


def _plain_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """Decode a color or gray JPEG without errors; return None for every other image.

    The pixels equal Pillow's, since both use libjpeg-turbo, and take two thirds of its time.
    One difference: Pillow refuses a JPEG whose JFIF, Adobe or ICC segment is shorter than its
    fields, and this function reads it. Such an image has weight 1 if simplejpeg is installed, and
    0 if it is not. Asking Pillow first would take 20 % more time for images halved for 64 px, and
    2 % for originals.
    """
    if simplejpeg is None or channels != 3 or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_pixels(width, height)
        if colours not in ("YCbCr", "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except MemoryError:
        raise
    except Exception:  # KeyError too, for a chroma subsampling that it does not know (4:4:1)
        return None


def _decode_any(data: bytes, channels: int) -> Image.Image:
    """Decode an image with Pillow."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError("no image in a known format") from None
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return with_channels(image, channels)


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Return an image of any mode with `channels` channels, as it is stored (EXIF is not read).

    Raises ValueError if its data are not complete, or it has more than MAX_PIXELS.
    """
    try:
        check_pixels(*image.size)
        image.load()
        if image.mode.startswith("I"):
            image = _high_bytes(image)
        return image if image.mode == MODES[channels] else image.convert(MODES[channels])
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of struct, zlib and others too
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _high_bytes(image: Image.Image) -> Image.Image:
    """Return the high bytes of 16-bit gray, which `convert` would clip to white.

    Pillow itself opens 16-bit images of other kinds (RGB, gray with alpha) as their high bytes.
    """
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for an image of more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)


def _as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return the image as an array, [H, W, C] uint8."""
    if isinstance(image, Image.Image):
        return np.array(image).reshape(image.height, image.width, -1)
    return image


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return (width, height)."""
    if isinstance(image, Image.Image):
        return image.size
    return image.shape[1], image.shape[0]


def _halve_to(image: Image.Image, short_side: int) -> Image.Image:
    """Halve with a box filter while the short side is at least 2 * short_side."""
    while min(image.size) >= 2 * short_side:
        image = _halve_once(image)
    return image


def _rows_first(image: Image.Image | np.ndarray) -> bool:
    """Return whether Pillow resizes the rows first, rounds, and then resizes the columns.

    It takes the columns first if the image is more than twice as tall as wide. An image with alpha
    is multiplied by alpha before the resize and divided after it.
    """
    width, height = _size(image)
    if isinstance(image, Image.Image):
        alpha = image.mode in ("LA", "RGBA")
    else:
        alpha = image.shape[2] in (2, 4)
    return height <= 2 * width and not alpha


def _halve_once(image: Image.Image) -> Image.Image:
    """Halve both sides, rounded down, with Pillow's box filter.

    Along an even side this is the rounded mean of two pixels, which `reduce` computes several
    times faster.
    """
    half = image.width // 2, image.height // 2
    if _rows_first(image) and image.width % 2 == 0:
        image = image.reduce((2, 1))
        if image.height % 2 == 0:
            return image.reduce((1, 2))
    return image.resize(half, resample=Image.Resampling.BOX)


def resized_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return (width, height) after resizing to a short side, with the aspect ratio kept.

    Raises ValueError if the result has more than MAX_PIXELS.
    """
    width, height = size
    while min(width, height) >= 2 * short_side:
        width, height = width // 2, height // 2
    scale = short_side / min(width, height)
    resized = round(width * scale), round(height * scale)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels at short side {short_side} are too many")
    return resized


def halve(image: Image.Image, size: int) -> Image.Image | None:
    """Do the halvings that every crop at `size` pixels or fewer begins with; None if none.

    The random crop's largest target is ceil(size / 0.8). While the short side is at least twice
    that, `resize_and_crop` halves the image first for every possible draw.
    """
    largest = math.ceil(size / MIN_CROP_FRAC)
    return None if min(image.size) < 2 * largest else _halve_to(image, largest)


def encode(image: Image.Image, form: str) -> bytes:
    """Encode an image as "png", lossless, or "jpg", quality 95 without chroma subsampling."""
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
    """Resize an image to a short side and cut a square: uint8 [size, size, channels].

    image: decoded, or uint8 [H, W, channels], which a fast resize uses without a copy.
    short_side: pixels after the resize. top, left: of the square, in pixels after the resize.
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
    """Resize with Pillow's bicubic filter, without most of the work for pixels that are cut away.

    The pass along the rows skips rows that no row of the crop needs; the pass along the columns
    skips columns outside the crop. Pillow's `box` would skip more, but its coordinates are fp32,
    and some pixels would differ.
    """
    width, height = resized
    scale = image.height / height
    reach = 2 * max(scale, 1.0) + 2  # half the width of the bicubic filter, in rows, plus a margin
    first = max(0, math.floor((top + 0.5) * scale - reach))
    last = min(image.height, math.ceil((top + size - 0.5) * scale + reach))
    if last - first > WORTH_CUTTING * image.height:
        first, last = 0, image.height
    rows = image if last - first == image.height else image.crop((0, first, image.width, last))
    rows = rows.resize((width, last - first), resample=Image.Resampling.BICUBIC)
    columns = rows.crop((left, 0, left + size, last - first))
    if last - first < image.height:  # move the rows back to their places
        rows, columns = columns, Image.new(image.mode, (size, image.height))
        columns.paste(rows, (0, first))
    columns = columns.resize((size, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(columns)[top : top + size].reshape(size, size, -1)


def _torch_crop(
    pixels: np.ndarray, resized: tuple[int, int], size: int, top: int, left: int
) -> np.ndarray:
    """Resize with torchvision's bicubic filter, then cut the square."""
    import torch  # imported here, since converting and verifying shards needs neither
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    width, height = resized
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # [C, H, W], channels last
    image = resize(image, [height, width], InterpolationMode.BICUBIC)
    return image[:, top : top + size, left : left + size].permute(1, 2, 0).numpy()


def center_crop(image: Image.Image | np.ndarray, size: int, *, fast: bool = False) -> np.ndarray:
    """Resize to short side `size` and cut the middle square: uint8 [size, size, channels]."""
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
    """Resize to a random short side and cut a random square: uint8 [size, size, channels].

    Draws, in the reference's order: target short side in [size, ceil(size / 0.8)], top, left.
    randrange: randrange(n) returns a random integer in [0, n).
    """
    short_side = size + randrange(math.ceil(size / MIN_CROP_FRAC) - size + 1)
    width, height = resized_size(_size(image), short_side)
    top = randrange(height - size + 1)
    left = randrange(width - size + 1)
    return resize_and_crop(image, short_side, size, top, left, fast=fast)
