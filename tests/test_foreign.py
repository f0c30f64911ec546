"""Shards made by others, laid out as timm, open_clip, img2dataset and CLIP_benchmark do."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import ROOT, launch, read_log, run_python
from flaky_server import FlakyServer
from PIL import Image

from ds_classifier.data import fetch
from ds_classifier.data.foreign import index
from ds_classifier.data.scan import scan_shard
from ds_classifier.data.shards import open_shards
from ds_classifier.data.store import open_split, store_of
from ds_classifier.data.tars import Sequential, tar_members
from ds_classifier.data.verify import verify

FAST = dict(stall_timeout_s=0.5, retries=3, pause_s=0.02)


def picture(number: int, form: str = "JPEG") -> bytes:
    pixels = np.random.RandomState(number).randint(0, 256, (10, 12, 3)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, form, **({"lossless": True} if form == "WEBP" else {}))
    return data.getvalue()


def label_of(number: int, classes: int = 3) -> int:
    return number * 7 % classes


def write_tar(path: Path, samples: list[dict]) -> None:
    """As every one of those tools does it: stock TarWriter, members in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)


def timm(folder: Path, lengths=(4, 5), val_lengths=(3,)) -> Path:
    splits, number = {}, 0
    for split, counts in (("train", lengths), ("validation", val_lengths)):
        names = [f"imagenet1k-{split}-{i:04d}.tar" for i in range(len(counts))]
        for name, count in zip(names, counts, strict=True):
            samples = []
            for _ in range(count):
                key = f"n{number:08d}_{split}"
                facts = {"label": label_of(number), "filename": f"{key}.JPEG", "width": 12}
                samples.append(
                    {
                        "__key__": key,
                        "jpg": picture(number),
                        "cls": label_of(number),
                        "json": facts,
                    }
                )
                number += 1
            write_tar(folder / name, samples)
        splits[split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": list(counts),
            "num_samples": sum(counts),
        }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def clip_benchmark(folder: Path) -> Path:
    for split, numbers in (("train", range(23)), ("test", range(100, 105))):
        (folder / split).mkdir(parents=True)
        sink = webdataset.ShardWriter(str(folder / split / "%d.tar"), maxcount=2, verbose=0)
        for i, number in enumerate(numbers):
            sample = {"__key__": f"s{i:07d}", "webp": picture(number, "WEBP")}
            sink.write(sample | {"cls": label_of(number)})
        shards = sink.shard
        sink.close()
        (folder / split / "nshards.txt").write_text(f"{shards}\n")
    (folder / "classnames.txt").write_text("tench\ncrane\ncrane\nnever seen\n")
    return folder


def img2dataset(folder: Path, counts=(3, 0, 4), label=label_of) -> Path:
    for shard, count in enumerate(counts):
        samples = []
        for i in range(count):
            number, key = shard * 100 + i, f"{shard:05d}{i:04d}"
            facts = {"caption": "a picture", "key": key, "status": "success", "class": 0}
            facts["class"] = label(number)
            samples.append(
                {"__key__": key, "jpg": picture(number), "txt": "a picture"}
                | {"json": json.dumps(facts, indent=4)}
            )
        write_tar(folder / f"{shard:05d}.tar", samples)
        stats = {"count": count + 2, "successes": count, "failed_to_download": 2}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


def open_clip(folder: Path, counts=(2, 3)) -> Path:
    for shard, count in enumerate(counts):
        write_tar(
            folder / f"{shard:05d}.tar",
            [
                {
                    "__key__": f"{shard}/{i}",
                    "png": picture(shard * 10 + i, "PNG"),
                    "cls": i % 2,
                    "txt": "a",
                }
                for i in range(count)
            ],
        )
    sizes = {f"{shard:05d}.tar": count for shard, count in enumerate(counts)}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def by_stock(tars: list[Path], label=lambda sample: int(sample["cls"])) -> dict:
    """key -> (picture, label), as stock webdataset reads them."""
    found = {}
    for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False):
        data = next(sample[suffix] for suffix in ("jpg", "png", "webp") if suffix in sample)
        found[sample["__key__"]] = (data, label(sample))
    return found


