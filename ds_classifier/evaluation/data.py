"""The data of an evaluation: validation shards, this rank's batches, a small training set."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import torch

from ds_classifier import distributed
from ds_classifier.checkpoint.weights import WeightsFile
from ds_classifier.common.urls import shown
from ds_classifier.config import Settings
from ds_classifier.data.labels.targets import Targets
from ds_classifier.data.loader import (
    Loader,
    ShardDataset,
    ValidationPositions,
    create_loader,
    worker_count,
)
from ds_classifier.data.shards import ShardSet, open_shards
from ds_classifier.data.splits import described, open_named, refuse_other_samples
from ds_classifier.data.store import is_url
from ds_classifier.guidance.exact_denoiser import ExactDenoiser, read_images
from ds_classifier.guidance.known_distribution import KnownDistribution, open_exact

# Numbers in a training set, up to which its exact posterior is evaluated without being asked for.
BAYES_NUMBERS = 10_000_000


def recorded_place(run_dir: Path, location: str) -> str:
    """Return where the shards lie that a run named by a location, a directory or a URL.

    A relative directory that is not here is looked for where the run was started; its command.sh
    says where that was, for the last start last.
    Raises ValueError, naming all places, if the directory is in none of them.
    """
    if is_url(location) or Path(location).exists():
        return location
    try:
        lines = (run_dir / "command.sh").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    starts = [shlex.split(line)[1] for line in reversed(lines) if line.startswith("cd ")]
    places = [str(Path(folder, location)) for folder in starts if folder != os.getcwd()]
    for place in places:
        if Path(place).exists():
            return place
    if not places or Path(location).is_absolute():
        return location  # opening it says that it does not exist
    raise ValueError(
        f"got {location}, as the run names it, which is neither in {os.getcwd()} nor in "
        f"{', '.join(dict.fromkeys(starts))}, where the run was started; need its directory; do: "
        "give the flag, with the place where the shards are now"
    )


def open_validation_data(
    source: WeightsFile,
    location: str,
    *,
    cache_dir: str | None,
    cache_gb: float | None,
    device: torch.device,
) -> tuple[str, ShardSet]:
    """Open the shards to evaluate on; return their location too.

    location: a directory or URL; "": as the run names it.
    cache_dir, cache_gb: of remote shards; None: as in training.
    Raises ValueError if they do not exist, differ between ranks, or have other classes or targets
    than the classifier.
    """
    settings = source.settings
    named = settings.validation if source.kind == "checkpoint" else ""
    if not location and not named:
        raise ValueError(f"--val_data_dir: got none; need it, since {source.path} names no data")

    def open_it() -> tuple[str, ShardSet]:
        try:
            place = location or recorded_place(source.home, named)
            return place, open_named(
                place,
                cache_dir=cache_dir or settings.cache_dir,
                cache_gb=settings.cache_gb if cache_gb is None else cache_gb,
                image_size=settings.image_size,
                channels=settings.in_channels,
            )
        except (ValueError, OSError) as error:
            raise ValueError(f"--val_data_dir: {error}") from None

    location, shards = distributed.together(open_it, device)
    targets = Targets.from_json(source.targets)
    if source.kind != "file" and shards.manifest.targets != targets:
        raise ValueError(
            f"--val_data_dir: got {shards.manifest.targets} in {shown(location)}; need {targets}, "
            f"as {source.path} was trained on; do: convert both splits in one call, with --val"
        )
    classes = shards.manifest.classes
    if source.classes not in (None, classes) or len(classes) != settings.num_classes:
        raise ValueError(
            f"--val_data_dir: got {len(classes)} classes in {shown(location)}; need the same list "
            f"as the {settings.num_classes} of {source.path}; do: convert both splits in one call, "
            "with --val"
        )
    if source.kind != "file":
        try:
            refuse_other_samples(shards.manifest, location, source.arrays, str(source.path))
        except ValueError as error:
            raise ValueError(f"--val_data_dir: {error}") from None
    fingerprint, problem = shards.manifest.fingerprint, None
    if distributed.broadcast_json(fingerprint, device) != fingerprint:
        problem = f"the shards in {shown(location)} on this node differ from those of rank 0's node"
    distributed.raise_together(problem, device)
    return location, shards


def create_validation_loader(
    shards: ShardSet, settings: Settings, *, batch_size: int, workers: int
) -> Loader:
    """Return a loader of this rank's batches.

    The composition of a batch does not depend on the number of ranks.
    workers: processes per rank; below 0: as many as suit the machine.
    """
    positions = ValidationPositions(
        shards.manifest.samples,
        batch=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    pixels = dict(image_size=settings.image_size, channels=settings.in_channels)
    dataset = ShardDataset(shards, batches=positions, **pixels)
    return create_loader(dataset, positions, workers=min(worker_count(workers), len(positions)))


def labels_of(shards: ShardSet, *, most: int = 1 << 62) -> np.ndarray:
    """Return labels [N] int of a set, or targets [N, K] for several classes and soft vectors.

    most: numbers; of a larger set every so many samples are taken, evenly spaced.
    """
    labels = shards.index["label"] if shards.targets is None else shards.targets
    return labels[:: max(1, labels.size // most)]


def open_training_set(
    source: WeightsFile, asked: str, val_shards: ShardSet, device: torch.device
) -> tuple[str, ExactDenoiser | KnownDistribution | None]:
    """Return the location of the training set, and what is known exactly of it, or None.

    asked: shards. Raises ValueError if they do not fit the validation set. "": the run's training
    set, if it is small; None unless every rank finds the same data there that the run trained on.
    None too unless each image has one class.
    """
    if val_shards.targets is not None:
        if asked:
            raise ValueError(
                f"--bayes: got {asked}; need images of one class each, of which alone the exact "
                "posterior is known; do: drop it"
            )
        return "", None
    settings, problem, opened = source.settings, None, None
    location = asked or (settings.data_dir if source.kind == "checkpoint" else "")
    try:
        if not asked and location:
            location = recorded_place(source.home, location)
        opened = open_shards(location) if location else None
    except (ValueError, OSError) as error:
        problem = f"--bayes: {error}"
    if opened is not None:
        if set(val_shards.index["label"].tolist()) - set(opened.index["label"].tolist()):
            problem = f"--bayes: got {location}; need images of every class in the validation set"
        elif opened.manifest.classes != val_shards.manifest.classes:
            problem = f"--bayes: got {location}; need the classes of the validation set"
        elif described(opened.manifest.arrays) != described(val_shards.manifest.arrays):
            problem = f"--bayes: got {location}; need samples like those of the validation set"
        elif not asked and opened.manifest.fingerprint != source.data:
            problem = "not the data of the run any more"
    if asked:
        distributed.raise_together(problem, device)
    per_image = settings.in_channels * settings.image_size**2
    small = opened is not None and opened.manifest.samples * per_image <= BAYES_NUMBERS
    usable = problem is None and opened is not None and (bool(asked) or small)
    unusable = torch.tensor(int(not usable), device=device)
    if int(distributed.all_reduce_sum(unusable)):
        return location, None
    images, labels = read_images(
        opened, image_size=settings.image_size, channels=settings.in_channels
    )
    return location, open_exact(opened.manifest, images, labels, device)
