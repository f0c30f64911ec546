"""Bytes of a URL: resumed where a try broke off, tried again after a pause, checked at the end.

http(s) goes through the standard library, every other scheme (gs, hf, sftp, file, pipe ...)
through webdataset's gopen. HTTP semantics: RFC 9110 (section 14, range requests).
"""

from __future__ import annotations

import http.client
import io
import os
import random
import re
import select
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ds_classifier import files

CHUNK = 1 << 20  # bytes asked for at a time
SLOWEST = 1024  # bytes a second; a slower stream is a stalled one
PROGRESS = 1 << 20  # new bytes that make a broken try no failure
LONGEST_PAUSE_S = 60.0
WORTH_TRYING_AGAIN = (408, 416, 425, 429)  # of the HTTP statuses 4xx

# A program in a shell, in a session of its own. Its group ends with the one who started it, of
# whatever that dies, and when that lets go: the watcher then sees the end of its standard input.
IN_SHELL = """exec 3<&0 </dev/null
{ read -r _; kill -KILL 0; } <&3 3<&- >/dev/null 2>&1 &
exec 3<&-
eval "$1"
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to insist.

    stall_timeout_s: seconds without an answer or bytes, or with fewer than SLOWEST, after which a
    try is broken off.
    retries: tries after a first that may fail in a row. pause_s: seconds before the second try;
    doubles up to LONGEST_PAUSE_S, and a random part of up to a half is taken off.
    """

    stall_timeout_s: float = 30.0
    retries: int = 5
    pause_s: float = 1.0


PATIENCE = Patience()


class NotServed(OSError):
    """The other side answers that it has no such file, or none for us."""


class _Failed(Exception):
    """One try failed. final: another will not help. restart: what it brought is of no use."""

    def __init__(self, reason: str, *, final: bool = False, restart: bool = False):
        super().__init__(reason)
        self.final, self.restart = final, restart


@dataclass
class _Stream:
    """An answer. read() gives some bytes, b"" at the end; start: where in the file they begin;
    total: bytes of the whole file, None where the server does not say."""

    read: Callable[[], bytes]
    start: int = 0
    total: int | None = None


