"""Splits: told by names, no image in both of them, and said by the command line."""

import os
import shutil
from pathlib import Path

import pytest
from made import make_images
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


def test_hard_links_are_shared_images(plain, tmp_path):  # noqa: F811
    shutil.copytree(plain / "train", tmp_path / "links", copy_function=os.link)
    assert f"9 images {BOTH}" in refused(plain / "train", tmp_path / "links")
    file = as_parquet(plain, "train", tmp_path / "a.parquet")
    os.link(file, tmp_path / "b.parquet")
    assert f"9 images {BOTH}" in refused(file, tmp_path / "b.parquet")


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
        ("TrainData.parquet", "ValData.parquet", ["TestData.parquet"]),
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
    unused = "".join(f", not taken: {name}" for name in others)
    expected = f"by the names in {hub}: {train} is train, {val} is val{unused}"
    assert source.remarks == (expected,)


def test_several_configurations_of_a_hub_set_are_not_merged(plain, tmp_path):  # noqa: F811
    for layout_of in ("{}/{}/0.parquet", "{}/{}-00.parquet"):
        hub = tmp_path / str(len(layout_of))
        for config in ("full_size", "160px"):
            for split, word in (("train", "train"), ("val", "validation")):
                as_parquet(plain, split, hub / layout_of.format(config, word))
        assert "need one folder per split" in refused(hub)
        assert_equal_to(plain, open_source(str(hub / "160px")))


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


# ------------------------------------------------------------------------------ folders of splits


def layout(plain, root, **places: str):  # noqa: F811
    """Copy the training images to each of the places but `val`, and the others to that."""
    for split, place in places.items():
        shutil.copytree(plain / ("val" if split == "val" else "train"), root / place)
    return root


@pytest.mark.parametrize(
    ("places", "remark"),
    [
        (dict(train="Training", val="Testing"), "Training is train, Testing is val"),
        (dict(train="Train", val="Test"), "Train is train, Test is val"),
        (dict(train="TRAIN", val="TEST"), "TRAIN is train, TEST is val"),
        (dict(train="train", val="dev"), "train is train, dev is val"),
        (dict(train="training_set", val="test_set"), "training_set is train, test_set is val"),
        (dict(train="train", val="valid"), "train is train, valid is val"),
        (dict(train="train2017", val="val2017"), "train2017 is train, val2017 is val"),
        (dict(train="train", val="val", x="test"), "train is train, val is val, not taken: test"),
        (dict(train="seg_train/seg_train", val="seg_test/seg_test"), "seg_train is train, seg_t"),
        (dict(train="train"), "train is train"),
        (dict(train="TrainData", val="TestData"), "TrainData is train, TestData is val"),
        (dict(train="TrainingData", val="ValidationData"), "TrainingData is train, ValidationDat"),
        (dict(train="trainA", val="testA"), "trainA is train, testA is val"),
        (dict(train="traindata", val="testimages"), "traindata is train, testimages is val"),
        (dict(train="TrainVal", val="Test"), "TrainVal is train, Test is val"),
        (dict(train="imagenetTrain", val="imagenet-val"), "imagenetTrain is train, imagenet-val"),
    ],
)
def test_folders_with_words_for_splits_in_their_names(plain, tmp_path, places, remark):  # noqa: F811
    root = layout(plain, tmp_path / "set", **places)
    source = open_source(str(root))
    assert_equal_to(plain, source, [split for split in ("train", "val") if split in places])
    assert source.remarks[0].startswith(f"by the names in {root}: {remark}")
    assert_equal_to(plain, image_folder(root), list(source.splits))


def test_folders_of_splits_beside_other_folders_and_files(plain, tmp_path):  # noqa: F811
    root = layout(plain, tmp_path / "set", train="Train", val="Test")
    (root / "docs").mkdir()
    (root / "docs" / "read.me").write_text("")
    (root / "labels.txt").write_text("")
    layout(plain, root / "__MACOSX", train="Train")
    source = open_source(str(root))
    assert_equal_to(plain, source)
    assert source.remarks == (
        f"by the names in {root}: Train is train, Test is val, not taken: docs",
        "passed over: 1 folder __MACOSX",
    )
    source = open_source(str(root), str(plain / "val"))
    assert_equal_to(plain, source)
    assert_equal_to(plain, open_source(str(root / "Train"), str(root)))
    assert f"9 images {BOTH}" in refused(root, root / "Train")
    (root / "loose_1.png").write_bytes(b"")
    assert "both directly in" in refused(root)


