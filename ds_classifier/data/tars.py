"""Read untrusted tars: the place of each member, with limits on headers and a check of the end.

Formats: POSIX.1-1988 ustar, with pax (POSIX.1-2001) and GNU headers; WebDataset's keys.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
TAR_BLOCK = 512
LARGEST_HEADER = 1 << 20  # bytes of all headers of a member; real ones stay under 10 KB
NAME_REACH = 1 << 14  # bytes before a member's content in which its headers are searched
_UNKNOWN_END = 1 << 62
_TAR_NAME = re.compile(
    r"[^.].*\.(tar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|lz|z|br))", re.IGNORECASE
)
LFS_POINTER = (
    b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A regular file in a tar; its bytes are [offset, offset + size) of the outermost file."""

    name: str
    offset: int
    size: int


class Sequential:
    """A file to read forward, made from chunks of bytes.

    seek goes forward, or back by one tar block at most.
    digest: SHA-256 of all bytes received so far.
    """

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._buffer, self._start, self._at = b"", 0, 0
        self.digest = hashlib.sha256()

    @property
    def arrived(self) -> int:
        """The number of bytes received so far."""
        return self._start + len(self._buffer)

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, position: int) -> None:
        """Move to a position that is not before the kept bytes."""
        assert position >= self._start, "these bytes are no longer kept"
        self._at = position
        while self.arrived < position and self._more():
            pass

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end."""
        while self.arrived < self._at + size and self._more():
            pass
        first = self._at - self._start
        data = self._buffer[first : first + size]
        self._at += len(data)
        return data

    def _more(self) -> bool:
        """Receive a chunk; return False at the end. The last block before the position is kept."""
        chunk = next(self._chunks, b"")
        self.digest.update(chunk)
        kept = max(0, min(self._at - self._start, len(self._buffer)) - TAR_BLOCK)
        self._buffer = self._buffer[kept:] + chunk
        self._start += kept
        return bool(chunk)


class _Headers:
    """An open file up to `end`, from which tarfile reads headers only, so every read is small.

    left: number of bytes that the headers of the next member may still have.
    """

    def __init__(self, file: BinaryIO | Sequential, end: int):
        self._file, self._end = file, end
        self.seek, self.tell = file.seek, file.tell
        self.left = LARGEST_HEADER

    def read(self, size: int) -> bytes:
        """Return the next bytes; ReadError if the headers of a member are too large."""
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"a header of {size} bytes; need {LARGEST_HEADER} at most")
        return self._file.read(max(0, min(size, self._end - self._file.tell())))


def tar_members(
    file: BinaryIO | Sequential, name: Path | str, start: int, end: int | None
) -> Iterator[Member]:
    """Yield the regular files of the tar at [start, end) of a file; skip directories.

    A member has to be read before the next one is requested.
    end: None to read to the end of the file.
    Python's tarfile stops silently at a damaged header, so the end is checked: the last member has
    to be followed by zeros only, at least two blocks of them (POSIX.1-1988).
    Raises ValueError if it is not an uncompressed tar, is cut short or damaged, or has links,
    devices, names that lead outside, or the same name twice.
    """
    end = _UNKNOWN_END if end is None else end
    names = set()
    position = start
    file.seek(start)
    _refuse_compressed(file.read(len(LFS_POINTER)), name)
    file.seek(start)
    headers, tar, member = _Headers(file, end), None, None
    while True:
        headers.left = LARGEST_HEADER
        try:
            tar = tar or tarfile.open(fileobj=headers, mode="r:")
            member = tar.next()
            if sum(map(len, tar.pax_headers.values())) > LARGEST_HEADER:
                raise tarfile.ReadError("endless global headers")
        except OSError:
            raise
        except Exception as error:  # tarfile raises errors of many types for damaged headers
            place = "at its first header" if member is None else f"after member {member.name!r}"
            raise ValueError(
                f"{name}: got a file that is not a tar, or is damaged or cut short {place} "
                f"({error}); need a complete, uncompressed tar; do: download it again"
            ) from None
        if member is None:
            break
        tar.members.clear()  # tarfile keeps every header
        blocks = -(-member.size // TAR_BLOCK)
        position = member.offset_data + (0 if member.isdir() else blocks * TAR_BLOCK)
        if member.size < 0 or position > end:
            raise ValueError(
                f"{name}: cut short: got {end - member.offset_data} bytes of member "
                f"{member.name!r}; need {member.size}; do: download it again"
            )
        outside = member.name.startswith("/") or ".." in member.name.split("/")
        plain = member.isdir() or (member.isreg() and not member.issparse())
        if outside or not plain or member.name in names:
            raise ValueError(
                f"{name}: got member {member.name!r}, which "
                + ("leads outside" if outside else "appears twice" if plain else "is not a file")
                + "; need regular files inside of the tar, each once; do: pack it again"
            )
        if member.isreg():
            names.add(member.name)
            yield Member(member.name, member.offset_data, member.size)
    file.seek(position)
    zeros = 0
    while chunk := file.read(min(LARGEST_HEADER, end - position - zeros)):
        if chunk.strip(b"\0"):
            break
        zeros += len(chunk)
    if chunk or zeros < 2 * TAR_BLOCK:
        raise ValueError(
            f"{name}: cut short or damaged at byte {position - start}: got no end-of-archive mark "
            "after the last readable member; need a complete tar; do: download it again"
        )


def _refuse_compressed(head: bytes, name: Path | str) -> None:
    """Raise ValueError if a file's first bytes are those of a compressed file, or of a pointer."""
    if head.startswith(LFS_POINTER):
        raise ValueError(
            f"{name}: got a pointer of Git LFS, not the tar itself; need its content; do: git lfs "
            "install && git lfs pull in its repository"
        )
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{name}: got a compressed tar ({kind}), in which members cannot be read by their "
                "place; need an uncompressed tar; do: decompress it"
            )


def is_tar_name(name: str) -> bool:
    """Return whether a file name is that of a tar, plain or compressed.

    Hidden files are no tars, nor is what programs write next to a tar: x.tar.idx, x.tar.md5.
    """
    return _TAR_NAME.fullmatch(name) is not None


def key_of(name: str) -> tuple[str, str] | None:
    """Return a member's key and its suffix in lower case, as WebDataset splits them.

    The key ends at the first dot of the base name. Returns None if the member does not belong to a
    sample: its base name begins with a dot or has no suffix, or its path begins with __NAME__.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix or re.match(r"__[^/]*__($|/)", name):
        return None
    return folder + slash + stem, suffix.lower()


def printable(text: str) -> str:
    """Return a name for a message, escaped if it has characters that a terminal would act on."""
    return text if text.isprintable() else ascii(text)


def member_name(before: bytes) -> str:
    """Return the name of a member from the bytes before its content, at most NAME_REACH of them.

    A name over 100 bytes is in the ustar prefix, or in pax or GNU headers before the member's own,
    which are found by their size. Raises tarfile.TarError if there is no header.
    """
    start = len(before) - TAR_BLOCK
    found = True
    while found:
        found = False
        for at in range(start - 2 * TAR_BLOCK, -1, -TAR_BLOCK):
            if before[at + 156 : at + 157] not in (b"x", b"L", b"K"):
                continue
            try:
                header = tarfile.TarInfo.frombuf(
                    before[at : at + TAR_BLOCK], "utf-8", "surrogateescape"
                )
            except tarfile.TarError:
                continue
            if at + TAR_BLOCK * (1 - (-header.size // TAR_BLOCK)) == start:
                start, found = at, True
                break
    with tarfile.open(fileobj=io.BytesIO(before[start:]), mode="r:") as tar:
        return tar.next().name
