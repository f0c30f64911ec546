"""The advice for shards that cannot be used: the first cause first, and what the tar holds."""

import shutil
import subprocess

import pytest
from layouts_of_others import (
    JPG,
    clip_benchmark,
    image,
    img2dataset,
    open_clip,
    problems,
    tar_of,
    timm,
)
from made import make_images
from running import ROOT, run_python

from ds_classifier.config import Settings
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.foreign.index import index
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import open_splits

KEYS = [f"{i:04d}" for i in range(30)]


def pairs(*members: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    """Return members for each of KEYS: (suffix, content)."""
    return [(f"{key}.{suffix}", data) for key in KEYS for suffix, data in members]


TARS = {
    "class folders": (
        [(f"256_ObjectCategories/{c:03d}.c/{c:03d}_{k}.jpg", JPG) for c in (1, 2) for k in KEYS],
        ["have no labels, but directories", "x.tar, then ds-classifier convert"],
    ),
    "class folders with dots in the names": (
        [(f"256/{c:03d}.c/{c:03d}.c_{k}.jpg", JPG) for c in (1, 2) for k in KEYS],
        ["have no labels, but directories", "x.tar, then ds-classifier convert"],
    ),
    "labels under another suffix": (
        pairs(("jpg", JPG), ("label", b"cat")),
        ["0000 has an image but no .cls (it has .label)", "if .label is the label, rename it to"],
    ),
    "numbers under another suffix": (
        pairs(("jpg", JPG), ("gt", b"1\n")),
        ["(it has .gt)", "if .gt is the label, rename it to .cls"],
    ),
    "loose images": (pairs(("jpg", JPG)), ["hold no labels; unpack them", "convert FOLDER data"]),
    "captions": (
        pairs(("jpg", JPG), ("txt", b"a")),
        ["0000 has an image but no .cls (it has .txt)", "hold no labels; unpack them"],
    ),
    "another suffix": (
        pairs(("img", JPG), ("cls", b"0")),
        ["0000 has a label but no image (it has .img)", "this tar has .img; store the images in"],
    ),
    "another suffix, apart": (
        [*pairs(("tiff", JPG)), *pairs(("cls", b"0"))],
        ["0000 has a label but no image", "this tar has .tiff; store the images in"],
    ),
    "labels in json": (
        pairs(("json", b'{"key": "1", "class": 0, "width": 1.5, "x": [1]}'), ("jpg", JPG)),
        ["(it has .json)", "--label json:KEY, where KEY", "the first one has key, class\n"],
    ),
    "no image at all": (pairs(("cls", b"0")), ["do: pack these samples again, each with its im"]),
    "two-part suffixes": (
        pairs(("left.png", JPG), ("right.png", JPG), ("cls", b"0")),
        ["0000 has a label but no image (it has .left.png, .right.png)", "such as 0000_left.png, "],
    ),
    "dots in keys": (
        [(f"img.{k}.{s}", data) for k in KEYS for s, data in (("jpg", JPG), ("cls", b"0"))],
        ["got no samples in 1 shard", "img.0000.jpg has the key img and the suffix .0000.jpg"],
    ),
    "directories in keys": (
        [(f"{s}/{k}.{s}", data) for k in KEYS for s, data in (("jpg", JPG), ("cls", b"0"))],
        ["jpg/0000 has an image but no .cls", "jpg/0000.jpg and cls/0000.cls in one directory"],
    ),
    "names in cls": (
        pairs(("jpg", JPG), ("cls", b"cat")),
        ["got 'cat'; need a class index in digits", "with --classes FILE, one per line"],
    ),
    "pickles": (
        [(f"cifar-10-batches-py/{n}", b"x") for n in ("data_batch_1", "batches.meta")],
        ["got no samples in 1 shard", "it holds files without suffix, .meta; unpack it"],
    ),
    "tars": ([(f"n{i}.tar", bytes(1024)) for i in (1, 2)], ["ImageNet's tar of tars", "convert"]),
    "nothing": ([], ["got no samples in 1 shard", "it holds nothing"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TARS)
def test_each_cause_has_its_own_advice(tmp_path, served_folder, case):
    server, far = served_folder
    members, words = TARS[case]
    tar = tar_of(far / "x.tar", members)
    for place in (tar, far, f"{server.url}/x.tar"):
        message = problems(place, tmp_path / "out")
        for word in words:
            assert word in message + "\n", (word, message)
        assert len(message.splitlines()) <= (7 if case == "directories in keys" else 4)
        if "json" not in case:
            assert "--label" not in message


def test_the_line_that_renames_labels(tmp_path):
    """Run it, and read the labels."""
    tar = tar_of(tmp_path / "x.tar", pairs(("jpg", JPG), ("lbl", b"0")))
    message = problems(tar, tmp_path / "out")
    with pytest.raises(ValueError, match="with shards of WebDataset such as") as error:
        open_source(str(tar))
    line = message.partition("in each tar: ")[2].rstrip()
    assert line in str(error.value)
    subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    index(str(tmp_path / "NEW.tar"), tmp_path / "out")
    assert open_shards(tmp_path / "out/train").index["label"].tolist() == [0] * len(KEYS)


def test_labels_may_be_looked_for_in_the_wrong_place(tmp_path):
    tar = tar_of(tmp_path / "x.tar", pairs(("jpg", JPG), ("cls", b"0")))
    assert "do: read the labels from .cls" in problems(tar, tmp_path / "out", labels="json:class")
    both = pairs(("jpg", JPG), ("json", b'{"class": 0, "split": "a"}'))
    message = problems(tar_of(tmp_path / "y.tar", both), tmp_path / "out", labels="json:label")
    assert "got no field 'label'; its fields are class, split\n" in message
    assert "do: give the place of labels with --label json:KEY" in message


def test_what_explains_most_samples_comes_first(tmp_path):
    """Sort the kinds by number of samples, list equal ones once, and count the others."""
    tar_of(
        tmp_path / "t-0.tar",
        [("a.cls", b"cat"), ("a.jpg", JPG), ("b.cls", b"dog"), ("b.jpg", JPG), ("z.cls", b"0")],
    )
    tar_of(tmp_path / "t-1.tar", [(f"n{key}.jpg", JPG) for key in KEYS])
    tar_of(tmp_path / "t-2.tar", [(f"m{key}.jpg", JPG) for key in KEYS])
    lines = [line.strip() for line in problems(tmp_path, tmp_path / "out").splitlines()]
    assert [line.removeprefix(f"{tmp_path}/")[:34] for line in lines[1:]] == [
        "t-1.tar: n0000 has an image but no",
        "... and 59 more problems like this",
        "do: these shards hold no labels; u",
        "t-0.tar: a has no usable label in ",
        "t-0.tar: b has no usable label in ",
        "do: if these are the names of clas",
        "t-0.tar: z has a label but no imag",
        "do: pack these samples again, each",
    ]


def test_damaged_shards_are_all_named_and_samples_with_one_fault_once(tmp_path):
    for shard in range(30):
        (tmp_path / f"t-{shard:02d}.tar").write_bytes(b"x" * 600)
    lines = problems(tmp_path, tmp_path / "out").splitlines()
    assert [f"t-{shard:02d}.tar" in lines[1 + shard] for shard in range(20)] == [True] * 20
    assert lines[21].strip() == "... and 10 more problems like this"
    assert len(lines) == 22


def refused(source, val=None) -> str:
    with pytest.raises(ValueError) as error:
        open_source(str(source), None if val is None else str(val))
    return str(error.value)


LINE = "ds-classifier index"


@pytest.mark.parametrize("layout", [timm, clip_benchmark, open_clip, img2dataset])
def test_convert_names_index_for_shards(tmp_path, layout):
    """Run the line that the message gives, with an OUT and a KEY that exist."""
    folder = layout(tmp_path / "in")
    message = refused(folder)
    assert message.startswith("source: got shards of WebDataset at ")
    label = ", where KEY is the field of the class: caption, key, status, class"
    assert (label in message) == (layout is img2dataset)
    line = message.split("do: ")[1].split(",")[0].replace("json:KEY", "json:class").split()
    assert line[:2] == LINE.split()
    done = run_python(ROOT / "launch/cli.py", *line[1:], cwd=tmp_path)
    assert done.code == 0, done.output
    assert open_shards(tmp_path / "data/train").manifest.samples > 0
    assert (tmp_path / "data/val").exists() == (layout in (timm, clip_benchmark))


def test_convert_names_index_for_one_shard_a_split_and_validation(tmp_path, folder):
    shards = open_clip(tmp_path / "my shards")
    one = shards / "00000.tar"
    assert f"do: {LINE} '{one}' data" in refused(one)
    assert f"do: {LINE} '{shards}' data" in refused(shards)
    assert f"do: {LINE} '{shards}' data --val '{one}'" in refused(shards, one)
    assert refused(folder, one).startswith("--val: got shards of WebDataset at ")
    assert f"ds-classifier index '{one}' VAL --classes FILE, where" in refused(folder, one)
    assert refused(folder, shards).startswith("--val: got shards of WebDataset at ")
    (tmp_path / "deep").mkdir()
    shutil.move(shards, tmp_path / "deep/er")
    assert f"do: {LINE} {tmp_path}/deep/er data" in refused(tmp_path / "deep")


def test_convert_of_other_tars_is_advised_as_before(tmp_path):
    folders = tar_of(tmp_path / "a/folders.tar", TARS["class folders"][0])
    line = f"do: mkdir FOLDER && tar xf {folders} -C FOLDER, and convert FOLDER"
    assert line in refused(folders)
    assert line in refused(make_images(tmp_path / "c", ["cat/0.png"]), folders)
    loose = tar_of(tmp_path / "loose.tar", TARS["loose images"][0])
    assert "do: unpack other tars and convert the folder" in refused(loose)
    assert "do: unpack each tar into a directory named after its class" in refused(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert "without any image" in refused(tmp_path / "b")
    (tmp_path / "b/x.tar.md5").write_bytes(b"0")
    assert "need CLASS/image.jpg" in refused(tmp_path / "b")
    make_images(tmp_path / "c", ["cat/1.png", "dog/1.png"])
    tar_of(tmp_path / "c/x.tar", [("a.jpg", JPG), ("a.cls", b"0")])
    assert open_source(str(tmp_path / "c")).classes == ["cat", "dog"]


def test_training_on_a_tar_names_index(tmp_path):
    tar = tar_of(tmp_path / "x.tar", [("a.jpg", image(1)), ("a.cls", b"0")])
    with pytest.raises(ValueError, match=f"which is a file; .* index {tar} data"):
        open_shards(tar)
    with pytest.raises(ValueError, match=f"tars without manifest.json; do: .* index {tmp_path}"):
        open_shards(tmp_path)
    index(str(tar), tmp_path / "data")
    with pytest.raises(ValueError, match=r"a file; need a directory of shards; do: .* convert"):
        open_shards(tmp_path / "data/train/index.npy")


def test_shards_for_validation_beside_a_converted_folder(tmp_path):
    """Follow the advice, and open both splits."""
    images = make_images(tmp_path / "in", ["cat/1.png", "dog/1.png"])
    tar = tar_of(tmp_path / "w.tar", [("a.jpg", JPG), ("a.cls", b"1")])
    message = refused(images, tar)
    words = (f"index {tar} VAL --classes FILE", "--data_dir OUT/train --val_data_dir VAL/train")
    assert all(word in message for word in words)
    convert(open_source(str(images)), tmp_path / "OUT")
    (tmp_path / "FILE").write_text("cat\ndog\n")
    index(str(tar), tmp_path / "VAL", classes=tmp_path / "FILE")
    places = {"data_dir": tmp_path / "OUT/train", "val_data_dir": tmp_path / "VAL/train"}
    train, val = open_splits(Settings(**{name: str(place) for name, place in places.items()}))
    assert (len(train.index), len(val.index)) == (2, 1)
    fields = tar_of(tmp_path / "j.tar", [("a.jpg", JPG), ("a.json", b'{"class": 1}')])
    assert refused(images, fields).endswith(
        "; also --label json:KEY, where KEY is the field of the class: class"
    )
