"""Lists and parquet files whose columns have other names; lists found beside images."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ds_classifier.data.convert.sources import BOTH, open_source
from launch.make_shards import main

LABELS = ["cat", "dog", "cat", "eel", "dog"]


def image(number: int) -> bytes:
    """Return bytes that start like a JPEG. Sources do not decode images."""
    return b"\xff\xd8\xff" + np.random.RandomState(number).bytes(100 + number)


EXPECTED = Counter((image(i), label) for i, label in enumerate(LABELS))


def content(source, split: str = "train") -> Counter:
    return Counter((s.read(), source.classes[s.label]) for s in source.splits[split])


def put(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(image(i))


def write(path: Path, columns: dict[str, list]) -> Path:
    """Write a list with the given columns, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
        return path
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def refused(*arguments, **keywords) -> str:
    with pytest.raises(ValueError) as error:
        open_source(*map(str, arguments), **keywords)
    return str(error.value)


# ----------------------------------------------------------------------------------------- lists

NAMES = [f"{i}.jpg" for i in range(5)]
IDS = [0, 1, 2, 3, 4]
LAYOUTS = {  # folder of the images, name of the list, columns
    "imagefolder": (".", "metadata.csv", {"file_name": NAMES, "species": LABELS}),
    "imagefolder, jsonl": (".", "metadata.jsonl", {"file_name": NAMES, "label": LABELS}),
    "Kaggle's CIFAR-10": ("train", "trainLabels.csv", {"id": IDS, "label": LABELS}),
    "dog breeds": ("train", "labels.csv", {"id": IDS, "breed": LABELS}),
    "cassava": ("train_images", "train.csv", {"image_id": NAMES, "label": LABELS}),
    "plants": ("images", "train.csv", {"image_id": IDS, "labels": LABELS}),
    "validation": ("val", "val.tsv", {"class": LABELS, "img": NAMES}),
    "pandas": ("imgs", "a.csv", {"": IDS, "path": [f"imgs/{n}" for n in NAMES], "label": LABELS}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_as_people_have_them(tmp_path, layout):
    folder, name, columns = LAYOUTS[layout]
    put(tmp_path / folder, NAMES)
    path = write(tmp_path / name, columns)
    assert content(open_source(str(path))) == EXPECTED
    message = refused(tmp_path)  # the folder is offered its list
    assert f"do: convert {path} OUT; or move" in message


def test_lists_without_a_line_of_names(tmp_path):
    """Read Caffe's list, and Tiny ImageNet's validation split for a folder of training images."""
    put(tmp_path / "my images", NAMES)
    caffe = tmp_path / "caffe.txt"
    caffe.write_text("".join(f"my images/{i}.jpg {i % 3}\n" for i in range(5)))
    source = open_source(str(caffe))
    assert content(source) == Counter((image(i), str(i % 3)) for i in range(5))
    for label in LABELS:
        put(tmp_path / "train" / label / "images", NAMES)
        (tmp_path / "train" / label / f"{label}_boxes.txt").write_text("0.jpg\t0\t0\t62\t62\n")
    put(tmp_path / "val/images", NAMES)
    annotations = tmp_path / "val/val_annotations.txt"
    annotations.write_text("".join(f"{i}.jpg\t{c}\t0\t32\t44\t62\n" for i, c in enumerate(LABELS)))
    source = open_source(str(tmp_path / "train"), str(annotations))
    assert content(source, "val") == EXPECTED
    line = f"do: convert {tmp_path}/train OUT --val {annotations}; or"
    assert line in refused(tmp_path / "train", tmp_path / "val")
    shutil.rmtree(tmp_path / "my images")
    caffe.unlink()
    assert line in refused(tmp_path)


def test_columns_that_are_not_clear_are_asked_for(tmp_path):
    put(tmp_path, NAMES)
    path = write(tmp_path / "a.csv", {"file": NAMES, "class": LABELS, "by": ["me"] * 5})
    line = "--columns path=file,label=class"
    assert line in refused(path)
    assert f"do: convert {path} OUT {line}, or with another label" in refused(tmp_path)
    source = open_source(str(path), columns={"path": "file", "label": "class"})
    assert content(source) == EXPECTED
    assert "has the columns ['file', 'class', 'by']" in refused(path, columns={"label": "x"})
    assert "need path, label and weight" in refused(path, columns={"image": "file"})
    numbers = write(tmp_path / "b.csv", {"class": [4, 3, 2, 1, 0], "id": IDS})  # both name files
    assert "class, id could hold the paths" in refused(numbers)
    source = open_source(str(numbers), columns={"label": "class"})
    assert content(source) == Counter((image(i), str(4 - i)) for i in range(5))
    (tmp_path / "0.png").write_bytes(image(0))
    assert "got 0.jpg and 0.png for the image 0" in refused(numbers, columns={"label": "class"})
    assert "--columns: got" in refused("digits", columns={"label": "class"})


def test_lists_that_a_folder_is_not_offered(tmp_path):
    """Keep the class folders if the list says the same, or names none of their images."""
    for i, label in enumerate(LABELS):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"{i}.jpg").write_bytes(image(i))
    paths = [f"{label}/{i}.jpg" for i, label in enumerate(LABELS)]
    write(tmp_path / "same.csv", {"path": paths, "label": LABELS})
    write(tmp_path / "names.csv", {"class": ["cat"], "meaning": ["a small animal"]})
    (tmp_path / "README.txt").write_text("These are images.\n")
    (tmp_path / "empty.csv").touch()
    assert content(open_source(str(tmp_path))) == EXPECTED


def test_lists_beside_class_folders_that_are_not_of_classes(tmp_path):
    """Keep clear class folders, unless a list plainly has other labels in some of its rows."""
    for i, label in enumerate(LABELS):
        put(tmp_path / label, [])
        (tmp_path / label / f"{i}.jpg").write_bytes(image(i))
    paths = [f"{label}/{i}.jpg" for i, label in enumerate(LABELS)]
    write(tmp_path / "sizes.csv", {"path": paths, "width": [64] * 5, "height": [64] * 5})
    write(tmp_path / "meta.csv", {"file_name": paths, "caption": [f"a {i}" for i in range(5)]})
    write(tmp_path / "ids.csv", {"path": paths, "label": [LABELS.index(x) for x in LABELS]})
    (tmp_path / "hash.txt").write_text("".join(f"{p} {i:032x}\n" for i, p in enumerate(paths)))
    assert content(open_source(str(tmp_path))) == EXPECTED
    other = ["cat", "dog", "fox", "eel", "fox"]  # the first rows agree
    for columns in (
        {"path": paths, "width": [1] * 5, "Category": other},
        {"f": paths, "x": [*LABELS[1:], "cat"]},
    ):
        path = write(tmp_path / "other.csv", columns)
        assert f"do: convert {path} OUT" in refused(tmp_path)


HAM10000 = {"image_id": ["a0", "a1", "a2", "a3", "a4"], "dx": LABELS, "sex": [*"mmfff"], "age": IDS}


def ham10000(root: Path, suffix: str = ".csv", **columns: list) -> Path:
    """Write images into two folders that are no classes, and the list of their labels."""
    for i, name in enumerate(HAM10000["image_id"]):
        put(root / f"part_{i % 2 + 1}", [])
        (root / f"part_{i % 2 + 1}" / f"{name}.jpg").write_bytes(image(i))
    return write(root / f"metadata{suffix}", HAM10000 | columns)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_list_beside_several_folders_of_images(tmp_path, suffix):
    path = ham10000(tmp_path, suffix)
    message = refused(tmp_path)
    flag = "--columns path=image_id,label=dx"
    assert f"do: convert {path} OUT {flag}, or with another label (sex); or move" in message
    source = open_source(str(path), columns={"path": "image_id", "label": "dx"})
    assert content(source) == EXPECTED
    assert "dx, sex, age could hold the labels" in (message := refused(path))
    assert message.endswith(f"as in {flag}")
    of_folders = [["nv", "mel"][i % 2] for i in range(5)]  # parts are no classes even then
    path = ham10000(tmp_path, suffix, dx=of_folders)
    assert f"do: convert {path} OUT {flag}" in refused(tmp_path)


def test_a_column_for_each_class(tmp_path):
    names = [f"leaf{name}" for name in NAMES]
    put(tmp_path, names)
    hot = {label: [int(label == other) for other in LABELS] for label in ("cat", "dog", "eel")}
    path = write(tmp_path / "list.csv", {"image": names} | hot)
    message = refused(path)
    assert refused(tmp_path) == message
    assert "got a column of 0 and 1 for each class (cat, dog, eel); need one column" in message
    assert "label=" not in message
    assert message.endswith("pandas: t['label'] = t[['cat', 'dog', 'eel']].idxmax(axis=1)")
    assert len(open_source(str(path), columns={"label": "dog"}).splits["train"]) == 5


def test_a_list_of_ids_beside_classes(tmp_path):
    """Keep the folders if a column says the same, or if no column can be a label."""
    parts = ["part_1", "part_2", "part_1", "part_2", "part_1"]
    path = ham10000(tmp_path, folder=parts)
    assert open_source(str(tmp_path)).classes == ["part_1", "part_2"]
    for columns in ({"width": [3, 3, 4, 4, 4], "height": [5] * 5}, {"note": [*"abcde"]}):
        write(path, {"image_id": HAM10000["image_id"]} | columns)
        assert open_source(str(tmp_path)).classes == ["part_1", "part_2"]
    write(path, {"image_id": HAM10000["image_id"], "level": [0, 0, 1, 1, 0]})
    assert f"do: convert {path} OUT; or move the list" in refused(tmp_path)


def test_an_id_in_folders_must_be_of_one_image(tmp_path):
    path = ham10000(tmp_path)
    columns = {"path": "image_id", "label": "dx"}
    put(tmp_path / "part_2", ["a0.png"])
    message = refused(path, columns=columns)
    assert "got part_1/a0.jpg and part_2/a0.png for the image a0 of a list; need one" in message
    (tmp_path / "part_2").rename(tmp_path / "test_part")
    shutil.copy(tmp_path / "part_1/a0.jpg", tmp_path / "test_part/a1.png")
    path = path.rename(tmp_path / "train_list.csv")  # images of test_part are not its own
    assert "csv:3: got a1, but there is no file" in refused(path, columns=columns)


def test_a_list_beside_folders_of_splits(tmp_path):
    """Offer Kaggle's train.csv beside train/ and test/, but not a list that says the same."""
    put(tmp_path / "train", NAMES)
    put(tmp_path / "test", ["x.jpg"])
    path = write(tmp_path / "train.csv", {"id": IDS, "label": LABELS})
    message = refused(tmp_path)
    assert f"got the folder {tmp_path}, which holds a list of its images, train.csv" in message
    assert f"do: convert {path} OUT; or move" in message
    same = tmp_path / "same"
    for i, label in enumerate(LABELS):
        (same / "train" / label).mkdir(parents=True, exist_ok=True)
        (same / "train" / label / f"{i}.jpg").write_bytes(image(i))
    put(same / "val/cat", ["x.jpg"])
    paths = [f"train/{label}/{i}.jpg" for i, label in enumerate(LABELS)]
    write(same / "all.csv", {"path": paths, "label": LABELS})
    source = open_source(str(same))
    assert content(source) == EXPECTED
    assert content(source, "val") == Counter([(image(0), "cat")])


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_delimiters_of_spreadsheets(tmp_path, delimiter, suffix):
    put(tmp_path, ["a,b;c d.jpg", "1.jpg"])
    path = tmp_path / f"list{suffix}"
    path.write_text(f'path{delimiter}label\n"a,b;c d.jpg"{delimiter}cat\n1.jpg{delimiter}dog\n')
    assert content(open_source(str(path))) == Counter([(image(0), "cat"), (image(1), "dog")])


def test_gaps_in_the_paths_and_labels_of_a_txt(tmp_path):
    lines = {
        "my cat.jpg golden retriever": ("my cat.jpg", "golden retriever"),
        "a copy.png of it.jpg 3": ("a copy.png of it.jpg", "3"),
        "b.JPEG,great white shark": ("b.JPEG", "great white shark"),
        "c.png; eel": ("c.png", "eel"),
        "an id dog": ("an id.jpg", "dog"),
    }
    put(tmp_path, [name for name, _ in lines.values()])
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines))
    expected = Counter((image(i), label) for i, (_, label) in enumerate(lines.values()))
    assert content(open_source(str(path))) == expected
    path.write_text("c.png 0 12 33 40\n")
    assert "list.txt:1: got '0 12 33 40' for c.png; need one label" in refused(path)


