"""Files that are not images: all listed in one error, and never waited for."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from made import make_images
from running import ROOT, run_python

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import image_folder, open_source
from ds_classifier.data.foreign.index import index
from ds_classifier.data.foreign.verify import verify

MAKE_SHARDS = ROOT / "launch" / "make_shards.py"


@pytest.mark.parametrize("workers", [1, 3])
def test_files_that_are_not_images_are_listed_together(many, tmp_path, workers):
    """Report their number and the first 20, list all in a file, and convert once they are gone."""
    bad = [f"c{i % 6}/{i:03d}.jpg" for i in range(0, 120, 4)]
    for i, name in enumerate(bad):
        (many / name).write_bytes(b"<html>not found</html>" if i else b"")
    command = [MAKE_SHARDS, "convert", many, tmp_path / "data", "--samples_per_shard", "7"]
    done = run_python(*command, "--workers", workers, cwd=tmp_path)
    listing = tmp_path / "data" / "train.bad.txt"
    assert (done.code, len(done.lines)) == (2, 22), done.output
    assert done.lines[0].startswith("error: got 30 files that cannot be stored; need whole images")
    assert f"the files in {listing}" in done.lines[0]
    assert done.lines[1] == f"  {min(bad)}: got b''..., which is not the start of an image file"
    assert done.lines[-1] == "  ... and 10 more"
    assert not (tmp_path / "data" / "train").exists()
    listed = listing.read_text().splitlines()
    assert listed == sorted(bad)
    for name in listed:
        (many / name).unlink()
    assert "remove it" in run_python(*command, cwd=tmp_path).lines[0]
    shutil.rmtree(tmp_path / "data" / "train.partial")
    assert run_python(*command, cwd=tmp_path).code == 0
    assert not listing.exists()
    assert verify(tmp_path / "data/train") == []


def test_a_file_that_cannot_be_read_is_listed_too(folder, tmp_path):
    source = image_folder(folder)
    (folder / "cat" / "cat_1.png").unlink()
    (folder / "cat" / "cat_1.png").mkdir()
    (folder / "dog" / "dog_1.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"(?s)2 files.*cat_1\.png: cannot be read \(Is a dir"):
        convert(source, tmp_path / "data")


def test_a_file_too_large_for_an_image_is_refused_unread(folder, tmp_path):
    (folder / "cat" / "huge.png").touch()
    os.truncate(folder / "cat" / "huge.png", 10 << 30)
    with pytest.raises(ValueError, match=r"huge\.png: got 10737418240 bytes; need at most"):
        convert(image_folder(folder), tmp_path / "data")


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Make folders for training and validation, with the classes cat and dog."""
    names = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(6)]
    return make_images(tmp_path / "train", names), make_images(tmp_path / "val", names)


