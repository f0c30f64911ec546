"""`convert --val 10%`: which images are held out, and what the shards record of it."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_sources import WNIDS, as_csv, as_parquet, imagenet, pack

from ds_classifier.data.convert import hold_out as module
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.hold_out import hold_out, parse_share
from ds_classifier.data.convert.samples import DataSource, Sample
from ds_classifier.data.convert.sources import image_folder, open_source
from ds_classifier.data.shards import open_shards
from launch.make_shards import main


def made(count: int, size: int = 40) -> list[bytes]:
    return [b"\xff\xd8\xff" + np.random.RandomState(i).bytes(size + i) for i in range(count)]


def in_memory(images: list[bytes]) -> DataSource:
    samples = [Sample(f"{i}.jpg", i % 3, data) for i, data in enumerate(images)]
    return DataSource("made", ["a", "b", "c"], {"train": samples})


def held(source: DataSource, percentage: float, **keywords) -> set[bytes]:
    """Return the bytes of the images held out; every image must be on one side."""
    splits = hold_out(source, percentage, **keywords).splits
    sides = {split: [s.read() for s in samples] for split, samples in splits.items()}
    everything = [s.read() for s in source.splits["train"]]
    assert sorted(sides["train"] + sides["val"]) == sorted(everything)
    assert not set(sides["train"]) & set(sides["val"])
    return set(sides["val"])


@pytest.mark.parametrize("size", [40, 20_000])
def test_the_side_of_an_image_depends_on_its_bytes_alone(size, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES_PER_TASK", 7)
    images = made(200, size)
    expected = held(in_memory(images), 25)
    assert held(in_memory(images), 25, workers=3) == expected
    shuffled = images + images[:50]  # copies, which are on the side of the image
    random.Random(0).shuffle(shuffled)
    assert held(in_memory(shuffled), 25, workers=2) == expected
    grown = held(in_memory(images + made(300, size)[200:]), 25)
    assert grown & set(images) == expected
    assert held(in_memory(images), 10) < expected < held(in_memory(images), 50)


@pytest.mark.parametrize("percentage", [0.5, 10, 50])
def test_the_share_is_held_out(percentage):
    count, share = 20_000, percentage / 100
    images = [f"{i}".encode() for i in range(count)]
    number = len(held(in_memory(images), percentage))
    assert abs(number - count * share) < 4 * (count * share * (1 - share)) ** 0.5


def test_the_sides_are_those_of_earlier_versions():
    small, large = made(60), made(60, 100_000)
    assert sorted(small.index(x) for x in held(in_memory(small), 10)) == [0, 23, 27, 30, 38, 54]
    assert sorted(large.index(x) for x in held(in_memory(large), 10)) == [9, 10, 19, 43, 56]


@pytest.fixture
def plain(tmp_path) -> Path:
    """Return a folder train/WNID/*.JPEG, some of whose images are not hashed whole."""
    for i, data in enumerate(made(60, 16_384 - 30)):
        file = tmp_path / "plain" / "train" / WNIDS[i % 3] / f"{WNIDS[i % 3]}_{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "plain" / "val").mkdir()
    return tmp_path / "plain"


def test_every_kind_of_source_holds_out_the_same_images(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES_PER_TASK", 7)
    convert(image_folder(plain / "train"), tmp_path / "shards")
    sources = {
        "folder": plain / "train",
        "list": as_csv(plain, "train"),
        "tar": imagenet(plain)[0],
        "parquet": as_parquet(plain, "train", tmp_path / "train.parquet"),
        "shards": tmp_path / "shards",
    }
    found = {kind: held(open_source(str(s)), 20, workers=2) for kind, s in sources.items()}
    assert 2 < len(found["folder"]) < 25
    assert all(images == found["folder"] for images in found.values()), found.keys()


def test_only_the_pieces_of_a_large_image_are_read(tmp_path, monkeypatch):
    """A file is held out or not by 16 KiB of it; a tar is not read as a whole either."""
    data = made(1, 1 << 20)[0]
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(pack({"a.jpg": data}))
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read as a whole"))
    sample = Sample("a", 0, tmp_path / "a.jpg")
    assert sample.pieces([0, 500_000], 9) == [data[:9], data[500_000:500_009]]
    for threshold in (0, 1 << 64):
        assert module._is_held(sample, threshold) == bool(threshold)


def test_images_that_cannot_be_read_are_left_for_the_conversion(plain, tmp_path):
    gone = next((plain / "train" / WNIDS[0]).iterdir())
    source = image_folder(plain / "train")
    gone.unlink()
    with pytest.raises(ValueError, match="cannot be read") as error:
        convert(hold_out(source, 20), tmp_path / "data")
    assert gone.name in str(error.value)
    assert not (tmp_path / "data" / "train").exists()


@pytest.mark.parametrize(
    ("text", "share"),
    [("10%", 10), ("5 %", 5), ("0.5%", 0.5), (".5%", 0.5), ("99.9%", 99.9)]
    + [(path, None) for path in ("10", "0.1", "data/10%", "./10%", "val", "%", "ten%")],
)
def test_a_share_is_told_from_a_path(text, share):
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["0%", "0.0 %", "100%", "120%", "-5%"])
def test_shares_that_hold_out_nothing_or_all_are_refused(text, plain, tmp_path, capsys):
    assert main(["convert", str(plain / "train"), str(tmp_path / "out"), f"--val={text}"]) == 2
    assert f"--val: got {text}; need more than 0% and less than 100%" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_split_and_a_second_validation_split_are_refused(plain, tmp_path, capsys):
    out, train = str(tmp_path / "out"), str(plain / "train")

    def refusal(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "holds out none; need one; do: hold out a larger" in refusal(train, out, "--val=0.001%")
    assert "holds out all; need fewer; do: hold out a sma" in refusal(train, out, "--val=99.999%")
    assert "which brings its own validation split of 360" in refusal("digits", out, "--val", "10%")
    answer = refusal(train, out, "--val", "10%", "--val_labels", "labels.csv")
    assert "--val_labels: got labels.csv with --val 10%" in answer
    assert "or a share such as 10%" in refusal(train, out, "--val", "0.1")
    convert(hold_out(image_folder(Path(train)), 20), tmp_path / "data")
    assert "its own validation split" in refusal(str(tmp_path / "data"), out, "--val", "10%")
    answer = refusal(str(tmp_path / "data" / "train"), out, "--val", "10%")
    assert "of which 20% were held out before" in answer


def test_the_command_records_the_share_and_refuses_another(plain, tmp_path, capsys):
    train, out = str(plain / "train"), tmp_path / "out"
    expected = held(image_folder(plain / "train"), 20)
    parts = ["--samples_per_shard", "9", "--workers", "2"]
    for i in range(2):
        assert main(["convert", train, str(out), "--val", "20%", "--part", f"{i}/2", *parts]) == 0
        assert main(["convert", train, str(out), "--val", "30%", "--part", "1/2", *parts]) == 2
        assert "conversion of another source, encoding, share or targets" in capsys.readouterr().err
    assert main(["merge", str(out)]) == 0
    split = open_shards(out / "val")
    counts = np.unique(split.index["label"], return_counts=True)[1]
    spread = f", 20% held out, {counts.min()} to {counts.max()} per class"
    assert spread in capsys.readouterr().out
    stored = {split.store.read(r["shard"], int(r["offset"]), int(r["length"])) for r in split.index}
    assert stored == expected
    for name in ("train", "val"):
        assert json.loads((out / name / "manifest.json").read_text())["held_out"] == "20%"
    again = ["convert", train, str(out), "--samples_per_shard", "9"]
    assert main([*again, "--val", "20.0%"]) == 0
    assert main([*again, "--val", "20.01%"]) == 2  # the same images are held out
    assert "converted with --val 20%, not with --val 20.01%" in capsys.readouterr().err
    assert main(again) == 2
    assert "converted with --val 20%, not without a share" in capsys.readouterr().err


def test_an_output_in_the_source_is_refused(plain, capsys):
    for out in (plain / "train", plain / "train" / "new"):
        assert main(["convert", str(plain / "train"), str(out), "--val", "20%"]) == 2
        assert f"OUT: got {out}, which is in the source" in capsys.readouterr().err
        assert not (out / "val").exists()


def test_classes_without_images_in_a_split_are_announced(plain, tmp_path, capsys):
    """All images of the first class are held out, and none of the second."""
    images = image_folder(plain / "train").splits["train"]
    chosen = held(DataSource("", WNIDS, {"train": images}), 30)
    for sample in images:
        in_val = sample.read() in chosen
        if (sample.label == 0 and not in_val) or (sample.label == 1 and in_val):
            sample.content.unlink()
    arguments = ["convert", str(plain / "train"), str(tmp_path / "out"), "--val", "30%"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"classes without images in train: 1 of 3 ({WNIDS[0]}); they cannot be lear" in printed
    assert f"classes without images in val: 1 of 3 ({WNIDS[1]}); no accuracy counts" in printed
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(plain / "train", tmp_path / "copy")
    assert main([*arguments[:3], "--val", str(tmp_path / "copy")]) == 0
    assert "without images" not in capsys.readouterr().out
