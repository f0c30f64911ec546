"""Data sets that come with the program or are made by it: scikit-learn's digits, and gaussians."""

from __future__ import annotations

import io

from ds_classifier.data.convert.samples import DataSource, Sample

DIGITS = "digits"
GAUSSIANS = "gaussians"
DRAWN = 1000  # images of a known distribution that are drawn at a time
DIGITS_HELD_OUT = 360  # the last images of scikit-learn's digits, by other writers than the first


def digits() -> DataSource:
    """Return the 1,797 handwritten digits in scikit-learn (UCI, Alpaydin & Kaynak 1998) as PNG.

    8 x 8 grey images, 10 classes. The last 360 images are the validation split.
    """
    import numpy as np
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "source: digits needs scikit-learn, which holds them; do: pip install scikit-learn"
        ) from None

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], 0..16 -> 0..255
    samples = []
    for i, (image, label) in enumerate(zip(pixels, bunch.target, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        samples.append(Sample(f"digit_{i:04d}", int(label), png.getvalue()))
    held_out = len(samples) - DIGITS_HELD_OUT
    splits = {"train": samples[:held_out], "val": samples[held_out:]}
    return DataSource(DIGITS, [str(name) for name in bunch.target_names], splits)


def gaussians(source: str) -> DataSource:
    """Return images drawn from a known distribution, as PNG, with equally many of each class.

    source: see `GaussianClasses.parse`.
    """
    import numpy as np
    from PIL import Image

    from ds_classifier.common.gaussians import GaussianClasses

    distribution = GaussianClasses.parse(source)
    sizes = {"train": distribution.images, "val": max(1, distribution.images // 4)}
    splits = {}
    for stream, (split, size) in enumerate(sizes.items()):
        samples = splits[split] = []
        for part in range(0, size, DRAWN):
            labels = np.arange(part, min(part + DRAWN, size)) % distribution.classes
            for pixels in distribution.draw(labels, (part // DRAWN) * len(sizes) + stream):
                png = io.BytesIO()
                mode = pixels[..., 0] if distribution.channels == 1 else pixels
                Image.fromarray(mode).save(png, format="PNG")
                number = len(samples)
                label = number % distribution.classes
                samples.append(Sample(f"{split}_{number:06d}", label, png.getvalue()))
    return DataSource(str(distribution), [str(k) for k in range(distribution.classes)], splits)
