"""A local S3 server, moto's, with faults that a test chooses; on 127.0.0.1."""

from __future__ import annotations

import socket
import struct
import threading
from collections import defaultdict
from contextlib import contextmanager

import requests

ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code} was said'
    "</Message><AWSAccessKeyId>{key}</AWSAccessKeyId></Error>"
)


class S3Server:
    """A server with the bucket "bkt".

    faults[(method, key)]: a list of faults, one for each next request. (503, "SlowDown"): that
    status and code. "reset": a connection reset. "stall": no answer.
    requests: (method, key, access key id or None), in order.
    """

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *arguments):
                pass

        self._moto = DomainDispatcherApplication(create_backend_app)
        self.faults: dict[tuple[str, str], list] = defaultdict(list)
        self.requests: list[tuple[str, str, str | None]] = []
        self.credentials: dict | None = None  # what a container's role has: served at /role
        self._released = threading.Event()
        self._server = make_server("127.0.0.1", 0, self._app, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def empty(self) -> None:
        """Begin anew with an empty bucket and without faults."""
        self._released.set()  # answers that wait for nobody
        self._released = threading.Event()
        self._backend().reset()
        requests.put(f"{self.url}/bkt", timeout=30)
        self.faults.clear()
        self.requests.clear()

    def close(self) -> None:
        """Stop the server and every answer that waits."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        self._backend().put_object("bkt", key, content)

    def get(self, key: str) -> bytes:
        """Return the content of an object."""
        return self._objects()[key].value

    def names(self) -> list[str]:
        """Return the keys of all objects."""
        return sorted(self._objects())

    def _objects(self) -> dict:
        return dict(self._backend().buckets["bkt"].keys.items())

    def _backend(self):
        from moto.s3.models import s3_backends

        return s3_backends["123456789012"]["aws"]

    def count(self, method: str, key: str) -> int:
        """Return the number of requests of an object."""
        return sum(request[:2] == (method, key) for request in self.requests)

    def _app(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        key = path.removeprefix("/bkt").lstrip("/")
        signed = environ.get("HTTP_AUTHORIZATION", "")
        who = signed.partition("Credential=")[2].partition("/")[0] or None
        self.requests.append((method, key, who))
        if path == "/role":
            import json

            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.credentials).encode()]
        fault = self.faults[method, key].pop(0) if self.faults[method, key] else None
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            environ["werkzeug.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            environ["werkzeug.socket"].close()
            raise ConnectionResetError
        if fault == "stall":
            self._released.wait(30)
            fault = (500, "InternalError")
        if fault:
            status, code = fault
            text = ERROR.format(code=code, key=who).encode()
            start_response(f"{status} Said", [("Content-Type", "application/xml")])
            return [text]
        return self._moto(environ, start_response)


@contextmanager
def found_by_environment(server: S3Server, monkeypatch):
    """Let obstore and botocore find a server, which is emptied, by the environment."""
    server.empty()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SKIP_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "KEYOFTHETEST",
        "AWS_SECRET_ACCESS_KEY": "topsecret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    end_helpers()
    yield
    end_helpers()


def end_helpers() -> None:
    """End the program that has the environment of its start."""
    from ds_classifier.data.remote import objects

    while objects._idle:
        objects._idle.pop().end()
