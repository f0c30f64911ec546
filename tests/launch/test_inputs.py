"""The inputs that `benchmark.py gpu` measures are right, with the CPU in the GPU's place."""

import io
import random

import numpy as np
import torch
from PIL import Image

from ds_classifier.data import images
from launch.benchmarks import inputs

CPU = torch.device("cpu")


def test_made_up_jpegs_are_like_those_of_imagenet():
    first, second = inputs.made_up_jpegs(2)
    assert first != second
    image = Image.open(io.BytesIO(first))
    assert image.size == (500, 375)
    assert "progressive" not in image.info  # decoders in hardware know the others only
    assert 90_000 < len(first) < 130_000


def test_crops_on_the_device_are_those_of_a_fast_resize():
    """The draws are the loader's too."""
    pixels = np.random.RandomState(0).randint(0, 256, (2, 375, 500, 3)).astype(np.uint8)
    decoded = list(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    squares = inputs.random_crops(decoded, 256, random.Random(3).randrange)
    assert squares.shape == (2, 256, 256, 3)
    randrange = random.Random(3).randrange
    for square, image in zip(squares, pixels, strict=True):
        cut = images.random_crop(image, 256, randrange, fast=True)
        assert np.array_equal(square.numpy(), cut)


def test_decoding_is_measured():
    jpegs = inputs.made_up_jpegs(2)
    alone, whole = inputs.device_rows(jpegs, 64, CPU, seconds=0)
    assert alone["largest difference"] <= 1  # both decode with libjpeg-turbo
    assert alone["images/s"] > 0
    assert whole["images/s"] > 0
    (worker,) = inputs.decoding_rows(64, 2, CPU, seconds=0)
    assert worker["images/s"] > 0
