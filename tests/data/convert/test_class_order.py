"""The order of the classes: by number if all names are numbers, as text in old conversions."""

import csv
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from made import make_images

from ds_classifier.data.convert.convert import convert, merge
from ds_classifier.data.convert.sources import image_folder, open_source
from ds_classifier.data.labels.classes import in_order
from ds_classifier.data.shards import open_shards

NUMBERS = ["0", "1", "2", "9", "10", "11", "100"]
AS_TEXT = ["0", "1", "10", "100", "11", "2", "9"]


@pytest.fixture
def numbered(tmp_path):
    """A folder of 4 images in each of the classes NUMBERS, called CLASS/cCLASS_i.png."""
    names = [f"{c}/c{c}_{i}.png" for c in NUMBERS for i in range(4)]
    return make_images(tmp_path / "numbered", names)


def as_version_0_1(source):
    """Return a source with its classes as text, as version 0.1 ordered them."""
    splits = {
        split: [replace(s, label=AS_TEXT.index(source.classes[s.label])) for s in samples]
        for split, samples in source.splits.items()
    }
    return replace(source, classes=AS_TEXT, splits=splits)


def classes_by_stock(folder, classes) -> Counter:
    """Return (class in the file's name, class by its label) -> number, as webdataset reads them."""
    tars = sorted(map(str, folder.glob("*.tar")))
    return Counter(
        (s["__key__"].split("_")[1].removeprefix("c"), classes[int(s["cls"])])
        for s in webdataset.WebDataset(tars, shardshuffle=False)
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (AS_TEXT, NUMBERS),
        (["10", "9", "cat"], ["10", "9", "cat"]),
        (["00010", "00009", "00100"], ["00009", "00010", "00100"]),
        (["1", "01", "001", "0"], ["0", "001", "01", "1"]),
        (["-1", "-10", "2"], ["-10", "-1", "2"]),
        (["1.5", "10", "2"], ["1.5", "10", "2"]),
        (["\u0661", "10", "2"], ["10", "2", "\u0661"]),  # a digit of another script is a text
        (["1_0", "9"], ["1_0", "9"]),
    ],
)
def test_numbers_are_sorted_as_numbers_and_names_as_text(names, expected):
    assert in_order(names) == expected
    assert in_order(reversed(names)) == expected


@pytest.fixture
def held_out(numbered, tmp_path) -> Path:
    """Return a folder of validation images: copies of the training images."""
    return Path(shutil.copytree(numbered, tmp_path / "held_out"))


def test_folders_prefixes_and_lists_agree(numbered, held_out, tmp_path):
    loose = make_images(tmp_path / "loose", [f"{c}_{i}.png" for c in NUMBERS for i in range(2)])
    with open(tmp_path / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows((f"numbered/{c}/c{c}_0.png", f"{int(c):03d}") for c in NUMBERS)
    for source in (numbered, loose):
        assert open_source(str(source)).classes == NUMBERS
    assert open_source(str(tmp_path / "list.csv")).classes == [f"{int(c):03d}" for c in NUMBERS]
    manifest = convert(image_folder(numbered, held_out), tmp_path / "out")["val"]
    assert manifest.classes == NUMBERS
    right = Counter({(c, c): 4 for c in NUMBERS})
    for split in ("train", "val"):
        assert classes_by_stock(tmp_path / "out" / split, NUMBERS) == right


def test_what_version_0_1_began_keeps_its_order(numbered, held_out, tmp_path):
    source = image_folder(numbered, held_out)
    options = dict(samples_per_shard=7)
    convert(as_version_0_1(source), tmp_path / "expected", **options)
    convert(as_version_0_1(source), tmp_path / "out", part=(0, 2), **options)
    assert (tmp_path / "out/train.partial").is_dir()
    convert(source, tmp_path / "out", part=(1, 2), **options)
    assert merge(tmp_path / "out") == ["train", "val"]
    for split in ("train", "val"):
        done = open_shards(tmp_path / "out" / split)
        assert done.manifest.classes == AS_TEXT
        assert (
            done.manifest.fingerprint
            == open_shards(tmp_path / "expected" / split).manifest.fingerprint
        )
        assert classes_by_stock(tmp_path / "out" / split, AS_TEXT) == {(c, c): 4 for c in NUMBERS}
    convert(source, tmp_path / "out", **options)  # finished: nothing to write, nothing refused
    convert(open_source(str(tmp_path / "out")), tmp_path / "again")
    assert open_shards(tmp_path / "again/train").manifest.classes == AS_TEXT


def test_a_validation_split_is_added_in_the_order_of_training(numbered, held_out, tmp_path):
    convert(as_version_0_1(image_folder(numbered)), tmp_path / "out")
    convert(image_folder(numbered, held_out), tmp_path / "out")
    assert open_shards(tmp_path / "out/val").manifest.classes == AS_TEXT


def test_merge_refuses_two_orders(numbered, tmp_path):
    for split, source in (("train", image_folder(numbered)), ("val", image_folder(numbered))):
        source = replace(source, splits={split: source.splits["train"]})
        source = as_version_0_1(source) if split == "val" else source
        convert(source, tmp_path / split, part=(0, 2), samples_per_shard=7)
        convert(source, tmp_path / split, part=(1, 2), samples_per_shard=7)
    (tmp_path / "val/val.partial").rename(tmp_path / "train/val.partial")
    with pytest.raises(ValueError, match=r"val.partial with other classes .* another order"):
        merge(tmp_path / "train")
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == [
        "train.partial",
        "val.partial",
    ]
