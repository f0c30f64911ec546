"""Download a URL: resume after a break, try again after a pause, check size and hash at the end.

connections.py opens the URLs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ds_classifier.common import files
from ds_classifier.common.urls import refuse_pipe, shown, without_logins
from ds_classifier.data.remote.connections import Stream, network_errors, opened_url
from ds_classifier.data.remote.failed import Failed

SLOWEST = 1024  # bytes per second; a slower stream counts as stalled
PROGRESS = 1 << 20  # a try that brings at least this many new bytes resets the count of failures
LONGEST_PAUSE_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """The limits of a download.

    stall_timeout_s: seconds without an answer or bytes, or with fewer than SLOWEST bytes per
        second, after which a try is broken off.
    retries: number of further tries after a failed one; a try with PROGRESS starts the count again.
    pause_s: seconds before the second try. The pause doubles up to LONGEST_PAUSE_S; a random part
        of it, up to a half, is left out.
    """

    stall_timeout_s: float = 30.0
    retries: int = 5
    pause_s: float = 1.0


PATIENCE = Patience()


class NotServed(OSError):
    """Raised when the server says that the file does not exist, or that we may not read it."""


def fetch_small(
    url: str, *, limit_bytes: int, patience: Patience = PATIENCE, allow_pipe: bool = False
) -> bytes:
    """Return the content of a URL, of at most limit_bytes.

    Raises ValueError for more bytes, or for a pipe that is not allowed; OSError after the last
    try; NotServed if another try would not help.
    """
    refuse_pipe(url, allow_pipe)

    def attempt() -> bytes:
        content = bytearray()
        with opened_url(url, 0, patience.stall_timeout_s) as stream:
            for chunk in _chunks(stream, patience.stall_timeout_s):
                content += chunk
                if len(content) > limit_bytes:
                    raise ValueError(f"{shown(url)}: got more than {limit_bytes} bytes")
        if stream.total is not None and len(content) != stream.total:
            raise Failed(f"got {len(content)} of {stream.total} bytes")
        return bytes(content)

    return insist(url, attempt, patience)


def stream(
    url: str, *, size: int | None = None, patience: Patience = PATIENCE, allow_pipe: bool = False
) -> Iterator[bytes]:
    """Yield the bytes of a URL in order, without storing them; resume where a try broke off.

    size: the expected number of bytes. It is used only if the server sends neither a length nor an
        end mark: a connection that ends before counts as broken. It is not checked in other cases.
    Raises ValueError for a pipe that is not allowed; OSError after the last try.
    """
    refuse_pipe(url, allow_pipe)
    at, total, needed, tag = 0, None, None, None
    chunks: Iterator[bytes] | None = None
    with ExitStack() as connection:

        def more() -> bytes:
            nonlocal at, total, needed, tag, chunks
            try:
                if chunks is None:
                    opened = connection.enter_context(opened_url(url, at, patience.stall_timeout_s))
                    if None not in (total, opened.total) and total != opened.total:
                        raise Failed(f"was {total} bytes, is {opened.total} now", final=True)
                    if at and tag != opened.tag:
                        raise Failed("was replaced while it was read", final=True)
                    tag = opened.tag
                    total = total if opened.total is None else opened.total
                    needed = size if total is None and not opened.ends else total
                    chunks = _from(at - opened.start, _chunks(opened, patience.stall_timeout_s))
                chunk = next(chunks, b"")
                at += len(chunk)
                if not chunk:
                    if needed is not None and at < needed:
                        raise Failed(f"got {at} of {needed} bytes")
                    connection.close()  # raises if a program failed
                return chunk
            except Failed:
                chunks = None
                with suppress(Failed):
                    connection.close()
                raise

        while chunk := insist(url, more, patience, reached=lambda: at):
            yield chunk


def _from(skipped: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Drop the first `skipped` bytes, which a server without range requests sends again."""
    for chunk in chunks:
        if skipped < len(chunk):
            yield chunk[skipped:]
        skipped = max(0, skipped - len(chunk))


def fetch_file(
    url: str, part: Path, *, sizes: tuple[int, int], sha256: str, patience: Patience = PATIENCE
) -> None:
    """Download into the file `part`, continuing after the bytes that it holds.

    sizes: the smallest and largest number of bytes allowed. sha256: of the whole file, in hex.
    Raises OSError after the last try; a later call can then resume `part`.
    """

    def attempt() -> None:
        try:
            total = _append(url, part, sizes, patience.stall_timeout_s)
            size = part.stat().st_size
            if size < (total or sizes[0]):
                raise Failed(f"got {size} of {total or sizes[0]} bytes")
            if (found := files.sha256(part)) != sha256:
                raise Failed(f"got sha256 {found}; need {sha256}", restart=True)
        except Failed as failure:
            if failure.restart:
                part.unlink(missing_ok=True)
            raise

    insist(url, attempt, patience, reached=lambda: _size(part))


def _append(url: str, part: Path, sizes: tuple[int, int], stall_timeout_s: float) -> int | None:
    """Append the missing bytes to `part`; return the whole size if the server says it."""
    least, most = sizes
    if _size(part) == least == most:
        return most
    with opened_url(url, _size(part), stall_timeout_s) as stream:
        if stream.total is not None and not least <= stream.total <= most:
            need = most if least == most else f"{least} to {most}"
            raise Failed(f"got a file of {stream.total} bytes; need {need}", restart=True)
        with open(part, "r+b" if stream.start else "wb") as file:
            file.seek(stream.start)
            for chunk in _chunks(stream, stall_timeout_s):
                if file.tell() + len(chunk) > most:
                    raise Failed(f"got more than {most} bytes", restart=True)
                file.write(chunk)
        return stream.total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def insist(
    url: str,
    attempt: Callable[[], T],
    patience: Patience,
    reached: Callable[[], int] = lambda: 0,
    failed: str = "got no whole file",
) -> T:
    """Call `attempt` until it succeeds, or has failed too often in a row without progress.

    reached: returns the number of bytes that are safe; a try that adds PROGRESS bytes starts the
        count of failures again.
    failed: what has not been done after the last try, for the message.
    Raises OSError after the last try; NotServed if another try would not help.
    """
    tries = failures = furthest = 0
    while True:
        tries += 1
        try:
            return attempt()
        except Failed as failure:
            further = reached()
            failures = 1 if further >= furthest + PROGRESS else failures + 1
            furthest = max(furthest, further)
            if failure.final or failures > patience.retries:
                times = "1 try" if tries == 1 else f"{tries} tries"
                reason = without_logins(str(failure))  # a program's error shows its command
                advice = failure.advice or "check the address and the server"
                raise (NotServed if failure.final else OSError)(
                    f"{shown(url)}: {failed} in {times}; last error: {reason}; do: "
                    f"{advice}, then run the same command again"
                ) from None
        pause = min(patience.pause_s * 2 ** (failures - 1), LONGEST_PAUSE_S)
        # The global generator's state belongs to the training, and forked processes share it.
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1))


def _chunks(stream: Stream, stall_timeout_s: float) -> Iterator[bytes]:
    """Yield the bytes of a stream; raise Failed if it is slower than SLOWEST."""
    since, got, at = time.monotonic(), 0, stream.start
    while at != stream.total:  # some servers keep the connection open after the last byte
        with network_errors():
            chunk = stream.read()
        if not chunk:
            return
        yield chunk
        at, got = at + len(chunk), got + len(chunk)
        if (now := time.monotonic()) - since > stall_timeout_s:
            if got < SLOWEST * stall_timeout_s:
                raise Failed(f"stalled: {got} bytes in {now - since:.1f} s")
            since, got = now, 0
