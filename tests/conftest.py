"""Fixtures that several tests share: recorded numbers, images, shards, shards at a URL."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import setuptools  # noqa: F401  before a test imports distutils, after which it could not be
from running import ROOT

# Set before torch is imported, here or in a program that a test starts. Small models gain nothing
# from more threads, and threads that wait for each other on busy cores lose a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ds_classifier  # noqa: F401  it sets how these threads wait

SHARED = ROOT.parent / "shared"
# Files whose tests take minutes. They begin first, so that no process waits for them at the end.
LONG = ("test_training.py", "test_evaluation.py", "test_benchmark.py", "test_first_hour.py",
        "test_report.py", "test_extend.py", "test_wheel.py", "test_cli.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by file, those of LONG first; the order within a file stays."""
    items.sort(key=lambda i: LONG.index(i.path.name) if i.path.name in LONG else len(LONG))


def shared(*parts: str) -> Path:
    """Return a file of the larger recorded set next to the checkout; skip the test without it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the recorded set {'/'.join(parts)} is not next to this checkout")
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of numbers recorded from guided-diffusion, more than tests/golden has."""
    return shared("reference")


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """A folder of real images, nNNNNNNNN_name.JPEG."""
    return shared("data", "imagenet-sample")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The digits as shards: a directory with train/ and val/."""
    from ds_classifier.data.convert.convert import convert
    from ds_classifier.data.convert.sources import open_source

    out = tmp_path_factory.mktemp("digits")
    convert(open_source("digits"), out)
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of 15 images, one directory per class: cat, dog, emu."""
    from made import make_images

    names = [f"{c}/{c}_{i}.png" for c in ("cat", "dog", "emu") for i in range(5)]
    return make_images(tmp_path / "images", names)


@pytest.fixture
def many(tmp_path) -> Path:
    """A folder of 120 images of 6 classes."""
    from made import make_images

    return make_images(tmp_path / "many", [f"c{i % 6}/{i:03d}.png" for i in range(120)])


@pytest.fixture
def served_store(tmp_path, monkeypatch):
    """Six shards of random bytes at a URL: (server, shards, function that makes their store)."""
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
    """An empty directory at a URL: (server, directory). Pauses between attempts are short."""
    from flaky_server import FlakyServer

    from ds_classifier.data.remote import fetch

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_S", 0.02)
    (tmp_path / "far").mkdir()
    server = FlakyServer(tmp_path / "far")
    yield server, tmp_path / "far"
    server.close()


@pytest.fixture
def poor_disk(monkeypatch):
    """Make system calls fail as on mounted drives, gcsfuse and exFAT: links, modes, directories."""
    fsync = os.fsync

    def refuse(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def fsync_of_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    for name in ("link", "symlink", "chmod"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "fsync", fsync_of_files)
