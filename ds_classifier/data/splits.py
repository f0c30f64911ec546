"""Open the training and validation split of a run, and check that they have the same classes."""

from __future__ import annotations

from ds_classifier.common.urls import shown
from ds_classifier.config import Settings
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.store import open_named


def open_splits(settings: Settings) -> tuple[ShardSet, ShardSet | None]:
    """Open the training shards, and the validation shards if the settings name some.

    Raises ValueError that names the flag, if a split cannot be read, if the two have different
    classes, or if their number differs from the settings.
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
            f"--num_classes: got {settings.num_classes}; need {len(classes)}, the number of "
            f"classes in {shown(settings.data_dir)}; do: drop the flag"
        )
    return shards, val_shards


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