def by_ours(shards) -> dict:
    """The same, through manifest, index and store."""
    store, found = store_of(shards), {}
    for i, row in enumerate(shards.index):
        data = store.read(int(row["shard"]), int(row["offset"]), int(row["length"]))
        found[shards.key(i)] = (data, int(row["label"]))
    assert len(found) == shards.manifest.samples == len(shards.index)
    return found


def problems(*arguments, **keywords) -> str:
    with pytest.raises(ValueError) as error:
        index(*map(str, arguments[:1]), *arguments[1:], **keywords)
    return str(error.value)


# ------------------------------------------------------------------------- the layouts, as they are


@pytest.mark.parametrize("name", ["", "_info.json"])
def test_timm_with_both_splits_by_its_info(tmp_path, name):
    folder = timm(tmp_path / "timm")
    found = index(str(folder / name), tmp_path / "out", workers=2)
    for split, pattern in (("train", "*-train-*.tar"), ("val", "*-validation-*.tar")):
        shards = open_shards(tmp_path / "out" / split)
        assert by_ours(shards) == by_stock(sorted(folder.glob(pattern)))
        assert shards.manifest.classes == ["0", "1", "2"]
        assert shards.manifest.location == str(folder)
        assert found[split].checked_by == "_info.json"
        assert verify(tmp_path / "out" / split, check_hash=True, check_decode=True) == []
    assert not (folder / "manifest.json").exists()


def test_timm_labels_may_stand_in_the_json(tmp_path):
    folder = timm(tmp_path / "timm")
    info = json.loads((folder / "_info.json").read_text())
    for split in info["splits"].values():
        split["alt_label"] = "label"
    (folder / "_info.json").write_text(json.dumps(info))
    index(str(folder), tmp_path / "out")
    shards = open_shards(tmp_path / "out/val")
    assert shards.manifest.labels == "json:label"
    tars = sorted(folder.glob("*-validation-*.tar"))
    assert by_ours(shards) == by_stock(tars, lambda sample: json.loads(sample["json"])["label"])
    assert verify(tmp_path / "out/val") == []


def test_clip_benchmark_with_its_class_names_and_ten_shards(tmp_path):
    folder = clip_benchmark(tmp_path / "clip")
    index(str(folder), folder)  # beside the shards, as far as they are called like our splits
    for split, theirs in (("train", "train"), ("val", "test")):
        shards = open_shards(folder / split)
        assert by_ours(shards) == by_stock(list((folder / theirs).glob("*.tar")))
        assert shards.manifest.classes == ["tench", "crane", "crane", "never seen"]
    train = open_shards(folder / "train").manifest
    assert train.location is None
    assert [s.name for s in train.shards] == [f"{i}.tar" for i in range(12)]
    assert open_shards(folder / "val").manifest.location == str(folder / "test")
    (folder / "train/nshards.txt").unlink()
    index(str(folder), folder)  # made anew
    train = open_shards(folder / "train").manifest
    assert [s.name for s in train.shards] == [f"{i}.tar" for i in range(12)]


def test_img2dataset_with_labels_in_the_json(tmp_path):
    folder = img2dataset(tmp_path / "i2d")
    found = index(str(folder), tmp_path / "out", labels="json:class")
    shards = open_shards(tmp_path / "out/train")
    tars = sorted(folder.glob("*.tar"))
    assert by_ours(shards) == by_stock(tars, lambda s: json.loads(s["json"])["class"])
    assert found["train"].checked_by == "NAME_stats.json"
    assert [s.name for s in shards.manifest.shards] == ["00000.tar", "00002.tar"]  # 1 is empty
    named = img2dataset(tmp_path / "named", label=lambda n: ["emu", "cat", "dog"][label_of(n)])
    (tmp_path / "names").write_text("cat\ndog\nemu\n")
    index(str(named), tmp_path / "o", labels="json:class", classes=tmp_path / "names")
    labels = {key: label for key, (_, label) in by_ours(open_shards(tmp_path / "o/train")).items()}
    numbers = {"cat": 0, "dog": 1, "emu": 2}
    assert labels == {
        key: numbers[name]
        for key, (_, name) in by_stock(
            sorted(named.glob("*.tar")), lambda s: json.loads(s["json"])["class"]
        ).items()
    }
    assert verify(tmp_path / "o/train") == []
    (tmp_path / "names").write_text("cat\ndog\ndog\n")
    message = problems(named, tmp_path / "x", labels="json:class", classes=tmp_path / "names")
    assert "'emu'" in message
    assert "'dog'" in message


