"""Read, write, list and delete objects in S3, Google and Azure storage; find files at hf://.

The work is done by object_program.py in a process of its own, which this process starts at the
first use and keeps. It ends with this process.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from ds_classifier.common.urls import scheme, shown
from ds_classifier.data.remote.failed import Failed

SCHEMES = ("s3", "gs", "az")
OTHER_SPELLINGS = {
    "s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az",
    "wasb": "az", "wasbs": "az", "adl": "az", "huggingface": "hf",
}  # fmt: skip
EXTRA = "pip install 'ds-classifier[cloud]'"
PROGRAM = Path(__file__).with_name("object_program.py")
START_S = 60.0  # seconds that the program may need to start and to find credentials
LAST_S = 0.2  # seconds for the end of an answer whose bytes are all there
PIPE = 1 << 20  # bytes that the program may be ahead
HEADER = 5  # bytes before the content of a frame
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_HF = re.compile(
    r"(?:(datasets|spaces)/)?(?!datasets?/|spaces?/|models?/)"
    r"([\w.-]+/[\w.-]+?)(?:@([\w./%-]+?))?/(.+)"
)
HF_NEED = "hf://datasets/ORG/NAME/PATH, or hf://datasets/ORG/NAME@REVISION/PATH"

HF_ADVICE = (
    "check the name, or, for a private or gated repository, ask for access and export HF_TOKEN=... "
    "(or: hf auth login)"
)


def refuse_unusable(url: str) -> None:
    """Raise ValueError for a URL that cannot be meant, or of object storage without obstore."""
    kind, where = scheme(url), shown(url)
    if kind not in ("", "pipe", "file") and "://" not in where:
        raise ValueError(f"got {where}; need {where.replace(':/', '://', 1)}; do: write it so")
    if kind in OTHER_SPELLINGS:
        need = {"az": "az://CONTAINER/PATH", "hf": HF_NEED}.get(
            OTHER_SPELLINGS[kind], f"{OTHER_SPELLINGS[kind]}://BUCKET/PATH"
        )
        raise ValueError(f"got {where}; need {need}; do: write it so")
    if kind == "hf":
        hf_address(url)
    if kind not in SCHEMES:
        return
    bucket = url.partition("://")[2].partition("/")[0]
    if "?" in url or "#" in url or not BUCKET.fullmatch(bucket):
        what = "CONTAINER" if kind == "az" else "BUCKET"
        raise ValueError(
            f"got {where.split('?')[0]}; need {kind}://{what}/PATH, without a login, a port or a "
            "query; do: correct it, and give credentials and endpoint by the environment (docs/"
            "data.md)"
        )
    needed = ("obstore", "botocore") if kind == "s3" else ("obstore",)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"got {where}, which needs the package {' and '.join(missing)}; do: {EXTRA}"
        )


def in_one_bucket(url: str, other: str) -> bool:
    """Return whether two URLs name the same bucket of object storage."""
    buckets = [place.split("/")[:3] for place in (url, other)]
    return scheme(url) in SCHEMES and buckets[0] == buckets[1]


def hf_address(url: str) -> tuple[str, str | None]:
    """Return the https URL of a file at hf://, and the token to send, or None.

    The token is that of HF_TOKEN, or of `hf auth login`.
    Raises ValueError for a URL that names no file.
    """
    found = _HF.fullmatch(url.partition("://")[2])
    if not found:
        raise ValueError(f"got {shown(url)}; need {HF_NEED}; do: correct it")
    kind, name, revision, path = found.groups()
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    prefix = f"{endpoint}/{kind}" if kind else endpoint
    token = os.environ.get("HF_TOKEN")
    if not token:
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        file = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token"))
        with suppress(OSError, RuntimeError, ValueError):
            token = file.expanduser().read_text(encoding="ascii").strip()
    revision = quote(revision or "main", safe="%")
    return f"{prefix}/{name}/resolve/{revision}/{quote(path, safe='/%')}", token or None


class _Helper:
    """A running object_program.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for this process
        )
        with suppress(OSError):  # the user has many pipes: then it stays at 64 KiB
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, PIPE)
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)
        self._left = 0  # bytes of the frame of data that is being read
        self.answered = True  # the last request
        _living.add(self)

    def ask(self, **request) -> None:
        """Send a request."""
        self.answered = False
        with suppress(BrokenPipeError):  # it has died, which `frame` reports
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def frame(self, limit_s: float) -> tuple[bytes, bytes]:
        """Return the kind of the next frame and its content; of data, the bytes that are there.

        Raises Failed for a failure, for limit_s seconds without bytes, and if the program dies.
        """
        if not self._left:
            header = self._exactly(HEADER, limit_s)
            kind, size = header[:1], int.from_bytes(header[1:], "little")
            if kind != b"D":
                content = self._exactly(size, limit_s)
                self.answered = kind in b"EF"
                if kind == b"F":
                    raise Failed(**json.loads(content))
                return kind, content
            self._left = size
        data = self._some(self._left, limit_s)
        self._left -= len(data)
        return b"D", data

    def _exactly(self, size: int, limit_s: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += self._some(size - len(data), limit_s)
        return bytes(data)

    def _some(self, size: int, limit_s: float) -> bytes:
        if not self._poll.poll(limit_s * 1000):
            raise Failed("stalled: no answer within the time-out")
        data = os.read(self._process.stdout.fileno(), size)
        if not data:
            raise Failed("the process that speaks to the storage died")
        return data

    def forget(self) -> None:
        """Close the pipes; the program ends when no process holds them."""
        _living.discard(self)
        self._process.stdin.close()
        self._process.stdout.close()

    def end(self) -> None:
        """Kill the program."""
        self._process.kill()
        self.forget()
        self._process.wait()


_living: set[_Helper] = set()
_idle: list[_Helper] = []  # at most one
_guard = threading.Lock()


def _after_fork() -> None:
    """Leave the parent's programs to the parent."""
    global _guard
    _guard = threading.Lock()
    _idle.clear()
    for helper in list(_living):
        helper.forget()


os.register_at_fork(after_in_child=_after_fork)


class Request:
    """A request to object storage: a context, which ends it.

    head: the JSON of the answer's head. limit_s: seconds that each read may take.
    Raises ValueError for a URL that cannot be used, and Failed.
    """

    def __init__(self, do: str, url: str, *, limit_s: float, **arguments):
        refuse_unusable(url)
        self._request = dict(do=do, url=url, **arguments)
        self._limit_s = limit_s

    def __enter__(self) -> Request:
        with _guard:
            self._helper = _idle.pop() if _idle else None
        if self._helper is None:
            self._helper = _Helper()
        try:
            self._helper.ask(**self._request)
            self._helper.frame(START_S)  # S
            kind, content = self._helper.frame(self._limit_s)
        except BaseException:
            self._leave()
            raise
        self.head = json.loads(content) if kind == b"H" else {}
        return self

    def read(self) -> bytes:
        """Return some bytes of the answer, b"" at its end."""
        return b"" if self._helper.answered else self._helper.frame(self._limit_s)[1]

    def __exit__(self, *error) -> None:
        self._leave()

    def _leave(self) -> None:
        """Keep the program for the next request, or end it if it is still busy with this one."""
        if not self._helper.answered:
            with suppress(Failed):
                self._helper.frame(LAST_S)  # E, which a reader that counts bytes leaves
        with _guard:
            keep = self._helper.answered and not _idle
            if keep:
                _idle.append(self._helper)
        if not keep:
            self._helper.end()
