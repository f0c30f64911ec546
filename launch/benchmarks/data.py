"""Images per second and core, from shards in every encoding and from a folder."""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ds_classifier.config import Settings
from ds_classifier.data.convert.convert import Encoding, convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.images import decode, random_crop
from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.order import SampleOrder
from ds_classifier.data.shards import open_shards

from .measuring import interleaved


def measure(images: str, *, image_sizes: list[int], count: int, repeats: int) -> list[dict]:
    """Measure the plain way (folder, Pillow, float32) and shards in every encoding.

    Rates are per second of the process's own CPU time. exact, fast: the values of `--resize`.
    decode: only from bytes to pixels of the stored size.
    """
    torch.set_num_threads(1)
    source = open_source(images)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in image_sizes:
            runs = {("plain", "exact"): _plain(source, size, count)}
            kilobytes = {"plain": _mean_kilobytes(source)}
            for name, encoding in stores(size).items():
                out = Path(folder, f"{size} {name}")
                manifest = convert(source, out, encoding=encoding)["train"]
                kilobytes[name] = sum(s.bytes for s in manifest.shards) / manifest.samples / 1e3
                for fast in (False, True):
                    run = _from_shards(out / "train", size, count, fast=fast)
                    runs[name, "fast" if fast else "exact"] = run
                runs[name, "decode"] = _decode_alone(out / "train", count)
            rates = interleaved(runs, repeats, clock=time.process_time)
            plain = rates["plain", "exact"]
            for name in kilobytes:
                rate = {way: rates.get((name, way), "") for way in ("exact", "fast", "decode")}
                row = {"px": size, "images/s a core": name, "KB each": kilobytes[name], **rate}
                for way in ("exact", "fast"):
                    row[f"{way} / plain"] = rate[way] / plain if rate[way] else ""
                rows.append(row)
    return rows


def stores(size: int) -> dict[str, Encoding]:
    """Return the ways in which shards store images that train at `size` pixels."""
    return {
        "original": Encoding(),
        "halved jpg": Encoding(size, "jpg"),
        "halved png": Encoding(size, "png"),
    }


def _mean_kilobytes(source) -> float:
    samples = source.splits["train"]
    return sum(sample.size() for sample in samples) / len(samples) / 1e3


def _decode_alone(folder: Path, count: int) -> Callable[[], int]:
    shards = open_shards(folder)
    data = [
        shards.store.read(int(r["shard"]), int(r["offset"]), int(r["length"])) for r in shards.index
    ]

    def run() -> int:
        for i in range(count):
            decode(data[i % len(data)])
        return count

    return run


def _plain(source, size: int, count: int) -> Callable[[], int]:
    """Return a run that reads as the reference: a file per image, cropped, flipped, as float32, in
    batches of 16."""
    samples = source.splits["train"]

    def one(i: int) -> tuple[np.ndarray, int]:
        sample = samples[i % len(samples)]
        image = Image.open(io.BytesIO(sample.read())).convert("RGB")
        pixels = random_crop(image, size, random.randrange)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.transpose(pixels.astype(np.float32) / 127.5 - 1, [2, 0, 1]), sample.label

    def run() -> int:
        for first in range(0, count, 16):
            batch = [one(i) for i in range(first, min(first + 16, count))]
            torch.utils.data.default_collate(batch)
        return count

    return run


def _from_shards(folder: Path, size: int, count: int, *, fast: bool) -> Callable[[], int]:
    shards = open_shards(folder)
    order = SampleOrder(
        [shard.samples for shard in shards.manifest.shards], **Settings().order_kwargs()
    )
    dataset = ShardDataset(
        shards, image_size=size, order=order, random_crop=True, random_flip=True, fast=fast
    )

    def run() -> int:
        for first in range(0, count, 16):
            dataset[np.arange(first, min(first + 16, count))]
        return count

    return run
