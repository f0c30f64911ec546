"""Pixels equal guided-diffusion's; odd and hostile files."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image
from running import GOLDEN

from ds_classifier.data import images


def png(mode, size=(20, 30), **save):
    data = io.BytesIO()
    Image.new(mode, size).save(data, format="PNG", **save)
    return data.getvalue()


def test_agrees_with_the_golden_image():
    golden = np.load(GOLDEN / "images.npz")
    image = Image.fromarray(golden["pixels"])
    assert np.array_equal(images.center_crop(image, 16), golden["center_16"])
    tall = Image.fromarray(golden["pixels"].transpose(1, 0, 2))
    assert np.array_equal(images.center_crop(tall, 16), golden["center_16_tall"])
    for seed in range(3):
        random.seed(seed)
        crop = images.random_crop(image, 16, random.randrange)
        assert np.array_equal(crop, golden[f"random_16_{seed}"])


def test_agrees_with_the_recorded_images(reference, imagenet_sample):
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
@pytest.mark.parametrize("fast", [False, True])
def test_any_mode_is_converted_to_the_channels(mode, channels, fast):
    crop = images.center_crop(images.decode(png(mode), channels), 8, fast=fast)
    assert crop.shape == (8, 8, channels)
    assert crop.dtype == np.uint8


@pytest.mark.parametrize("fast", [False, True])
def test_cmyk_jpeg_and_one_pixel(fast):
    data = io.BytesIO()
    Image.new("CMYK", (9, 9)).save(data, format="JPEG")
    for image in (data.getvalue(), png("RGB", (1, 1))):
        crop = images.center_crop(images.decode(image), 4, fast=fast)
        assert crop.shape == (4, 4, 3)


def test_a_subsampling_that_the_fast_decoder_does_not_know_goes_to_pillow():
    """4:4:1, made by patching the header of a 4:2:0 image, since no encoder here writes it."""
    stored = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(stored, "JPEG", subsampling=2)
    data = bytearray(stored.getvalue())
    frame = data.find(b"\xff\xc0")
    data[frame + 11], data[frame + 5 : frame + 9] = 0x14, b"\x02\x00\x00\x80"
    expected = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    assert np.array_equal(np.asarray(images.decode(bytes(data))), np.asarray(expected))


def test_jpegs_are_decoded_to_the_pixels_of_pillow(imagenet_sample):
    """The fast decoder gives Pillow's pixels, or its error, for whole and damaged JPEGs."""
    pytest.importorskip("simplejpeg")

    def outcome(decoder, data):
        try:
            return decoder(data)
        except ValueError as error:
            return str(error)

    def by_pillow(data):
        return np.asarray(images._decode_any(data, 3))

    whole = [path.read_bytes() for path in sorted(imagenet_sample.iterdir())]
    whole += list(kinds_of_jpeg(Image.open(io.BytesIO(whole[0]))))
    draw, damaged = random.Random(0), []
    for _ in range(1000):
        data = bytearray(draw.choice(whole[202:]))
        at = draw.randrange(len(data))
        data[at : at + draw.choice([1, 8, len(data)])] = draw.choice([b"", b"\0", b"?!"])
        damaged.append(bytes(data))
    fast = errors = 0
    for data in whole + damaged:
        expected = outcome(by_pillow, data)
        found = outcome(lambda data: np.asarray(images.decode(data)), data)
        pixels = outcome(images.decode_pixels, data)
        assert np.array_equal(found, expected)
        assert np.array_equal(pixels, expected)
        errors += isinstance(expected, str)
        fast += images._plain_jpeg(data, 3) is not None
    assert fast > 202 + 60
    assert errors > 200


def kinds_of_jpeg(original):
    for size in ((1, 1), (17, 33), (40, 23)):
        for mode in ("RGB", "L", "CMYK"):
            for subsampling in (0, 1, 2) if mode == "RGB" else (0,):
                for save in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
                    data = io.BytesIO()
                    image = original.resize(size).convert(mode)
                    image.save(data, format="JPEG", subsampling=subsampling, **save)
                    yield data.getvalue()


