"""Files on disks that offer less than others, or fail."""

import errno
import os

import pytest

from ds_classifier.common import files
from ds_classifier.distributed import failures


def test_one_creates_and_the_text_is_whole(tmp_path, poor_disk):
    assert files.create(tmp_path / "one", "first é")
    assert not files.create(tmp_path / "one", "second")
    assert (tmp_path / "one").read_bytes() == "first é".encode()


def test_only_a_sync_that_is_not_offered_is_passed_over(tmp_path, poor_disk, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert files.fsync(tmp_path / "file") is None
    assert files.fsync(tmp_path) == "Invalid argument"

    def fail(handle):
        raise OSError(errno.EIO, "made up")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="made up") as raised:
        files.fsync(tmp_path)
    assert raised.value.filename == str(tmp_path)


def test_one_verdict_a_host_without_hard_links(tmp_path, poor_disk):
    assert failures.claim(tmp_path, {"message": "first", "code": 1})
    assert not failures.claim(tmp_path, {"message": "second", "code": 2})
    assert failures.claimed(tmp_path) == {"message": "first", "code": 1}
