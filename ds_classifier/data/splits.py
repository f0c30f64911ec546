"""The two splits of a training: opened, and checked to be of the same classes."""

from __future__ import annotations

from ds_classifier.common.urls import shown
from ds_classifier.config import Settings
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.store import open_named


def open_splits(settings: Settings) -> tuple[ShardSet, ShardSet | None]:
    """Open the training shards, and the validation shards if the settings name some.

    Raises ValueError, which names the flag, if they cannot be read, differ in their classes, or
    have another number of them than the settings.
    """
    shards = _open("data_dir", settings)
    val_shards = _open("val_data_dir", settings) if settings.val_data_dir else None
    classes = shards.manifest.classes
    if val_shards is not None and val_shards.manifest.classes != classes:
        raise ValueError(
            f"--val_data_dir: got {len(val_shards.manifest.classes)} classes in "
            f"{shown(settings.val_data_dir)}; need the same list as the {len(classes)} in "
            f"{shown(settings.data_dir)}; do: convert both in one call, with --val"
        )
    if settings.num_classes not in (0, len(classes)):
        raise ValueError(
            f"--num_classes: got {settings.num_classes}; need {len(classes)}, as many as "
            f"{shown(settings.data_dir)} has; do: drop the flag"
        )
    return shards, val_shards


def _open(name: str, settings: Settings) -> ShardSet:
    try:
        return open_named(
            getattr(settings, name),
            cache_dir=settings.cache_dir,
            cache_gb=settings.cache_gb,
            image_size=settings.image_size,
        )
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None
