"""Read the JSON as DeepSpeed does: with comments and trailing commas, without duplicate keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_classifier.common import files
from ds_classifier.config.shipped import find_config


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read the JSON at a path, or the shipped one of that name.

    Raises ValueError for a missing or unreadable file, broken JSON or a duplicate key.
    """
    import hjson  # DeepSpeed's own reader

    try:
        text = _text_of(find_config(path))
    except OSError as error:
        raise ValueError(
            f"--deepspeed_config: got {path}: {files.problem(error)}; need a DeepSpeed JSON"
        ) from None

    if not text.strip():
        raise ValueError(f"{path}: got an empty file; need a JSON object")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{path}: key {key!r} is given twice; do: remove one")
        return dict(pairs)

    try:
        raw = hjson.loads(text, object_pairs_hook=no_duplicates)
    except hjson.HjsonDecodeError as error:
        raise ValueError(
            f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: got {type(raw).__name__}; need a JSON object")
    return raw


def _text_of(path: Path) -> str:
    try:
        return files.read_text(path)
    except ValueError as error:
        raise ValueError(f"--deepspeed_config: {error}") from None
