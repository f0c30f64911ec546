"""Open splits: by directory or URL, and the training and validation split of a run."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ds_classifier.common.urls import refuse_hidden_login, refuse_pipe, scheme, shown
from ds_classifier.config import Settings
from ds_classifier.data.arrays import Arrays
from ds_classifier.data.remote.fetch import NotServed, Patience, fetch_small
from ds_classifier.data.remote.objects import in_one_bucket, refuse_unusable
from ds_classifier.data.shards import (
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    Beside,
    Manifest,
    ShardSet,
    open_shards,
    parse_manifest,
    read_beside,
    read_index,
    refuse_shared_shards,
)
from ds_classifier.data.store import ShardStore, is_url, url_of

MANIFEST_LIMIT = 1 << 28  # bytes; 200,000 shards and 20,000 classes need 50 MB


def open_split(
    location: str,
    *,
    cache_dir: Path,
    budget_bytes: int | None = None,
    stall_timeout_s: float = 30.0,
    retries: int = 5,
    pause_s: float = 1.0,
    allow_pipe: bool = False,
    to_verify: bool = False,
) -> ShardSet:
    """Open a split by its directory or URL; its manifest may name another place for the tars.

    At a URL, manifest and index are fetched now, and shards through the cache when they are read.
    allow_pipe: accept a pipe: URL as `location`; a manifest may never name a program.
    to_verify: see `open_shards`. The other arguments are those of ShardStore.
    Raises ValueError for a location or a manifest that cannot be trusted; OSError if a file cannot
    be fetched.
    """
    options = dict(
        cache_dir=cache_dir,
        budget_bytes=budget_bytes,
        stall_timeout_s=stall_timeout_s,
        retries=retries,
        pause_s=pause_s,
    )
    if not is_url(location):
        folder = Path(location)
        manifest = None
        if (folder / MANIFEST).is_file():
            manifest = parse_manifest((folder / MANIFEST).read_bytes(), folder / MANIFEST)
        if manifest is None or manifest.location is None or not is_url(manifest.location):
            return open_shards(folder, to_verify=to_verify)
        store = ShardStore(manifest.location, manifest.shards, **options)
        index = read_index(folder / INDEX, manifest, thorough=to_verify)
        beside = read_beside(folder.joinpath, manifest, thorough=to_verify)
        return ShardSet(store.folder, manifest, index, store, **beside)
    patience = Patience(stall_timeout_s, retries, pause_s)
    refuse_pipe(location, allow_pipe)
    refuse_hidden_login(location)
    if scheme(location) != "hf":  # of which the name of the file is a part
        refuse_unusable(location)
    url = url_of(location, MANIFEST)
    text = fetch_small(url, limit_bytes=MANIFEST_LIMIT, patience=patience, allow_pipe=allow_pipe)
    manifest = parse_manifest(text, shown(url))
    if manifest.location is not None and not in_one_bucket(location, manifest.location):
        raise ValueError(
            f"{shown(url)}: got a manifest whose shards are at {shown(manifest.location)}; need a "
            "manifest next to its shards, in the same bucket, or on this machine; do: copy it and "
            "its index into a directory here"
        )
    place = manifest.location or location
    store = ShardStore(place, manifest.shards, allow_pipe=allow_pipe, **options)
    needed = {INDEX: Beside(INDEX_DTYPE, (manifest.samples,), manifest.index_sha256)}

    def fetched(name: str) -> Path:
        need = (needed | manifest.beside)[name]
        rows = math.prod(need.shape) * np.dtype(need.dtype).itemsize
        sizes = (rows, rows + 4096)
        return store.fetch_beside(name, sizes=sizes, sha256=need.sha256, location=location)

    index = read_index(fetched(INDEX), manifest, thorough=to_verify)
    beside = read_beside(fetched, manifest, thorough=to_verify)
    return ShardSet(store.folder, manifest, index, store, **beside)


def open_named(
    location: str, *, cache_dir: str, cache_gb: float, image_size: int, channels: int | None = None
) -> ShardSet:
    """Open a split that the command line names by a path or URL, for images of image_size pixels.

    cache_dir, cache_gb: directory of the node for shards at a URL, and its limit; 0 for no limit.
    channels: of the images; None: the shape of arrays is not checked.
    Raises ValueError if there is no split at the location, if its images are stored too small, or
    if it holds arrays of another shape.
    """
    try:
        split = open_split(
            location,
            cache_dir=Path(cache_dir),
            budget_bytes=int(cache_gb * 1e9) or None,
            allow_pipe=True,  # the URL comes from the command line
        )
    except NotServed as error:  # the address is wrong, not the connection
        raise ValueError(str(error)) from None
    if channels is not None:
        refuse_other_shape(split.manifest, image_size, channels)
    stored = split.manifest.image_size
    if stored is not None and image_size > stored:
        raise ValueError(
            f"got --image_size {image_size}, but the images in {split.folder} are stored halved "
            f"for {stored} px; need {stored} or less; do: convert the originals with --image_size "
            f"{image_size}"
        )
    return split


def with_validation(settings: Settings) -> Settings:
    """Return settings that name D/val, if the training split is D/train and no other is named.

    Only directories are looked at: a server may take long to say that it has no such file.
    """
    train = Path(settings.data_dir)
    val = train.parent / "val"
    if settings.val_data_dir or is_url(settings.data_dir) or train.name != "train":
        return settings
    return settings.replace(val_data_dir=str(val)) if (val / MANIFEST).is_file() else settings


def open_splits(
    settings: Settings, *, found_beside: bool = False
) -> tuple[ShardSet, ShardSet | None]:
    """Open the training shards, and the validation shards if the settings name some.

    found_beside: nobody named the validation shards: see `with_validation`.
    Raises ValueError that names the flag, if a split cannot be read, if the two have different
    classes or a shard in common, or if the number of classes differs from the settings.
    """
    shards = _open("data_dir", settings)
    classes = shards.manifest.classes
    try:
        val_shards = _open_validation(settings, shards.manifest) if settings.validation else None
    except ValueError as error:
        if not found_beside:
            raise
        raise ValueError(
            f"{error}; it was found beside the training split: --val_data_dir none trains without"
        ) from None
    if settings.num_classes not in (0, len(classes)):
        raise ValueError(
            f"--num_classes: got {settings.num_classes}; need {len(classes)}, the number of "
            f"classes in {shown(settings.data_dir)}; do: drop the flag"
        )
    return shards, val_shards


def _open_validation(settings: Settings, train: Manifest) -> ShardSet:
    """Open the validation shards. train: the manifest of the training shards."""
    val_shards = _open("val_data_dir", settings)
    if val_shards.manifest.classes != train.classes:
        raise ValueError(
            f"--val_data_dir: got {len(val_shards.manifest.classes)} classes in "
            f"{shown(settings.val_data_dir)}; need the same list as the {len(train.classes)} in "
            f"{shown(settings.data_dir)}; do: convert both in one call, with --val"
        )
    if val_shards.manifest.targets != train.targets:
        raise ValueError(
            f"--val_data_dir: got {val_shards.manifest.targets} in "
            f"{shown(settings.val_data_dir)}; need {train.targets}, as in "
            f"{shown(settings.data_dir)}; do: convert both in one call, with --val"
        )
    ours, theirs = described(train.arrays), described(val_shards.manifest.arrays)
    if ours != theirs:
        raise ValueError(
            f"--val_data_dir: got {theirs} in {shown(settings.val_data_dir)}, and {ours} in "
            f"{shown(settings.data_dir)}; need the same in both; do: convert both in one call, "
            "with --val"
        )
    refuse_shared_shards(
        train,
        val_shards.manifest,
        "--val_data_dir",
        "name other shards, or train with --val_data_dir none; to measure a run on its training "
        f"images: ds-classifier evaluate RUN --val_data_dir {shown(settings.data_dir)}",
    )
    return val_shards


def settled_by_data(settings: Settings, manifest: Manifest, *, given: Collection[str]) -> Settings:
    """Return settings in which the training data decide what nobody gave.

    That is the number of classes, and for arrays their size and channels; and they are neither
    cropped nor mirrored. given: names of the settings that a recipe, a file or a flag set.
    Raises ValueError for a size, channels or crops that do not suit arrays.
    """
    settings = settings.replace(num_classes=len(manifest.classes))
    if settings.class_balance and manifest.targets.vectors:
        raise ValueError(
            f"--class_balance: got {settings.class_balance} for data with {manifest.targets}; need "
            "one class per image, whose frequency could decide what the image counts; do: drop the "
            "flag, or convert the data with weights of your own"
        )
    if (arrays := manifest.arrays) is None:
        refuse_other_shape(manifest, settings.image_size, settings.in_channels)
        return settings
    usual = dict(
        image_size=arrays.size, in_channels=arrays.channels, random_crop=False, random_flip=False
    )
    settings = settings.replace(**{k: v for k, v in usual.items() if k not in given})
    if settings.random_crop:
        raise ValueError(
            f"--random_crop: got True for arrays ({arrays}), which are not resized, as crops are; "
            "need False; do: --random_crop False"
        )
    if settings.augment:
        raise ValueError(
            f"--augment: got {settings.augment} for arrays ({arrays}), such as latents, to which "
            "changes of colour and shape mean something else than to an image; do: drop the flag"
        )
    refuse_other_shape(manifest, settings.image_size, settings.in_channels)
    return settings


def refuse_other_shape(manifest: Manifest, image_size: int, channels: int) -> None:
    """Raise ValueError if a classifier of this size and channels cannot read a split's samples."""
    from ds_classifier.data.images import MODES

    if manifest.arrays is not None:
        manifest.arrays.refuse_other_shape(image_size, channels)
    elif channels not in MODES:
        raise ValueError(
            f"--in_channels: got {channels} for images; need 1 to {max(MODES)}; do: convert "
            "arrays (.npy), which may have more"
        )


def refuse_other_samples(
    manifest: Manifest, place: str, arrays: dict[str, Any] | None, name: str
) -> None:
    """Raise ValueError for a split whose samples are not what weights were trained on.

    place: where the split lies. arrays: what is recorded with the weights of their arrays; None:
    images. name: of the weights.
    """
    need = None if arrays is None else Arrays.from_json(arrays)
    got = manifest.arrays
    if (got and got.scaling) != (need and need.scaling):
        raise ValueError(
            f"got {described(got)} in {shown(place)}; need {described(need)}, which {name} was "
            "trained on; do: convert them with the same --scale and --shift"
        )


def described(arrays: Arrays | None) -> str:
    """Return what the samples of a split are."""
    return "images" if arrays is None else f"arrays of {arrays} with x_0 = {arrays.scaling}"


def _open(name: str, settings: Settings) -> ShardSet:
    """Open the split that a setting names."""
    try:
        return open_named(
            getattr(settings, name),
            cache_dir=settings.cache_dir,
            cache_gb=settings.cache_gb,
            image_size=settings.image_size,
        )
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None
