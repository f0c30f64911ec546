"""Shards made by other programs that contradict their metadata, or have incomplete samples."""

import pytest
from layouts_of_others import (
    JPG,
    clip_benchmark,
    img2dataset,
    open_clip,
    problems,
    rewrite,
    tar_of,
    timm,
    write_tar,
)

from ds_classifier.data.foreign.index import index
from ds_classifier.data.scan import scan_shard
from ds_classifier.data.shards import open_shards


def test_counts_that_do_not_agree(tmp_path):
    def timm_length(folder):
        timm(folder)
        rewrite(folder / "_info.json", lambda i: i["splits"]["train"].update(shard_lengths=[4, 4]))
        return ["got 5 samples; _info.json says 4", "num_samples of train is 9", "sum to 8"]

    def timm_names(folder):
        timm(folder)
        names = [f"imagenet1k-train-000{i}.tar" for i in range(3)]
        rewrite(
            folder / "_info.json",
            lambda i: i["splits"]["train"].update(filenames=names, shard_lengths=[4, 5, 0]),
        )
        return ["imagenet1k-train-0002.tar", "No such file", "_info.json says 0"]

    def sizes_count(folder):
        rewrite(open_clip(folder) / "sizes.json", lambda s: s.update({"00001.tar": 4}))
        return ["00001.tar: got 3 samples; sizes.json says 4"]

    def sizes_names(folder):
        rewrite(open_clip(folder) / "sizes.json", lambda s: s.update({"00002.tar": 4}))
        write_tar(folder / "00005.tar", [{"__key__": "z", "jpg": b"", "cls": 0}])
        return [
            "00002.tar does not exist, but is in sizes.json",
            "00005.tar is not in sizes.json",
        ]

    def nshards(folder):
        clip_benchmark(folder)
        (folder / "train/nshards.txt").write_text("11\n")
        (folder / "test/nshards.txt").write_text("4\n")
        return ["train/11.tar is not in nshards", "test/3.tar does not exist, but is in nsh"]

    def stats(folder):
        img2dataset(folder)
        rewrite(folder / "00000_stats.json", lambda s: s.update(successes=2))
        (folder / "00001_stats.json").unlink()
        (folder / "00002.tar").unlink()
        return [
            "00000.tar: got 3 samples; NAME_stats.json says 2",
            "00001.tar: got no 00001_stats.json",
            "00002.tar does not exist, but is in NAME_stats.json",
        ]

    for number, layout in enumerate(
        (timm_length, timm_names, sizes_count, sizes_names, nshards, stats)
    ):
        folder = tmp_path / str(number)
        words = layout(folder)
        labels = "json:class" if layout is stats else None
        message = problems(folder, tmp_path / "out", labels=labels)
        for word in words:
            assert word in message, (word, message)
        assert not (tmp_path / "out").exists()


FAULTS = {
    "no label": ([("a.jpg", JPG)], "a has an image but no .cls"),
    "no image": ([("a.cls", b"0")], "a has a label but no image"),
    "negative": ([("a.jpg", JPG), ("a.cls", b"-1")], "a has no usable label in .cls: got '-1'"),
    "no number": ([("a.jpg", JPG), ("a.cls", b"cat")], "got 'cat'; need a class index in digits"),
    "empty": ([("a.jpg", JPG), ("a.cls", b"")], "got ''; need"),
    "huge": ([("a.jpg", JPG), ("a.cls", b"9" * 12)], "a has no usable label"),
    "long": ([("a.jpg", JPG), ("a.cls", b"1" + b" " * (1 << 20))], "got more than 1048576 bytes"),
    "two images": ([("a.jpg", JPG), ("a.cls", b"0"), ("a.png", JPG)], "a has two images"),
    "twice": (
        [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"0"), ("a.jpeg", JPG)],
        "a appears twice",
    ),
    "again apart": (
        [("a.jpg", JPG), ("b.jpg", JPG), ("a.cls", b"0"), ("b.cls", b"0"), ("a.png", JPG)],
        "a appears twice",
    ),
    "two apart": (
        [("a.jpg", JPG), ("b.jpg", JPG), ("a.png", JPG), ("b.cls", b"0"), ("a.cls", b"0")],
        "a has two images",
    ),
    "unprintable": ([("a\x1b[2J.jpg", JPG)], r"'a\x1b[2J' has an image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_incomplete_samples_are_reported_with_their_key(tmp_path, fault):
    members, words = FAULTS[fault]
    good = [("good.jpg", JPG), ("good.cls", b"0")]
    tar = tar_of(tmp_path / "x-0.tar", [*good, *members, ("z.jpg", JPG), ("z.cls", b"x")])
    message = problems(tmp_path, tmp_path / "out")
    assert words in message
    assert "x-0.tar: " in message
    assert "z has no usable label" in message  # problems after the first one are reported too
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"x-0\.tar"):
        list(scan_shard(tar))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('{"other": 1}', "got no field 'class'"),
        ('{"class": -1}', "got '-1'"),
        ('{"class": true}', "got 'true'"),
        ('{"class": null}', "got 'null'"),
        ('{"class": NaN}', "got 'NaN'"),
        ('{"class": 1.5}', "got '1.5'"),
        ('{"class": [1]}', "got '[1]'"),
        ('{"class": "cat"}', "got 'cat'"),
        ("[1]", "got no field 'class'"),
        ("{", "got no JSON"),
        ("[" * 100_000, "got no JSON"),
        ('{"class": ' + "9" * 10_000 + "}", "no usable label"),
        ('"' + "x" * (1 << 20), "got more than 1048576 bytes"),
    ],
)
def test_labels_in_a_json_are_checked(tmp_path, value, words):
    tar_of(tmp_path / "x.tar", [("a.json", value.encode()), ("a.jpg", JPG)])
    message = problems(tmp_path / "x.tar", tmp_path / "out", labels="json:class")
    assert "a has no usable label in .json" in message
    assert words in message


