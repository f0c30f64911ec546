"""Pixels against guided-diffusion's, and what odd or hostile files do."""

import io
import json
import random

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from ds_classifier.data import images


def png(mode, size=(20, 30), **save):
    data = io.BytesIO()
    Image.new(mode, size).save(data, format="PNG", **save)
    return data.getvalue()


def test_agrees_with_the_golden_picture():
    golden = np.load(GOLDEN / "images.npz")
    image = Image.fromarray(golden["pixels"])
    assert np.array_equal(images.center_crop(image, 16), golden["center_16"])
    tall = Image.fromarray(golden["pixels"].transpose(1, 0, 2))
    assert np.array_equal(images.center_crop(tall, 16), golden["center_16_tall"])
    for seed in range(3):
        random.seed(seed)
        crop = images.random_crop(image, 16, random.randrange)
        assert np.array_equal(crop, golden[f"random_16_{seed}"])


def test_agrees_with_the_recorded_pictures(reference, imagenet_sample):
    recorded = np.load(reference / "images.npz")
    compared = 0
    for case in json.loads((reference / "cases.json").read_text())["images"]:
        image = images.decode((imagenet_sample / case["file"]).read_bytes())
        for size in case["sizes"]:
            center = images.center_crop(image, size)
            assert np.array_equal(center, recorded[f"center_{size}_{case['index']}"])
            random.seed(case["seed"])
            crop = images.random_crop(image, size, random.randrange)
            assert np.array_equal(crop, recorded[f"random_{size}_{case['index']}"])
            compared += 2
    assert compared == 24


def test_resize_and_crop_is_the_random_crop_with_its_draws_made():
    image = Image.fromarray(np.load(GOLDEN / "images.npz")["pixels"])
    draws = iter([3, 2, 4])
    assert np.array_equal(
        images.random_crop(image, 16, lambda stop: next(draws)),
        images.resize_and_crop(image, 19, 16, 2, 4),
    )


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_mode_becomes_the_channels_asked_for(mode, channels):
    crop = images.center_crop(images.decode(png(mode), channels), 8)
    assert crop.shape == (8, 8, channels)
    assert crop.dtype == np.uint8


def test_cmyk_jpeg_and_one_pixel():
    data = io.BytesIO()
    Image.new("CMYK", (9, 9)).save(data, format="JPEG")
    assert images.center_crop(images.decode(data.getvalue()), 4).shape == (4, 4, 3)
    assert images.center_crop(images.decode(png("RGB", (1, 1))), 4).shape == (4, 4, 3)


def test_damaged_files_are_value_errors():
    data = io.BytesIO()
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(data, format="JPEG")
    whole = data.getvalue()
    for damaged in (b"", b"<html>", whole[:200], whole[: len(whole) // 2], png("RGB")[:40]):
        with pytest.raises(ValueError):
            images.decode(damaged)


def test_a_sliver_is_not_blown_up():
    with pytest.raises(ValueError, match="too many"):
        images.center_crop(images.decode(png("L", (1, 200_000))), 64)


def test_huge_pictures_are_refused_before_decoding():
    header = png("1", (20_000, 20_000))  # 400 megapixels in a few kilobytes
    with pytest.raises(ValueError, match="pixels"):
        images.decode(header)
