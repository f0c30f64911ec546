"""All kinds of PNG give the 8-bit pixels that their numbers stand for."""

import itertools
import struct
import zlib

import numpy as np
import pytest

from ds_classifier.data import images

SIDE = 21, 13  # rows, columns
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
DEPTHS = {GRAY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8)}
# Adam7: first row, first column, row step, column step of each pass.
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
          (1, 0, 2, 1)]  # fmt: skip
KINDS = [
    kind
    for colour in CHANNELS
    for kind in itertools.product(
        [colour],
        DEPTHS.get(colour, (8, 16)),
        [False, True],
        [False] if colour in (GRAY_ALPHA, RGBA) else [False, True],
    )
]


def chunk(name, content):
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def rows_of(numbers, depth):
    """Pack [h, w, c] numbers as rows of a PNG, without a filter."""
    packed = b""
    for row in numbers.reshape(len(numbers), -1):
        if depth == 16:
            packed += b"\0" + row.astype(">u2").tobytes()
        else:
            bits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
            packed += b"\0" + np.packbits(bits).tobytes()
    return packed


def png(numbers, colour, depth, *, interlaced=False, palette=None, transparent=b""):
    """Write a PNG by the book (RFC 2083); numbers: [h, w, c] in 0 .. 2^depth - 1."""
    if interlaced:
        passes = [numbers[top::down, left::right] for top, left, down, right in PASSES]
        content = b"".join(rows_of(part, depth) for part in passes if part.size)
    else:
        content = rows_of(numbers, depth)
    height, width = numbers.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += b"" if palette is None else chunk(b"PLTE", palette.tobytes())
    data += chunk(b"tRNS", transparent) if transparent else b""
    return data + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def to_8_bits(numbers, depth):
    """Return the high byte of 16-bit numbers, and fewer bits stretched to 0 .. 255."""
    return numbers >> 8 if depth == 16 else numbers * 255 // (2**depth - 1)


@pytest.mark.parametrize(("colour", "depth", "interlaced", "transparent"), KINDS)
def test_pixels_are_the_numbers_in_the_file(colour, depth, interlaced, transparent):
    random = np.random.RandomState(depth)
    numbers = random.randint(0, 2**depth, (*SIDE, CHANNELS[colour]))
    palette, clear = None, b""
    if colour == PALETTE:
        palette = random.randint(0, 256, (2**depth, 3)).astype(np.uint8)
        expected = palette[numbers[:, :, 0]]
        clear = b"\xff\x00" if transparent else b""
    else:
        eight = to_8_bits(numbers, depth)
        expected = eight[:, :, :3] if colour in (RGB, RGBA) else eight[:, :, :1].repeat(3, 2)
        clear = numbers[3, 4].astype(">u2").tobytes() if transparent else b""
    data = png(numbers, colour, depth, interlaced=interlaced, palette=palette, transparent=clear)
    assert np.array_equal(np.asarray(images.decode(data)), expected)
    assert np.array_equal(images.decode_pixels(data), expected)
    if colour in (GRAY, GRAY_ALPHA):
        assert np.array_equal(images.decode_pixels(data, 1), expected[:, :, :1])


def test_16_bit_gray_equals_the_same_picture_in_colour():
    """Check every number, and the loader's fast resize beside the exact one."""
    numbers = np.arange(2**16).reshape(256, 256, 1)
    gray, colour = png(numbers, GRAY, 16), png(numbers.repeat(3, axis=2), RGB, 16)
    for decoder in (images.decode, images.decode_pixels):
        assert np.array_equal(np.asarray(decoder(gray)), np.asarray(decoder(colour)))
    for fast in (False, True):
        crops = [images.center_crop(images.decode(d), 24, fast=fast) for d in (gray, colour)]
        assert np.array_equal(*crops)
