"""Shared fixtures: recorded numbers, images, shards of digits, the deepspeed launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before torch is imported, here or by what the tests start: small models gain nothing by more, and
# threads that wait for each other on busy cores lose a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
GOLDEN = Path(__file__).parent / "golden"


def shared(*parts: str) -> Path:
    """A file of the larger recorded set beside the checkout; skips where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the recorded set {'/'.join(parts)} is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    """Numbers recorded from guided-diffusion, beyond those in tests/golden."""
    return shared("reference")


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """A folder of real images, nNNNNNNNN_name.JPEG."""
    return shared("data", "imagenet-sample")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Shards of the digits: a directory with train/ and val/."""
    from ds_classifier.data.convert.convert import convert
    from ds_classifier.data.convert.sources import open_source

    out = tmp_path_factory.mktemp("digits")
    convert(open_source("digits"), out)
    return out


def make_images(folder: Path, names: list[str]) -> Path:
    """A folder of small different images, in the format of their suffix."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(i).randint(0, 256, (12, 10, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    names = [f"{c}/{c}_{i}.png" for c in ("cat", "dog", "emu") for i in range(5)]
    return make_images(tmp_path / "images", names)


@pytest.fixture
def many(tmp_path) -> Path:
    """120 images of 6 classes."""
    return make_images(tmp_path / "many", [f"c{i % 6}/{i:03d}.png" for i in range(120)])


@pytest.fixture
def served_store(tmp_path, monkeypatch):
    """Shards of random bytes at a URL: (server, shards, a function that makes their store)."""
    from stores import FAST, make_shards, serving

    from ds_classifier.data.store import ShardStore

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    shards = make_shards(tmp_path / "far", 6)
    with serving(tmp_path / "far") as server:

        def store(**options) -> ShardStore:
            options = FAST | dict(cache_dir=tmp_path / "cache") | options
            return ShardStore(server.url, shards, **options)

        yield server, shards, store


@pytest.fixture
def served_folder(tmp_path, monkeypatch):
    """An empty directory at a URL: (server, directory); pauses are short."""
    from flaky_server import FlakyServer

    from ds_classifier.data.remote import fetch

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_S", 0.02)
    (tmp_path / "far").mkdir()
    server = FlakyServer(tmp_path / "far")
    yield server, tmp_path / "far"
    server.close()


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    output: str

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


def environment(**extra: str) -> dict[str, str]:
    """A clean environment: no rank variables of an outer launcher, no device talk."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"DS_ACCELERATOR": "cpu", **extra}


def run_python(*arguments: object, cwd: Path, timeout: float = 300, **variables: str) -> Finished:
    """Run a Python program to its end, with these variables in its environment."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode, done.stdout)


def launch(
    ranks: int,
    *arguments: object,
    cwd: Path,
    script: Path = ROOT / "launch" / "train.py",
    launcher: bool = False,
    timeout: float = 300,
) -> Finished:
    """Run a script on several ranks to its end.

    launcher: through the real deepspeed launcher; else the ranks are started here, 6 s sooner, with
    the environment that it would give them.
    """
    from ds_classifier.distributed import free_port

    port = str(free_port())
    command = [sys.executable, str(script), *map(str, arguments)]
    if launcher:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        head = [
            sys.executable,
            deepspeed,
            "--quiet",
            "--master_port",
            port,
            "--num_gpus",
            str(ranks),
        ]
        commands = [([*head, *command[1:]], environment())]
    else:
        group = dict(WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
        commands = [
            (command, environment(RANK=str(r), LOCAL_RANK=str(r), MASTER_PORT=port, **group))
            for r in range(ranks)
        ]
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(c, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT)
            for c, env in commands
        ]
        code = _first_failure(processes, time.monotonic() + timeout)
        output.seek(0)
        return Finished(code % 256, output.read())


def _first_failure(processes: list[subprocess.Popen], deadline: float) -> int:
    """Wait for all; when one fails, end the others a moment later. The first code that is not 0."""
    failed = 0
    while any(process.poll() is None for process in processes):
        failed = failed or next((p.returncode for p in processes if p.returncode), 0)
        if failed:
            deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
            assert failed, "timed out"
        time.sleep(0.05)
    return failed or next((p.returncode for p in processes if p.returncode), 0)


def read_log(run: Path) -> list[dict]:
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