@pytest.mark.parametrize("name", ["", "sizes.json", "{00000..00001}.tar"])
def test_open_clip_and_a_second_place_for_validation(tmp_path, name):
    folder, val = open_clip(tmp_path / "a"), open_clip(tmp_path / "b", (1,))
    found = index(str(folder / name), tmp_path / "out", val=str(val))
    assert {s.checked_by for s in found.values()} == {"sizes.json"}
    for split, place in (("train", folder), ("val", val)):
        opened = open_shards(tmp_path / "out" / split)
        assert by_ours(opened) == by_stock(sorted(place.glob("*.tar")))
        assert opened.manifest.classes == ["0", "1"]


def test_long_names_folders_and_other_members(tmp_path):
    """GNU and pax tars with names over 100 and 255 bytes, in any order, with much between them."""
    long = "n" * 90 + "/" + "k" * 150
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [
            ("./", None),
            (f"{'d' * 95}/a.cls", b"1\n"),
            (f"{'d' * 95}/a.jpg", picture(1)),
            ("b.JPG", picture(2)),
            ("b.pyd", b"\0"),
            ("b.pkl", b"cos\nsystem\n(S'false'\ntR."),
            ("b.cls", b" 0 "),
            ("._b.jpg", b"mac"),
            ("__notes__/c.jpg", b"passed by webdataset too"),
            ("readme.txt", b"about"),
            (f"{long}.json", b"{" * 100_000),
            (f"{long}.png", picture(3, "PNG")),
            (f"{long}.cls", b"0002"),
        ]
        tar = tmp_path / f"{form}" / "long.tar"
        tar.parent.mkdir()
        with tarfile.open(tar, "w", format=form) as out:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
                member.size, member.mtime, member.uid = len(data or b""), 1.25, 1000
                out.addfile(member, io.BytesIO(data or b""))
        index(str(tar), tmp_path / f"out{form}")
        ours = by_ours(open_shards(tmp_path / f"out{form}/train"))
        assert ours == {
            f"{'d' * 95}/a": (picture(1), 1),
            "b": (picture(2), 0),
            long: (picture(3, "PNG"), 2),
        }


# ---------------------------------------------------------------------------------- what is refused


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


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
            "00002.tar is not here, but in sizes.json",
            "00005.tar: sizes.json does not name it",
        ]

    def nshards(folder):
        clip_benchmark(folder)
        (folder / "train/nshards.txt").write_text("11\n")
        (folder / "test/nshards.txt").write_text("4\n")
        return ["train/11.tar is here, but not in nshards", "test/3.tar is not here, but in nsh"]

    def stats(folder):
        img2dataset(folder)
        rewrite(folder / "00000_stats.json", lambda s: s.update(successes=2))
        (folder / "00001_stats.json").unlink()
        (folder / "00002.tar").unlink()
        return [
            "00000.tar: got 3 samples; NAME_stats.json says 2",
            "00001.tar: got no 00001_stats.json",
            "00002.tar is not here, but in NAME_stats.json",
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


JPG = picture(0)
FAULTS = {
    "no label": ([("a.jpg", JPG)], "a has a picture but no .cls"),
    "no picture": ([("a.cls", b"0")], "a has a label but no picture"),
    "negative": ([("a.jpg", JPG), ("a.cls", b"-1")], "a has no usable label in .cls: got '-1'"),
    "no number": ([("a.jpg", JPG), ("a.cls", b"cat")], "got 'cat'; need a class index in digits"),
    "empty": ([("a.jpg", JPG), ("a.cls", b"")], "got ''; need"),
    "huge": ([("a.jpg", JPG), ("a.cls", b"9" * 12)], "a has no usable label"),
    "long": ([("a.jpg", JPG), ("a.cls", b"1" + b" " * (1 << 20))], "got more than 1048576 bytes"),
    "two pictures": ([("a.jpg", JPG), ("a.cls", b"0"), ("a.png", JPG)], "a has two pictures"),
    "twice": (
        [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"0"), ("a.jpeg", JPG)],
        "a comes twice",
    ),
    "apart": ([("a.jpg", JPG), ("b.jpg", JPG), ("a.cls", b"0"), ("b.cls", b"0")], "b comes twice"),
    "unprintable": ([("a\x1b[2J.jpg", JPG)], r"'a\x1b[2J' has a picture"),
}


