"""Splits that are written to object storage: the files of a local conversion, in any run of it."""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from running import ROOT, run_python
from stores import wait_until

from ds_classifier.data.convert.convert import convert, merge
from ds_classifier.data.convert.sources import image_folder
from ds_classifier.data.foreign.index import index
from ds_classifier.data.remote.mirror import mirrored
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import open_split
from launch.make_shards import main

OUT = "s3://bkt/a/data"
MAKE_SHARDS = str(ROOT / "launch" / "make_shards.py")


def in_bucket(s3, prefix: str = "a/data/") -> dict[str, bytes]:
    """Return the objects under a prefix."""
    return {k.removeprefix(prefix): s3.get(k) for k in s3.names() if k.startswith(prefix)}


def on_disk(folder: Path) -> dict[str, bytes]:
    """Return the files of a directory."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write(source: Path, **keywords) -> None:
    with mirrored(OUT) as mirror:
        convert(
            image_folder(source), mirror.folder, samples_per_shard=30, mirror=mirror, **keywords
        )


@pytest.fixture
def expected(many, tmp_path) -> dict[str, bytes]:
    """The files of a conversion of `many` to a directory."""
    convert(image_folder(many), tmp_path / "near", samples_per_shard=30)
    return on_disk(tmp_path / "near")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket_gets_the_files_of_a_directory_and_the_manifest_last(s3, many, expected, workers):
    write(many, workers=workers)
    assert in_bucket(s3) == expected
    puts = [key for method, key, _ in s3.requests if method == "PUT"]
    assert puts[0] == "a/data/train.partial/plan.json"
    assert puts[-2:] == ["a/data/train/index.npy", "a/data/train/manifest.json"]
    assert all(who == "KEYOFTHETEST" for method, _, who in s3.requests[:5])


@pytest.mark.parametrize("fault", [(500, "InternalError"), (503, "SlowDown"), "reset", "stall"])
def test_an_upload_is_tried_again_after_a_fault(s3, many, expected, fault):
    keys = ["train/train-000001.tar", "train.partial/train-000002.json", "train/manifest.json"]
    keys = [f"a/data/{key}" for key in (keys[:1] if fault == "stall" else keys)]
    for key in keys:
        s3.faults["PUT", key] = [fault]
    write(many)
    assert in_bucket(s3) == expected
    assert [s3.count("PUT", key) for key in keys] == [2] * len(keys)


def test_a_stopped_conversion_has_no_manifest_and_is_continued_from_another_machine(
    s3, many, expected
):
    s3.faults["PUT", "a/data/train/train-000002.tar"] = [(403, "AccessDenied")]
    with pytest.raises(ValueError, match=r"train-000002\.tar: was not written in 1 try; .*403"):
        write(many)
    assert "train/manifest.json" not in in_bucket(s3)
    s3.requests.clear()
    write(many)
    assert in_bucket(s3) == expected
    counts = [s3.count("PUT", f"a/data/train/train-{n:06d}.tar") for n in range(4)]
    assert counts == [0, 0, 1, 1]


@pytest.mark.parametrize("last", ["train/index.npy", "train/manifest.json"])
def test_a_run_stopped_at_its_very_end_is_finished_by_the_next(s3, many, expected, last):
    s3.faults["PUT", f"a/data/{last}"] = [(403, "AccessDenied")]
    with pytest.raises(ValueError, match="AccessDenied"):
        write(many)
    write(many)
    assert in_bucket(s3) == expected
    s3.put("a/data/train.partial/plan.json", b"{}")  # as if killed before it was removed
    s3.requests.clear()
    write(many)
    assert in_bucket(s3) == expected
    assert not any(method == "PUT" for method, *_ in s3.requests)


def test_a_shard_that_is_missing_or_cut_is_written_again(s3, many, expected):
    s3.faults["PUT", "a/data/train/index.npy"] = [(403, "AccessDenied")]
    with pytest.raises(ValueError, match="AccessDenied"):
        write(many)
    s3.put("a/data/train/train-000001.tar", b"short")
    write(many)
    assert in_bucket(s3) == expected


def test_parts_of_several_machines_are_merged(s3, many, expected):
    for i in range(3):
        write(many, part=(i, 3))
        assert "train/manifest.json" not in in_bucket(s3)
    assert main(["merge", OUT]) == 0
    assert in_bucket(s3) == expected


def test_a_part_that_is_missing_is_named(s3, many):
    write(many, part=(0, 3))
    missing = f"{OUT}/train.partial: 2 of 4 shards are missing"
    with pytest.raises(ValueError, match=missing), mirrored(OUT) as mirror:
        merge(mirror.folder, mirror)


@pytest.mark.parametrize("key", ["train/other.tar", "train/manifest.json", "train.partial/x"])
def test_a_prefix_that_holds_something_else_is_refused(s3, many, key):
    s3.put(f"a/data/{key}", b"x")
    with pytest.raises(ValueError, match=f"{OUT}/train"):
        write(many)
    assert list(s3.names()) == [f"a/data/{key}"]


def test_another_source_is_refused(s3, many, folder):
    write(many)
    before = in_bucket(s3)
    with pytest.raises(ValueError, match=f"got {OUT}/train, which already holds something else"):
        write(folder)
    assert in_bucket(s3) == before


def test_bad_files_are_listed_in_the_bucket(s3, many):
    (many / "c0" / "bad.png").write_bytes(b"<html>")
    with pytest.raises(ValueError) as raised:
        write(many)
    listed = [key for key in s3.names() if key.endswith(".txt")]
    assert len(listed) == 1
    assert f"s3://bkt/{listed[0]}" in str(raised.value)
    assert b"bad.png" in s3.get(listed[0])


def test_a_killed_program_leaves_what_the_next_one_continues(s3, many, expected, tmp_path):
    s3.faults["PUT", "a/data/train/train-000002.tar"] = ["stall"]
    arguments = [MAKE_SHARDS, "convert", many, OUT, "--samples_per_shard", "30", "--workers", "1"]
    program = subprocess.Popen([sys.executable, *map(str, arguments)])
    try:
        wait_until(lambda: s3.count("PUT", "a/data/train/train-000002.tar"), seconds=60)
    finally:
        program.kill()
        program.wait()
    done = run_python(*map(str, arguments), cwd=tmp_path)
    assert f"{OUT}/train: 120 images of 6 classes in 4 shards" in done.output
    assert in_bucket(s3) == expected


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("hf://datasets/o/n", "hf upload"),
        ("https://h/x", "need a directory, or s3://BUCKET/PATH"),
        ("s3://", "need s3://BUCKET/PATH"),
        ("s3://user:secret@bkt/x", "need s3://BUCKET/PATH"),
        ("s3://bkt/x?versionId=1", "need s3://BUCKET/PATH"),
        ("az://box/x", "AZURE_STORAGE_ACCOUNT"),
        ("s3://nobucket/x", "create the bucket"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_message(s3, many, out, words, capsys):
    with suppress(SystemExit):
        assert main(["convert", str(many), out]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert "secret" not in error


@pytest.mark.parametrize("out", ["s3://bkt/far", "s3://bkt/elsewhere", None])
def test_shards_of_others_in_a_bucket_are_indexed_into_it_or_here(s3, many, tmp_path, out):
    convert(image_folder(many), tmp_path / "near", samples_per_shard=30)
    for path in (tmp_path / "near" / "train").glob("*.tar"):
        s3.put(f"far/train/{path.name}", path.read_bytes())
    place = out or str(tmp_path / "index")
    assert main(["index", "s3://bkt/far/train", place]) == 0
    assert main(["index", "s3://bkt/far/train", place]) == 0  # again
    split = open_split(f"{place}/train", cache_dir=tmp_path / "cache")
    near = open_shards(tmp_path / "near" / "train")
    assert [s.sha256 for s in split.manifest.shards] == [s.sha256 for s in near.manifest.shards]
    assert split.store.read(1, 0, 3000) == near.store.read(1, 0, 3000)
    assert split.manifest.location == (None if out == "s3://bkt/far" else "s3://bkt/far/train")


def test_an_index_in_a_bucket_may_not_name_shards_outside_of_it(s3, many, tmp_path):
    write(many)
    index(f"{OUT}/train/train-{{000000..000003}}.tar", tmp_path / "i")
    for name in ("manifest.json", "index.npy"):
        text = (tmp_path / "i" / "train" / name).read_bytes()
        s3.put(f"b/train/{name}", text.replace(b"s3://bkt/", b"s3://bk2/"))
    with pytest.raises(ValueError, match=r"are at s3://bk2/a/data/train; need .* same bucket"):
        open_split("s3://bkt/b/train", cache_dir=tmp_path / "cache")


def test_nothing_is_left_in_the_temporary_directory(s3, many, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with mirrored(OUT) as mirror:
        convert(image_folder(many), mirror.folder, samples_per_shard=30, mirror=mirror)
        tars = list(mirror.folder.rglob("*.tar"))
        assert len(tars) == 4
        assert sum(os.stat(tar).st_blocks for tar in tars) == 0  # uploaded shards take no space
    assert os.listdir(tmp_path / "tmp") == []