def test_a_label_can_be_an_integral_float(tmp_path):
    tar_of(tmp_path / "x.tar", [("a.json", b'{"class": 0.0}'), ("a.jpg", JPG)])
    index(str(tmp_path / "x.tar"), tmp_path / "out", labels="json:class")
    assert open_shards(tmp_path / "out/train").index["label"].tolist() == [0]


def test_labels_out_of_range_and_gaps(tmp_path):
    tar_of(tmp_path / "t-0.tar", [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"1")])
    tar_of(tmp_path / "t-1.tar", [("c.jpg", JPG), ("c.cls", b"7")])
    message = problems(tmp_path, tmp_path / "out")
    assert "no image has label 2, but c in t-1.tar has 7" in message
    assert "--classes" in message
    (tmp_path / "names").write_text("cat\ndog\n")
    message = problems(tmp_path, tmp_path / "out", classes=tmp_path / "names")
    assert "t-1.tar: c has label 7; there are 2 classes" in message
    (tmp_path / "names").write_text("\n".join("abcdefgh"))
    index(str(tmp_path), tmp_path / "out", classes=tmp_path / "names")
    assert open_shards(tmp_path / "out/train").manifest.classes == list("abcdefgh")
    first = str(tmp_path / "t-0.tar")
    message = problems(first, tmp_path / "new", val=str(tmp_path / "t-1.tar"))
    assert "t-1.tar: c has label 7; there are 2 classes" in message


def test_keys_in_several_shards(tmp_path):
    tar_of(tmp_path / "t-0.tar", [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG)])
    tar_of(tmp_path / "t-1.tar", [("b.cls", b"0"), ("c.jpg", JPG), ("c.cls", b"0")])
    message = problems(tmp_path, tmp_path / "out")  # a sample split over two shards
    assert "t-0.tar: b has an image but no .cls" in message
    assert "t-1.tar: b has a label but no image" in message
    tar_of(tmp_path / "t-0.tar", [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"0")])
    tar_of(tmp_path / "t-1.tar", [("c.jpg", JPG), ("c.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"0")])
    index(str(tmp_path), tmp_path / "out")  # b is another sample in each shard
    shards = open_shards(tmp_path / "out/train")
    assert [shards.key(i) for i in range(4)] == ["t-0/a", "t-0/b", "t-1/c", "t-1/b"]


def test_the_same_shard_under_two_names_is_refused(tmp_path):
    for name in ("t-0.tar", "t-1.tar", "t-2.tar"):
        key = "b" if name == "t-1.tar" else "a"
        tar_of(tmp_path / name, [(f"{key}.jpg", JPG), (f"{key}.cls", b"0")])
    message = problems(tmp_path, tmp_path / "out")
    assert "t-0.tar and t-2.tar have the same bytes; need each shard once" in message
    assert "t-1.tar" not in message


def test_the_index_of_other_shards_is_not_replaced(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tar_of(tmp_path / name / "x.tar", [("k.jpg", JPG), ("k.cls", b"0")])
    index(str(tmp_path / "a"), tmp_path / "out")
    index(str(tmp_path / "a"), tmp_path / "out")
    before = (tmp_path / "out/train/manifest.json").read_text()
    with pytest.raises(ValueError, match="the index of other shards"):
        index(str(tmp_path / "b"), tmp_path / "out")
    assert (tmp_path / "out/train/manifest.json").read_text() == before


def test_locations_without_shards_or_with_several_kinds(tmp_path):
    assert "does not exist" in problems(tmp_path / "nowhere", tmp_path / "out")
    assert "without any .tar" in problems(tmp_path, tmp_path / "out")
    assert "none of its 3 shards exists" in problems(tmp_path / "x-{0..2}.tar", tmp_path / "out")
    assert "--val: got" in problems(timm(tmp_path / "a"), tmp_path / "out", val=str(tmp_path / "b"))
    (tmp_path / "a/_info.json").unlink()
    message = problems(tmp_path / "a", tmp_path / "out")
    assert "2 kinds (imagenet#k-train-#.tar, imagenet#k-validation-#.tar)" in message
    open_clip(tmp_path / "b")
    assert "2 directories" in problems(
        f"{tmp_path}/{{a/imagenet1k-train-0000,b/00000}}.tar", tmp_path / "out"
    )
    (tmp_path / "b/sizes.json").write_text('{"../../x.tar": 3}')
    assert "../../x.tar does not exist" in problems(tmp_path / "b", tmp_path / "out")
    rewrite(
        timm(tmp_path / "c") / "_info.json",
        lambda i: i["splits"]["train"].update(filenames=["/etc/x.tar", "y.tar"]),
    )
    assert "without directories" in problems(tmp_path / "c", tmp_path / "out")


def test_converted_shards_are_not_overwritten(digits, tmp_path):
    open_clip(tmp_path / "a")
    before = (digits / "train/manifest.json").read_bytes()
    assert "holds converted shards" in problems(tmp_path / "a", digits)
    assert (digits / "train/manifest.json").read_bytes() == before