def tar_of(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_samples_that_are_not_whole_are_told_with_their_key(tmp_path, fault):
    members, words = FAULTS[fault]
    good = [("good.jpg", JPG), ("good.cls", b"0")]
    tar = tar_of(tmp_path / "x-0.tar", [*good, *members, ("z.jpg", JPG), ("z.cls", b"x")])
    message = problems(tmp_path, tmp_path / "out")
    assert words in message
    assert "x-0.tar: " in message
    assert "z has no usable label" in message  # and what follows
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"x-0\.tar"):
        list(scan_shard(tar))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('{"other": 1}', "got nothing called 'class'"),
        ('{"class": -1}', "got '-1'"),
        ('{"class": true}', "got 'true'"),
        ('{"class": null}', "got 'null'"),
        ('{"class": NaN}', "got 'NaN'"),
        ('{"class": 1.5}', "got '1.5'"),
        ('{"class": [1]}', "got '[1]'"),
        ('{"class": "cat"}', "got 'cat'"),
        ("[1]", "got nothing called 'class'"),
        ("{", "got no JSON"),
        ("[" * 100_000, "got no JSON"),
        ('{"class": ' + "9" * 10_000 + "}", "no usable label"),
        ('"' + "x" * (1 << 20), "got more than 1048576 bytes"),
    ],
)
def test_labels_in_a_json_are_looked_at_closely(tmp_path, value, words):
    tar_of(tmp_path / "x.tar", [("a.json", value.encode()), ("a.jpg", JPG)])
    message = problems(tmp_path / "x.tar", tmp_path / "out", labels="json:class")
    assert "a has no usable label in .json" in message
    assert words in message


def test_a_number_is_taken_as_a_float_too(tmp_path):
    tar_of(tmp_path / "x.tar", [("a.json", b'{"class": 0.0}'), ("a.jpg", JPG)])
    index(str(tmp_path / "x.tar"), tmp_path / "out", labels="json:class")
    assert open_shards(tmp_path / "out/train").index["label"].tolist() == [0]


def test_labels_out_of_range_and_gaps(tmp_path):
    tar_of(tmp_path / "t-0.tar", [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"1")])
    tar_of(tmp_path / "t-1.tar", [("c.jpg", JPG), ("c.cls", b"7")])
    message = problems(tmp_path, tmp_path / "out")
    assert "no picture has label 2, but c in t-1.tar has 7" in message
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


