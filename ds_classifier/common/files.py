"""Write files completely or not at all; append to line files; hash files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_classifier.common import limits

# The errors of a file system that does not offer fsync.
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)


def problem(error: BaseException) -> str:
    """Return an error's text; for a system error, "FILE: REASON" without the error number.

    If a limit of the machine is the cause, what to do about it follows.
    """
    if not isinstance(error, OSError) or error.strerror is None:
        text = str(error)
    else:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return text + limits.advice(error, text)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_hashed(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write chunks to a file and sync it; return its size in bytes and its SHA-256 in hex.

    The hash is of the bytes passed in; the file is not read again.
    Raises OSError that names the path.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            _sync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return size, digest.hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def size_of_file(path: Path) -> int:
    """Return the size of a regular file in bytes, following links.

    Raises OSError for everything else: opening a FIFO may never return, a device may never end.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a FIFO, socket or device, not a file", str(path))
    return found.st_size


def refuse_unwritable(flag: str, folder: Path) -> None:
    """Raise ValueError that names the flag, if no files can be written to a folder.

    The folder need not exist: then it must be possible to make it. Nothing is left behind, and
    nothing is made, so that several programs can ask at the same time.
    """
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a directory")
        with tempfile.TemporaryFile(dir=nearest) as file:  # it has no name, or loses it at once
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise _unwritable(flag, folder, error) from None


def refuse_unwritable_file(flag: str, path: Path) -> None:
    """Raise ValueError that names the flag, if a file cannot be written or replaced.

    Nothing is left behind, and a file that exists is not changed.
    """
    if path.exists() and not path.is_file():  # os.replace would put a file in place of a device
        raise ValueError(f"{flag}: got {path}, which is no regular file; do: name a file")
    refuse_unwritable(flag, path.parent)
    if path.exists():
        try:
            os.close(os.open(path, os.O_WRONLY))
        except OSError as error:
            raise _unwritable(flag, path, error) from None


def _unwritable(flag: str, place: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{flag}: got {place}; need a place where files can be written ({error.strerror}); do: "
        "name another one"
    )


def nearest_directory(path: Path) -> Path:
    """Return the path, or its nearest parent, that is a directory: on the disk it will use."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def read_text(path: Path) -> str:
    """Return the text of a small file that a user wrote, in UTF-8 with or without a mark.

    Raises OSError, and ValueError that names the file and the way out for another encoding.
    """
    data = path.read_bytes()
    try:
        if b"\0" not in data[:4]:  # in UTF-16 each ASCII character has one
            return data.decode("utf-8-sig")
        problem = "which looks like UTF-16"
    except UnicodeDecodeError as error:
        problem = f"whose byte {error.start} is not UTF-8"
    guess = "LATIN1"
    if b"\0" in data[:4]:
        without_mark = "UTF-16BE" if data[0] == 0 else "UTF-16LE"
        guess = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else without_mark
    raise ValueError(
        f"got {path}, {problem}; need text in UTF-8; do: iconv -f {guess} -t UTF-8 {path} > NEW"
    )


def create(path: Path, text: str) -> bool:
    """Create a file with a text; return False if it exists.

    Only one of several processes can create it, on network file systems and on those without hard
    links too. Another may see it empty for a moment.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with naming(path), open(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        path.unlink()
        raise
    return True


def fsync(path: Path) -> str | None:
    """Sync a file, or a directory's entries, to the disk.

    Returns the reason if the file system does not offer that, such as some FUSE and network file
    systems for directories; None if it is done. Raises OSError that names the path if it fails.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            return _sync(handle)
    finally:
        os.close(handle)


def _sync(handle: int) -> str | None:
    """Sync an open file or directory; return why its file system does not offer that, or None."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        return error.strerror
    return None


def replace_text(path: Path, text: str) -> None:
    """Replace a file's content atomically: readers see the old or the new text, never a part."""
    replace_lines(path, [text])


def replace_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a file's content atomically with lines that need not fit in memory together."""
    staging = path.with_name(f".{path.name}.staging")
    with open(staging, "w", newline="", encoding="utf-8") as file:
        file.writelines(lines)
    fsync(staging)
    os.replace(staging, path)


def append(path: Path, text: str) -> None:
    """Append whole lines to a file.

    If a full disk or a kill cut the last line short, a line break is written first.
    """
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a .jsonl file; skip lines that a kill cut short.

    Yields nothing if the file does not exist.
    """
    try:
        file = open(path, errors="replace", encoding="utf-8")
    except OSError:
        return
    with file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