WORDS = ["train", "Training", "val", "dev", "TEST"]


def test_a_column_of_splits(tmp_path):
    """Compare the rows of each split with the labels written; labels of other rows may lack."""
    put(tmp_path, NAMES[:4])
    lines = {"file": NAMES, "species": ["cat", "dog", "cat", "dog", ""], "Split": WORDS}
    path = write(tmp_path / "list.csv", lines)
    source = open_source(str(path))
    assert content(source) == Counter([(image(0), "cat"), (image(1), "dog")])
    assert content(source, "val") == Counter([(image(2), "cat"), (image(3), "dog")])
    assert source.remarks == (
        "by the column Split of list.csv: 2 rows of train for train, 2 rows of val for val, "
        "1 row of test not taken",
    )
    both = open_source(str(path), str(path))  # the list names its own splits
    assert [content(both, split) for split in BOTH] == [content(source, split) for split in BOTH]
    lines = {"path": NAMES[:4], "label": [1, 0, 1, 0], "data set": ["train"] * 2 + ["test"] * 2}
    source = open_source(str(write(tmp_path / "list.jsonl", lines)))
    assert content(source, "val") == Counter([(image(2), "1"), (image(3), "0")])


def test_a_column_of_splits_that_is_none(tmp_path):
    put(tmp_path, NAMES)
    one = write(tmp_path / "one.csv", {"file": NAMES, "kind": LABELS, "split": ["train"] * 5})
    source = open_source(str(one))
    assert (content(source), source.remarks) == (EXPECTED, ())
    folds = write(
        tmp_path / "folds.csv", {"path": NAMES, "label": LABELS, "split": [0, 1, 2, 3, 4]}
    )
    source = open_source(str(folds))
    assert content(source) == EXPECTED
    remark = (
        "folds.csv: the column split is not used (0, 1, 2, ...); splits are train, val and test"
    )
    assert source.remarks == (remark,)
    label = write(tmp_path / "label.csv", {"path": NAMES, "set": LABELS})
    assert content(open_source(str(label))) == EXPECTED
    words = write(tmp_path / "words.csv", {"path": NAMES, "split": WORDS, "label": LABELS})
    source = open_source(str(words), columns={"label": "split"})
    assert source.classes == sorted(WORDS)


