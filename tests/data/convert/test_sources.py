"""Data sources: each compared with a plain folder of the same images; and those refused."""

import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made import make_images
from running import ROOT, run_python

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.samples import DataSource, Sample, Slice
from ds_classifier.data.convert.sources import image_folder, open_source
from ds_classifier.data.labels.classes import class_lines
from ds_classifier.data.shards import open_shards

# ILSVRC ids run against the order of the sorted WordNet ids; 4 is a synset that is no class.
WNIDS = ["n01440764", "n01443537", "n02084071"]
ILSVRC_ID = {"n01440764": 3, "n01443537": 1, "n02084071": 2, "n00001740": 4}
VAL_WNIDS = ["n02084071", "n01440764", "n02084071", "n01443537", "n01440764"]


def fake_image(number: int) -> bytes:
    """Return bytes that start like a JPEG. Sources do not decode images."""
    return b"\xff\xd8\xff" + np.random.RandomState(number).bytes(300 + 97 * number)


def pack(entries: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar. Its mtimes have a fraction, for which the pax format adds headers."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in entries.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def plain(tmp_path) -> Path:
    """Return the folder to compare with: train/WNID/*.JPEG and val/WNID/*.JPEG."""
    number = 0
    for wnid in WNIDS:
        for i in range(3):
            file = tmp_path / "plain/train" / wnid / f"{wnid}_{i}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(fake_image(number))
            number += 1
    for i, wnid in enumerate(VAL_WNIDS, start=1):
        file = tmp_path / "plain/val" / wnid / f"ILSVRC2012_val_{i:08d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(fake_image(number))
        number += 1
    return tmp_path / "plain"


def answer(plain: Path, split: str) -> Counter:
    """Return (bytes, class name) of every image in a plain folder, found with glob alone."""
    return Counter((p.read_bytes(), p.parent.name) for p in (plain / split).glob("*/*.JPEG"))


def content(source: DataSource, split: str) -> Counter:
    """Return (bytes, class name) of every sample, after pickling it and checking its size."""
    found = Counter()
    for sample in pickle.loads(pickle.dumps(source.splits[split])):
        assert sample.size() == len(sample.read())
        found[sample.read(), source.classes[sample.label]] += 1
    return found


def assert_equal_to(plain: Path, source: DataSource, splits=("train", "val")) -> None:
    assert source.classes == WNIDS
    assert set(source.splits) == set(splits)
    for split in splits:
        assert content(source, split) == answer(plain, split)


def refused(*arguments: object) -> str:
    """Return the message of the error with which a source is refused."""
    with pytest.raises(ValueError) as error:
        open_source(*(None if a is None else str(a) for a in arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------- ImageNet


@pytest.fixture(params=[tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def form(request) -> int:
    return request.param


def imagenet(plain: Path, form: int = tarfile.GNU_FORMAT) -> tuple[Path, Path]:
    """Write the tars as ImageNet is distributed, with unsorted classes."""
    inner = {
        f"{wnid}.tar": pack({p.name: p.read_bytes() for p in (plain / "train" / wnid).iterdir()})
        for wnid in reversed(WNIDS)
    }
    val = {p.name: p.read_bytes() for p in (plain / "val").glob("*/*")}
    train_tar, val_tar = plain.parent / "train.tar", plain.parent / "val.tar"
    train_tar.write_bytes(pack(inner, form))
    val_tar.write_bytes(pack(val, form))
    return train_tar, val_tar


def devkit_folder(root: Path, wnids: list[str] = VAL_WNIDS) -> Path:
    from scipy.io import savemat

    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True, exist_ok=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    ids = sorted(ILSVRC_ID.items(), key=lambda item: item[1])
    rows = [(np.uint16(i), wnid, f"words of {wnid}", np.uint8(0)) for wnid, i in ids]
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    lines = [f"{ILSVRC_ID[wnid]}\n" for wnid in wnids]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))
    return data.parent


def devkit_archive(root: Path) -> Path:
    with tarfile.open(root / "devkit.tar.gz", "w:gz") as tar:
        tar.add(devkit_folder(root), "ILSVRC2012_devkit_t12")
    return root / "devkit.tar.gz"


def kaggle(root: Path) -> Path:
    lines = ["ImageId,PredictionString"]
    for i, wnid in reversed(list(enumerate(VAL_WNIDS, start=1))):
        lines.append(f"ILSVRC2012_val_{i:08d},{wnid} 85 1 499 272 {wnid} 1 2 3 4 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    return root / "LOC_val_solution.csv"


@pytest.mark.parametrize("labels", [devkit_folder, devkit_archive, kaggle])
def test_imagenet_tars_hold_what_the_unpacked_folder_holds(plain, form, labels):
    train, val = imagenet(plain, form)
    source = open_source(str(train), str(val), str(labels(plain.parent)))
    assert_equal_to(plain, source)
    assert all(isinstance(s.content, Slice) for s in source.splits["train"])
    assert len(pickle.dumps(source.splits["train"][0])) < 500


def test_ilsvrc_ids_are_not_the_classes(plain):
    """Check the labels with ILSVRC IDs that are 1-based and ordered unlike the WordNet IDs."""
    train, val = imagenet(plain)
    source = open_source(str(train), str(val), str(devkit_folder(plain.parent)))
    labels = {Path(s.name).stem[-1]: s.label for s in source.splits["val"]}
    assert labels == {"1": 2, "2": 0, "3": 2, "4": 1, "5": 0}
    by_id = {str(i): ILSVRC_ID[wnid] - 1 for i, wnid in enumerate(VAL_WNIDS, start=1)}
    assert labels != by_id


def test_imagenet_tar_and_folders_mix(plain):
    train, val = imagenet(plain)
    labels = str(kaggle(plain.parent))
    assert_equal_to(plain, open_source(str(train), str(plain / "val")))
    assert_equal_to(plain, open_source(str(plain / "train"), str(val), labels))
    flat = plain.parent / "flat"
    flat.mkdir()
    for file in (plain / "val").glob("*/*"):
        (flat / file.name).write_bytes(file.read_bytes())
    assert_equal_to(plain, open_source(str(train), str(flat), labels))
    assert_equal_to(plain, open_source(str(train)), splits=["train"])


@pytest.mark.parametrize("keep", ["member", "header", "payload", "mark"])
def test_a_train_tar_cut_short_is_refused(plain, keep):
    """Cut at four places. tarfile stops without an error at three of them."""
    train, _ = imagenet(plain)
    data = train.read_bytes()
    with tarfile.open(train) as tar:
        last = tar.getmembers()[-1]
    cut = {
        "member": last.offset,
        "header": last.offset + 200,
        "payload": last.offset_data + 1000,
        "mark": last.offset_data + last.size,
    }
    train.write_bytes(data[: cut[keep]])
    message = refused(train)
    assert "train.tar: cut short" in message
    assert "download" in message


def test_damage_inside_an_inner_tar_is_refused(plain):
    train, _ = imagenet(plain)
    data = bytearray(train.read_bytes())
    with tarfile.open(train) as tar:
        inner = tar.getmembers()[1]
        second = tarfile.open(fileobj=tar.extractfile(inner)).getmembers()[1]
    at = inner.offset_data + second.offset
    train.write_bytes(data[: at + 3] + bytes([data[at + 3] ^ 1]) + data[at + 4 :])
    assert f"{inner.name}: cut short or damaged" in refused(train)
    train.write_bytes(data[:at] + bytes(512) + data[at + 512 :])
    assert f"{inner.name}: cut short or damaged" in refused(train)
    # without its end mark, reading would continue in the next inner tar
    with tarfile.open(train) as tar:
        images = [tar.extractfile(m).read() for m in tar]
    unmarked = images[0][: len(images[0].rstrip(b"\0")) // 512 * 512 + 512]
    train.write_bytes(pack({"n01.tar": unmarked, "n02.tar": images[1]}))
    assert "n01.tar: cut short or damaged" in refused(train)


def member(kind: bytes = tarfile.REGTYPE, name: str = "a.JPEG", size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd" * (kind in b"12"), size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (member(name="../a.JPEG"), "outside"),
        (member(name="/a.JPEG"), "outside"),
        (member(name="x/../../a.JPEG"), "outside"),
        (member(tarfile.SYMTYPE), "is not a file"),
        (member(tarfile.LNKTYPE), "is not a file"),
        (member(tarfile.CHRTYPE), "is not a file"),
        (member(tarfile.FIFOTYPE), "is not a file"),
        (member(tarfile.GNUTYPE_SPARSE), "is not a file"),
        (member() + member(), "twice"),
        (member(size=10 << 30), "need 10737418240"),
        (member(tarfile.GNUTYPE_LONGNAME, size=10 << 30), "10737418240 bytes"),
        (member(tarfile.XHDTYPE, size=10 << 30), "10737418240 bytes"),
        (b"", "no image"),
        (b"<html>not found</html>".ljust(512), " damaged "),
    ],
)
def test_members_that_are_not_regular_files_are_refused(tmp_path, members, words):
    """Put the members in an inner tar, then in an outer one."""
    (tmp_path / "x.tar").write_bytes(pack({"n01.tar": members + bytes(10240)}))
    message = refused(tmp_path / "x.tar")
    assert words in message
    assert "n01.tar" in message
    (tmp_path / "x.tar").write_bytes(members + bytes(10240))
    assert (words if members else "empty tar") in refused(tmp_path / "x.tar")


def test_other_tars_are_refused(plain):
    train, val = imagenet(plain)
    assert "tar of tars" in refused(val)
    assert "--val_labels" in refused(train, val)
    assert "without --val" in refused(train, None, kaggle(plain.parent))
    (plain.parent / "zip.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "uncompressed" in refused(plain.parent / "zip.tar")
    (plain.parent / "empty.tar").write_bytes(b"")
    assert "empty.tar" in refused(plain.parent / "empty.tar")


def test_labels_and_images_of_validation_must_match(plain):
    train, val = imagenet(plain)
    root = plain.parent
    devkit = devkit_folder(root)
    truth = devkit / "data" / "ILSVRC2012_validation_ground_truth.txt"

    def after(text: str) -> str:
        truth.write_text(text)
        return refused(train, val, devkit)

    assert "ILSVRC2012_val_00000005" in after("2\n3\n2\n1\n")
    assert "without ILSVRC2012_val_00000006" in after("2\n3\n2\n1\n3\n1\n")
    assert ":3: got 'x'" in after("2\n3\nx\n1\n3\n")
    assert ":5: got '9'" in after("2\n3\n2\n1\n9\n")
    assert "'n00001740'" in after("2\n3\n2\n1\n4\n")
    (devkit / "data" / "meta.mat").write_bytes(b"nonsense")
    assert "MATLAB" in after("2\n3\n2\n1\n3\n")
    truth.unlink()
    assert "without data/ILSVRC2012_validation" in refused(train, val, devkit)
    archive = devkit_archive(root)
    archive.write_bytes(archive.read_bytes()[:-300])
    assert "not a complete .tar.gz" in refused(train, val, archive)
    solution = kaggle(root)
    text = solution.read_text()
    solution.write_text(text + "ILSVRC2012_val_00000002,n01443537 1 2 3 4\n")
    assert ":7: got 'ILSVRC2012_val_00000002'" in refused(train, val, solution)
    solution.write_text(text.replace("n01443537 85 1 499 272 n01443537 1 2 3 4 ", ""))
    assert ":3: got" in refused(train, val, solution)
    solution.write_text("path,label\n")
    assert "PredictionString" in refused(train, val, solution)
    assert "does not exist" in refused(train, val, root / "absent.csv")


def test_large_files_of_a_devkit_are_refused_unread(plain, tmp_path):
    """Refuse a member or a file larger than any real one, and a compressed table that large."""
    import gzip
    import tracemalloc

    from scipy.io import savemat

    train, val = imagenet(plain)
    devkit = devkit_folder(plain.parent)
    meta = devkit / "data" / "meta.mat"
    savemat(meta, {"synsets": np.zeros((1, 300 << 20), np.uint8)}, do_compression=True)
    bomb = tmp_path / "bomb.tar.gz"
    header = tarfile.TarInfo("devkit/data/meta.mat")
    header.size = 100 << 20
    bomb.write_bytes(gzip.compress(header.tobuf() + bytes(header.size + 1024), 1))
    tracemalloc.start()
    assert "when unpacked" in refused(train, val, devkit)
    assert "meta.mat of 104857600 bytes" in refused(train, val, bomb)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    os.truncate(meta, 1 << 33)
    assert "8589934592 bytes" in refused(train, val, devkit)


# ----------------------------------------------------------------------------------------- lists


def as_csv(plain: Path, split: str) -> Path:
    path = plain / f"{split}.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "size", "path"])
        for p in sorted((plain / split).glob("*/*"), reverse=True):
            rows.writerow([p.parent.name, p.stat().st_size, p.relative_to(plain)])
    return path


def as_jsonl(plain: Path, split: str) -> Path:
    path = plain / f"{split}.jsonl"
    rows = [{"path": str(p), "label": p.parent.name} for p in (plain / split).glob("*/*")]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("write", [as_csv, as_jsonl])
def test_lists_hold_what_the_folder_holds(plain, write, monkeypatch):
    train, val = write(plain, "train"), write(plain, "val")
    assert_equal_to(plain, open_source(str(train), str(val)))
    monkeypatch.chdir(plain.parent)  # relative paths are relative to the list
    assert_equal_to(plain, open_source(f"plain/{train.name}", str(plain / "val")))


def write_list(tmp_path: Path, suffix: str, labels: list, name: str = "list") -> Path:
    rows = []
    for i, label in enumerate(labels):
        image = f"{name}_{i}.jpg" if name != "list" else f"{i}.jpg"
        (tmp_path / image).write_bytes(fake_image(i))
        rows.append((image, label))
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".csv":
        path.write_text("path,label\n" + "".join(f"{p},{label}\n" for p, label in rows))
    else:
        path.write_text("".join(json.dumps({"path": p, "label": x}) + "\n" for p, x in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_integer_labels_keep_their_numeric_order(tmp_path, suffix):
    labels = [11, 2, *range(11), 10]
    train = write_list(tmp_path, suffix, labels)
    val = write_list(tmp_path, suffix, [10, 2], "val")
    source = open_source(str(train), str(val))
    assert source.classes == [str(i) for i in range(12)]
    assert [s.label for s in source.splits["train"]] == labels
    assert [s.label for s in source.splits["val"]] == [10, 2]
    assert "'12'" in refused(train, write_list(tmp_path, suffix, [12], "other"))


def test_labels_that_are_names_although_some_look_like_numbers(tmp_path):
    source = open_source(str(write_list(tmp_path, ".csv", ["10", "9", "cat"])))
    assert source.classes == ["10", "9", "cat"]
    source = open_source(str(write_list(tmp_path, ".csv", ["02", "01"])))
    assert source.classes == ["01", "02"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,class\nabsent.jpg,a\n", "columns ['file', 'class'], of which none names a file"),
        ("0.jpg,a\n1.jpg,a\n", "put the line path,label before it"),
        ("", "need a first line"),
        ("path,label\n", "no image"),
        ("path,label\n0.jpg,a\nabsent.jpg,a\n", ".csv:3: got absent.jpg"),
        ("path,label\n0.jpg,a\n.,a\n", ".csv:3: got ."),
        ("path,label\npipe:cat 0.jpg,a\n", ".csv:2: got pipe:cat 0.jpg"),
        ("path,label\n0.jpg,a\n1.jpg\n", ".csv:3: got label None"),
        ("path,label\n0.jpg, \n", ".csv:2: got label ''"),
        ("path,label\n,a\n", ".csv:2: got no path"),
        ("path,label\n0,jpg,a\n", ".csv:2: got 1 more values"),
        ("path,label\n0.jpg,a\n1.jpg,a\n0.jpg,b\n", ".csv:4: got label 'b' for 0.jpg, and 'a'"),
        ("path,label\n0.jpg,0\n1.jpg,-1\n", "label -1"),
        ("path,label\n0.jpg,0\n1.jpg,2\n", "none is 1"),
        ('path,label\n"0.jpg,a\n', "no valid UTF-8 CSV"),
        ("path,label\n\udcff.jpg,a\n", "UTF-8"),
    ],
)
def test_csv_that_is_refused(tmp_path, text, words):
    path = write_list(tmp_path, ".csv", ["a", "a"])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert words in refused(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"),
        ("[1]", "need an object"),
        ('{"label": 1}', "no path"),
        ('{"path": "0.jpg"}', "label None"),
        ('{"path": "0.jpg", "label": true}', "label True"),
        ('{"path": "0.jpg", "label": 1.5}', "label 1.5"),
        ('{"path": "absent.jpg", "label": 1}', "no file"),
    ],
)
def test_jsonl_that_is_refused(tmp_path, line, words):
    path = write_list(tmp_path, ".jsonl", ["a", "a"])
    path.write_text('{"path": "1.jpg", "label": "a"}\n' + line)
    message = refused(path)
    assert words in message
    assert ".jsonl:2: " in message


# --------------------------------------------------------------------------------------- parquet


def as_parquet(plain: Path, split: str, path: Path, *, flat=False, names=tuple(WNIDS)) -> Path:
    """Write the images of a folder as datasets does, two per row group."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    found = sorted((plain / split).glob("*/*"), key=lambda p: p.read_bytes())
    cells = [p.read_bytes() if flat else {"bytes": p.read_bytes(), "path": p.name} for p in found]
    kind = pa.binary() if flat else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = [WNIDS.index(p.parent.name) for p in found]
    table = pa.table({"label": pa.array(labels), "image": pa.array(cells, kind)})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("flat", [False, True])
def test_parquet_holds_what_the_folder_holds(plain, tmp_path, flat):
    train = as_parquet(plain, "train", tmp_path / "t.parquet", flat=flat)
    val = as_parquet(plain, "val", tmp_path / "v.parquet", flat=flat)
    source = open_source(str(train), str(val))
    assert_equal_to(plain, source)
    assert len({s.name for s in source.splits["train"]}) == 9
    assert len(pickle.dumps(source.splits["train"][0])) < 500


def test_parquet_without_names_has_classes_by_number(plain, tmp_path):
    source = open_source(str(as_parquet(plain, "train", tmp_path / "t.parquet", names=None)))
    assert source.classes == ["0", "1", "2"]
    expected = Counter(
        {(b, str(WNIDS.index(c))): n for (b, c), n in answer(plain, "train").items()}
    )
    assert content(source, "train") == expected


def test_parquet_class_names_keep_their_order_and_unused_ones(plain, tmp_path):
    names = ("z", "y", "x", "nobody")
    train = as_parquet(plain, "train", tmp_path / "t.parquet", names=names)
    source = open_source(str(train))
    assert source.classes == list(names)
    assert Counter(s.label for s in source.splits["train"]) == {0: 3, 1: 3, 2: 3}
    val = as_parquet(plain, "val", tmp_path / "v.parquet", names=("y", "x", "z"))
    labels = Counter(s.label for s in open_source(str(train), str(val)).splits["val"])
    assert labels == {1: 2, 2: 1, 0: 2}  # labels are looked up by name: y is class 0 in this file
    val = as_parquet(plain, "val", tmp_path / "v.parquet", names=("z", "y", "other"))
    assert "'other'" in refused(train, val)


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001.parquet", "{}/0000.parquet"])
def test_a_parquet_folder_brings_its_own_splits(plain, tmp_path, layout):
    for split, word in (("train", "train"), ("val", "validation"), ("val", "test")):
        as_parquet(plain, split, tmp_path / "hub" / layout.format(word))
    assert_equal_to(plain, open_source(str(tmp_path / "hub")))
    other = as_parquet(plain, "train", tmp_path / "other.parquet", flat=True)  # no copy
    source = open_source(str(tmp_path / "hub"), str(other))
    assert content(source, "val") == answer(plain, "train")


def test_parquet_that_is_refused(plain, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    hub = tmp_path / "hub"
    part = as_parquet(plain, "train", hub / "train-00001-of-00003.parquet")
    as_parquet(plain, "train", hub / "train-00000-of-00003.parquet")
    assert "without number 2" in refused(hub)
    last = as_parquet(plain, "train", hub / "train-00002-of-00003.parquet", names=("a", "b", "c"))
    assert "other class names" in refused(hub)
    last.write_bytes(part.read_bytes()[:-100])
    assert "no complete parquet" in refused(hub)
    assert "need the same kind" in refused(plain / "train", part)
    assert "drop it" in refused(part, part, kaggle(tmp_path))
    (hub / "zebra.png").write_bytes(b"")
    assert "zebra.png" in refused(hub)

    def after(names=None, **columns) -> str:
        info = {"info": {"features": {"label": {"names": names}}}}
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(info)})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        return refused(tmp_path / "x.parquet")

    assert "columns ['img']" in after(img=[b"x"])
    assert "image of type string" in after(image=["x"], label=[0])
    assert "label of type double" in after(image=[b"x"], label=[0.5])
    assert "x.parquet/1: got label None" in after(image=[b"x", b"y"], label=[0, None])
    for label in (-1, 2):
        assert f"got label {label}; need" in after(["a", "b"], image=[b"x"], label=[label])
    assert "got label -1; need" in after(image=[b"x"], label=[-1])
    assert "one of them twice" in after(["a", "a"], image=[b"x"], label=[0])
    assert "none is 1" in after(image=[b"x", b"y"], label=[0, 2])
    assert "no rows" in after(image=pa.array([], pa.binary()), label=pa.array([], pa.int64()))
    pyarrow.parquet.write_table(
        pa.table({"image": [b"x", None], "label": [0, 1]}), tmp_path / "n.parquet"
    )
    source = open_source(str(tmp_path / "n.parquet"))
    with pytest.raises(ValueError, match="no bytes in row 1"):
        source.splits["train"][0].read()


# ---------------------------------------------------------------------------------------- shards


def test_shards_of_shards_keep_classes_and_labels(plain, tmp_path):
    classes = ["twice", "b", "twice", "never"]  # class names need not be unique in shards
    train, val = (
        [Sample(str(p), WNIDS.index(p.parent.name), p) for p in (plain / split).glob("*/*")]
        for split in ("train", "val")
    )
    convert(
        DataSource("s", classes, {"train": train, "val": val}), tmp_path / "a", samples_per_shard=4
    )
    source = open_source(str(tmp_path / "a"))
    convert(source, tmp_path / "b", samples_per_shard=2, shuffle_seed=7)

    def labels(samples) -> Counter:
        return Counter((s.read(), s.label) for s in samples)

    for split, samples in (("train", train), ("val", val)):
        again = open_shards(tmp_path / "b" / split)
        assert again.manifest.classes == classes
        opened = open_source(str(tmp_path / "b" / split))
        assert labels(opened.splits["train"]) == labels(samples)
    two = open_source(str(tmp_path / "b/train"), str(tmp_path / "a"))
    assert labels(two.splits["val"]) == labels(val)
    convert(DataSource("s", WNIDS, {"train": train}), tmp_path / "c")
    assert "another class list" in refused(tmp_path / "a", tmp_path / "c/train")
    os.truncate(tmp_path / "b/train/train-000001.tar", 700)
    assert "train-000001.tar" in refused(tmp_path / "b")


# ------------------------------------------------------------------------------------- all of them


def test_a_class_absent_from_validation_shifts_nothing(plain):
    train, val = imagenet(plain)
    assert_equal_to(plain, open_source(str(train), str(val), str(kaggle(plain.parent))))
    for file in (plain / "val" / WNIDS[0]).iterdir():
        file.unlink()
    listed = open_source(str(as_csv(plain, "train")), str(as_csv(plain, "val")))
    assert listed.classes == WNIDS
    assert content(listed, "val") == answer(plain, "val")
    assert {s.label for s in listed.splits["val"]} == {1, 2}
    for file in (plain / "train" / WNIDS[1]).iterdir():
        file.unlink()
    assert f"'{WNIDS[1]}'" in refused(as_csv(plain, "train"), as_csv(plain, "val"))


def test_a_slice_of_a_file_that_has_shrunk(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    assert Slice(tmp_path / "x", 2, 3).read() == b"234"
    with pytest.raises(ValueError, match="got 2 bytes at 8; need 3"):
        Slice(tmp_path / "x", 8, 3).read()


def test_a_folder_that_contains_itself_is_refused(plain):
    (plain / "train" / WNIDS[0] / "loop").symlink_to(plain / "train")
    with pytest.raises(ValueError, match="loop, a link to a folder that contains it"):
        image_folder(plain / "train")


def test_a_folder_that_cannot_be_read_is_refused(plain, monkeypatch):
    scandir = os.scandir

    def deny(place):
        if Path(place).name == WNIDS[1]:
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", deny)  # root can read a folder of mode 0
    assert f"{WNIDS[1]}: Permission denied" in refused(plain / "train")


def test_a_missing_image_leaves_no_split(plain, tmp_path):
    source = open_source(str(as_csv(plain, "train")))
    next((plain / "train" / WNIDS[2]).iterdir()).unlink()
    with pytest.raises(ValueError, match=r"1 file that.*\n.*cannot be read \(No such file"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()


def test_paths_that_are_not_a_source(tmp_path):
    assert "which does not exist; need" in refused(tmp_path / "absent")
    assert "absent.csv" in refused(tmp_path / "absent.csv")
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt" in refused(tmp_path / "notes.txt")
    (tmp_path / "nothing").mkdir()
    assert "without any image" in refused(tmp_path / "nothing")
    assert "does not exist" in refused(tmp_path / "nothing", tmp_path / "absent")


def test_sources_are_light_to_import():
    heavy = {"torch", "PIL", "scipy", "pyarrow", "sklearn"}
    code = (
        f"import sys, ds_classifier.data.convert.sources; sys.exit(str({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_the_command_line_takes_val_labels(plain, tmp_path):
    train, val = imagenet(plain)
    script = ROOT / "launch" / "make_shards.py"
    command = [script, "convert", train, tmp_path / "out", "--val", val, "--val_labels"]
    done = run_python(*command, devkit_archive(tmp_path), cwd=tmp_path)
    assert done.code == 0, done.output
    assert "9 images of 3 classes" in done.output
    assert "5 images of 3 classes" in done.output
    assert_equal_to(plain, open_source(str(tmp_path / "out")))


def test_a_class_that_is_not_utf_8_is_refused(tmp_path):
    """Use Latin-1 in the name of a folder and in classnames.txt, and a surrogate in a .jsonl."""
    for name in (b"cat", b"caf\xe9"):
        folder = os.path.join(os.fsencode(tmp_path / "images"), name)
        os.makedirs(folder)
        with open(os.path.join(folder, b"0.jpg"), "wb") as file:
            file.write(fake_image(0))
    assert r"images: got the class 'caf\udce9', which is not UTF-8" in refused(tmp_path / "images")
    (tmp_path / "list.jsonl").write_text(
        f'{{"path": "images/cat/0.jpg", "label": "{chr(92)}udce9"}}\n'
        '{"path": "images/cat/1.jpg", "label": "cat"}'
    )
    shutil.copy(tmp_path / "images/cat/0.jpg", tmp_path / "images/cat/1.jpg")
    assert r"list.jsonl: got the class '\udce9'" in refused(tmp_path / "list.jsonl")
    assert class_lines("\ufeffcat\r\ncafé\n".encode(), "f") == ["cat", "café"]
    for text in (b"cat\ncaf\xe9\n", b"\xef\xbb\xbfcat\rcaf\xe9 "):
        with pytest.raises(ValueError, match=r"^f: got the class 'caf\\udce9', which is not UTF-8"):
            class_lines(text, "f")


def test_names_that_the_locale_garbles_are_refused(tmp_path, monkeypatch):
    folder = make_images(tmp_path / "images", ["café/a.png", "tea/b.png", "water/c.png"])
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "iso8859-1")
    with pytest.raises(ValueError, match="iso8859-1; need UTF-8; do: put PYTHONUTF8=1"):
        open_source(str(folder))
    shutil.rmtree(folder / "café")
    assert open_source(str(folder)).classes == ["tea", "water"]
