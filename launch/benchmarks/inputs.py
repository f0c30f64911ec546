"""Measure what the inputs of a training step cost on a device: its noise and its images.

Both are measured in the way that the trainer has, and in one that it could have on a GPU.
"""

from __future__ import annotations

import io
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from ds_classifier.common import keyed_noise
from ds_classifier.common.keyed_random import stream_key
from ds_classifier.data import images
from ds_classifier.diffusion import stratified

from .measuring import seconds_of, wait_for
from .parts import Row

SIDES = (375, 500)  # rows and columns of most of ImageNet's images
CONTRAST = 45  # of made-up images, in levels of 255: they take about 110 kB then, as ImageNet's


def noise_rows(px: int, micro: int, device: torch.device, seconds: float) -> Iterator[Row]:
    """Measure drawing a micro-batch's numbers for timesteps, and its noise, eager and compiled."""

    def draw(positions: Tensor) -> tuple[Tensor, Tensor]:
        return (
            stratified(0, positions, micro),
            keyed_noise.keyed_noise(0, "noise", positions, (px, px, 3)),
        )

    positions = torch.arange(micro, device=device)
    eager = draw(positions)
    took = seconds_of(lambda: draw(positions), device, seconds)
    yield {"px": px, "way": "eager", "micro-batch": micro, "ms": 1e3 * took}

    torch.compiler.reset()
    # A hash in Python, which the compiler takes as the number that it is.
    keyed_noise.stream_key = torch.compiler.assume_constant_result(stream_key)
    compiled = torch.compile(draw, dynamic=False, fullgraph=True)
    began = time.perf_counter()
    numbers, noise = compiled(positions)
    wait_for(device)
    first = time.perf_counter() - began
    took = seconds_of(lambda: compiled(positions), device, seconds)
    half = compiled(positions[: micro // 2])[1]  # as on twice the number of ranks
    yield {
        "px": px,
        "way": "compiled",
        "micro-batch": micro,
        "ms": 1e3 * took,
        "first, s": first,
        "timesteps": "bit-equal" if numbers.equal(eager[0]) else "differ",
        "noise differs by": float((noise - eager[1]).abs().max()),
        "half a batch": "bit-equal" if half.equal(noise[: micro // 2]) else "differs",
    }


def decoding_rows(px: int, count: int, device: torch.device, seconds: float) -> Iterator[Row]:
    """Measure decoding JPEGs of ImageNet's size and cutting random squares of them.

    The first row is a loader's worker, in one thread. On a GPU there are two more, in batches of
    `count`, with the copy to the device.
    """
    torch.set_num_threads(1)
    jpegs = made_up_jpegs(count)
    randrange = random.Random(0).randrange

    def on_a_worker() -> None:
        for jpeg in jpegs:
            images.random_crop(images.decode(jpeg), px, randrange)

    library = "Pillow" if images.simplejpeg is None else "simplejpeg"
    worker = count / seconds_of(on_a_worker, torch.device("cpu"), seconds)
    row = {"px": px, "images/s": worker, "kB": sum(map(len, jpegs)) / count / 1e3}
    yield row | {"way": f"one worker, {library}"}
    if device.type == "cuda":
        for row in device_rows(jpegs, px, device, seconds):
            yield row | {"as many workers": row["images/s"] / worker}


def device_rows(
    jpegs: Sequence[bytes], px: int, device: torch.device, seconds: float
) -> Iterator[Row]:
    """Measure decoding alone, with its difference from the loader's pixels, and with crops."""
    encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    randrange = random.Random(0).randrange

    def decode() -> list[Tensor]:
        return torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB, device)

    errors = [
        (image.cpu().permute(1, 2, 0).short() - images.decode_pixels(jpeg)).abs()
        for image, jpeg in zip(decode(), jpegs, strict=True)
    ]
    rate = len(jpegs) / seconds_of(decode, device, seconds)
    yield {
        "px": px,
        "way": "this GPU, decoding alone",
        "images/s": rate,
        "largest difference": max(int(error.max()) for error in errors),
        "mean difference": statistics.mean(float(error.float().mean()) for error in errors),
    }
    rate = len(jpegs) / seconds_of(lambda: random_crops(decode(), px, randrange), device, seconds)
    yield {"px": px, "way": "this GPU, decoding and crops", "images/s": rate}


def made_up_jpegs(count: int) -> list[bytes]:
    """Return JPEGs of SIDES and quality 90, whose spectrum falls with 1 / frequency, as that of
    photographs (Field 1987, "Relations between the statistics of natural images and the response
    properties of cortical cells")."""
    numbers = np.random.default_rng(0)
    rows, columns = (np.fft.fftfreq(side) for side in SIDES)
    frequency = np.hypot(rows[:, None], columns)[..., None]  # [rows, columns, 1]
    frequency[0, 0] = math.inf  # no offset
    jpegs = []
    for _ in range(count):
        spectrum = np.fft.fft2(numbers.standard_normal((*SIDES, 3)), axes=(0, 1)) / frequency
        pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
        pixels = 128 + CONTRAST * pixels / pixels.std()
        data = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        jpegs.append(data.getvalue())
    return jpegs


def random_crops(decoded: Sequence[Tensor], px: int, randrange: Callable[[int], int]) -> Tensor:
    """Do what `images.random_crop` does on the images' device, without its halving first.

    decoded: each [3, H, W] uint8. Returns [N, px, px, 3] uint8.
    """
    squares = []
    for image in decoded:
        short_side = px + randrange(math.ceil(px / images.MIN_CROP_FRAC) - px + 1)
        scale = short_side / min(image.shape[1:])
        height, width = (round(side * scale) for side in image.shape[1:])
        top, left = randrange(height - px + 1), randrange(width - px + 1)
        resized = resize(image, [height, width], InterpolationMode.BICUBIC)
        squares.append(resized[:, top : top + px, left : left + px])
    return torch.stack(squares).permute(0, 2, 3, 1)
