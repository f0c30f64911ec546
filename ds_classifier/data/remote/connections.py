"""Open a URL once, from a byte on, and report failures in one form.

http(s) and hf go through requests, s3, gs and az through obstore (objects.py), every other scheme
(sftp, file, pipe ...) through webdataset's gopen. HTTP semantics: RFC 9110 (section 14, ranges).
"""

from __future__ import annotations

import http.client
import os
import re
import select
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import requests
import urllib3

from ds_classifier.common import files
from ds_classifier.common.urls import scheme
from ds_classifier.data.remote import objects
from ds_classifier.data.remote.failed import Failed

CHUNK = 1 << 20  # bytes to read at a time, at most
WORTH_TRYING_AGAIN = (408, 416, 425, 429)  # HTTP statuses 4xx after which another try may succeed
WRAPPERS = (requests.RequestException, urllib3.exceptions.HTTPError)  # their texts may hold secrets
BAD_URL = (
    "the URL, or one that it redirects to, is not valid; need %XX for special characters, such as "
    "those in a password"
)
BAD_PROXY = (
    "the proxy in the environment (http_proxy, https_proxy, all_proxy) cannot be used; do: correct "
    "or unset it; a SOCKS proxy needs: pip install 'requests[socks]'"
)

# Runs a program in a shell, in a session of its own. A watcher in the background reads a pipe that
# only this process holds open; when this process closes it or dies, the watcher kills the group.
IN_SHELL = """exec 3<&0 </dev/null
{ read -r _; kill -KILL 0; } <&3 3<&- >/dev/null 2>&1 &
exec 3<&-
eval "$1"
"""


@dataclass
class Stream:
    """An open URL.

    read: returns some bytes, b"" at the end.
    start: position in the file of the first byte that it returns.
    total: bytes of the whole file; None if the server does not say.
    ends: False if the end of the file can only be seen from the end of the connection, which a
        broken connection looks like too.
    tag: the ETag of an object in storage. Web servers have other ones on each mirror: None.
    """

    read: Callable[[], bytes]
    start: int = 0
    total: int | None = None
    ends: bool = True
    tag: str | None = None