def test_without_the_fast_decoder_pillow_decodes(monkeypatch):
    data = next(kinds_of_jpeg(Image.new("RGB", (9, 9), "red")))
    expected = images.decode_pixels(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(images.decode_pixels(data), expected)
    assert np.array_equal(np.asarray(images.decode(data)), expected)


def test_damaged_files_are_value_errors():
    data = io.BytesIO()
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(data, format="JPEG")
    whole = data.getvalue()
    for damaged in (b"", b"<html>", whole[:200], whole[: len(whole) // 2], png("RGB")[:40]):
        with pytest.raises(ValueError):
            images.decode(damaged)


def test_a_very_thin_image_is_not_enlarged_too_far():
    for size, fast in (((1, 200_000), False), ((200_000, 1), True)):
        with pytest.raises(ValueError, match="too many"):
            images.center_crop(images.decode(png("L", size)), 64, fast=fast)


def test_huge_images_are_refused_before_decoding():
    header = png("1", (20_000, 20_000))  # 400 megapixels in a few kilobytes
    with pytest.raises(ValueError, match="pixels"):
        images.decode(header)


def whole_then_crop(image, short_side, size, top, left):
    """Do all halvings and the whole resize with Pillow, then crop, as guided-diffusion does."""
    while min(image.size) >= 2 * short_side:
        half = tuple(side // 2 for side in image.size)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = short_side / min(image.size)
    size_then = tuple(round(side * scale) for side in image.size)
    image = image.resize(size_then, resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)[top : top + size, left : left + size]
    return pixels.reshape(size, size, -1)


def test_the_shortcuts_change_no_pixel():
    """Exact crops equal the whole resize, fast ones nearly; wide and tall images of all sizes."""
    draw, noise = random.Random(0), np.random.RandomState(0)
    differing = []
    for _ in range(400):
        width, height = draw.choice([(1, 1), (40, 300), (300, 40)] + [(90, 90)] * 3)
        width, height = draw.randint(1, width), draw.randint(1, height)
        mode = draw.choice(["L", "LA", "RGB", "RGB", "RGBA"])
        pixels = noise.randint(0, draw.choice([2, 256]), (height, width, len(mode)))
        pixels = (pixels * 255 // pixels.max(initial=1)).astype(np.uint8)
        image = Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels)
        short_side = draw.randint(1, 80)
        size = draw.randint(-(-short_side // 2), short_side)
        if max(width, height) > 20 * min(width, height):
            continue
        resized = images.resized_size(image.size, short_side)
        top, left = draw.randint(0, resized[1] - size), draw.randint(0, resized[0] - size)
        crop = (image, short_side, size, top, left)
        expected = whole_then_crop(*crop)
        assert np.array_equal(images.resize_and_crop(*crop), expected), crop
        fast = images.resize_and_crop(*crop, fast=True)
        same = images.resize_and_crop(pixels, *crop[1:], fast=True)
        assert np.array_equal(same, fast)
        assert np.array_equal(images.resize_and_crop(pixels, *crop[1:]), expected)
        assert fast.dtype == np.uint8
        difference = np.abs(fast.astype(int) - expected)
        assert difference.max() <= 2, crop
        differing.append((difference > 0).mean())
    assert len(differing) > 250
    assert 0 < np.mean(differing) < 0.01  # torchvision did the resize, and exactly enough


@pytest.mark.parametrize(("size", "mean", "decibels"), [(64, 0.005, 66.0), (256, 0.005, 66.0)])
def test_fast_pixels_of_real_images(imagenet_sample, size, mean, decibels):
    """Fast pixels differ by at most 2 of 255; the means over all images are as documented."""
    means = []
    for i, path in enumerate(sorted(imagenet_sample.iterdir())):
        image = images.decode(path.read_bytes())
        exact = images.random_crop(image, size, random.Random(i).randrange)
        fast = images.random_crop(image, size, random.Random(i).randrange, fast=True)
        difference = np.abs(exact.astype(int) - fast)
        assert difference.max() <= images.FAST_TOLERANCE == 2
        assert 10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)) > decibels, path.name
        means.append(difference.mean())
    assert len(means) == 202
    assert np.mean(means) < mean


def test_fast_pixels_of_the_golden_image():
    golden = np.load(GOLDEN / "images.npz")
    image = Image.fromarray(golden["pixels"])
    for seed in range(3):
        crop = images.random_crop(image, 16, random.Random(seed).randrange, fast=True)
        assert np.abs(crop - golden[f"random_16_{seed}"].astype(int)).max() <= 2
