"""An HTTP server for one directory, on 127.0.0.1, with faults that a test chooses."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from base64 import b64encode
from collections import defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

STEP = 16384  # bytes written at a time


class FlakyServer:
    """A server of one folder. faults[name]: a list of faults, one for each next request of a file.

    Faults: 500: that status. "reset": half of the file, then a connection reset. "close": half of
    it, then the end of the connection. "stall": half of it, then nothing. "drip": half of it, then
    20 bytes per second. "head": the answer's head at that rate. "chunk": the length of the first
    chunk of a chunked body at that rate. "long", "short": a Content-Length that is not the file's.
    "wrong": one byte differs. "slow": small pieces with pauses.
    no_ranges: ignore Range. no_length: send no length; the file ends with the connection.
    login: the "USER:PASSWORD" that is required. redirects: name -> the URL or path that has it.
    tags: name -> ETag, if it is not "1".
    logins: the Authorization headers received. requests: (name, Range header or None), in order.
    """

    def __init__(self, folder: Path):
        self.faults: dict[str, list] = defaultdict(list)
        self.no_ranges = self.no_length = False
        self.login: str | None = None
        self.logins: list[str | None] = []
        self.redirects: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer._answer(self, folder)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def count(self, name: str) -> int:
        """Return the number of requests of a file."""
        return sum(requested == name for requested, _ in self.requests)

    def close(self) -> None:
        """Stop the server and every answer that waits."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, folder: Path) -> None:
        name = unquote(request.path.lstrip("/"))
        asked = request.headers.get("Range")
        self.requests.append((name, asked))
        fault = self.faults[name].pop(0) if self.faults[name] else None
        if not (folder / name).is_file() and name not in self.redirects:
            fault = 404
        login = request.headers.get("Authorization")
        self.logins.append(login)
        if self.login and login != "Basic " + b64encode(self.login.encode()).decode():
            fault = 401
        if name in self.redirects and not isinstance(fault, int):
            request.send_response(302)
            request.send_header("Location", self.redirects[name])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if isinstance(fault, int):
            request.send_error(fault)
            return
        if fault in ("head", "chunk"):
            chunked = b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            self._drip(request, b"HTTP/1.0 200 OK\r\nX: " if fault == "head" else chunked)
            return
        content = (folder / name).read_bytes()
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if asked and start >= len(content):
            request.send_error(416)
            return
        if asked and not self.no_ranges:
            request.send_response(206)
            total = "*" if self.no_length else len(content)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{total}")
            content = content[start:]
        else:
            request.send_response(200)
        if fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        declared = len(content) + {"long": 1000, "short": -1000}.get(fault, 0)
        if not self.no_length:
            request.send_header("Content-Length", str(declared))
        request.send_header("ETag", f'"{self.tags.get(name, "1")}"')
        request.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        request.end_headers()
        try:
            self._send(request, content, fault)
        except OSError:  # the client has gone
            request.close_connection = True

    def _send(self, request: BaseHTTPRequestHandler, content: bytes, fault: str | None) -> None:
        half = len(content) // 2
        if fault in (None, "wrong", "long", "short"):
            request.wfile.write(content)
        elif fault == "slow":
            for at in range(0, len(content), STEP):
                request.wfile.write(content[at : at + STEP])
                time.sleep(0.01)
        else:
            request.wfile.write(content[:half])
        if fault == "reset":
            time.sleep(0.05)  # without it the reset overtakes the bytes
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()
        elif fault == "stall":
            self.released.wait(30)
        elif fault == "drip":
            self._drip(request, b"", content[half : half + 300])

    def _drip(self, request, first: bytes, then: bytes = b"0" * 300) -> None:
        request.close_connection = True
        with suppress(OSError):  # the client has gone
            request.wfile.write(first)
            for at in range(len(then)):
                if self.released.wait(0.05):
                    break
                request.wfile.write(then[at : at + 1])
