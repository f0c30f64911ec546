"""Write samples to disk: guided-diffusion's npz, and PNG sheets to look at.

scale_3/samples_NxHxWx3.npz   arr_0 uint8 [N, H, W, 3], arr_1 int64 [N]: images and classes;
                              of arrays, arr_0 [N, C, H, W], as `convert` reads them: fp32, or
                              uint8 if they are pixels
scale_3/class_0007.png        the samples of a class
overview.png                  a row per class, with its name; a block of columns per scale
samples.json                  how they were drawn: classifier, denoiser, scales, seed, process

Where an image may show several classes, arr_1 is uint8 [N, K], 1 for those asked for, and a sheet
is class_0003+0007.png. Of values, arr_1 is eta, fp32 [N], and a sheet eta_0.5.png.

Writing the samples of a scale deletes those that an earlier run left in its folder.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between images
SHEET_SIDE = 64  # pixels; smaller images are enlarged by a whole factor
CLASS_IMAGES = 64  # images on the sheet of a class, at most
OVERVIEW_CLASSES, OVERVIEW_IMAGES = 10, 8  # rows, and columns per scale, at most
HEADER, TEXT_SIZE, LINE = 16, 11, 14  # pixels: an overview's line of scales, its text and lines
NAME_WIDTH = 18  # characters in a line of a class name at most


def scale_folder(out: Path, scale: float) -> Path:
    """Return the folder of a scale's samples."""
    return out / f"scale_{scale:g}"


def write_samples(
    folder: Path, pixels: np.ndarray, labels: np.ndarray, values: np.ndarray | None = None
) -> Path:
    """Write the npz and a sheet per class in place of older ones; return the path of the npz.

    pixels: uint8 [N, H, W, C]. labels: what was asked for, see the head of this file. values:
    arrays, [N, C, H, W], of which the pixels are a picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = pixels if values is None else values
    path = folder / f"samples_{'x'.join(map(str, values.shape))}.npz"
    staging = path.with_suffix(".staging.npz")
    np.savez(staging, values, labels)  # numpy names the arrays arr_0, arr_1
    sheets = [path for kind in ("class", "eta") for path in folder.glob(f"{kind}_*.png")]
    for old in [*folder.glob("samples_*.npz"), *sheets]:
        if old != staging:
            old.unlink()
    os.replace(staging, path)
    for asked, places in groups(labels):
        shown = pixels[places[:CLASS_IMAGES]]
        columns = min(8, len(shown))
        rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
        _save(sheet(rows), folder / f"{_sheet_name(asked)}.png")
    return path


def groups(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each thing that was asked for, with the places of its samples, in order.

    labels: [N] or [N, K], see the head of this file.
    """
    asked, firsts, group = np.unique(labels, axis=0, return_index=True, return_inverse=True)
    return [(asked[k], np.flatnonzero(group.ravel() == k)) for k in np.argsort(firsts)]


def title(asked: np.ndarray, name: Callable[[int], str]) -> str:
    """Return words for what a sample was asked to show.

    asked: a number or [K], of labels. name: returns the name of a class.
    """
    if asked.dtype.kind == "f":
        return f"eta {asked:g}"
    return " + ".join(name(k) for k in classes_asked(asked))


def _sheet_name(asked: np.ndarray) -> str:
    """Return the name of a sheet's file without its suffix; asked: see `title`."""
    if asked.dtype.kind == "f":
        return f"eta_{asked:g}"
    return "class_" + "+".join(f"{k:04d}" for k in classes_asked(asked))


def classes_asked(asked: np.ndarray) -> list[int]:
    """Return the classes that a sample was asked to show; asked: see `title`."""
    return np.flatnonzero(asked).tolist() if asked.ndim else [int(asked)]


def write_overview(
    path: Path,
    scales: Sequence[float],
    samples: Sequence[np.ndarray],
    labels: np.ndarray,
    names: Sequence[str],
) -> int:
    """Write a sheet with a row for each of the first classes, and a block of columns per scale.

    samples: per scale, uint8 [N, H, W, C]; labels: what was asked for, the same at all scales.
    names: of all classes. A long one is broken into lines, and cut at the height of its row.
    Returns the number of rows.
    """
    asked = groups(labels)[:OVERVIEW_CLASSES]
    blocks = [
        sheet([pixels[places[:OVERVIEW_IMAGES]] for _, places in asked]) for pixels in samples
    ]
    height = blocks[0].shape[0]
    font = ImageFont.load_default(size=TEXT_SIZE)
    most = dict(max_lines=height // len(asked) // LINE, placeholder="…")
    # Pillow's font has no letters but ASCII's; where boxes stand for others, the number helps.
    letters = [name if name.isascii() else f"{k} {name}" for k, name in enumerate(names)]
    names = [title(label, letters.__getitem__) for label, _ in asked]
    names = ["\n".join(textwrap.wrap(name, NAME_WIDTH, **most)) for name in names]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 3 * GAP + math.ceil(max(draw.textbbox((0, 0), n, font=font)[2] for n in names))
    width = margin + sum(block.shape[1] for block in blocks) + 4 * GAP * (len(blocks) - 1)
    canvas = Image.new("RGB", (width, HEADER + height), "white")
    draw, left = ImageDraw.Draw(canvas), margin
    for row, name in enumerate(names):
        middle = HEADER + height * (2 * row + 1) // (2 * len(asked))
        draw.text((GAP, middle), name, fill="black", font=font, anchor="lm", spacing=1)
    for scale, block in zip(scales, blocks, strict=True):
        draw.text((left + GAP, GAP), f"scale {scale:g}", fill="black", font=font)
        canvas.paste(_image(block), (left, HEADER))
        left += block.shape[1] + 4 * GAP
    canvas.save(path)
    return len(asked)


def sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Lay out images in rows with white gaps: rows of uint8 [n, H, W, C] -> uint8 [h, w, C]."""
    height, width, channels = rows[0].shape[1:]
    factor = max(1, SHEET_SIDE // max(height, width))
    tile = (height * factor + GAP, width * factor + GAP)
    columns = max(map(len, rows))
    canvas = np.full((len(rows) * tile[0] - GAP, columns * tile[1] - GAP, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            large = image.repeat(factor, axis=0).repeat(factor, axis=1)
            top, left = i * tile[0], j * tile[1]
            canvas[top : top + large.shape[0], left : left + large.shape[1]] = large
    return canvas


def _image(pixels: np.ndarray) -> Image.Image:
    """Return [H, W, C] uint8 as a Pillow image; one channel is grey."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _save(pixels: np.ndarray, path: Path) -> None:
    """Write [H, W, C] uint8 to an image file."""
    _image(pixels).save(path)
