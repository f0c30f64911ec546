"""Shards read by stock WebDataset; sources; conversion; damage that verify finds."""

import io
import json
import os
import pickle
import re
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from made import make_images
from PIL import Image
from running import ROOT, run_python

from ds_classifier.common import files
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import DataSource, Sample, image_folder, open_source
from ds_classifier.data.foreign.verify import verify
from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.scan import scan_shard
from ds_classifier.data.shards import Manifest, Shard, open_shards


def test_stock_webdataset_reads_the_same_samples(folder, tmp_path):
    import webdataset

    convert(image_folder(folder), tmp_path / "data", samples_per_shard=4)
    opened = open_shards(tmp_path / "data" / "train")
    urls = [str(opened.path(i)) for i in range(len(opened.manifest.shards))]
    assert len(urls) == 4
    by_webdataset = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        by_webdataset[sample["__key__"]] = (sample["png"], int(sample["cls"]))
    assert len(by_webdataset) == 15
    for i, row in enumerate(opened.index):
        data = opened.path(row["shard"]).read_bytes()
        image = data[row["offset"] : row["offset"] + row["length"]]
        assert by_webdataset[opened.key(i)] == (image, row["label"])
    originals = {p.read_bytes(): p.parent.name for p in folder.rglob("*.png")}
    for image, label in by_webdataset.values():
        assert originals.pop(image) == opened.manifest.classes[label]
    assert not originals


def test_one_class_list_for_both_splits(folder, tmp_path):
    val = make_images(tmp_path / "val", ["emu/a.png", "cat/b.png"])
    convert(image_folder(folder, val), tmp_path / "data")
    train, held_out = (open_shards(tmp_path / "data" / split) for split in ("train", "val"))
    assert train.manifest.classes == held_out.manifest.classes == ["cat", "dog", "emu"]
    assert sorted(held_out.index["label"].tolist()) == [0, 2]
    make_images(val, ["fox/c.png"])
    with pytest.raises(ValueError, match="'fox'"):
        image_folder(folder, val)


def test_classes_by_file_prefix_as_the_reference_names_files(tmp_path):
    source = image_folder(make_images(tmp_path / "flat", ["b_1.png", "a_2.png", "a_1_x.png"]))
    assert source.classes == ["a", "b"]
    found = [(Path(s.name).name, s.label) for s in source.splits["train"]]
    assert found == [("a_1_x.png", 0), ("a_2.png", 0), ("b_1.png", 1)]


def test_linked_roots_and_deep_folders(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert image_folder(tmp_path / "link").classes == ["cat", "dog", "emu"]
    deep = image_folder(make_images(tmp_path / "deep", ["a/x/1.png", "a/y/1.png", "b/1.png"]))
    assert [s.label for s in deep.splits["train"]] == [0, 0, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "without any image"),
        (["a/1.png", "2_b.png"], "both directly"),
        (["nounderscore.png"], "before the first underscore"),
    ],
)
def test_folders_that_cannot_be_read_as_classes(tmp_path, names, message):
    (tmp_path / "odd").mkdir()
    with pytest.raises(ValueError, match=message):
        image_folder(make_images(tmp_path / "odd", names))


def test_folders_without_images_do_not_vanish(folder):
    (folder / "fox").mkdir()
    (folder / ".cache").mkdir()
    with pytest.raises(ValueError, match=r"fox.*without any image"):
        image_folder(folder)