@pytest.mark.parametrize("workers", [1, 3])
def test_one_error_lists_all_bad_files(two, tmp_path, workers):
    train, val = two
    (train / "cat/link.png").symlink_to("/nowhere/at/all")
    (train / "dog/loop.jpg").symlink_to("loop.jpg")
    (train / "dog/html.jpg").write_text("<html>")
    os.mkfifo(train / "dog/fifo.jpg")
    os.mkfifo(train / "dog/fifo")  # without an image's suffix: left out like other such files
    (train / "cat/zero.png").symlink_to("/dev/zero")
    (val / "dog/empty.png").touch()
    (val / "cat/link.png").symlink_to("gone.png")
    (val / "cat/good.png").symlink_to("0.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(val / "cat/socket.gif"))
        command = [MAKE_SHARDS, "convert", train, tmp_path / "data", "--val", val]
        command += ["--workers", workers, "--samples_per_shard", 2]
        done = run_python(*command, cwd=tmp_path, timeout=60)
    assert done.code == 2, done.output
    left_out, head, *lines = done.lines
    assert left_out.endswith(": 1 without suffix (dog/fifo)")
    listings = [tmp_path / "data" / f"{split}.bad.txt" for split in ("train", "val")]
    assert head.startswith("error: got 8 files that cannot be stored (5 of train, 3 of val); need")
    assert f"the files in {listings[0]} and {listings[1]}, and remove" in head
    absent, no_file = "No such file or directory", "a FIFO, socket or device, not a file"
    assert [line.strip() for line in lines] == [
        f"train: cat/link.png: cannot be read ({absent})",
        f"train: cat/zero.png: cannot be read ({no_file})",
        f"train: dog/fifo.jpg: cannot be read ({no_file})",
        "train: dog/html.jpg: got b'<html>'..., which is not the start of an image file",
        "train: dog/loop.jpg: cannot be read (Too many levels of symbolic links)",
        f"val: cat/link.png: cannot be read ({absent})",
        f"val: cat/socket.gif: cannot be read ({no_file})",
        "val: dog/empty.png: got b''..., which is not the start of an image file",
    ]
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["train.bad.txt", "val.bad.txt"]
    for folder, listing in zip(two, listings, strict=True):
        for name in listing.read_text().splitlines():
            (folder / name).unlink()
    assert run_python(*command, cwd=tmp_path, timeout=60).code == 0
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["train", "val"]
    assert verify(tmp_path / "data/val", check_decode=True) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_both_splits_are_checked(two, tmp_path, workers):
    """Find the bad files of validation although writing stops at the first one of training."""
    train, val = two
    (train / "dog/5.png").write_text("<html>")
    (val / "cat/3.png").write_text("<html>")
    source = image_folder(train, val)
    with pytest.raises(ValueError, match=r"2 files.*1 of train, 1 of val.*\n.*dog/5.*\n.*cat/3"):
        convert(source, tmp_path / "data", workers=workers)
    assert not (tmp_path / "data/val.partial").exists()
    shutil.copy(train / "dog/4.png", train / "dog/5.png")
    shutil.rmtree(tmp_path / "data/train.partial")
    with pytest.raises(ValueError, match=r"1 file that cannot be stored; .*\n  cat/3"):
        convert(image_folder(train, val), tmp_path / "data", workers=workers)
    assert not (tmp_path / "data/train.bad.txt").exists()
    shutil.copy(val / "dog/4.png", val / "cat/3.png")
    shutil.rmtree(tmp_path / "data/val.partial")
    assert set(convert(image_folder(train, val), tmp_path / "data")) == {"train", "val"}


def test_the_parts_together_list_all_bad_files(two, tmp_path):
    train, val = two
    bad = {f"{c}/{i}.png" for c in ("cat", "dog") for i in (1, 4)}
    for name in bad:
        (val / name).write_text("<html>")
    (train / "cat/link.png").symlink_to("gone.png")
    listed = []
    for i in range(3):
        with pytest.raises(ValueError, match=r"cat/link\.png"):
            convert(image_folder(train, val), tmp_path / "data", part=(i, 3))
        listing = tmp_path / f"data/val.bad-{i}.txt"
        listed += listing.read_text().splitlines() if listing.exists() else []
    assert sorted(listed) == sorted(bad)


def test_classes_with_a_broken_link_are_reported(two, tmp_path):
    train, _ = two
    for name in ("emu", "fox"):
        (train / name).symlink_to(tmp_path / "unmounted" / name)
    (train / "notes.txt").symlink_to("gone")
    (train / ".emu.lock").symlink_to("host:77")
    with pytest.raises(ValueError, match=r"got 2 folders in .*\(emu, fox\).*broken links"):
        image_folder(train)


@pytest.fixture
def impatient():
    """Interrupt a test that takes more than 20 s."""

    def give_up(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_no_command_waits_for_a_fifo(two, tmp_path, impatient):
    pytest.importorskip("pyarrow")
    convert(image_folder(two[0]), tmp_path / "data", samples_per_shard=6)
    shard = tmp_path / "data/train/train-000001.tar"
    shard.unlink()
    os.mkfifo(shard)
    (problem,) = verify(tmp_path / "data/train")
    assert problem.endswith("train-000001.tar': got 0 whole samples; need 6")
    assert "a FIFO, socket or device, not a file" in problem
    with pytest.raises(ValueError, match=r"(?s)cannot be used.*a FIFO, socket or device"):
        index(str(tmp_path / "data/train"), tmp_path / "out")
    (tmp_path / "rows").mkdir()
    os.mkfifo(tmp_path / "rows/train-0.parquet")
    with pytest.raises(OSError, match="a FIFO, socket or device"):
        open_source(str(tmp_path / "rows"))
