"""Places that cannot be written are refused; files on disks that offer little, or fail."""

import errno
import os
import re
import tempfile
from pathlib import Path

import pytest

from ds_classifier.common import files
from ds_classifier.distributed import failures


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in sorted(folder.rglob("*"))
    }


def test_places_that_can_be_written_are_accepted_and_not_touched(tmp_path):
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "full").mkdir()
    before = everything(tmp_path)
    for folder in (tmp_path, tmp_path / "full", tmp_path / "new", tmp_path / "a/b/c"):
        files.refuse_unwritable("--out", folder)
    for file in ("old.json", "new.json", "a/b/new.json"):
        files.refuse_unwritable_file("--out", tmp_path / file)
    assert everything(tmp_path) == before


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")  # it must not be opened, nor replaced
    before = sorted(tmp_path.rglob("*"))
    for folder in ("/proc/x", "/proc/x/y", tmp_path / "file", tmp_path / "file/in/it"):
        with pytest.raises(ValueError) as error:
            files.refuse_unwritable("--out", Path(folder))
        message = re.escape(f"--out: got {folder}; need a place where files can be written (")
        assert re.fullmatch(rf"{message}.+\); do: name another one", str(error.value))
    with pytest.raises(ValueError, match=r"got .*loop; need a place"):
        files.refuse_unwritable("--out", tmp_path / "loop")
    for file in ("/proc/x", tmp_path / "file/in.html"):
        with pytest.raises(ValueError, match=r"--out: got .*; need a place"):
            files.refuse_unwritable_file("--out", Path(file))
    for file in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(ValueError, match=r"--out: got .*, which is no regular file; do: name"):
            files.refuse_unwritable_file("--out", file)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
    with pytest.raises(ValueError, match=r"--out: .* \(No space left on device\); do: name"):
        files.refuse_unwritable("--out", tmp_path / "new")


def test_a_file_that_may_not_be_replaced_is_refused(tmp_path, monkeypatch):
    """Root may write to any file, so the system's answer is made up."""
    (tmp_path / "r.html").write_text("old")
    (tmp_path / "r.html").chmod(0o444)
    if os.getuid() == 0:

        def refuse(path, flags):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(files.os, "open", refuse)
        monkeypatch.setattr(files, "refuse_unwritable", lambda flag, folder: None)
    with pytest.raises(ValueError, match=r"--out: got .*r.html; need .* \(Permission denied\)"):
        files.refuse_unwritable_file("--out", tmp_path / "r.html")


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
