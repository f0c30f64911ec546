"""Read the JSON as DeepSpeed does: with comments and trailing commas, without duplicate keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ds_classifier.common import files
from ds_classifier.config.shipped import find_config

# Words that hjson would read as the begin of a string -> what to write. They are looked for as
# values, outside of strings and comments.
NO_JSON = {"True": "true", "False": "false", "None": "null"}
NO_JSON |= dict.fromkeys(("NaN", "nan", "Infinity", "inf"), "a number")
_STRING_OR_COMMENT = r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/\*.*?\*/'
_TOKEN = re.compile(
    rf"{_STRING_OR_COMMENT}|[:\[,]\s*({'|'.join(NO_JSON)})\s*(?=[,}}\]\n#/]|$)", re.DOTALL
)


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read the JSON at a path, or the shipped one of that name.

    Raises ValueError for a missing or unreadable file, broken JSON, a value of Python's or a
    duplicate key.
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

    _refuse_python(text, path)

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


def _refuse_python(text: str, path: Path) -> None:
    for token in _TOKEN.finditer(text):
        if word := token[1]:
            line = text.count("\n", 0, token.start(1)) + 1
            raise ValueError(
                f"{path}, line {line}: got {word}, which JSON does not have; do: write "
                f"{NO_JSON[word]}"
            )


def _text_of(path: Path) -> str:
    try:
        return files.read_text(path)
    except ValueError as error:
        raise ValueError(f"--deepspeed_config: {error}") from None