@contextmanager
def network_errors() -> Iterator[None]:
    """Raise Failed in place of the errors of a network or a server.

    Wrap only code that reads from the URL: errors of the local disk are OSErrors too.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Failed(files.problem(error), final=True) from None
    except (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
        cause = error
        while isinstance(cause, WRAPPERS) and (inner := cause.__cause__ or cause.__context__):
            cause = inner
        if isinstance(cause, TimeoutError):
            raise Failed("stalled: no answer within the time-out") from None
        text = "" if isinstance(cause, WRAPPERS) else f": {files.problem(cause)}"
        raise Failed(type(cause).__name__ + text) from None


@contextmanager
def opened_url(url: str, start: int, stall_timeout_s: float) -> Iterator[Stream]:
    """Open a URL for reading from byte `start` on; the stream may begin before it.

    stall_timeout_s: seconds that connecting, the head of the answer, and each read may take.
    Raises Failed; ValueError for a URL of object storage that cannot be used.
    """
    objects.refuse_unusable(url)
    if scheme(url) in objects.SCHEMES:
        opened = _opened_object(url, start, stall_timeout_s)
    elif scheme(url) == "hf":
        address, token = objects.hf_address(url)
        opened = _opened_http(address, start, stall_timeout_s, token=token)
    elif scheme(url) in ("http", "https"):
        opened = _opened_http(url, start, stall_timeout_s)
    else:
        opened = _opened_by_gopen(url, start, stall_timeout_s)
    try:
        with opened as stream:
            yield stream
    except Failed as failure:
        if "HTTP 40" in str(failure) and scheme(url) == "hf":
            failure.advice = objects.HF_ADVICE
        raise


@contextmanager
def _opened_object(url: str, start: int, stall_timeout_s: float) -> Iterator[Stream]:
    """Open an object in storage from byte `start` on."""
    with objects.Request("get", url, start=start, limit_s=stall_timeout_s) as request:
        head = request.head
        yield Stream(request.read, head["start"], head["total"], tag=head["tag"])


@contextmanager
def _opened_http(
    url: str, start: int, stall_timeout_s: float, *, token: str | None = None
) -> Iterator[Stream]:
    """Open an http(s) URL with requests, which follows redirects and reads the proxy settings.

    A login in the URL, or a token, is sent to the URL's own host, but not to another host after a
    redirect.
    """
    headers = {"User-Agent": "ds_classifier", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if start:
        headers["Range"] = f"bytes={start}-"
    adapter = _PatientAdapter(stall_timeout_s)
    certificates = ssl.get_default_verify_paths()
    with _Session() as session, ExitStack() as opened:
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        with network_errors():
            try:
                parts = urllib3.util.parse_url(url)
                login = parts.auth and map(unquote_to_bytes, parts.auth.partition(":")[::2])
                response = session.get(
                    parts._replace(auth=None).url,
                    headers=headers,
                    # Bytes, since requests encodes text as Latin-1. Without a login in the URL none
                    # is sent: given no auth at all, requests would look into ~/.netrc.
                    auth=tuple(login) if login else lambda request: request,
                    # The system's certificates; given True, requests would take its own list.
                    verify=certificates.cafile or certificates.capath or True,
                    stream=True,
                    timeout=stall_timeout_s,
                )
            except ValueError as error:  # its text may hold part of a password
                proxy = isinstance(error, requests.exceptions.InvalidProxyURL)
                proxy |= "SOCKS" in str(error)
                raise Failed(BAD_PROXY if proxy else BAD_URL, final=True) from None
        opened.enter_context(response)
        response.raw.enforce_content_length = False  # fetch.py compares sizes
        status = response.status_code
        if not 200 <= status < 300:
            final = 400 <= status < 500 and status not in WORTH_TRYING_AGAIN
            # 416: the part on disk is as long as the server's file, or longer.
            raise Failed(f"HTTP {status} {response.reason}", final=final, restart=status == 416)
        if status == 206:
            word = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", word)
            if not found or int(found[1]) != start:
                raise Failed(f"asked for bytes {start}-, got {word!r}", restart=True)
            total = None if found[2] == "*" else int(found[2])
        else:  # the whole file; the server may have ignored the range
            start, total = 0, response.raw.length_remaining

        def read() -> bytes:
            adapter.restart_clock()
            # iter_content waits for a full chunk, and loses its bytes if the connection breaks.
            return response.raw.read1(CHUNK, decode_content=False)

        yield Stream(read, start, total, ends=total is not None or response.raw.chunked)


class _Session(requests.Session):
    """A session that sends the login of the URL, and none from ~/.netrc, after a redirect."""

    def rebuild_auth(self, prepared_request, response) -> None:
        """Drop the login if the redirect leads to another host."""
        if self.should_strip_auth(response.request.url, prepared_request.url):
            prepared_request.headers.pop("Authorization", None)


class _PatientAdapter(requests.adapters.HTTPAdapter):
    """Makes connections on which the head of a response, and each read, have limit_s seconds.

    A socket's own time-out starts again with every byte, and the head of a response, or the length
    of a chunk, may come in a thousand pieces.
    """

    def __init__(self, limit_s: float):
        super().__init__()
        self._limit_s = limit_s

    def init_poolmanager(self, *arguments, **keywords):
        """Load the system's certificate file and directory; requests would load only one."""
        context = ssl.create_default_context()
        return super().init_poolmanager(*arguments, ssl_context=context, **keywords)

    def restart_clock(self) -> None:
        """Allow limit_s seconds from now."""
        self._end = time.monotonic() + self._limit_s

    def get_connection_with_tls_context(self, *arguments, **keywords):
        """Return the pool of connections for a request."""
        pool = super().get_connection_with_tls_context(*arguments, **keywords)
        own = {"response_class": staticmethod(self._response)}
        pool.ConnectionCls = type("_PatientConnection", (pool.ConnectionCls,), own)
        return pool

    def _response(self, socket, *arguments, **keywords) -> http.client.HTTPResponse:
        """Return a response whose reads raise TimeoutError once the clock has run out."""
        self.restart_clock()
        response = http.client.HTTPResponse(socket, *arguments, **keywords)
        receive = response.fp.raw.readinto

        def readinto(buffer) -> int | None:
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            socket.settimeout(left)
            return receive(buffer)

        response.fp.raw.readinto = readinto
        return response


@contextmanager
def _opened_by_gopen(url: str, start: int, stall_timeout_s: float) -> Iterator[Stream]:
    """Open a URL of any other scheme with gopen, which always reads from the first byte."""
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
    """Start a shell command as gopen's Pipe.

    The command, and every process that it starts, is killed at the end of the block, or when this
    process dies.
    """
    from webdataset import utils
    from webdataset.gopen import Pipe

    if utils.enforce_security:
        raise ValueError("WDS_SECURE forbids programs")
    watched, held = os.pipe()  # only this process has `held`, so it closes when this process dies
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
    """Yield the output of a program, given as gopen's Pipe; Failed if the program fails."""
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
                source.close()  # raises if the program failed
        except subprocess.TimeoutExpired:
            raise Failed("stalled: the program does not end") from None
    finally:
        source.proc.kill()
        source.stream.close()
        source.proc.wait()