def test_images_of_other_formats_do_not_vanish(folder, tmp_path):
    """A TIFF and a JPEG named .jfif are images of their class; HEIC among them is reported."""
    image = Image.new("RGB", (9, 9))
    image.save(folder / "cat" / "saved.jfif", format="JPEG")
    image.save(folder / "cat" / "scan.TIF", format="TIFF")
    names = [sample.name for sample in image_folder(folder).splits["train"]]
    convert(image_folder(folder), tmp_path / "data")
    assert open_shards(tmp_path / "data/train").manifest.samples == len(names)
    assert {"cat/saved.jfif", "cat/scan.TIF"} < set(names)
    (folder / "cat" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    with pytest.raises(ValueError, match=r"1 file that cannot be stored(.|\n)*cat/phone\.HEIC"):
        convert(image_folder(folder), tmp_path / "other")


def test_splits_are_not_taken_for_classes(tmp_path):
    names = ["train/cat/1.png", "train/dog/3.png", "val/cat/2.png"]
    source = image_folder(make_images(tmp_path / "both", names))
    assert source.classes == ["cat", "dog"]
    assert {split: len(samples) for split, samples in source.splits.items()} == {
        "train": 2,
        "val": 1,
    }


def test_digits_are_the_ones_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for split, first, count in (("train", 0, 1437), ("val", 1437, 360)):
        opened = open_shards(digits / split)
        assert opened.manifest.samples == count
        seen = set()
        for i, row in enumerate(opened.index):
            with open(opened.path(row["shard"]), "rb") as file:
                file.seek(row["offset"])
                image = np.asarray(Image.open(io.BytesIO(file.read(row["length"]))))
            number = int(opened.key(i).split("_")[-1])
            assert np.array_equal(image, np.round(bunch.images[number] * 255 / 16))
            assert row["label"] == bunch.target[number]
            seen.add(number)
        assert seen == set(range(first, first + count))
    with pytest.raises(ValueError, match="its own validation"):
        open_source("digits", "val")


# ------------------------------------------------------------------------------------- damage


@pytest.fixture
def split(folder, tmp_path) -> Path:
    convert(image_folder(folder), tmp_path / "data", samples_per_shard=20)
    return tmp_path / "data" / "train"


def member_offsets(tar: Path) -> list[int]:
    return [sample.entry[0] for sample in scan_shard(tar)]


def pack(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def damaged_shards() -> dict:
    """Return ways to damage a shard; stock WebDataset reads most of them without an error."""

    def cut_at_member(tar, data, offsets):
        return data[: offsets[7] - 512]

    def cut_between_samples(tar, data, offsets):
        return data[: offsets[7] - 3 * 512]

    def zero_between_samples(tar, data, offsets):
        at = offsets[7] - 3 * 512
        return data[:at] + bytes(512) + data[at + 512 :]

    def cut_in_header(tar, data, offsets):
        return data[: offsets[7] - 100]

    def cut_in_payload(tar, data, offsets):
        return data[: offsets[7] + 100]

    def flip_header_byte(tar, data, offsets):
        at = offsets[7] - 512 + 3
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    def zero_a_block(tar, data, offsets):
        at = offsets[7] - 512
        return data[:at] + bytes(512) + data[at + 512 :]

    def empty(tar, data, offsets):
        return b""

    def html(tar, data, offsets):
        return b"<html><body>404 not found</body></html>" * 100

    ways = (
        cut_between_samples,
        zero_between_samples,
        cut_at_member,
        cut_in_header,
        cut_in_payload,
        flip_header_byte,
        zero_a_block,
        empty,
        html,
    )
    return {way.__name__: way for way in ways}


@pytest.mark.parametrize("way", damaged_shards())
def test_a_damaged_shard_is_named_with_its_counts_or_loses_nothing(split, way):
    """verify reports every kind. Training refuses a changed size, and reads all samples if not."""
    tar, before = split / "train-000000.tar", ShardDataset(open_shards(split), image_size=8)
    whole = tar.read_bytes()
    offsets = member_offsets(tar)
    assert len(offsets) == 15
    expected = before[np.arange(15)]
    data = damaged_shards()[way](tar, whole, offsets)
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-000000\.tar"):
        list(scan_shard(tar))
    (problem,) = verify(split)
    found = 0 if way in ("empty", "html") else 7
    assert problem.startswith(f"{tar}: ")
    assert problem.endswith(f": got {found} whole samples; need 15")
    if len(data) != len(whole):
        with pytest.raises(ValueError, match=rf"got {len(data)} bytes; need {len(whole)} bytes wi"):
            open_shards(split)
    else:
        batch = ShardDataset(open_shards(split), image_size=8)[np.arange(15)]
        assert batch.weights.tolist() == 15 * [1.0]
        assert torch.equal(batch.images, expected.images)
    tar.write_bytes(whole + bytes(512))
    (problem,) = verify(split)
    assert problem.endswith(
        f"got {len(whole) + 512} bytes; need {len(whole)}, as the manifest says"
    )


def test_verify_finds_what_the_structure_does_not_show(split):
    tar = split / "train-000000.tar"
    assert verify(split, check_hash=True, check_decode=True) == []
    data = bytearray(tar.read_bytes())
    at = member_offsets(tar)[3] + 60
    data[at] ^= 0xFF
    tar.write_bytes(data)
    assert verify(split) == []
    assert any("sha256" in problem for problem in verify(split, check_hash=True))
    key = open_shards(split).key(3)
    assert any(key in problem for problem in verify(split, check_decode=True))


def test_verify_compares_labels_with_the_index(split):
    tar = split / "train-000000.tar"
    data = tar.read_bytes()
    cls = data.index(b".cls\0")
    block = (cls // 512 + 1) * 512
    tar.write_bytes(data[:block] + b"9" + data[block + 1 :])
    problems = verify(split)
    assert any("has label 9" in problem for problem in problems)
    assert any("index" in problem for problem in problems)


@pytest.mark.parametrize("text", [b"", b"-1", b"x", b"1.0"])
def test_invalid_labels_are_reported(tmp_path, text):
    pack(tmp_path / "x.tar", {"a/k1.png": b"", "a/k1.cls": b"0", "a/k2.png": b"", "a/k2.cls": text})
    with pytest.raises(ValueError, match=r"x\.tar.*a/k2.*"):
        list(scan_shard(tmp_path / "x.tar"))


@pytest.mark.parametrize("missing", [1, 3])
def test_images_without_a_label_are_reported(tmp_path, missing):
    """The label is missing in the middle, or at the end, where it could be in the next shard."""
    members = {"k1.png": b"", "k1.cls": b"0", "k2.png": b"", "k2.cls": b"1"}
    del members[list(members)[missing]]
    pack(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=r"x\.tar: k[12] has an image but no \.cls"):
        list(scan_shard(tmp_path / "x.tar"))


def test_keys_that_appear_twice_are_found(folder, tmp_path):
    """The same key appears in one shard, and in two."""
    convert(image_folder(folder), tmp_path / "data", samples_per_shard=5)
    split = tmp_path / "data" / "train"
    first, second, third = sorted(split.glob("*.tar"))
    third.write_bytes(first.read_bytes())
    data = bytearray(second.read_bytes())
    with tarfile.open(second) as tar:
        members = tar.getmembers()
        for member, like in zip(members[2:4], members[:2], strict=True):
            header = tarfile.TarInfo(like.name)
            header.size = member.size
            data[member.offset : member.offset + 512] = header.tobuf(tarfile.USTAR_FORMAT)
    second.write_bytes(data)
    in_one, *in_two = verify(split)
    assert re.match(rf"{second}: got member .* appears twice", in_one)
    in_two = [problem for problem in in_two if problem.endswith("appears twice")]
    assert len(in_two) == 5
    assert all(problem.startswith(str(third)) for problem in in_two)


def test_no_member_but_the_image_is_ever_decoded(tmp_path):
    """A pickle next to an image, and one with the name of an image, are never run."""

    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    evil = pickle.dumps(Evil())
    source = DataSource("s", ["a"], {"train": [Sample("x", 0, b"GIF8" + evil)]})
    convert(source, tmp_path / "data")
    split = tmp_path / "data" / "train"
    members = {"k.jpg": evil, "k.pkl": evil, "k.pyd": evil, "k.pt": evil, "k.cls": b"0"}
    pack(tmp_path / "x.tar", members)
    assert [sample.key for sample in scan_shard(tmp_path / "x.tar")] == ["k"]
    batch = ShardDataset(open_shards(split), image_size=8)[np.arange(1)]
    assert (batch.weights.tolist(), len(batch.bad)) == ([0.0], 1)
    assert len(verify(split, check_decode=True)) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../out.jpg", "/etc/x.jpg", "a/../../x.jpg"])
def test_members_that_leave_the_directory_are_refused(tmp_path, name):
    pack(tmp_path / "x.tar", {name: b""})
    with pytest.raises(ValueError, match="leads outside"):
        list(scan_shard(tmp_path / "x.tar"))


def test_opening_says_what_is_wrong_and_what_to_do(split, folder, tmp_path):
    unfinished = tmp_path / "half" / "train.partial"
    unfinished.mkdir(parents=True)
    (unfinished / "train-000000.tar").touch()
    for place, words in (
        (folder, ["folder of images", "ds-classifier convert"]),
        (tmp_path / "nowhere", ["does not exist", "ds-classifier convert"]),
        (split.parent, ["one level down", str(split)]),
        (unfinished, ["not finished", f"merge {unfinished.parent}"]),
    ):
        with pytest.raises(ValueError) as error:
            open_shards(place)
        for word in words:
            assert word in str(error.value)
    copy = tmp_path / "copy"

    def after(change) -> str:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(split, copy)
        change()
        with pytest.raises(ValueError) as error:
            open_shards(copy)
        return str(error.value)

    assert "no such file" in after(lambda: (copy / "train-000000.tar").unlink())
    assert "need" in after(lambda: os.truncate(copy / "train-000000.tar", 5000))
    assert "not a manifest" in after(lambda: (copy / "manifest.json").write_text("{}"))
    assert "index.npy" in after(lambda: (copy / "index.npy").unlink())
    assert "samples" in after(lambda: np.save(copy / "index.npy", open_shards(split).index[:3]))
    rows = np.array(open_shards(split).index)
    assert "sha256" in after(lambda: np.save(copy / "index.npy", rows[::-1]))

    def index_of(rows) -> None:
        """Write an index with a manifest that fits it."""
        np.save(copy / "index.npy", rows)
        manifest = open_shards(split).manifest
        manifest = replace(manifest, index_sha256=files.sha256(copy / "index.npy"))
        (copy / "manifest.json").write_text(manifest.to_json())

    for column, value in (("label", 3), ("label", -1), ("shard", 1), ("offset", 1 << 63)):
        other = rows.copy()
        other[column][5] = value
        assert "for sample 5, outside of" in after(partial(index_of, other))
    manifest = json.loads((split / "manifest.json").read_text())
    manifest["classes"] = ["changed", "by", "hand"]
    assert "fingerprint" in after(lambda: (copy / "manifest.json").write_text(json.dumps(manifest)))
    assert "without manifest.json" in after(lambda: (copy / "manifest.json").unlink())


def test_the_command_line(folder, tmp_path):
    script = ROOT / "launch" / "make_shards.py"
    done = run_python(script, "convert", folder, tmp_path / "out", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (0, 1), done.output
    assert "15 images of 3 classes in 1 shard," in done.output
    done = run_python(script, "verify", tmp_path / "out/train", "--hash", "--decode", cwd=tmp_path)
    assert (done.code, done.output) == (0, f"{tmp_path / 'out/train'}: no problems\n")
    os.truncate(tmp_path / "out/train/train-000000.tar", 5120)
    done = run_python(script, "verify", tmp_path / "out/train", cwd=tmp_path)
    train = tmp_path / "out/train"
    advice = f"do: restore the shards, or remove {train} and give the command that made it again"
    assert (done.code, done.lines[-1]) == (1, f"{train}: 1 problem; {advice}")
    assert "train-000000.tar: cut short or damaged at byte" in done.output
    assert done.lines[0].endswith(": got 2 whole samples; need 15")
    (tmp_path / "out/train/train-000000.tar").unlink()
    done = run_python(script, "verify", tmp_path / "out/train", cwd=tmp_path)
    assert done.lines[0].endswith("train-000000.tar: got no such file; need 15 samples")
    done = run_python(script, "convert", tmp_path / "absent", "data", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert "which does not exist" in done.output


def test_a_sample_reads_bytes_or_a_file(tmp_path):
    (tmp_path / "x.png").write_bytes(b"abc")
    assert Sample("x", 0, tmp_path / "x.png").read() == Sample("x", 0, b"abc").read() == b"abc"
    assert DataSource("s", ["a"], {}).classes == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        dict(classes=None),
        dict(classes="abc"),
        dict(classes=[1, 2, 3]),
        dict(image_size="64"),
        dict(shards=[]),
    ],
)
def test_manifests_with_wrong_types_are_refused(folder, tmp_path, change):
    convert(image_folder(folder), tmp_path / "data")
    path = tmp_path / "data/train/manifest.json"
    fields = json.loads(path.read_text()) | change
    made = Manifest(**{k: v for k, v in fields.items() if k in Manifest.__dataclass_fields__})
    object.__setattr__(made, "shards", [Shard(**shard) for shard in fields["shards"]])
    path.write_text(made.to_json())  # with a correct fingerprint
    with pytest.raises(ValueError, match="not a manifest of this program"):
        open_shards(tmp_path / "data/train")


def test_a_deeply_nested_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a manifest of this program"):
        open_shards(tmp_path)
