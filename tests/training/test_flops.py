"""FLOPs against known counts and a count by hand, MFU against arithmetic on paper."""

import pytest
import torch

from ds_classifier.config import RECIPES, Settings
from ds_classifier.model import create_classifier
from ds_classifier.training.logs.flops import (
    Arithmetic,
    forward_flops,
    peak_flops,
    training_flops_with,
)

# Forward GFLOP an image of guided-diffusion's classifiers, 1,000 classes, counted on its code.
KNOWN = {
    ("imagenet64", 2): 20.25,
    ("imagenet64", 4): 38.2,
    ("imagenet128", 2): 42.1,
    ("imagenet256", 2): 146.7,
    ("imagenet512", 2): 225.5,
}


@pytest.mark.parametrize(("recipe", "depth"), KNOWN)
def test_known_counts(recipe, depth):
    settings = Settings(**RECIPES[recipe]).replace(num_classes=1000, classifier_depth=depth)
    ours = forward_flops(settings.model_kwargs())
    # guided-diffusion forms every token's answer in its pooling, ours the mean token's alone, of
    # T = 8 * 8 + 1 tokens, C = 512 channels and K = 1,000 classes.
    tokens, channels, classes = 65, 512, 1000
    queries = 2 * (tokens - 1) * channels * channels
    attention = 2 * 2 * (tokens - 1) * tokens * channels
    answers = 2 * (tokens - 1) * channels * classes
    theirs = ours + queries + attention + answers
    assert theirs / 1e9 == pytest.approx(KNOWN[recipe, depth], rel=2e-3)
    if depth == 2 and recipe == "imagenet64":
        assert theirs / 1e9 == pytest.approx(20.25, rel=1e-4)


def test_a_tiny_classifier_by_hand():
    settings = Settings(
        image_size=8,
        in_channels=1,
        num_classes=10,
        classifier_width=64,
        classifier_channel_mult="1",
        classifier_depth=1,
        classifier_attention_resolutions="",
        classifier_pool="adaptive",
    )
    c, pixels, emb = 64, 64, 256
    embedding = 64 * emb + emb * emb
    first = 9 * 1 * c * pixels
    block = 2 * 9 * c * c * pixels + emb * 2 * c  # two convolutions; scale and shift
    attention = c * 3 * c * pixels + 2 * pixels * pixels * c + c * c * pixels
    multiply_adds = embedding + first + 3 * block + attention + c * 10
    assert forward_flops(settings.model_kwargs()) == 2 * multiply_adds
    # A frozen trunk has no backward; the head's last layer has gradients of weights and inputs.
    with torch.device("meta"):
        names = [n for n, _ in create_classifier(**settings.model_kwargs()).named_parameters()]
    trunk = [name for name in names if not name.startswith("out.")]
    kwargs = settings.model_kwargs()
    assert training_flops_with(trunk, kwargs) == 2 * (multiply_adds + 2 * c * 10)
    # Neither pixels nor timesteps need a gradient.
    assert training_flops_with([], kwargs) == 2 * (3 * multiply_adds - first - 64 * emb)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L40", "bf16", 181.05),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # computed without tensor cores
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA A100-SXM-64GB", "bf16", None),  # a cut of its own
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("AMD Instinct MI300X", "bf16", None),
    ],
)
def test_a_peak_is_known_or_not_guessed(name, precision, tflops):
    found = peak_flops(name, precision)
    assert found == (None if tflops is None else pytest.approx(1e12 * tflops))


def test_what_a_rank_achieves():
    """1,000 images a second of 38.2 GFLOP forward: 114.6 TFLOP/s, 36.7 % of an A100."""
    forward = 38_200_000_000
    on_a100 = Arithmetic(
        forward, 3 * forward, device_name="NVIDIA A100-SXM4-80GB", precision="bf16"
    )
    assert on_a100.achieved(1000) == pytest.approx({"gflops_per_sec": 114_600, "mfu": 0.3673}, 1e-3)
    on_cpu = Arithmetic(forward, 3 * forward, device_name=None, precision="bf16")
    assert on_cpu.achieved(1) == pytest.approx({"gflops_per_sec": 114.6})