def scheme(location: str) -> str:
    """ "http", "pipe" ... of a URL in lower case; "" of a local path."""
    found = re.match(r"([a-z][a-z0-9+.-]*)://|(pipe|file):", location, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def shown(url: str) -> str:
    """The URL without what may be secret: user and password, and an http query."""
    url = re.sub(r"//[^/@]*@", "//", url)
    return url.split("?")[0] if scheme(url) in ("http", "https") else url


def refuse_pipe(url: str, allow_pipe: bool) -> None:
    """ValueError for a pipe: URL, which runs a program, unless the command line named it."""
    if scheme(url) == "pipe" and not allow_pipe:
        raise ValueError(f"got {url!r}, which runs a program; need a URL; do: pass it as a flag")


def fetch_small(
    url: str, *, limit_bytes: int, patience: Patience = PATIENCE, allow_pipe: bool = False
) -> bytes:
    """The content of a URL, into memory.

    Raises ValueError for more than limit_bytes or a pipe that is not allowed; OSError after the
    last try, NotServed where another would not help.
    """
    refuse_pipe(url, allow_pipe)

    def attempt() -> bytes:
        content = bytearray()
        with _opened(url, 0, patience.stall_timeout_s) as stream:
            for chunk in _chunks(stream, patience.stall_timeout_s):
                content += chunk
                if len(content) > limit_bytes:
                    raise ValueError(f"{shown(url)}: got more than {limit_bytes} bytes")
        if stream.total is not None and len(content) != stream.total:
            raise _Failed(f"got {len(content)} of {stream.total} bytes")
        return bytes(content)

    return _insist(url, attempt, patience)


def stream(url: str, *, patience: Patience = PATIENCE, allow_pipe: bool = False) -> Iterator[bytes]:
    """The bytes of a URL in order, kept nowhere; goes on where a try broke off.

    Raises ValueError for a pipe that is not allowed; OSError after the last try.
    """
    refuse_pipe(url, allow_pipe)
    at, total = 0, None
    chunks: Iterator[bytes] | None = None
    with ExitStack() as connection:

        def more() -> bytes:
            nonlocal at, total, chunks
            try:
                if chunks is None:
                    opened = connection.enter_context(_opened(url, at, patience.stall_timeout_s))
                    if total not in (None, opened.total):
                        raise _Failed(f"was {total} bytes, is {opened.total} now", final=True)
                    total = opened.total
                    chunks = _from(at - opened.start, _chunks(opened, patience.stall_timeout_s))
                chunk = next(chunks, b"")
                at += len(chunk)
                if not chunk:
                    if total is not None and at < total:
                        raise _Failed(f"got {at} of {total} bytes")
                    connection.close()  # tells whether a program failed
                return chunk
            except _Failed:
                chunks = None
                with suppress(_Failed):
                    connection.close()
                raise

        while chunk := _insist(url, more, patience, reached=lambda: at):
            yield chunk


def _from(skipped: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Chunks without their first bytes: a server that knows no ranges sends them again."""
    for chunk in chunks:
        if skipped < len(chunk):
            yield chunk[skipped:]
        skipped = max(0, skipped - len(chunk))


def fetch_file(
    url: str, part: Path, *, sizes: tuple[int, int], sha256: str, patience: Patience = PATIENCE
) -> None:
    """Complete the file `part`, going on from the bytes that it holds.

    sizes: the least and the most bytes that it may have. sha256: in hex, of all of it.
    Raises OSError after the last try; `part` then holds what a later call may resume.
    """

    def attempt() -> None:
        try:
            total = _append(url, part, sizes, patience.stall_timeout_s)
            size = part.stat().st_size
            if size < (total or sizes[0]):
                raise _Failed(f"got {size} of {total or sizes[0]} bytes")
            if (found := files.sha256(part)) != sha256:
                raise _Failed(f"got sha256 {found}; need {sha256}", restart=True)
        except _Failed as failure:
            if failure.restart:
                part.unlink(missing_ok=True)
            raise

    _insist(url, attempt, patience, reached=lambda: _size(part))


def _append(url: str, part: Path, sizes: tuple[int, int], stall_timeout_s: float) -> int | None:
    """Add what is missing; returns the server's word on the whole size."""
    least, most = sizes
    if _size(part) == least == most:
        return most
    with _opened(url, _size(part), stall_timeout_s) as stream:
        if stream.total is not None and not least <= stream.total <= most:
            need = most if least == most else f"{least} to {most}"
            raise _Failed(f"got a file of {stream.total} bytes; need {need}", restart=True)
        with open(part, "r+b" if stream.start else "wb") as file:
            file.seek(stream.start)
            for chunk in _chunks(stream, stall_timeout_s):
                if file.tell() + len(chunk) > most:
                    raise _Failed(f"got more than {most} bytes", restart=True)
                file.write(chunk)
        return stream.total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _insist(
    url: str, attempt: Callable[[], T], patience: Patience, reached: Callable[[], int] = lambda: 0
) -> T:
    """Try until it works, or has failed too often without getting further than ever before."""
    tries = failures = furthest = 0
    while True:
        tries += 1
        try:
            return attempt()
        except _Failed as failure:
            further = reached()
            failures = 1 if further >= furthest + PROGRESS else failures + 1
            furthest = max(furthest, further)
            if failure.final or failures > patience.retries:
                times = "1 try" if tries == 1 else f"{tries} tries"
                raise (NotServed if failure.final else OSError)(
                    f"{shown(url)}: got no whole file in {times}; the last: {failure}; do: check "
                    "the address and the server, then run the same command again"
                ) from None
        pause = min(patience.pause_s * 2 ** (failures - 1), LONGEST_PAUSE_S)
        # Not from the global generator: its state belongs to the training, and forks share it.
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1))


def _chunks(stream: _Stream, stall_timeout_s: float) -> Iterator[bytes]:
    since, got, at = time.monotonic(), 0, stream.start
    while at != stream.total:  # some servers leave the connection open after the last byte
        with _failures():
            chunk = stream.read()
        if not chunk:
            return
        yield chunk
        at, got = at + len(chunk), got + len(chunk)
        if (now := time.monotonic()) - since > stall_timeout_s:
            if got < SLOWEST * stall_timeout_s:
                raise _Failed(f"stalled: {got} bytes in {now - since:.1f} s")
            since, got = now, 0


