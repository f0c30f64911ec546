"""The report's section "Does it guide?": samples that `launch/sample.py` drew into the run."""

from __future__ import annotations

import functools
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ds_classifier.common.false_colours import FalseColours
from ds_classifier.common.text import count, percent
from ds_classifier.guidance.fidelity import NEAREST, measured
from ds_classifier.guidance.sample_files import groups, title
from ds_classifier.report.data import GuidedSamples, RunData
from ds_classifier.report.evaluation import class_name, data_uri

SCALES_SHOWN, CLASSES_SHOWN, IMAGES_SHOWN = 3, 10, 8  # side by side, rows, images in a row
SIDE = 64  # pixels; larger samples are shrunk


def guides(run: RunData) -> dict[str, Any] | str:
    """Return samples by scale and class, the share of the class asked for, and the comparison."""
    samples = run.samples
    if samples is None:
        data = run.settings.get("data_dir") or "SHARDS"
        eta = f" --eta {run.targets.moving_eta:.2g}" if run.targets.kind == "values" else ""
        return (
            "No samples yet. To draw and measure some on a small training set and update this "
            f"page, run: ds-classifier sample --classifier_path {run.named} --data_dir {data}{eta} "
            "--classifier_scale 0 1 10 --num_samples 100 --timestep_respacing 50 --measure. With "
            "the diffusion model to be guided: --model_path FILE.pt and its flags in place of "
            "--data_dir and --measure."
        )
    drawn = {scale: read_samples(run.path / "samples", scale) for scale in samples.scales}
    scales = [scale for scale, found in drawn.items() if found is not None]
    places = np.linspace(0, len(scales) - 1, min(SCALES_SHOWN, len(scales))).round().astype(int)
    names = run.classes or []
    arrays = [drawn[scale][0] for scale in scales if not _are_images(drawn[scale][0])]
    colours = FalseColours(arrays[0].transpose(0, 2, 3, 1)) if arrays else None
    blocks = []
    for scale in (scales[i] for i in places):
        pixels, labels = drawn[scale]
        if not _are_images(pixels):
            pixels = colours(pixels.transpose(0, 2, 3, 1))
        shown = ""
        if (share := samples.shares.get(scale)) is not None:
            of = " of the class asked for" if samples.kind == "class" else ""
            shown = measured(samples.kind, share, 0) + of
        blocks.append(
            {
                "name": f"scale {scale:g}" if scale else "unguided",
                "measured": shown,
                "rows": [
                    {
                        "name": title(asked, functools.partial(class_name, names)),
                        "sources": [
                            data_uri(_tile(image)) for image in pixels[places[:IMAGES_SHOWN]]
                        ],
                    }
                    for asked, places in groups(labels)[:CLASSES_SHOWN]
                ],
            }
        )
    return {
        "text": _text(run, samples, scales)
        + (f" The samples are arrays; their colours are {colours.words}." if colours else ""),
        "images": max((len(row["sources"]) for b in blocks for row in b["rows"]), default=1),
        "blocks": blocks,
        "table": _table(samples),
    }


def read_samples(folder: Path, scale: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a scale's samples and what they were asked to show, [N] or [N, K]; None if damaged.

    Samples are uint8 [N, H, W, C], or of arrays [N, C, S, S], fp32 or uint8, as
    guidance/sample_files.py writes them.
    """
    for path in sorted((folder / f"scale_{scale:g}").glob("samples_*.npz")):
        if path.name.endswith(".staging.npz"):
            continue
        try:
            with np.load(path, allow_pickle=False) as arrays:
                pixels, labels = arrays["arr_0"], arrays["arr_1"]
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
            continue
        whole = pixels.ndim == 4 and pixels.dtype in (np.uint8, np.float32)
        whole = whole and (_are_images(pixels) or pixels.shape[2] == pixels.shape[3])
        if whole and len(pixels) and labels.shape[:1] == pixels.shape[:1] and labels.ndim <= 2:
            return pixels, labels
    return None


def _are_images(samples: np.ndarray) -> bool:
    """Return whether samples are images, [N, H, W, 1 or 3] uint8, and no arrays."""
    return samples.dtype == np.uint8 and samples.shape[-1] in (1, 3)


def _tile(image: np.ndarray) -> np.ndarray:
    """Return a sample, uint8 [H, W, C], as [h, w, 3] of at most SIDE pixels."""
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    if max(image.shape) <= SIDE:
        return image
    small = Image.fromarray(np.ascontiguousarray(image))
    small.thumbnail((SIDE, SIDE))
    return np.asarray(small)


def _text(run: RunData, samples: GuidedSamples, scales: Sequence[float]) -> str:
    """Return how the samples were drawn, and the share of the class asked for by scale."""
    step = f" of step {samples.step:,}" if samples.step is not None else ""
    drawn = f"{count(samples.number, 'sample')} per scale, guided by the classifier{step}"
    if samples.source:
        drawn += f", from {samples.source}"
    parts = [f"{drawn}."]
    if samples.asked > CLASSES_SHOWN:
        parts.append(f"The first {CLASSES_SHOWN} of {samples.asked:,} classes are shown.")
    if len(scales) > SCALES_SHOWN:
        parts.append(f"{SCALES_SHOWN} of {len(scales)} scales are shown.")
    if samples.shares:
        shares = ", ".join(
            f"{measured(samples.kind, share, 0)} at scale {scale:g}"
            for scale, share in samples.shares.items()
        )
        what = NEAREST.get(samples.kind)
        what = what or f"share that {samples.judge} assigns to the class asked for"
        parts.append(f"{what[0].upper()}{what[1:]}: {shares}.")
    else:
        parts.append(
            "How many show what was asked for was not measured: ds-classifier sample --measure."
        )
    if samples.step is not None and samples.step < run.step:
        parts.append(f"The run has reached step {run.step:,} since.")
    return " ".join(parts)


def _table(samples: GuidedSamples) -> dict[str, Any] | None:
    """Return the comparison with the best possible classifier, a row per noise level."""
    columns = ("t", "kl", "accuracy", "bayes_accuracy", "compared", "cosine", "length_ratio")
    heads = [
        "t",
        "log-SNR",
        "KL(Bayes, model)",
        "top-1",
        "Bayes top-1",
        "compared",
        "cosine",
        "length",
    ]
    rows = []
    for level in samples.levels:
        t, kl, right, best, compared, cosine, length = (level.get(name) for name in columns)
        if None in (t, kl, right, best, compared) or not math.isfinite(kl):
            continue
        snr = level.get("log_snr")  # fidelity.json of an older version has none
        cells = [
            "" if snr is None else f"{snr:.2f}",
            f"{kl:.3f}",
            percent(right),
            percent(best),
            percent(compared, 0),
        ]
        cells += ["-" if value is None else f"{value:.3g}" for value in (cosine, length)]
        rows.append([str(t), *cells])
    return {"heads": heads, "rows": rows} if rows else None
