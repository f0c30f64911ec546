"""Small classifiers and UNets with weights computed from their names; a small training set."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch

from ds_classifier.guidance.unet import create_unet

# The classifier of tests/golden/model.npz.
DEFAULT = dict(
    image_size=16,
    classifier_width=32,
    classifier_depth=1,
    classifier_attention_resolutions="8",
    classifier_use_scale_shift_norm=True,
    classifier_resblock_updown=True,
    classifier_pool="attention",
    classifier_channel_mult="1,2",
    num_classes=7,
)
RELATIVE = 1e-4  # error allowed in float32, relative to the largest value
SMALL = dict(
    image_size=16,
    num_classes=5,
    classifier_width=32,
    classifier_depth=1,
    classifier_attention_resolutions="8",
    classifier_channel_mult="1,2",
)
SMALL_UNET = dict(
    image_size=16,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2",
    num_heads=4,
    num_head_channels=-1,
    num_heads_upsample=-1,
    attention_resolutions="8",
    class_cond=False,
    use_scale_shift_norm=True,
    resblock_updown=False,
    use_new_attention_order=False,
    learn_sigma=False,
    num_classes=7,
)
GOLDEN_UNETS = {  # the same as in tests/golden/record.py
    "cond": dict(
        class_cond=True,
        num_head_channels=32,
        resblock_updown=True,
        use_new_attention_order=True,
        learn_sigma=True,
    ),
    "uncond": dict(num_heads_upsample=2, use_scale_shift_norm=False),
}
CLASSES = 3


def recorded_input() -> torch.Tensor:
    """Return the input of the recorded gradients of tests/golden/model.npz, [2, 3, 16, 16] fp32."""
    x = np.random.RandomState(7).standard_normal((2, 3, 16, 16)).astype(np.float32)
    return torch.from_numpy(x)


def filled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights computed from their names, as those of the recorded cases were."""
    weights = {}
    for name, value in state.items():
        seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
        n = np.random.RandomState(seed).standard_normal(tuple(value.shape))
        if value.dim() > 1:
            n = n / np.sqrt(np.prod(value.shape[1:]))
        else:
            n = 1 + 0.1 * n if name.endswith("weight") else 0.1 * n
        weights[name] = torch.from_numpy(n.astype(np.float32))
    return weights


def relative_error(got, recorded):
    """Return the largest difference, relative to the largest recorded value."""
    return np.abs(got - recorded).max() / np.abs(recorded).max()


def small_unet(name):
    """Return one of GOLDEN_UNETS with weights computed from their names."""
    unet = create_unet(**SMALL_UNET | GOLDEN_UNETS[name])
    unet.load_state_dict(filled(unet.state_dict()))
    return unet.eval()


def training_set(m=11, side=4):
    """Return m random images, [m, 2, side, side] uint8, and their labels, [m]."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (m, 2, side, side), generator=generator, dtype=torch.uint8)
    return images, torch.arange(m) % CLASSES


def noisy(images, alpha_bar):
    """Return the first two images, noised to alpha_bar, [2, C, S, S] float64."""
    generator = torch.Generator().manual_seed(6)
    clean = images[:2].double() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return math.sqrt(alpha_bar) * clean + math.sqrt(1 - alpha_bar) * noise
