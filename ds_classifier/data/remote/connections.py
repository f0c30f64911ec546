"""A URL, opened once, from some byte on: what comes, and how it fails.

http(s) goes through the standard library, every other scheme (gs, hf, sftp, file, pipe ...)
through webdataset's gopen. HTTP semantics: RFC 9110 (section 14, range requests).
"""

from __future__ import annotations

import base64
import http.client
import io
import os
import re
import select
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from ds_classifier.common import files
from ds_classifier.common.urls import scheme

CHUNK = 1 << 20  # bytes asked for at a time
WORTH_TRYING_AGAIN = (408, 416, 425, 429)  # of the HTTP statuses 4xx

# A program in a shell, in a session of its own. Its group ends with the one who started it, of
# whatever that dies, and when that lets go: the watcher then sees the end of its standard input.
IN_SHELL = """exec 3<&0 </dev/null
{ read -r _; kill -KILL 0; } <&3 3<&- >/dev/null 2>&1 &
exec 3<&-
eval "$1"
"""


class Failed(Exception):
    """One try failed. final: another will not help. restart: what it brought is of no use."""

    def __init__(self, reason: str, *, final: bool = False, restart: bool = False):
        super().__init__(reason)
        self.final, self.restart = final, restart


@dataclass
class Stream:
    """An answer. read() gives some bytes, b"" at the end; start: where in the file they begin;
    total: bytes of the whole file, None where the server does not say; ends: whether it says when
    that was the last byte, or the connection just ends, as it also does when it breaks."""

    read: Callable[[], bytes]
    start: int = 0
    total: int | None = None
    ends: bool = True


@contextmanager
def network_errors() -> Iterator[None]:
    """What a network does to us is a failed try; what our own disk does is not."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        final = 400 <= error.code < 500 and error.code not in WORTH_TRYING_AGAIN
        # 416: the part is as long as the server's file, or longer.
        restart = error.code == 416
        raise Failed(f"HTTP {error.code} {error.reason}", final=final, restart=restart) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Failed(files.problem(error), final=True) from None
    except TimeoutError:
        raise Failed("stalled: no answer within the time-out") from None
    except http.client.InvalidURL:  # its text may hold a part of a password
        reason = "no valid URL; need %XX for what is no plain letter in it, as in a password"
        raise Failed(reason, final=True) from None
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{type(error).__name__}: {files.problem(error)}") from None


@contextmanager
def opened_url(url: str, start: int, stall_timeout_s: float) -> Iterator[Stream]:
    opened = _opened_http if scheme(url) in ("http", "https") else _opened_by_gopen
    with opened(url, start, stall_timeout_s) as stream:
        yield stream


@contextmanager
def _opened_http(url: str, start: int, stall_timeout_s: float) -> Iterator[Stream]:
    headers = {"User-Agent": "ds_classifier", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with network_errors():
        request = urllib.request.Request(url, headers=headers)
        response = _OPENER.open(request, timeout=stall_timeout_s)
    with response:
        if response.status == 206:
            word = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", word)
            if not found or int(found[1]) != start:
                raise Failed(f"asked for bytes {start}-, got {word!r}", restart=True)
            total = None if found[2] == "*" else int(found[2])
        else:  # the whole file, whether or not a range was asked for
            start, total = 0, response.length

        def read() -> bytes:
            response.patient.start()
            return response.read1(CHUNK)

        yield Stream(read, start, total, ends=total is not None or bool(response.chunked))


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


class _Login(urllib.request.BaseHandler):
    """USER:PASSWORD@ of a URL as an Authorization header (RFC 7617), which urllib leaves in the
    host's name. Redirects do not take it along: it is for the host that it was given for."""

    handler_order = 100  # before a Host header is made

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        login, at, host = request.host.rpartition("@")
        if at:
            parts = urllib.parse.urlsplit(request.full_url)
            request.full_url = parts._replace(netloc=host).geturl()
            words = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
            request.add_unredirected_header("Authorization", f"Basic {words}")
        return request

    https_request = http_request


class _Redirect(urllib.request.HTTPRedirectHandler):
    """To another path of the same server the login is taken along."""

    def redirect_request(self, request, *answer):
        following = super().redirect_request(request, *answer)
        login = request.unredirected_hdrs.get("Authorization")
        if following and login and _origin(following) == _origin(request):
            following.add_unredirected_header("Authorization", login)
        return following


def _origin(request: urllib.request.Request) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(request.full_url)
    return parts.scheme.lower(), parts.netloc.lower()


_OPENER = urllib.request.build_opener(_Http, _Https, _Login, _Redirect)


@contextmanager
def _opened_by_gopen(url: str, start: int, stall_timeout_s: float) -> Iterator[Stream]:
    """gopen knows no ranges: always the whole file."""
    from webdataset.gopen import Pipe, gopen, rewrite_url  # imports torch

    with ExitStack() as opened:
        try:
            with network_errors():
                url = rewrite_url(url)
                if scheme(url) == "pipe":
                    source = opened.enter_context(_in_shell(url[len("pipe:") :]))
                else:
                    source = gopen(url, bufsize=0)
        except (ValueError, ImportError) as error:
            raise Failed(f"gopen cannot open it: {error}", final=True) from None
        if isinstance(source, Pipe):
            with _program(source, stall_timeout_s) as stream:
                yield stream
        else:
            with source:
                yield Stream(lambda: source.read(CHUNK))


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
def _program(source, stall_timeout_s: float) -> Iterator[Stream]:
    """What a program writes, as gopen's Pipe."""
    handle = source.stream.fileno()
    poll = select.poll()
    poll.register(handle, select.POLLIN)

    def read() -> bytes:
        if not poll.poll(stall_timeout_s * 1000):
            raise TimeoutError
        return os.read(handle, CHUNK)

    try:
        yield Stream(read)
        source.timeout = stall_timeout_s
        try:
            with network_errors():
                source.close()  # raises when the program failed
        except subprocess.TimeoutExpired:
            raise Failed("stalled: the program does not end") from None
    finally:
        source.proc.kill()
        source.stream.close()
        source.proc.wait()
