"""The meaning of a pixel, and the loss of noised images."""

import torch

from ds_classifier.loss import from_x_start, to_x_start


def test_all_pixel_values_go_there_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_x_start(pixels)
    assert x.dtype == torch.float32
    assert (float(x[0]), float(x[255])) == (-1.0, 1.0)
    assert torch.equal(from_x_start(x).round().to(torch.uint8), pixels)


def test_values_beyond_the_range_are_clipped():
    assert from_x_start(torch.tensor([-1.2, 1.5])).tolist() == [0.0, 255.0]


def test_floating_values_are_x_start_already():
    latents = torch.tensor([-3.0, 0.25])
    assert torch.equal(to_x_start(latents), latents)
    assert to_x_start(latents, torch.float64).dtype == torch.float64
