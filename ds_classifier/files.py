"""Files that are whole or not there: hashes, syncing, replacing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Have a file, or a directory's entries, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Give a file a new content at once: readers see the old or the new one, never a part."""
    staging = path.with_name(f".{path.name}.staging")
    staging.write_text(text)
    fsync(staging)
    os.replace(staging, path)