def test_keys_over_shards(tmp_path):
    tar_of(tmp_path / "t-0.tar", [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG)])
    tar_of(tmp_path / "t-1.tar", [("b.cls", b"0"), ("c.jpg", JPG), ("c.cls", b"0")])
    message = problems(tmp_path, tmp_path / "out")  # a sample split over two shards
    assert "t-0.tar: b has a picture but no .cls" in message
    assert "t-1.tar: b has a label but no picture" in message
    tar_of(tmp_path / "t-0.tar", [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"0")])
    tar_of(tmp_path / "t-1.tar", [("c.jpg", JPG), ("c.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"0")])
    message = problems(tmp_path, tmp_path / "out")
    assert "key b is in t-0.tar and t-1.tar" in message
    assert "key a" not in message
    assert not (tmp_path / "out").exists()


def test_many_problems_are_not_all_told(tmp_path):
    for shard in range(3):
        members = [(f"{shard}_{i}.jpg", b"") for i in range(50)]
        tar_of(tmp_path / f"t-{shard}.tar", members)
    message = problems(tmp_path, tmp_path / "out")
    assert len(message.splitlines()) == 23  # a head, 20 problems, how many more, what to do
    assert message.splitlines()[-2].strip() == "... and 130 problems more"


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


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def damage() -> dict:
    """name -> (bytes of a tar after two whole samples and before its end, words of the error)."""
    pax = header("x", 20, b"x") + b"20 comment=aaaaaaaa\n".ljust(512, b"\0")
    link = tarfile.TarInfo("l.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("d.jpg")
    device.type = tarfile.CHRTYPE
    flipped = bytearray(header("c.jpg", 3))
    flipped[3] ^= 1
    return {
        "parent": (header("../c.jpg", 0), "outside of it"),
        "absolute": (header("/c.jpg", 0), "outside of it"),
        "link": (link.tobuf(), "no file"),
        "device": (device.tobuf(), "no file"),
        "10 GB": (header("c.jpg", 10 << 30), "c.jpg"),
        "10 GB of header": (header("x", 10 << 30, b"x"), "a header of 10737418240 bytes"),
        "endless pax": (pax * 2000, "damaged"),
        "pax for nothing": (header("x", 600_000, b"x") + bytes(600_064) + pax, "damaged"),
        "flipped": (bytes(flipped) + b"abc".ljust(512, b"\0"), "no end-of-archive mark"),
        "negative": (header("c.jpg", 3)[:124] + b"\xff" * 12 + header("c.jpg", 3)[136:], "damaged"),
        "name twice": (header("a.jpg", 0), "there twice"),
    }


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_S", 0.02)
    (tmp_path / "far").mkdir()
    server = FlakyServer(tmp_path / "far")
    yield server, tmp_path / "far"
    server.close()


@pytest.mark.parametrize("way", damage())
def test_damaged_and_hostile_tars(tmp_path, served, way):
    """From a file and from a URL; the error names the shard and both counts."""
    server, far = served
    blocks, words = damage()[way]
    whole = tar_of(
        far / "x.tar", [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"0")]
    )
    with tarfile.open(whole) as tar:
        end = max(m.offset_data for m in tar.getmembers()) + 512
    whole.write_bytes(whole.read_bytes()[:end] + blocks + bytes(1024))
    (far / "sizes.json").write_text('{"x.tar": 3}')
    for place in (far, server.url):
        message = problems(place, tmp_path / "out")
        assert "x.tar" in message
        assert words in message
        assert re.search("samples found before: [12]; sizes.json says 3", message)
    if way != "name twice":
        with pytest.raises(ValueError, match=r"x\.tar"):
            list(scan_shard(whole))


@pytest.mark.parametrize("cut", [700, 1400, 5120, 6656 - 512])
def test_cut_tars(tmp_path, served, cut):
    server, far = served
    whole = tar_of(far / "x.tar", [(f"{i}.{s}", b"0") for i in range(3) for s in ("cls", "jpg")])
    whole.write_bytes(whole.read_bytes()[:cut])
    for place in (far, f"{server.url}/x.tar"):
        message = problems(place, tmp_path / "out")
        assert "x.tar" in message
        assert "samples found before: " in message


def test_compressed_shards_are_refused(tmp_path):
    tar_of(tmp_path / "x.tar.gz", [("a.jpg", JPG)], format=tarfile.GNU_FORMAT)
    for place in (tmp_path, tmp_path / "x.tar.gz"):
        assert "decompress" in problems(place, tmp_path / "out")
    with tarfile.open(tmp_path / "y.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert "compressed tar (gzip)" in problems(tmp_path / "y.tar", tmp_path / "out")


def test_memory_stays_small_in_what_follows_the_last_member(tmp_path):
    """Headers of 30 MB and a trailer of 100 MB are walked in pieces."""
    import tracemalloc

    class Zeros:
        def __iter__(self):
            yield header("a.jpg", 0) + header("a.cls", 0)
            for i in range(300):
                note = b"100000 comment=" + bytes([97 + i % 26]) * 99984 + b"\n"
                yield header("x", len(note), b"x") + note.ljust(196 * 512, b"\0")
                yield header(f"{i}.txt", 0)
            for _ in range(100):
                yield bytes(1 << 20)

    tracemalloc.start()
    file = Sequential(iter(Zeros()))
    assert sum(1 for _ in tar_members(file, "x", 0, None)) == 302
    assert file.arrived == 1024 + 300 * 198 * 512 + (100 << 20)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_places_that_hold_no_shards_or_too_many_kinds(tmp_path):
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
    assert "../../x.tar is not here" in problems(tmp_path / "b", tmp_path / "out")
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


# ---------------------------------------------------------------------------- at a URL; where it is


@pytest.mark.parametrize(
    ("layout", "suffix", "checked"),
    [
        (timm, "", "_info.json"),
        (timm, "/_info.json", "_info.json"),
        (timm, "/imagenet1k-train-{0000..0001}.tar", "_info.json"),
        (clip_benchmark, "", "nshards.txt"),
        (open_clip, "/sizes.json", "sizes.json"),
        (open_clip, "/{00000..00001}.tar", "sizes.json"),
    ],
)
def test_shards_at_a_url_are_streamed_once_and_read_through_the_cache(
    served, tmp_path, layout, suffix, checked
):
    server, far = served
    layout(far)
    first = sorted(tar.relative_to(far).as_posix() for tar in far.rglob("*0*.tar"))[0]
    server.faults[first] = ["reset", 500]  # resumed where it broke off
    found = index(f"{server.url}{suffix}", tmp_path / "out", workers=2)
    assert found["train"].checked_by == checked
    assert ("val" in found) == (layout is not open_clip and not suffix.endswith(".tar"))
    ranges = [asked for name, asked in server.requests if name == first]
    assert ranges[0] is None
    assert len(ranges) == 3
    assert all(asked.startswith("bytes=") for asked in ranges[1:])
    assert not (tmp_path / "cache").exists()
    for split in found:
        shards = open_split(str(tmp_path / "out" / split), cache_dir=tmp_path / "cache", **FAST)
        theirs = far if layout is not clip_benchmark else far / {"val": "test"}.get(split, split)
        names = [theirs / shard.name for shard in shards.manifest.shards]
        assert by_ours(shards) == by_stock(names)
        assert sorted(p.name for p in shards.folder.glob("*.tar")) == sorted(p.name for p in names)
        with pytest.raises(ValueError, match="need them on this machine"):
            open_shards(tmp_path / "out" / split)


@pytest.mark.parametrize("no_ranges", [False, True])
def test_a_stream_goes_on_where_it_broke_off(served, no_ranges):
    server, far = served
    content = np.random.RandomState(0).bytes(3_000_000)
    (far / "x.tar").write_bytes(content)
    server.no_ranges = no_ranges
    server.faults["x.tar"] = ["close", "reset", 500]
    patience = fetch.Patience(**FAST)
    assert b"".join(fetch.stream(f"{server.url}/x.tar", patience=patience)) == content
    assert server.count("x.tar") == 4
    if no_ranges:
        server.faults["x.tar"] = ["close", "long"]  # another length: another file
        with pytest.raises(OSError, match="was 3000000 bytes, is 3001000 now"):
            list(fetch.stream(f"{server.url}/x.tar", patience=patience))


def test_img2dataset_at_a_url(served, tmp_path):
    server, far = served
    img2dataset(far)
    pattern = f"{server.url}/{{00000..00002}}.tar"
    found = index(pattern, tmp_path / "out", labels="json:class")
    assert found["train"].checked_by == "NAME_stats.json"
    (far / "00002_stats.json").write_text('{"successes": 5}')
    message = problems(pattern, tmp_path / "x", labels="json:class")
    assert "00002.tar: got 4 samples; NAME_stats.json says 5" in message
    (far / "00001.tar").unlink()
    message = problems(pattern, tmp_path / "x", labels="json:class")
    assert "00001.tar: got no whole file in 1 try; the last: HTTP 404" in message


def test_urls_that_no_manifest_may_hold(tmp_path, served):
    for url, words in (
        ("pipe:cat /tmp/{0..3}.tar", "runs a program"),
        ("x.tar::pipe:cat y.tar", "runs a program"),
        ("http://h/{0..3}.tar?token=secret", "query"),
        ("https://me:secret@h/{0..3}.tar", "password"),
        ("sftp://me:secret@h/{0..3}.tar", "password"),
        ("http://127.0.0.1:9/it's/{0..3}.tar", "as %XX"),
    ):
        message = problems(url, tmp_path / "out")
        assert words in message
        assert "secret" not in message
    with pytest.raises(OSError, match="refused"):
        index("http://127.0.0.1:9/nobody", tmp_path / "out")


def test_the_location_of_a_manifest(tmp_path, served):
    server, far = served
    open_clip(far)
    index(str(far), tmp_path / "near")
    index(f"{server.url}/sizes.json", tmp_path / "out")
    near, split = open_shards(tmp_path / "near/train").manifest, tmp_path / "out/train"
    cache = dict(cache_dir=tmp_path / "cache", **FAST)
    manifest = open_split(str(split), **cache).manifest
    assert manifest.location == server.url
    assert manifest.fingerprint == near.fingerprint
    for location in (
        "pipe:cat {name}",
        "PIPE:cat {name}",
        "relative/place",
        "gs://bucket/'; touch /tmp/x; '",
        "http://h/a b",
        "sftp://-oProxyCommand=x/",
        "",
        7,
    ):
        rewrite(split / "manifest.json", lambda m, location=location: m.update(location=location))
        for opener in (lambda: open_shards(split), lambda: open_split(str(split), **cache)):
            with pytest.raises(ValueError, match="not a manifest"):
                opener()
    rewrite(split / "manifest.json", lambda m: m.update(location=str(tmp_path)))
    far_split = FlakyServer(split)
    with pytest.raises(ValueError, match="need one beside its shards"):
        open_split(far_split.url, **cache)
    far_split.close()
    rewrite(split / "manifest.json", lambda m: m.update(location=str(far)))
    assert by_ours(open_split(str(split), **cache)) == by_stock(sorted(far.glob("*.tar")))


# -------------------------------------------------------------------------------- the command line


def test_indexed_shards_are_trained_on(tmp_path):
    folder = timm(tmp_path / "timm", lengths=(20, 20), val_lengths=(6,))
    script = ROOT / "launch" / "make_shards.py"
    done = run_python(script, "index", folder, tmp_path / "data", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (0, 3), done.output
    assert "40 pictures of 3 classes in 2 shards" in done.lines[0]
    assert f"at {folder}; counts agree with _info.json" in done.lines[0]
    assert "0.0% of neighbours share their class, 33" in done.lines[1]
    assert "lane" not in done.output
    done = run_python(script, "verify", tmp_path / "data/train", "--hash", cwd=tmp_path)
    assert done.code == 0, done.output
    arguments = shlex.split(
        "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1 "
        "--classifier_attention_resolutions 4 --noise_schedule cosine --workers 1"
    )
    done = launch(
        1,
        *("--deepspeed_config", ROOT / "ds_configs/zero1_fp32.json", *arguments),
        *("--data_dir", tmp_path / "data/train", "--val_data_dir", tmp_path / "data/val"),
        *("--iterations", 3, "--log_interval", 1, "--run_dir", tmp_path / "run"),
        *("--batch_size", 8),
        cwd=tmp_path,
    )
    assert done.code == 0, done.output
    losses = [row["train_loss"] for row in read_log(tmp_path / "run") if "train_loss" in row]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert (
        f"40 pictures (2 shards) in {tmp_path / 'data/train'}; 6 pictures (1 shard)" in done.output
    )


def test_the_command_line(tmp_path):
    script = ROOT / "launch" / "make_shards.py"
    members = [(f"{i:03d}.{s}", {"jpg": JPG, "cls": str(i // 10).encode()}[s])
               for i in range(40) for s in ("jpg", "cls")]  # fmt: skip
    tar_of(tmp_path / "x.tar", members)
    done = run_python(script, "index", "x.tar", "out", "--workers", "1", cwd=tmp_path)
    assert done.code == 0, done.output
    assert "nothing beside them tells their counts" in done.lines[0]
    assert "92.3% of neighbours share their class, 25.0% in a random order" in done.lines[1]
    assert done.lines[1].endswith("do: train with --shuffle_shards lane")
    tar_of(tmp_path / "x.tar", [*members, ("z.jpg", JPG)])
    done = run_python(script, "index", "x.tar", "new", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 3), done.output
    assert done.lines[0].startswith("error: these shards cannot be used as they are")
    assert done.lines[1].endswith("x.tar: z has a picture but no .cls")
    assert "do: say where labels stand with --label" in done.lines[2]
    assert not (tmp_path / "new").exists()
    done = run_python(script, "index", "x.tar", "new", "--label", "txt", cwd=tmp_path)
    assert done.code == 2
    assert "need cls or json:KEY" in done.output
