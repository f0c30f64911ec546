"""Splits: told by names, no image in both of them, and said by the command line."""

import shutil

import pytest
from test_sources import (
    answer,
    as_csv,
    as_jsonl,
    as_parquet,
    assert_equal_to,
    content,
    plain,  # noqa: F401, a fixture
    refused,
)

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import image_folder, open_source
from launch.make_shards import main

BOTH = "in both splits"


# ----------------------------------------------------------------------- no image in both splits


@pytest.fixture
def sources(plain, tmp_path) -> dict:  # noqa: F811
    """Return a source of the training images by its kind."""
    convert(image_folder(plain / "train"), tmp_path / "shards", samples_per_shard=4)
    for image in (plain / "train").glob("*/*"):
        (tmp_path / "loose").mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / "loose" / f"{image.parent.name}_{image.name}")
    return {
        "folder": plain / "train",
        "loose": tmp_path / "loose",
        "csv": as_csv(plain, "train"),
        "jsonl": as_jsonl(plain, "train"),
        "parquet": as_parquet(plain, "train", tmp_path / "data.parquet"),
        "shards": tmp_path / "shards",
        "split": tmp_path / "shards" / "train",
    }


KINDS = ["folder", "loose", "csv", "jsonl", "parquet", "shards", "split"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_cannot_validate_itself(sources, tmp_path, kind):
    source = sources[kind]
    itself = sources["split"] if kind == "shards" else source  # it has no validation split
    link = source.parent / f"link{source.suffix}"
    link.symlink_to(itself)
    for val in (itself, link):
        message = refused(source, val)
        assert f"--val: got 9 images {BOTH} of {source}, such as " in message
        assert "--val 10%" in message


def test_images_that_two_kinds_of_sources_share_are_found(sources, plain, tmp_path):  # noqa: F811
    assert f"9 images {BOTH}" in refused(sources["folder"], sources["csv"])
    assert f"9 images {BOTH}" in refused(sources["jsonl"], sources["folder"])
    one = next((plain / "train").glob("*/*"))
    (plain / "val" / one.parent.name / "linked.JPEG").symlink_to(one)
    assert f"got 1 image {BOTH}" in refused(plain / "train", plain / "val")
    inner = tmp_path / "inner"
    shutil.copytree(plain / "train", inner, ignore=lambda *_: ["linked.JPEG"])
    shutil.copytree(inner, inner / "held_out")
    assert f"9 images {BOTH} of {inner}" in refused(inner, inner / "held_out")


def test_copies_are_no_shared_images(plain, tmp_path):  # noqa: F811
    """Data sets hold copies; only `--val 10%` keeps them on one side."""
    shutil.copytree(plain / "train", tmp_path / "copy")
    source = open_source(str(plain / "train"), str(tmp_path / "copy"))
    assert content(source, "val") == content(source, "train") == answer(plain, "train")


# ------------------------------------------------------------------------------- parquet by name


@pytest.mark.parametrize("name", ["0000.parquet", "data/a.parquet", "a-00000-of-00001.parquet"])
def test_parquet_without_words_for_splits_is_one_split(plain, tmp_path, name):  # noqa: F811
    hub = as_parquet(plain, "train", tmp_path / "hub" / name)
    assert_equal_to(plain, open_source(str(tmp_path / "hub")), ["train"])
    other = as_parquet(plain, "val", tmp_path / "other" / "0000.parquet")
    source = open_source(str(tmp_path / "hub"), str(other.parent))
    assert_equal_to(plain, source)
    assert source.remarks == ()
    assert f"9 images {BOTH}" in refused(tmp_path / "hub", hub.parent)


@pytest.mark.parametrize(
    ("train", "val", "others"),
    [
        ("partial-train/0.parquet", "partial-validation/0.parquet", ["partial-test/0.parquet"]),
        ("training.parquet", "dev.parquet", ["testing.parquet"]),
        ("TRAIN-0.parquet", "Val-0.parquet", []),
        ("c/train_set/0.parquet", "c/valid_set/0.parquet", []),
        ("mnist-train.parquet", "mnist-validation.parquet", ["mnist-eval.parquet"]),
    ],
)
def test_words_for_splits_in_the_names_of_parquet(plain, tmp_path, train, val, others):  # noqa: F811
    hub = tmp_path / "hub"
    as_parquet(plain, "val", hub / val)
    for name in (train, *others):
        as_parquet(plain, "train", hub / name)
    source = open_source(str(hub))
    assert_equal_to(plain, source)
    unused = "".join(f", {name} is not used" for name in others)
    expected = f"by the names in {hub}: {train} is train, {val} is val{unused}"
    assert source.remarks == (expected,)


def test_the_test_split_of_parquet_is_used_if_there_is_no_other(plain, tmp_path):  # noqa: F811
    root = tmp_path / "hub"
    as_parquet(plain, "train", root / "training.parquet")
    as_parquet(plain, "val", root / "testing.parquet")
    source = open_source(str(root))
    assert_equal_to(plain, source)
    assert source.remarks[0].endswith(": training.parquet is train, testing.parquet is val")
    (root / "data.parquet").symlink_to(root / "training.parquet")
    assert "data.parquet next to files of the splits ['test', 'train']" in refused(root)
    (root / "data.parquet").unlink()
    (root / "testing.parquet").unlink()
    (root / "testing.parquet").symlink_to(root / "training.parquet")
    assert f"9 images {BOTH}" in refused(root)


def test_the_command_says_what_it_took(plain, tmp_path, capsys):  # noqa: F811
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        as_parquet(plain, "val" if "test" in name else "train", tmp_path / f"hub/{name}.parquet")
    assert main(["convert", str(tmp_path / "hub"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "hub: train-00000-of-00002.parquet and 1 more is train, test-00000-of-00001" in printed