def test_folders_whose_split_is_in_doubt_are_refused(plain, tmp_path):  # noqa: F811
    def message(name: str, **places: str) -> str:
        return refused(layout(plain, tmp_path / name, **places))

    both = "Train and training, which are both named for train; need one folder per split; do: "
    root = tmp_path / "a"
    assert (
        f"{both}name the folders of both splits, such as convert {root}/Train OUT --val {root}/test"
        in message("a", train="Train", x="training", val="test")
    )
    assert "test-dev, a name for test and val, beside other folders of splits; need" in message(
        "b", train="train", val="test-dev"
    )
    assert "with folders of splits (test, train) inside of set/; need them above the classes" in (
        wrapped := message("c", train="set/train", val="set/test")
    )
    assert wrapped.endswith(f"do: convert {tmp_path}/c/set")
    inside = make_images(tmp_path / "d", [f"{c}/{s}/1.png" for c in "ab" for s in ("train", "val")])
    assert "inside of a/; need" in refused(inside)
    unsorted = layout(plain, tmp_path / "e", train="seg_train", val="seg_test")
    make_images(unsorted / "seg_pred", ["1.png"])
    assert "splits (seg_test, seg_train), which hold further folders, beside seg_pred" in (
        hinted := refused(unsorted)
    )
    assert f"do: convert {unsorted}/seg_train OUT --val {unsorted}/seg_test, or" in hinted
    kept_apart = layout(plain, tmp_path / "f", train="train")
    make_images(kept_apart / "holdout", ["x/1.png"])
    assert "splits (train), which hold further folders, beside holdout" in refused(kept_apart)
    assert f"do: convert {kept_apart}/train OUT --val 10%, or, if" in refused(kept_apart)
    unlabelled = layout(plain, tmp_path / "g", train="train")
    make_images(unlabelled / "test", ["1.png"])
    assert f"to choose: convert {unlabelled}/train OUT, with --val or" in refused(unlabelled)


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (["bus", "car", "train"], ["train: taken for classes, not for splits, because of bus"]),
        (["freight_train", "passenger_train"], []),
        (
            ["bullet_train", "test_tube"],
            ["bullet_train, test_tube: taken for classes, not for splits, because of their"],
        ),
        (["trainA", "trainB"], ["trainA, trainB: taken for classes, not for splits, because of s"]),
        (["trains", "vale", "testers"], []),
        (["blood_test", "urine_test"], []),
        (["training camp", "holiday"], []),
        (["@at", "__init__", "_under", "Recycle"], []),
    ],
)
def test_classes_that_are_named_like_splits_or_oddly(tmp_path, classes, named):
    root = make_images(tmp_path / "set", [f"{c}/{i}.png" for c in classes for i in range(2)])
    source = open_source(str(root))
    assert source.classes == sorted(classes)
    assert len(source.splits["train"]) == 2 * len(classes)
    assert len(source.remarks) == len(named)
    assert all(map(str.startswith, source.remarks, named))