# --------------------------------------------------------------------------------------- parquet

FINE, COARSE = ["cat", "dog", "eel"], ["mammal", "fish"]


def parquet(path: Path, columns: dict[str, list], names: dict[str, list]) -> Path:
    """Write a file as datasets does. names: the class names of the columns that are ClassLabels."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    images = ("img", "image")
    cells = [{"bytes": image(i), "path": f"{i}.jpg"} for i in range(5)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            name: pa.array(cells, kind) if name in ("img", "image") else v
            for name, v in columns.items()
        }
    )
    features = {name: {"names": n, "_type": "ClassLabel"} for name, n in names.items()}
    features |= {name: {"_type": "Image"} for name in columns if name in images}
    info = json.dumps({"info": {"features": features}})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": info}), path)
    return path


NUMBERS = [FINE.index(label) for label in LABELS]


def test_parquet_as_the_hub_has_it(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", {"img": [], "label": NUMBERS}, {"label": FINE}
    )  # cifar10
    assert content(open_source(str(path))) == EXPECTED
    columns = {"id": [9] * 5, "img": [], "breed": NUMBERS, "note": ["x"] * 5}
    path = parquet(tmp_path / "b.parquet", columns, {"breed": FINE})  # the only ClassLabel
    assert content(open_source(str(path))) == EXPECTED
    path = parquet(tmp_path / "c.parquet", {"image": [], "species": LABELS}, {})  # the only text
    columns = {"image": [], "species": LABELS, "more": [0] * 5}
    val = parquet(tmp_path / "val.parquet", columns, {"species": None})
    source = open_source(str(path), str(val), columns={"label": "species"})
    assert content(source) == content(source, "val") == EXPECTED
    assert source.classes == FINE


def test_a_column_of_parquet_that_is_taken_for_labels_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"image": [], "species": LABELS}, {})
    assert open_source(str(path)).remarks == ("labels: the column species",)
    assert open_source(str(path), columns={"label": "species"}).remarks == ()
    path = parquet(tmp_path / "b.parquet", {"image": [], "label": LABELS}, {})
    assert open_source(str(path)).remarks == ()
    for column, values in (
        ("image_id", [0, 0, 0, 0, 1]),
        ("id", IDS),
        ("index", IDS),
        ("note", NAMES),
    ):
        path = parquet(tmp_path / "c.parquet", {"image": [], column: values}, {})
        message = refused(path)
        assert f"got the column {column}, wh" in message
        assert message.endswith(f"add --columns label={column}")
        chosen = open_source(str(path), columns={"label": column})
        assert len(chosen.splits["train"]) == 5


def test_two_labels_in_parquet_are_asked_for(tmp_path, capsys):
    columns = {"img": [], "fine_label": NUMBERS, "coarse_label": [0, 0, 0, 1, 0]}
    names = {"fine_label": FINE, "coarse_label": COARSE}
    path = parquet(tmp_path / "cifar100.parquet", columns, names)
    assert "--columns image=img,label=fine_label" in refused(path)
    out = tmp_path / "out"
    chosen = ["--columns", "image=img,label=coarse_label"]
    assert main(["convert", str(path), str(out), *chosen]) == 0
    source = open_source(str(out))
    assert source.classes == COARSE
    expected = Counter((b, COARSE[label == "eel"]) for (b, label) in EXPECTED)
    assert content(source) == expected
    assert "has the columns" in refused(path, columns={"label": "x"})
    assert "need image, label and weight" in refused(path, columns={"path": "img"})
    assert "img of type struct" in refused(path, columns={"label": "img"})
    with pytest.raises(SystemExit):
        main(["convert", str(path), str(out), "--columns", "img"])
    assert "need path=NAME,label=NAME" in capsys.readouterr().err


def test_copies_of_a_file_are_not_in_both_splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    columns = {"image": [], "label": NUMBERS}
    train = parquet(folder / "train.parquet", columns, {"label": FINE})
    val = shutil.copy(train, folder / "validation.parquet")
    for places in ([folder], [train, val]):
        assert f"got {val} with the same bytes as {train}; need" in refused(*places)
    parquet(val, columns | {"label": NUMBERS[::-1]}, {"label": FINE})
    assert len(open_source(str(folder)).splits["val"]) == 5


@pytest.mark.parametrize("hidden", [-1, None])
def test_hidden_labels_of_a_test_split(tmp_path, hidden):
    """Convert the training split alone with the line that the message gives."""
    pa = pytest.importorskip("pyarrow")
    train = parquet(tmp_path / "train.parquet", {"image": [], "label": NUMBERS}, {"label": FINE})
    labels = pa.array([hidden] * 5, pa.int64())
    test = parquet(tmp_path / "test.parquet", {"image": [], "label": labels}, {"label": FINE})
    message = refused(tmp_path)
    assert f"{test}: got label {hidden} in all rows" in message
    assert message.endswith(f"do: leave this file out: convert {train} OUT --val 10%")
    assert refused(train, test).endswith(f": convert {train} OUT --val 10%")
    assert main(["convert", str(train), str(tmp_path / "out"), "--val", "40%"]) == 0
    parquet(tmp_path / "train-1.parquet", {"image": [], "label": NUMBERS}, {"label": FINE})
    end = f"out: move it out of {tmp_path}, then convert {tmp_path} OUT --val 10%"
    shutil.rmtree(tmp_path / "out")
    assert refused(tmp_path).endswith(end)
    assert "do: leave this file out" in refused(test)
