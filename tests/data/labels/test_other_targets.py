"""Targets other than one class, and weights: from lists, parquet and arrays to batches."""

import csv
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ds_classifier.common import files
from ds_classifier.config import Settings
from ds_classifier.data.labels.targets import Targets
from ds_classifier.data.loader import ShardDataset, ValidationPositions, create_loader
from ds_classifier.data.order import SampleOrder
from ds_classifier.data.shards import Manifest, images_per_class, open_shards
from ds_classifier.data.splits import open_splits
from ds_classifier.training.setup import facts_of
from launch.make_shards import main

COUNT = 50
NAMES = ["bald", "hat", "smile", "young"]
random = np.random.RandomState(5)
HOT = (random.random((COUNT, 4)) < 0.4).astype(int)
HOT[7] = 0  # an image with no class
HOT[8] = 1
LOGITS = random.randn(COUNT, 3) * 4
SOFT = torch.softmax(torch.tensor(LOGITS), dim=1).numpy()
AGES = np.round(random.gamma(3.0, 15.0, COUNT), 1)
WEIGHTS = np.round(random.random(COUNT) * 3, 3)
PATHS = [f"images/{i:03d}.png" for i in range(COUNT)]


def pixels(number: int) -> np.ndarray:
    """Return an image that says its number."""
    return np.full((8, 8, 3), number, np.uint8)


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels(number)).save(data, "png")
    return data.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with images/, which is the current one."""
    (tmp_path / "images").mkdir()
    for i, path in enumerate(PATHS):
        (tmp_path / path).write_bytes(png(i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, columns: dict[str, list]) -> str:
    rows = list(zip(*columns.values(), strict=True))
    if name.endswith(".jsonl"):
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        Path(name).write_text("\n".join(lines))
        return name
    with open(name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return name


def as_parquet(name: str, columns: dict[str, pa.Array], features: dict | None = None) -> str:
    table = pa.table({"image": pa.array([png(i) for i in range(COUNT)])} | columns)
    if features:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pyarrow.parquet.write_table(table, name, row_group_size=20)
    return name


def run(*arguments: str) -> None:
    assert main(["convert", *arguments, "--samples_per_shard", "15", "--workers", "2"]) == 0


def refused(capsys, *arguments: str) -> str:
    assert main(["convert", *arguments, "--workers", "1"]) == 2
    return capsys.readouterr().err


def batches_of(split, workers: int = 0) -> dict[int, tuple[np.ndarray, float]]:
    """Return (label, importance) of every image by its number, as the loader delivers them."""
    positions = ValidationPositions(split.manifest.samples, batch=8, rank=0, world_size=1)
    dataset = ShardDataset(split, image_size=8)
    found = {}
    for batch in create_loader(dataset, positions, workers=workers):
        assert batch.to("cpu").importance.dtype == torch.float32
        for image, label, weight, importance in zip(
            batch.images, batch.labels, batch.weights, batch.importance, strict=True
        ):
            if weight:
                number = int(image[0, 0, 0])
                assert number not in found
                found[number] = (label.numpy(), float(importance))
    return found


def both(out: str = "out", workers: int = 0) -> dict[int, tuple[np.ndarray, float]]:
    train, val = (batches_of(open_shards(Path(out, s)), workers) for s in ("train", "val"))
    assert not train.keys() & val.keys()
    assert sorted(train | val) == list(range(COUNT))
    return train | val


# ------------------------------------------------------------------------------- several classes


@pytest.mark.parametrize("workers", [0, 2])
def test_columns_of_1_and_minus_1_become_vectors(place, capsys, workers):
    signs = (HOT * 2 - 1).T.tolist()
    write("attr.csv", {"image_id": PATHS, **dict(zip(NAMES, signs, strict=True))})
    run("attr.csv", "out", "--targets", "classes", "--val", "20%")
    found = both(workers=workers)
    for number, (label, importance) in found.items():
        assert label.dtype == np.float32
        assert label.tolist() == HOT[number].tolist()
        assert importance == 1
    split = open_shards("out/train")
    assert split.manifest.classes == NAMES
    assert (split.manifest.targets, split.manifest.weighted) == (Targets("classes"), False)
    lowest = [int(row.argmax()) for row in split.targets]
    assert split.index["label"].tolist() == lowest
    here = np.array([HOT[number] for number in batches_of(split)])
    assert images_per_class(split) == dict(zip(NAMES, here.sum(axis=0).tolist(), strict=True))
    said = capsys.readouterr().out
    none = f", {(here.sum(axis=1) == 0).sum()} of none"
    assert f"{len(here)} images of 4 classes ({here.sum() / len(here):.1f} per image{none})" in said
    assert main(["verify", "out/train", "out/val", "--hash", "--decode"]) == 0


SETS = [[name for name, hot in zip(NAMES, row, strict=True) if hot] for row in HOT]
CLASSES = {
    "COCO": ("a.jsonl", {"file_name": PATHS, "labels": SETS}, ""),
    "bars": ("a.csv", {"path": PATHS, "tags": list(map("|".join, SETS))}, ""),
    "blanks": ("a.csv", {"path": PATHS, "tags": list(map(" ".join, SETS)), "x": PATHS}, "tags"),
    "pandas": ("a.tsv", {"path": PATHS, "label": list(map(str, SETS))}, ""),
    "text of numbers": (
        "a.csv",
        {"path": PATHS, "tags": [";".join(map(str, np.flatnonzero(row))) for row in HOT]},
        "",
    ),
    "numbers": (
        "a.jsonl",
        {"path": PATHS, "label": [np.flatnonzero(row).tolist() for row in HOT]},
        "",
    ),
    "0 or 1 for each": ("a.jsonl", {"path": PATHS, "label": HOT.tolist()}, ""),
}


@pytest.mark.parametrize("layout", CLASSES)
def test_lists_of_classes_become_vectors(place, layout):
    name, columns, label = CLASSES[layout]
    path = write(name, columns)
    if name.endswith(".tsv"):
        Path(path).write_text(
            Path(path).read_text().replace(",label", "\tlabel").replace("png,", "png\t")
        )
    more = ["--columns", f"path=path,label={label}"] if label else []
    run(path, "out", "--targets", "classes", *more)
    split = open_shards("out/train")
    order = [NAMES.index(c) if c in NAMES else int(c) for c in split.manifest.classes]
    for number, (label, _) in batches_of(split).items():
        assert label.tolist() == HOT[number][order].tolist()


@pytest.mark.parametrize("kind", ["names", "features", "vectors", "columns"])
def test_parquet_of_several_classes(place, kind):
    features = None
    if kind == "columns":
        columns = {name: pa.array(HOT[:, i].astype(bool)) for i, name in enumerate(NAMES)}
    elif kind == "vectors":
        columns = {"label": pa.array(HOT.tolist())}
    elif kind == "names":
        columns = {"tags": pa.array(SETS)}
    else:
        columns = {"label": pa.array([np.flatnonzero(row).tolist() for row in HOT])}
        features = {"label": {"feature": {"names": NAMES, "_type": "ClassLabel"}}}
    as_parquet("a.parquet", columns, features)
    more = ["--columns", f"label={','.join(NAMES)}"] if kind == "columns" else []
    run("a.parquet", "out", "--targets", "classes", *more)
    split = open_shards("out/train")
    expected = ["0", "1", "2", "3"] if kind == "vectors" else NAMES
    assert sorted(split.manifest.classes) == expected
    order = [expected.index(c) for c in split.manifest.classes]
    for number, (label, _) in batches_of(split).items():
        assert label.tolist() == HOT[number][order].tolist()


# --------------------------------------------------------------------------------- probabilities


def write_soft(kind: str) -> list[str]:
    """Write a source of probabilities or logits; return the arguments of convert."""
    numbers = {"logits": LOGITS, "soft": SOFT}[kind.split()[0]]
    columns = dict(zip(("p_a", "p_b", "p_c"), numbers.T, strict=True))
    if kind.endswith("csv"):
        write("a.csv", {"path": PATHS, "id": range(COUNT), **columns})
        return ["a.csv", "--columns", "path=path,label=p*"]  # not the paths
    if kind.endswith("jsonl"):
        return [write("a.jsonl", {"path": PATHS, "label": numbers.tolist()})]
    if kind.endswith("text"):
        return [write("a.csv", {"path": PATHS, "label": [str(row) for row in numbers.tolist()]})]
    if kind.endswith("parquet"):
        return [as_parquet("a.parquet", {"teacher": pa.array(numbers.tolist())})]
    if kind.endswith("found"):
        write("a.csv", {"photo": PATHS, "pw": [1 + i for i in range(COUNT)], **columns})
        return ["a.csv", "--columns", "label=p*,weight=pw"]
    if kind.endswith("columns"):
        parts = {name: pa.array(column) for name, column in columns.items()}
        as_parquet("a.parquet", {"w": pa.array(range(1, 1 + COUNT)), **parts})
        return ["a.parquet", "--columns", "label=*,weight=w"]
    images = np.stack([pixels(i) for i in range(COUNT)])
    if kind.endswith("npz"):
        np.savez("a.npz", images=images, labels=numbers.astype(np.float32))
        return [str(Path.cwd() / "a.npz")]  # by its path: what was read is kept by its name
    here = Path.cwd()
    np.save("a.npy", images)
    np.save("teacher.npy", numbers)
    return [str(here / "a.npy"), "--labels", str(here / "teacher.npy")]


@pytest.mark.parametrize("kind", ["soft", "logits"])
@pytest.mark.parametrize(
    "form", ["csv", "found", "columns", "jsonl", "text", "parquet", "npz", "npy"]
)
def test_probabilities_and_logits(place, kind, form):
    run(*write_soft(f"{kind} {form}"), "--targets", kind, "out", "--val", "20%")
    for number, (label, _) in both().items():
        np.testing.assert_allclose(label, SOFT[number], rtol=1e-5, atol=1e-7)
    split = open_shards("out/train")
    assert split.manifest.targets == Targets("soft")
    assert split.manifest.classes == (
        ["p_a", "p_b", "p_c"] if form in ("csv", "found", "columns") else ["0", "1", "2"]
    )
    assert split.index["label"].tolist() == split.targets.argmax(axis=1).tolist()
    assert np.abs(split.targets.sum(axis=1, dtype=np.float64) - 1).max() < 1e-6


# ---------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("form", ["csv", "parquet", "npz"])
def test_values_are_put_into_bins_of_the_training_images(place, form, capsys):
    if form == "csv":
        arguments = [write("a.csv", {"path": PATHS, "age": AGES.tolist()})]
    elif form == "parquet":
        arguments = [as_parquet("a.parquet", {"age": pa.array(AGES)})]
    else:
        np.savez("a.npz", x=np.stack([pixels(i) for i in range(COUNT)]), age=AGES)
        arguments = [str(place / "a.npz"), "--columns", "image=x,label=age"]
    run(*arguments, "out", "--targets", "values", "--bins", "6", "--val", "30%")
    split = open_shards("out/train")
    targets, train = split.manifest.targets, batches_of(split)
    assert (targets.kind, targets.name, len(targets.values)) == ("values", "age", 6)
    ages = np.array([AGES[number] for number in train])
    bins = np.array([int(label) for label, _ in train.values()])
    for k in range(6):
        inside = ages[bins == k]
        assert abs(len(inside) - len(ages) / 6) <= 1  # no two ages are the same here
        np.testing.assert_allclose(targets.values[k], inside.mean())
        low, high = split.manifest.classes[k].split(" to ")
        assert float(low) == inside.min()
        assert inside.max() <= float(high)
    assert list(targets.edges) == [float(c.split(" to ")[0]) for c in split.manifest.classes[1:]]
    val = open_shards("out/val")
    assert (val.manifest.targets, val.manifest.classes) == (targets, split.manifest.classes)
    outside = 0
    for number, (label, _) in batches_of(val).items():
        expected = sum(AGES[number] >= edge for edge in targets.edges)
        assert (label.dtype, int(label)) == (np.int64, expected)
        outside += not ages.min() <= AGES[number] <= ages.max()
    said = capsys.readouterr().out
    assert (f"{outside} validation value" in said) == (outside > 0)
    assert f"{len(ages)} images in 6 bins of age ({ages.min():g} to {ages.max():g})" in said


def test_equal_values_share_a_bin(place, capsys):
    stars = [1, 1, 1, 1, 1, 1, 2, 3, 3, 4] * 5
    write("a.csv", {"path": PATHS, "stars": stars})
    val = ["path,stars", f"{PATHS[0]},0.5", f"{PATHS[1]},2.5", f"{PATHS[2]},9"]
    (place / "held").mkdir()
    for i in range(3):
        (place / f"held/{i}.png").write_bytes(png(200 + i))
    rows = [f"held/{i}.png,{row.split(',')[1]}" for i, row in enumerate(val[1:])]
    Path("val.csv").write_text("\n".join([val[0], *rows]))
    run("a.csv", "out", "--targets", "values", "--val", "val.csv")
    split = open_shards("out/train")
    assert split.manifest.classes == ["1 to 2", "2 to 3", "3 to 4", "4 to 4"]
    assert split.manifest.targets.values == (1, 2, 3, 4)
    found = {number: int(label) for number, (label, _) in batches_of(split).items()}
    assert found == {i: value - 1 for i, value in enumerate(stars)}
    held = {number: int(label) for number, (label, _) in batches_of(open_shards("out/val")).items()}
    assert held == {200: 0, 201: 1, 202: 3}
    said = capsys.readouterr().out
    assert "4 bins of stars, not 20: many of its values are equal" in said
    assert "2 validation values outside of 1 to 4, the training values" in said


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("form", ["csv", "parquet", "npz"])
def test_weights_reach_the_batch(place, form, workers):
    labels = (np.arange(COUNT) % 3).tolist()
    if form == "csv":
        write("a.csv", {"path": PATHS, "label": labels, "w": WEIGHTS})
        arguments = ["a.csv", "--columns", "weight=w"]
    elif form == "parquet":
        as_parquet("a.parquet", {"label": pa.array(labels), "w": pa.array(WEIGHTS)})
        arguments = ["a.parquet", "--columns", "weight=w"]
    else:
        images = np.stack([pixels(i) for i in range(COUNT)])
        np.savez("a.npz", images=images, labels=labels, w=WEIGHTS)
        arguments = [str(place / "a.npz"), "--columns", "image=images,label=labels,weight=w"]
    run(*arguments, "out", "--val", "20%")
    for number, (label, importance) in both(workers=workers).items():
        assert int(label) == number % 3
        assert importance == np.float32(WEIGHTS[number])
    split = open_shards("out/train")
    assert split.manifest.weighted
    assert split.sample_weights.dtype == np.float32


def test_weights_of_npz_are_not_said_to_be_left_out(place, capsys):
    images = np.stack([pixels(i) for i in range(COUNT)])
    np.savez("a.npz", images=images, labels=np.arange(COUNT) % 3, w=WEIGHTS)
    run("a.npz", "out", "--columns", "weight=w")
    assert "not taken" not in capsys.readouterr().out


def test_weights_with_npy_are_refused(place, capsys):
    np.save("a.npy", np.stack([pixels(i) for i in range(COUNT)]))
    np.save("labels.npy", np.arange(COUNT) % 3)
    message = refused(capsys, "a.npy", "out", "--columns", "weight=w")
    assert "need an .npz, whose arrays have names" in message


@pytest.mark.parametrize("no", [0, -1])
def test_lists_of_0_and_1_of_two_classes_are_no_class_numbers(place, no):
    hot = np.array([[i % 2, i // 2 % 2] for i in range(COUNT)])
    lines = [
        {"path": path, "labels": np.where(row, 1, no).tolist()}
        for path, row in zip(PATHS, hot, strict=True)
    ]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("a.jsonl", "out", "--targets", "classes")
    split = open_shards("out/train")
    assert sorted(split.targets.tolist()) == sorted(hot.tolist())


# ------------------------------------------------------------------------------------- on disk


def files_in(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def vectors(place) -> list[str]:
    """The arguments of a conversion of several classes with weights, but for OUT."""
    write("a.jsonl", {"path": PATHS, "label": SETS, "w": WEIGHTS.tolist()})
    return ["a.jsonl", "--targets", "classes", "--columns", "weight=w"]


def test_parts_give_the_bytes_of_one_run(place, vectors, capsys):
    run(*vectors, "out")
    run(*vectors, "parts", "--part", "1/2")
    run(*vectors, "parts", "--part", "0/2")
    assert "of another source" in refused(capsys, "a.jsonl", "parts", "--targets", "classes")
    assert main(["merge", "parts"]) == 0
    assert files_in(place / "parts") == files_in(place / "out")
    assert sorted(p.name for p in (place / "out/train").iterdir()) == [
        *("index.npy", "manifest.json", "targets.npy"),
        *(f"train-{i:06d}.tar" for i in range(4)),
        "weights.npy",
    ]
    before = files_in(place / "out")
    run(*vectors, "out")  # nothing to do
    assert files_in(place / "out") == before
    without = refused(capsys, "a.jsonl", "out", "--targets", "classes", "--samples_per_shard", "15")
    assert "already holds something else" in without
    more = [[*names, "young"] if names == ["bald"] else names for names in SETS]
    assert more != SETS  # with the same first classes
    write("a.jsonl", {"path": PATHS, "label": more, "w": WEIGHTS.tolist()})
    assert "already holds something else" in refused(
        capsys, *vectors, "out", "--samples_per_shard", "15"
    )


ORDER = dict(seed=1, lanes=2, shuffle_shards=None)


def test_training_in_random_order_sees_the_targets_of_its_images(place, vectors):
    run(*vectors, "out")
    split = open_shards("out/train")
    order = SampleOrder([shard.samples for shard in split.manifest.shards], **ORDER)
    dataset = ShardDataset(split, image_size=8, order=order)
    batch = dataset[np.arange(COUNT, 2 * COUNT)]
    numbers = batch.images[:, 0, 0, 0].tolist()
    assert sorted(numbers) == list(range(COUNT))
    order_of_classes = [NAMES.index(name) for name in split.manifest.classes]
    assert batch.labels.tolist() == HOT[numbers][:, order_of_classes].tolist()
    assert batch.importance.tolist() == WEIGHTS[numbers].astype(np.float32).tolist()


def test_shards_are_converted_again_with_their_targets(place, vectors):
    run(*vectors, "out", "--val", "20%")
    run("out", "again")
    first, second = both("out"), both("again")
    assert all(np.array_equal(first[i][0], second[i][0]) for i in first)
    assert {i: w for i, (_, w) in first.items()} == {i: w for i, (_, w) in second.items()}
    write("ages.csv", {"path": PATHS, "age": AGES.tolist()})
    run("ages.csv", "bins", "--targets", "values", "--val", "20%")
    run("bins", "bins2")
    assert open_shards("bins2/val").manifest.targets == open_shards("bins/val").manifest.targets


def test_damage_is_found(place, vectors, capsys):
    run(*vectors, "out")
    whole = place / "out/train"

    def after(change) -> str:
        shutil.rmtree(place / "copy", ignore_errors=True)
        shutil.copytree(whole, place / "copy")
        change(place / "copy")
        with pytest.raises(ValueError) as error:
            open_shards(place / "copy")
        assert main(["verify", str(place / "copy")]) == 2
        assert "do: remove" in str(error.value) or "do: bring" in str(error.value)
        return str(error.value)

    targets = np.load(whole / "targets.npy")
    assert "got no such file" in after(lambda f: (f / "targets.npy").unlink())
    assert "got sha256" in after(lambda f: np.save(f / "targets.npy", 1 - targets))
    assert "got uint8 of shape [50, 3]; need uint8 of shape [50, 4]" in after(
        lambda f: np.save(f / "targets.npy", targets[:, :3])
    )
    assert "weights.npy: got sha256" in after(
        lambda f: np.save(f / "weights.npy", np.ones(COUNT, np.float32))
    )


def test_the_manifest_says_which(place, vectors):
    run(*vectors, "out")
    text = Path("out/train/manifest.json").read_text()
    fields = json.loads(text)
    assert fields["targets"] == {"kind": "classes"}
    assert fields["targets_sha256"] == files.sha256(Path("out/train/targets.npy"))
    assert Manifest.from_json(text).to_json() == text
    manifest = Manifest.from_json(text)
    others = {
        replace(manifest, **changes).fingerprint
        for changes in ({}, {"targets_sha256": "0"}, {"weights_sha256": "0"})
    }
    assert len(others) == 3
    write("class.csv", {"path": PATHS, "label": [i % 2 for i in range(COUNT)]})
    run("class.csv", "plain")
    text = Path("plain/train/manifest.json").read_text()
    assert "targets" not in text
    assert "weight" not in text
    assert Manifest.from_json(text).targets == Targets()


def test_a_run_records_its_targets(place, vectors):
    run(*vectors, "out")
    resolved = SimpleNamespace(settings=Settings(), shaping={})
    facts = facts_of(resolved, open_shards("out/train"))
    assert facts["targets"] == {"kind": "classes"}
    write("class.csv", {"path": PATHS, "label": [i % 2 for i in range(COUNT)]})
    run("class.csv", "plain")
    assert "targets" not in facts_of(resolved, open_shards("plain/train"))


def test_targets_as_json():
    for targets in (Targets(), Targets("soft"), Targets("values", (1.0, 2.5), (2.0,), "age")):
        assert Targets.from_json(json.loads(json.dumps(targets.to_json()))) == targets
    for fields in ({"kind": "several"}, {"kind": "values", "values": [1], "edges": [1]}):
        with pytest.raises(ValueError, match="need one"):
            Targets.from_json(fields)


# -------------------------------------------------------------------------------------- refusals


def table(**columns) -> dict[str, list]:
    return {"path": PATHS[:2], **columns}


REFUSED = {
    "a number": (table(age=[1.5, 2]), [], "do: --targets values"),
    "a list": (table(label=["['a', 'b']", "['c']"]), [], "do: --targets classes"),
    "columns": (table(a=[0, 1], b=[1, 1]), [], "do: --targets classes"),
    "no number": (table(age=["x", 2]), ["values"], "a.csv:2: got value 'x'; need a finite number"),
    "equal numbers": (table(age=[3, 3]), ["values"], "age is 3 in all training images"),
    "nan": (table(age=[3, "nan"]), ["values"], "a.csv:3: got value 'nan'"),
    "sum": (table(label=[".5 .5", ".5 .6"]), ["soft"], "a.csv:3: got '.5 .6', of which the least"),
    "below 0": (table(label=["1.5|-.5", ".5|.5"]), ["soft"], "a.csv:2: got '1.5|-.5'"),
    "length": (table(label=[".5 .5", ".2 .2 .6"]), ["soft"], "a.csv:3: got 3 numbers; need 2"),
    "one": (table(label=["1", "1"]), ["soft"], "a.csv:2: got '1'; need a number for each"),
    "words": (table(label=["a b", "c d"]), ["logits"], "need a list of finite numbers"),
    "0, 1, -1": (table(a=[0, 1], b=[1, -1]), ["classes"], "a.csv:3: got 0 and -1; need 0 and 1"),
    "parts": (table(a=[0.5, 1], b=[1, 1]), ["classes", "label=a,b"], "or --targets soft"),
    "no column": (table(a=[0, 1], b=[1, 0]), ["classes", "label=a,c"], "got label=c; a.csv has"),
    "no class": (table(tags=["", ""]), ["classes"], "in which no image has a class"),
    "two values": (table(a=[0, 1], b=[1, 0]), ["values", "label=a,b"], "2 columns for label"),
    "weight": (table(c=["x", "y"], w=[1, -1]), ["class", "weight=w"], "a.csv:3: got weight -1"),
    "weights": (table(c=["x", "y"], w=[0, 0]), ["class", "weight=w"], "got weight 0 in all rows"),
    "large": (table(c=["x", "y"], w=[1, 1e39]), ["class", "weight=w"], "a.csv:3: got weight '1e+"),
    "tiny": (table(c=["x", "y"], w=[1, 1e-60]), ["class", "weight=w"], "a.csv:3: got weight 1e-60"),
    "huge": (table(age=[-1e308, 1e308]), ["values"], "a.csv:2: got value '-1e+308'; need 1e+30 at"),
    "all 0": (table(a=[0, 0], b=[0, 0]), ["classes", "label=a,b"], "images without any class"),
    "weights of train": (
        table(a=[1, 1], b=[1, 0], w=[0, 1], split=["train", "val"]),
        ["classes", "label=a,b,weight=w"],
        "weight 0 for all training images",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_list_cannot_hold_is_refused(place, capsys, case):
    columns, flags, words = REFUSED[case]
    write("a.csv", columns)
    names = ["--targets", "--columns"]
    given = [word for pair in zip(names, flags, strict=False) for word in pair]
    message = refused(capsys, "a.csv", "out", *given)
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("label", "flags", "words"),
    [
        ([0.5] * COUNT, [], "do: cast the columns, or name others with --columns; or --targets va"),
        (SETS, [], "or --targets classes"),
        (SETS, ["--targets", "soft"], "need a list of numbers for --targets soft"),
        (SOFT.tolist(), ["--targets", "classes"], "need a list of class names or numbers"),
        (["a"] * COUNT, ["--targets", "values"], "need a number for --targets values"),
        ([[0.5, 0.5], [1.0]] * (COUNT // 2), ["--targets", "soft"], "need one shape"),
    ],
)
def test_what_parquet_cannot_hold_is_refused(place, capsys, label, flags, words):
    as_parquet("a.parquet", {"label": pa.array(label)})
    message = refused(capsys, "a.parquet", "out", *flags)
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("labels", "flags", "words"),
    [
        (SOFT, [], "do: --targets classes, soft or logits"),
        (AGES, [], "do: --targets values"),
        (AGES, ["--targets", "soft"], "need numbers of shape [N, K]"),
        (SOFT, ["--targets", "values"], "need numbers of shape [N], for --targets values"),
        (SOFT, ["--targets", "classes"], "need 0 or 1 for each class"),
        (SOFT[:, :1], ["--targets", "logits"], "need a number for each of several classes"),
    ],
)
def test_what_arrays_cannot_hold_is_refused(place, capsys, labels, flags, words):
    np.savez("a.npz", images=np.stack([pixels(i) for i in range(COUNT)]), labels=labels)
    message = refused(capsys, str(place / "a.npz"), "out", *flags)
    assert words in message
    assert f"{place / 'a.npz'}: labels" in message
    assert message.count("\n") == 1


def test_an_index_of_foreign_shards_keeps_one_class(place, capsys):
    with tarfile.open("s-000000.tar", "w") as tar:
        for name, data in (("1.png", png(1)), ("1.json", b'{"labels": ["a", "b"]}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert main(["index", str(place / "s-000000.tar"), "out", "--label", "json:labels"]) == 2
    message = capsys.readouterr().err
    assert "need one class" in message
    assert "convert the list with --targets classes" in message


def test_other_sources_and_splits_are_refused(place, capsys, vectors):
    assert "--targets: got soft with digits" in refused(capsys, "digits", "o", "--targets", "soft")
    assert "--targets: got soft with images" in refused(capsys, "images", "o", "--targets", "soft")
    assert "--bins: got 5 with --targets class" in refused(capsys, "a.jsonl", "o", "--bins", "5")
    write("one.csv", {"path": PATHS, "label": [NAMES[i % 4] for i in range(COUNT)]})
    run(*vectors, "several")
    run("one.csv", "one")
    settings = Settings(data_dir="several/train", val_data_dir="one/train", image_size=8)
    with pytest.raises(ValueError, match="got one class per image in one/train; need several cl"):
        open_splits(settings)