def test_a_third_folder_beside_two_splits_is_not_guessed(tmp_path):
    """Fruits-360 of Kaggle has test-multiple_fruits/, without classes, beside Training and Test."""
    splits = [f"{s}/{c}/{s}{c}.png" for s in ("Training", "Test") for c in ("apple", "pear")]
    root = make_images(tmp_path / "a", [*splits, "test-multiple_fruits/1.png"])
    message = refused(root)
    assert "with folders named for splits (Test, Training, test-multiple_fruits)" in message
    assert f"do: convert {root}/Training OUT --val {root}/Test, or, if they" in message
    flat = make_images(tmp_path / "b", ["masks/1.png", "train/2.png", "val/3.png", "test/4.png"])
    assert f"do: convert {flat}/train OUT --val {flat}/val, or, if" in refused(flat)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["fold1", "fold2", "fold3"], "fold1 OUT --val {}/fold2, or --val 10%"),
        (["entrenamiento", "prueba"], "entrenamiento OUT --val {}/prueba, or --val 10%"),
        (["TEST", "TEST_SIMPLE", "TRAIN"], "TRAIN OUT --val {}/TEST, or --val 10%"),
        (["train", "train_aug"], "train OUT --val 10%"),
    ],
)
def test_folders_that_hold_the_same_folders_may_be_splits(tmp_path, names, advice):
    paths = [f"{name}/{c}/{name}{c}.png" for name in names for c in ("cat", "dog")]
    root = make_images(tmp_path / "set", paths)
    message = refused(root)
    assert "hold the same folders (cat, dog), as splits hold the same classes; need" in message
    assert f"do: convert {root}/{advice.format(root)}, or, if they are classes" in message
    convert_line = message.partition("do: convert ")[2].split(",")[0].split(" --val ")
    train = convert_line[0].removesuffix(" OUT")
    assert open_source(train).classes == ["cat", "dog"]


def test_classes_may_hold_folders_of_their_own(tmp_path):
    paths = ["cat/left/1.png", "cat/right/2.png", "dog/left/3.png", "dog/top/4.png"]
    root = make_images(tmp_path / "set", [*paths, "eel/images/5.png", "fox/images/6.png"])
    assert open_source(str(root)).classes == ["cat", "dog", "eel", "fox"]


@pytest.mark.parametrize("inner", ["animals", "archive/animals/all"])
def test_one_class_is_refused_with_the_folder_that_has_several(tmp_path, inner):
    root = make_images(tmp_path / "set", [f"{inner}/{c}/{c}.png" for c in ("cat", "dog")])
    message = refused(root)
    assert f"got {root} with one class, {inner.split('/')[0]}; need at least two" in message
    assert message.endswith(f"{root}/{inner} holds 2 folders: convert {root}/{inner} OUT")
    assert open_source(str(root / inner)).classes == ["cat", "dog"]
    shutil.rmtree(root / inner / "dog")
    assert f"give the folder above {root}/{inner}, if that" in refused(root / inner)
    make_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "one.csv").write_text("path,label\na.png,cat\nb.png,cat\n")
    assert "one.csv with one class, cat; need at least two" in refused(tmp_path / "one.csv")


def test_eval_is_for_validation_if_test_is_there_too(plain, tmp_path):  # noqa: F811
    root = layout(plain, tmp_path / "set", train="train", val="eval", x="test")
    source = open_source(str(root))
    assert_equal_to(plain, source)
    assert source.remarks[0].endswith(": train is train, eval is val, not taken: test")


def test_loose_images_in_folders_named_for_splits(tmp_path):
    """Refuse them with both readings: three splits of one class, or three classes."""
    for name, splits in (("a", ["train", "test", "val"]), ("b", ["TrainData", "TestData"])):
        names = [f"{s}/{kind}_{s}.png" for s in splits for kind in ("img", "pic")]
        root = make_images(tmp_path / name, names)
        message = refused(root)
        line = f"convert {root}/{splits[0]} OUT --val {root}/{splits[-1]}; if they are classes"
        assert line in message
        assert "list the images in a .csv, or give the folders other names" in message
        val = root / splits[1]
        assert open_source(str(root / splits[0]), str(val)).classes == ["img", "pic"]
    pairs = make_images(tmp_path / "c", [f"{s}{c}/1.png" for s in ("train", "test") for c in "AB"])
    assert "trainA and trainB, which are both named for train; need one" in refused(pairs)


def test_splits_inside_of_one_of_several_folders(plain, tmp_path):  # noqa: F811
    root = layout(plain, tmp_path / "set", train="imagenet/train", val="imagenet/val", x="extra")
    message = refused(root)
    assert "with folders of splits (train, val) inside of imagenet/; need them above" in message
    assert f"do: convert {root}/imagenet alone, or list" in message
    assert_equal_to(plain, open_source(str(root / "imagenet")))


# ------------------------------------------------------------------------------ what is passed over

