"""Make inputs for tests: folders of images, run directories, and shards with a long index."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_models import SMALL, filled

from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.fitting import tensors_of
from ds_classifier.config import Settings
from ds_classifier.data.images import encode
from ds_classifier.data.shards import INDEX, INDEX_DTYPE, Manifest, Shard, ShardSet
from ds_classifier.model import create_classifier

CLASS_NAMES = ["cat", "dog: a | b", "héron", '"quoted"', "```"]
PREDICTOR_SETTINGS = Settings(
    image_size=8,
    num_classes=10,
    classifier_width=32,
    classifier_channel_mult="1,2",
    classifier_depth=1,
    classifier_attention_resolutions="4",
    noise_schedule="cosine",
    timestep_respacing="250",
)


def make_run(
    run: Path, *, step: int = 7, arrays: dict | None = None, targets: dict | None = None, **own
) -> Path:
    """Write a run with one checkpoint, whose weights are computed from their names; return it."""
    settings = Settings(**SMALL | dict(noise_schedule="cosine", lr=1e-3) | own)
    more = map(str, range(len(CLASS_NAMES), settings.num_classes))
    state = {
        "format": disk.FORMAT,
        "version": disk.VERSION,
        "step": step,
        "settings": asdict(settings),
        "classes": [*CLASS_NAMES, *more][: settings.num_classes],
        "data": "f" * 64,
    }
    state |= {k: v for k, v in {"arrays": arrays, "targets": targets}.items() if v is not None}
    model = filled(tensors_of(settings))
    disk.commit(run / "checkpoints" / disk.step_name(step), model=model, optimizer={}, state=state)
    return run


def write_run(home):
    """Write a run with one checkpoint of an untrained classifier; return it."""
    torch.manual_seed(0)
    classifier = create_classifier(**PREDICTOR_SETTINGS.model_kwargs())
    for parameter in classifier.parameters():  # parameters that start at zero would hide errors
        torch.nn.init.normal_(parameter, std=0.2)
    state = dict(
        format=disk.FORMAT,
        version=disk.VERSION,
        step=7,
        settings=vars(PREDICTOR_SETTINGS),
        classes=[f"the {digit}" for digit in range(10)],
        data="",
    )
    (home / "checkpoints").mkdir(parents=True)
    final = home / "checkpoints" / disk.step_name(7)
    disk.commit(final, model=classifier.state_dict(), optimizer={}, state=state)
    return home


def make_images(folder: Path, names: list[str]) -> Path:
    """Write small random images, each in the format of its suffix, and return their folder."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(i).randint(0, 256, (12, 10, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def made_up_shards(folder: Path, sizes: list[int], touched: np.ndarray) -> ShardSet:
    """Return a split whose index is as long as a real one, but sparse on disk.

    sizes: samples per shard. touched: the rows that may be read; each names the same image.
    """
    noise = np.random.RandomState(0).randint(0, 256, (80, 100, 3)).astype(np.uint8)
    image = encode(Image.fromarray(noise), "jpg")
    shards = [Shard(f"train-{n:06d}.tar", k, len(image), "0" * 64) for n, k in enumerate(sizes)]
    (folder / shards[0].name).write_bytes(image)
    samples = sum(sizes)
    rows = np.lib.format.open_memmap(folder / INDEX, "w+", dtype=INDEX_DTYPE, shape=(samples,))
    rows["length"][touched] = len(image)
    rows.flush()
    manifest = Manifest(
        split="train",
        source="made up",
        plan="",
        classes=["one"],
        samples=samples,
        stored="original",
        image_size=None,
        form="",
        undecodable=[],
        shards=shards,
        index_sha256="",
    )
    return ShardSet(folder, manifest, np.load(folder / INDEX, mmap_mode="r"))
