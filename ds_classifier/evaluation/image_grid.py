"""A grid of validation images at several noise levels, with their predicted classes.

It is kept as one PNG of tiles, with a row per image and a column per level. The predictions are in
the PNG's text chunk TEXT_KEY, as JSON. predictions.py computes the grid.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

TEXT_KEY = "ds_classifier pictures"
RIGHT, WRONG = (0, 114, 178), (213, 94, 0)  # blue and vermilion, safe for the colour-blind
MARKED_SIDE, CAPTION = 64, 15  # pixels: least side of a marked tile, height of its caption


@dataclass(frozen=True)
class Predictions:
    """The predictions for a grid of R images at L levels."""

    step: int | None
    t: list[int]  # [L]
    log_snr: list[float]  # [L]
    shrunk: int  # the factor by which a tile is smaller than the classified image
    positions: list[int]  # [R], in the validation set
    labels: list[int]  # [R]; of several classes the lowest, of a soft vector the likeliest one
    predicted: list[list[int]]  # [R][L], the likeliest classes
    confidence: list[list[float | None]]  # [R][L], their probabilities; None: not finite
    colours: str = ""  # what the colours of arrays are; "" for images
    several: list[list[int]] | None = None  # [R], all classes of an image; None: each has one

    def right(self, row: int, level: int) -> bool:
        """Return whether the predicted class is one of the image's."""
        classes = self.several[row] if self.several is not None else [self.labels[row]]
        return self.predicted[row][level] in classes


@dataclass(frozen=True)
class ImageGrid:
    """A grid of images and their predictions.

    tiles: uint8 [R, L, side, side, 3].
    """

    tiles: np.ndarray
    predictions: Predictions


def save_grid(grid: ImageGrid, path: Path) -> None:
    """Write the PNG; readers see the old file or the new one, never a part."""
    rows, levels, side = grid.tiles.shape[:3]
    sheet = grid.tiles.transpose(0, 2, 1, 3, 4).reshape(rows * side, levels * side, 3)
    text = PngInfo()
    text.add_text(TEXT_KEY, json.dumps(asdict(grid.predictions)))
    staging = path.with_name(f".{path.name}.staging")
    Image.fromarray(sheet).save(staging, format="PNG", pnginfo=text)
    os.replace(staging, path)


def load_grid(path: Path) -> ImageGrid | None:
    """Read a grid that save_grid wrote; return None for any other or missing file."""
    try:
        with Image.open(path) as image:
            image.load()
            predictions = Predictions(**json.loads(image.text[TEXT_KEY]))
            pixels = np.asarray(image.convert("RGB"))
        rows, levels = len(predictions.labels), len(predictions.t)
        height, width = pixels.shape[0] // rows, pixels.shape[1] // levels
        tiles = pixels.reshape(rows, height, levels, width, 3).transpose(0, 2, 1, 3, 4)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return ImageGrid(tiles, predictions)


def marked_sheet(grid: ImageGrid, classes: Sequence[str]) -> np.ndarray:
    """Draw the grid with its predictions under the tiles, uint8 [h, w, 3], for TensorBoard.

    A tile's frame is blue if its prediction is right, vermilion if it is wrong.
    """
    rows, levels, side = grid.tiles.shape[:3]
    factor = max(1, MARKED_SIDE // side)
    side, frame = side * factor, 2
    cell = (side + 2 * frame + 2, side + 2 * frame + CAPTION)
    canvas = Image.new("RGB", (levels * cell[0], rows * cell[1] + CAPTION), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for j, t in enumerate(grid.predictions.t):
        draw.text((j * cell[0] + frame, 0), f"t = {t}", fill="black", font=font)
    for i in range(rows):
        for j in range(levels):
            left, top = j * cell[0], CAPTION + i * cell[1]
            predicted = grid.predictions.predicted[i][j]
            color = RIGHT if grid.predictions.right(i, j) else WRONG
            draw.rectangle(
                (left, top, left + side + 2 * frame - 1, top + side + 2 * frame - 1), fill=color
            )
            tile = grid.tiles[i, j].repeat(factor, axis=0).repeat(factor, axis=1)
            canvas.paste(Image.fromarray(tile), (left + frame, top + frame))
            confidence = grid.predictions.confidence[i][j]
            percent = "-" if confidence is None else f"{100 * confidence:.0f}%"
            name = classes[predicted]
            while name and font.getlength(f"{name} {percent}") > side:
                name = name[:-1]
            corner = (left + frame, top + side + 2 * frame)
            draw.text(corner, f"{name} {percent}", fill=color, font=font)
    return np.asarray(canvas)