HIDDEN = [
    "@tmp",
    ".ipynb_checkpoints",
    ".Trash-1000",
    ".snapshot",
    "@eaDir",
    "__MACOSX",
    "lost+found",
]


@pytest.mark.parametrize("name", [*HIDDEN, "$RECYCLE.BIN", "System Volume Information"])
def test_hidden_folders_are_passed_over(plain, tmp_path, name):  # noqa: F811
    hub = tmp_path / "hub"
    as_parquet(plain, "train", hub / "data" / "0.parquet")
    as_parquet(plain, "train", hub / name / "1.parquet")
    for split in ("train", "val"):
        for place in (plain / split, plain / split / "n01440764"):
            shutil.copytree(plain / split / "n02084071", place / name / "x")
    source = open_source(str(plain / "train"), str(plain / "val"))
    assert_equal_to(plain, source)
    assert source.remarks == (f"passed over: 4 folders {name}",)
    source = open_source(str(hub))
    assert_equal_to(plain, source, ["train"])
    assert source.remarks == (f"passed over: 1 folder {name}",)


def test_hidden_files_are_passed_over_and_unreadable_folders_not_opened(
    plain,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    for image in (plain / "train").glob("*/*_0.JPEG"):
        image.with_name(f"._{image.name}").write_bytes(b"\0\5\x16\7" + bytes(4092))  # AppleDouble
        image.with_name(".DS_Store").write_bytes(b"")  # no image: not counted
    for i in range(5):
        (plain / "train" / f".cache{i}").mkdir()
    (plain / "train" / "lost+found").mkdir()
    walk = os.scandir

    def deny(place):
        assert Path(place).name != "lost+found"  # only root can open it
        return walk(place)

    monkeypatch.setattr(os, "scandir", deny)
    assert main(["convert", str(plain / "train"), str(tmp_path / "out")]) == 0
    expected = "passed over: 3 hidden files, 1 folder .cache0, 1 folder .cache1, 1 folder .cache2"
    assert f"{expected}, 3 other folders\n" in capsys.readouterr().out
    assert open_source(str(tmp_path / "out")).remarks == ()
    alone = tmp_path / "alone" / ".hidden"
    shutil.copytree(plain / "train" / "n02084071", alone / "n02084071")
    shutil.copytree(plain / "train" / "n02084071", alone / "other")
    assert "; passed over: 1 folder .hidden); need" in refused(tmp_path / "alone")
    assert open_source(str(alone)).classes == ["n02084071", "other"]  # the user named it


def test_images_of_any_kind_count_for_splits_and_among_hidden_files(plain, tmp_path):  # noqa: F811
    """Take a file without suffix, or with that of another format, for an image everywhere."""
    root = layout(plain, tmp_path / "root", train="Training", val="Testing")
    first = next((root / "Training").glob("*/*"))
    for name in ("._x.ppm", ".nameless"):
        shutil.copy(first, first.parent / name)
    (first.parent / ".notes").write_text("no image")
    source = open_source(str(root))
    assert source.remarks[-1] == "passed over: 2 hidden files"
    assert_equal_to(plain, source, ["train", "val"])
    for name in ("nameless", "other.ppm"):  # an image in a folder that is no split
        (root / "extra").mkdir()
        shutil.copy(first, root / "extra" / name)
        message = refused(root)
        assert "folders named for splits (Testing, Training)" in message
        assert "beside extra" in message
        shutil.rmtree(root / "extra")


def test_archives_beside_the_folders_of_splits_are_named(plain, tmp_path):  # noqa: F811
    root = layout(plain, tmp_path / "root", train="train")
    (root / "val.zip").write_bytes(b"PK\3\4")
    (root / "README.md").write_text("about it")
    as_parquet(plain, "train", tmp_path / "hub" / "0.parquet")
    (tmp_path / "hub/val.tar").write_bytes(b"")
    for place, archive in ((root, "1 .zip (val.zip)"), (tmp_path / "hub", "1 .tar (val.tar)")):
        assert open_source(str(place)).remarks[-1] == (
            f"left out, since they are not images: {archive}; do: unpack the archives, if they "
            "hold images"
        )
