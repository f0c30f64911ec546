"""Test the UNet against outputs recorded from guided-diffusion's."""

import json
import zlib

import numpy as np
import pytest
import torch
from running import GOLDEN
from small_models import GOLDEN_UNETS, RELATIVE, SMALL_UNET, filled, relative_error, small_unet

from ds_classifier.guidance.unet import create_unet

# Flags that all models in guided-diffusion's README share.
PUBLISHED = dict(SMALL_UNET, channel_mult="", num_classes=1000, class_cond=True, learn_sigma=True)
PUBLISHED |= dict(attention_resolutions="32,16,8", resblock_updown=True, num_res_blocks=2)


def output_of(unet, size, t, y):
    x = np.random.RandomState(7).standard_normal((2, 3, size, size)).astype(np.float32)
    y = None if unet.num_classes is None else torch.as_tensor(y)
    with torch.no_grad():
        return unet(torch.from_numpy(x), torch.as_tensor(t), y).numpy()


@pytest.mark.parametrize("name", GOLDEN_UNETS)
def test_small_unets_equal_the_reference(name):
    recorded = np.load(GOLDEN / "sampling.npz")
    output = output_of(small_unet(name), 16, recorded["t"], recorded["y"])
    assert relative_error(output, recorded[f"output_{name}"]) < RELATIVE


@pytest.mark.parametrize("name", ["unet64_cond", "unet64_uncond_heads4"])
def test_equals_the_reference(reference, name):
    case = json.loads((reference / "sampling_cases.json").read_text())["unets"][name]
    settings = {key: value for key, value in case["model"].items() if key in PUBLISHED}
    unet = create_unet(**settings).eval()
    assert {k: list(v.shape) for k, v in unet.state_dict().items()} == case["state"]
    unet.load_state_dict(filled(unet.state_dict()))
    output = output_of(unet, 64, case["timesteps"], case["labels"])
    assert relative_error(output, np.load(reference / f"{name}.npz")["output"]) < RELATIVE


@pytest.mark.parametrize(
    ("size", "flags", "parameters", "crc"),
    [
        (64, dict(num_channels=192, num_head_channels=64, num_res_blocks=3), 295904454, 2434856170),
        (128, dict(num_channels=256), 421529606, 2580750828),
        (256, dict(num_channels=256, num_head_channels=64), 553838086, 4096379770),
        (
            256,
            dict(num_channels=256, num_head_channels=64, class_cond=False),
            552814086,
            3099076109,
        ),
        (512, dict(num_channels=256, num_head_channels=64), 558997638, 1592047770),
    ],
)
def test_published_sizes_have_the_reference_s_names_and_shapes(size, flags, parameters, crc):
    """Compare with the crc of guided-diffusion's own state dict, built with these flags."""
    with torch.device("meta"):
        unet = create_unet(**PUBLISHED | flags | dict(image_size=size))
    assert sum(p.numel() for p in unet.parameters()) == parameters
    state = [[name, list(value.shape)] for name, value in unet.state_dict().items()]
    assert zlib.crc32(json.dumps(state).encode()) == crc


def test_half_precision_stays_near():
    unet = small_unet("cond")
    full = output_of(unet, 16, [3, 750], [1, 5])
    unet.set_precision(torch.bfloat16)
    half = output_of(unet, 16, [3, 750], [1, 5])
    assert half.dtype == np.float32
    assert 1e-5 < relative_error(half, full) < 0.1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(channel_mult="1,x"), "channel_mult"),
        (dict(image_size=17), "multiple of 2"),
        (dict(num_channels=40), "num_channels"),
        (dict(num_heads=3), "num_heads"),
        (dict(num_head_channels=48), "num_head_channels"),
        (dict(num_channels=0), "num_channels: got 0"),
        (dict(channel_mult="1,0"), "num_channels: got 0"),
        (dict(num_heads=0), "num_head_channels: got 0, 0, -1"),
        (dict(num_heads_upsample=0), "num_head_channels: got 4, 0, -1"),
        (dict(num_head_channels=0), "num_head_channels: got 4, 4, 0"),
        (dict(num_head_channels=-2), "num_head_channels: got 4, 4, -2"),
        (dict(num_res_blocks=0), "num_res_blocks: got 0"),
        (dict(image_size=0), "image_size: got 0"),
    ],
)
def test_refuses_architectures_that_cannot_be_built(flags, words):
    with pytest.raises(ValueError, match=words):
        create_unet(**SMALL_UNET | flags)