@contextmanager
def _failures() -> Iterator[None]:
    """What a network does to us is a failed try; what our own disk does is not."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        final = 400 <= error.code < 500 and error.code not in WORTH_TRYING_AGAIN
        # 416: the part is as long as the server's file, or longer.
        restart = error.code == 416
        raise _Failed(f"HTTP {error.code} {error.reason}", final=final, restart=restart) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise _Failed(files.problem(error), final=True) from None
    except TimeoutError:
        raise _Failed("stalled: no answer within the time-out") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(f"{type(error).__name__}: {files.problem(error)}") from None


@contextmanager
def _opened(url: str, start: int, stall_timeout_s: float) -> Iterator[_Stream]:
    opened = _opened_http if scheme(url) in ("http", "https") else _opened_by_gopen
    with opened(url, start, stall_timeout_s) as stream:
        yield stream


@contextmanager
def _opened_http(url: str, start: int, stall_timeout_s: float) -> Iterator[_Stream]:
    headers = {"User-Agent": "ds_classifier", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with _failures():
        request = urllib.request.Request(url, headers=headers)
        response = _OPENER.open(request, timeout=stall_timeout_s)
    with response:
        if response.status == 206:
            word = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", word)
            if not found or int(found[1]) != start:
                raise _Failed(f"asked for bytes {start}-, got {word!r}", restart=True)
            total = None if found[2] == "*" else int(found[2])
        else:  # the whole file, whether or not a range was asked for
            start, total = 0, response.length

        def read() -> bytes:
            response.patient.start()
            return response.read1(CHUNK)

        yield _Stream(read, start, total)


class _Patient(io.RawIOBase):
    """What a socket receives; TimeoutError when that takes longer, in all, than its time-out.

    By itself a socket counts from byte to byte, and an answer's head may come in a thousand.
    """

    def __init__(self, socket, received: io.RawIOBase):
        self._socket, self._received = socket, received
        self._timeout_s = socket.gettimeout()
        self.start()

    def start(self) -> None:
        self._end = time.monotonic() + self._timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, socket, *arguments, **keywords):
        super().__init__(socket, *arguments, **keywords)
        self.patient = _Patient(socket, self.fp.detach())
        self.fp = io.BufferedReader(self.patient)


class _PatientConnections:
    def do_open(self, connection, request, **keywords):
        patient = type("_Connection", (connection,), {"response_class": _Response})
        return super().do_open(patient, request, **keywords)


class _Http(_PatientConnections, urllib.request.HTTPHandler):
    pass


class _Https(_PatientConnections, urllib.request.HTTPSHandler):
    pass


_OPENER = urllib.request.build_opener(_Http, _Https)


@contextmanager
def _opened_by_gopen(url: str, start: int, stall_timeout_s: float) -> Iterator[_Stream]:
    """gopen knows no ranges: always the whole file."""
    from webdataset.gopen import Pipe, gopen, rewrite_url  # imports torch

    with ExitStack() as opened:
        try:
            with _failures():
                url = rewrite_url(url)
                if scheme(url) == "pipe":
                    source = opened.enter_context(_in_shell(url[len("pipe:") :]))
                else:
                    source = gopen(url, bufsize=0)
        except (ValueError, ImportError) as error:
            raise _Failed(f"gopen cannot open it: {error}", final=True) from None
        if isinstance(source, Pipe):
            with _program(source, stall_timeout_s) as stream:
                yield stream
        else:
            with source:
                yield _Stream(lambda: source.read(CHUNK))


@contextmanager
def _in_shell(command: str) -> Iterator:
    """A program as gopen's Pipe; it and all that it starts end with this block or process."""
    from webdataset import utils
    from webdataset.gopen import Pipe

    if utils.enforce_security:
        raise ValueError("WDS_SECURE forbids programs")
    watched, held = os.pipe()  # held by this process alone: it closes when that dies
    try:
        words = ["sh", "-c", IN_SHELL, "sh", command]
        own_group = dict(stdin=watched, start_new_session=True, bufsize=0)
        program = Pipe(words, mode="rb", ignore_status=[141], **own_group)
        os.close(watched)
        try:
            yield program
        finally:
            with suppress(ProcessLookupError):
                os.killpg(program.proc.pid, signal.SIGKILL)
    finally:
        os.close(held)


@contextmanager
def _program(source, stall_timeout_s: float) -> Iterator[_Stream]:
    """What a program writes, as gopen's Pipe."""
    handle = source.stream.fileno()
    poll = select.poll()
    poll.register(handle, select.POLLIN)

    def read() -> bytes:
        if not poll.poll(stall_timeout_s * 1000):
            raise TimeoutError
        return os.read(handle, CHUNK)

    try:
        yield _Stream(read)
        source.timeout = stall_timeout_s
        try:
            with _failures():
                source.close()  # raises when the program failed
        except subprocess.TimeoutExpired:
            raise _Failed("stalled: the program does not end") from None
    finally:
        source.proc.kill()
        source.stream.close()
        source.proc.wait()
