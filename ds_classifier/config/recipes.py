"""Recipes: settings that belong together, by name."""

from __future__ import annotations

from typing import Any


# Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", Table 12. Not trained
# here.
def _imagenet(**settings: Any) -> dict[str, Any]:
    """Return the settings of all ImageNet recipes, and those of one of them."""
    return dict(
        classifier_width=128,
        classifier_depth=2,
        classifier_attention_resolutions="32,16,8",
        classifier_pool="attention",
        noise_schedule="linear",
        global_batch=256,
        lr=3e-4,
        weight_decay=0.05,
        **settings,
    )


def _small(**settings: Any) -> dict[str, Any]:
    """Return the settings of a network that a CPU trains in minutes, and those of a recipe."""
    return dict(
        image_size=32,
        classifier_width=32,
        classifier_depth=1,
        classifier_attention_resolutions="8",
        noise_schedule="cosine",
        schedule_sampler="noisy",
        posterior_images=2048,
        random_flip=False,
        global_batch=64,
        lr=1e-3,
        muon_lr_scale=10,
        weight_decay=0.05,
        log_interval=50,
        **settings,
    )


RECIPES: dict[str, dict[str, Any]] = {
    # guided-diffusion's exact training maths, with --anneal_lr True as in its README. The JSON must
    # not clip, and must lower the loss scale at every overflow; deepspeed_json checks both.
    "reference": dict(anneal_lr=True),
    "imagenet64": _imagenet(image_size=64, iterations=300_000)
    | dict(
        classifier_depth=4, noise_schedule="cosine", global_batch=1024, lr=6e-4, weight_decay=0.2
    ),
    "imagenet128": _imagenet(image_size=128, iterations=300_000),
    "imagenet256": _imagenet(image_size=256, iterations=500_000),
    "imagenet512": _imagenet(image_size=512, iterations=500_000),
    # Latents of 256 px images (those of Stable Diffusion's autoencoder: 4 channels, a side of 32).
    # Not trained here. A flipped latent is not the latent of the flipped image.
    "latent32": _imagenet(image_size=32, iterations=300_000)
    | dict(in_channels=4, noise_schedule="scaled_linear", random_crop=False, random_flip=False),
    # CIFAR-10 and similar data sets: 32 px colour images of objects.
    "cifar32": dict(
        image_size=32,
        classifier_width=64,
        classifier_depth=2,
        classifier_attention_resolutions="16,8",
        noise_schedule="cosine",
        posterior_images=8192,
        global_batch=128,
        iterations=20_000,
        lr=6e-4,
        muon_lr_scale=10,
        weight_decay=0.05,
        save_interval=1000,
    ),
    # scikit-learn's handwritten digits, enlarged to 32 px; `make quickstart` trains this.
    "digits32": _small(iterations=500, save_interval=250),
    # digits32 under the process of flow matching.
    "flow32": _small(iterations=500, save_interval=250) | dict(noise_schedule="flow"),
    # Made-up images of a known distribution (`convert gaussians`), to measure choices on. They are
    # not cropped or mirrored, which would change the distribution.
    "gaussians32": _small(random_crop=False, iterations=1000, save_interval=500)
    | dict(schedule_sampler="uniform", high_noise_weight=100),
}
