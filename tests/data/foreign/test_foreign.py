"""Shards made by other programs, in the layouts of timm, open_clip, img2dataset, CLIP_benchmark."""

import io
import json
import shlex
import tarfile

import numpy as np
import pytest
from layouts_of_others import (
    JPG,
    by_ours,
    by_stock,
    clip_benchmark,
    image,
    img2dataset,
    label_of,
    open_clip,
    problems,
    tar_of,
    timm,
)
from running import ROOT, launch, read_log, run_python

from ds_classifier.data.foreign.index import index
from ds_classifier.data.foreign.verify import verify
from ds_classifier.data.shards import open_shards


@pytest.mark.parametrize("name", ["", "_info.json"])
def test_timm_with_both_splits_from_its_info(tmp_path, name):
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


def test_timm_labels_can_be_in_the_json(tmp_path):
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
    index(str(folder), folder)  # the manifest of train/ is written next to its shards
    for split, theirs in (("train", "train"), ("val", "test")):
        shards = open_shards(folder / split)
        assert by_ours(shards) == by_stock(list((folder / theirs).glob("*.tar")))
        assert shards.manifest.classes == ["tench", "crane", "crane", "never seen"]
    train = open_shards(folder / "train").manifest
    assert train.location is None
    assert [s.name for s in train.shards] == [f"{i}.tar" for i in range(12)]
    assert open_shards(folder / "val").manifest.location == str(folder / "test")
    (folder / "train/nshards.txt").unlink()
    index(str(folder), folder)  # replaces the index
    train = open_shards(folder / "train").manifest
    assert [s.name for s in train.shards] == [f"{i}.tar" for i in range(12)]


def test_folders_of_splits_in_another_case(tmp_path):
    folder = clip_benchmark(tmp_path / "clip")
    (folder / "train").rename(folder / "Train")
    (folder / "test").rename(folder / "TEST")
    index(str(folder), tmp_path / "out")
    for split, theirs in (("train", "Train"), ("val", "TEST")):
        shards = open_shards(tmp_path / "out" / split)
        assert by_ours(shards) == by_stock(list((folder / theirs).glob("*.tar")))
        assert shards.manifest.classes == ["tench", "crane", "crane", "never seen"]


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
def test_open_clip_and_a_second_location_for_validation(tmp_path, name):
    folder, val = open_clip(tmp_path / "a"), open_clip(tmp_path / "b", (1,))
    found = index(str(folder / name), tmp_path / "out", val=str(val))
    assert {s.checked_by for s in found.values()} == {"sizes.json"}
    for split, place in (("train", folder), ("val", val)):
        opened = open_shards(tmp_path / "out" / split)
        assert by_ours(opened) == by_stock(sorted(place.glob("*.tar")))
        assert opened.manifest.classes == ["0", "1"]


def test_long_names_folders_and_other_members(tmp_path):
    """Index GNU and pax tars with names over 100 and 255 bytes, in any order, and other members."""
    long = "n" * 90 + "/" + "k" * 150
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [
            ("./", None),
            (f"{'d' * 95}/a.cls", b"1\n"),
            (f"{'d' * 95}/a.jpg", image(1)),
            ("b.JPG", image(2)),
            ("b.pyd", b"\0"),
            ("b.pkl", b"cos\nsystem\n(S'false'\ntR."),
            ("b.cls", b" 0 "),
            ("._b.jpg", b"mac"),
            ("__notes__/c.jpg", b"skipped by webdataset too"),
            ("readme.txt", b"about"),
            (f"{long}.json", b"{" * 100_000),
            (f"{long}.png", image(3, "PNG")),
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
            f"{'d' * 95}/a": (image(1), 1),
            "b": (image(2), 0),
            long: (image(3, "PNG"), 2),
        }


def test_indexed_shards_are_trained_on(tmp_path):
    folder = timm(tmp_path / "timm", lengths=(20, 20), val_lengths=(6,))
    script = ROOT / "launch" / "make_shards.py"
    done = run_python(script, "index", folder, tmp_path / "data", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (0, 3), done.output
    assert "40 images of 3 classes in 2 shards" in done.lines[0]
    assert f"at {folder}; counts agree with _info.json" in done.lines[0]
    assert "0.0 % of neighbours share their class, 33" in done.lines[1]
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
    assert f"data        40 images (2 shards) in {tmp_path / 'data/train'}\n" in done.output
    assert "validation  6 images (1 shard) in " in done.output


def test_the_command_line(tmp_path):
    script = ROOT / "launch" / "make_shards.py"
    members = [(f"{i:03d}.{s}", {"jpg": JPG, "cls": str(i // 10).encode()}[s])
               for i in range(40) for s in ("jpg", "cls")]  # fmt: skip
    tar_of(tmp_path / "x.tar", members)
    done = run_python(script, "index", "x.tar", "out", "--workers", "1", cwd=tmp_path)
    assert done.code == 0, done.output
    assert "no metadata to compare the counts with" in done.lines[0]
    assert "92.3 % of neighbours share their class, 25.0 % in a random order" in done.lines[1]
    assert done.lines[1].endswith("do: train with --shuffle_shards lane")
    tar_of(tmp_path / "x.tar", [*members, ("z.jpg", JPG)])
    done = run_python(script, "index", "x.tar", "new", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 3), done.output
    assert done.lines[0].startswith("error: these shards cannot be used as they are")
    assert done.lines[1].endswith("x.tar: z has an image but no .cls")
    assert "do: pack these shards again with a label for every image" in done.lines[2]
    assert not (tmp_path / "new").exists()
    done = run_python(script, "index", "x.tar", "new", "--label", "txt", cwd=tmp_path)
    assert done.code == 2
    assert "need cls or json:KEY" in done.output
