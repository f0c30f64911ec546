"""Lists of images and labels: .csv, .tsv, .jsonl, and .txt with a path and a label in each line.

Kaggle's lists name an image by its id, without suffix or folder; an imagefolder's metadata.csv or
metadata.jsonl of Hugging Face has file_name; Tiny ImageNet's val_annotations.txt and Caffe's lists
have no line of names.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ds_classifier.common.text import count
from ds_classifier.data.convert.formats import ALL_SUFFIXES, image_files, is_image_file
from ds_classifier.data.convert.samples import NamedSample, files_under, is_passed_over
from ds_classifier.data.convert.split_names import kinds_in
from ds_classifier.data.labels.reading import (
    HOT,
    named_columns,
    read_labels,
    read_weights,
    refuse_numbers,
    refuse_other_kind,
    several_for_one,
)
from ds_classifier.data.tars import printable

LISTS = (".csv", ".tsv", ".jsonl", ".txt")
MAX_NAMED = 5  # columns in a message
LONGEST_LINE = 1 << 20  # bytes of a first line that is looked at, in a file that may be no list
ROWS_LOOKED_AT = 1000  # of a list beside images
LABEL_NAMES = {
    *("label", "labels", "label_name", "class", "classes", "class_name", "classname", "class_id"),
    *("category", "categories", "category_name", "category_id", "target", "species", "breed"),
}
SPLIT_NAMES = {"split", "set", "subset", "dataset", "partition", "phase", "fold", "usage"}
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")  # text that str(int(text)) does not change; 01 is a name
_HELD_OUT = re.compile(r"val|test|dev", re.IGNORECASE)
_SUFFIXES = "|".join(map(re.escape, ALL_SUFFIXES))
_IMAGE_FIRST = re.compile(rf"(.+(?:{_SUFFIXES}))\s*[\s,;]\s*(\S.*)", re.IGNORECASE)  # path, label
_NUMBER = re.compile(r"[-+.\de]*")
_PART = re.compile(  # HAM10000_images_part_1, images_001
    r"(?:^|[^a-z])(?:part|images?|imgs?|photos?|batch|fold|folder|dir|set|data)[^a-z]*\d$",
    re.IGNORECASE,
)
_NUMBERS = re.compile(r"[-+.\d]+(\s+[-+.\d]+)+")

Row = tuple[int, Mapping[str, object]]  # line number, and the values by column


class _Columns(NamedTuple):
    """The columns that are read, and the place that finds the files.

    labels: several for targets with a column for each class. weight: "" without weights.
    """

    path: str
    labels: list[str]
    weight: str
    files: _Files | _FilesBelow


def listed_files(
    path: Path, columns: Mapping[str, str], splits: Sequence[str], targets: str = "class"
) -> tuple[dict[str, list[NamedSample]], list[str], list[str]]:
    """Return the images in a list by their split, the columns of labels, and remarks for the user.

    Classes are integers if all labels are.
    columns: names of columns for "path", "label" and "weight"; those not given are found if that is
    clear. "label" may name several, with commas or a pattern, for targets that have many.
    targets: what the labels are, one of `labels.targets.ASKED`.
    splits: those to take, "train", "val" or both. A list without a column of splits is of the
    first. Otherwise rows of "test" are those for validation, if none has "val".
    Raises ValueError for columns that are not clear, and for a line without image, file or label.
    """
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"{path}: got no images; need a path and a label in every line")
    by_split, remarks = _by_split(path, rows, columns, splits, targets)
    taken = [row for rows in by_split.values() for row in rows]
    chosen = _choose(path, taken, columns, targets)
    images = iter(_images(path, taken, chosen, targets))
    of_split = {split: list(islice(images, len(rows))) for split, rows in by_split.items()}
    if len(chosen.labels) > 1:
        remarks.append(f"classes: the {len(chosen.labels)} columns {_some(chosen.labels)}")
    return of_split, chosen.labels, remarks


def _some(names: Sequence[str]) -> str:
    """Return the first names for a message."""
    return ", ".join(map(printable, names[:MAX_NAMED])) + ", ..." * (len(names) > MAX_NAMED)


def _images(path: Path, rows: list[Row], chosen: _Columns, targets: str) -> list[NamedSample]:
    """Return the images of rows."""
    files = chosen.files
    images = []
    first: dict[str, tuple[int, object]] = {}  # path as written -> its line and label
    for line, row in rows:
        image, label = row.get(chosen.path), row.get(chosen.labels[0])
        if isinstance(image, bool) or not isinstance(image, str | int) or image == "":
            raise ValueError(f"{path}:{line}: got no path; need the path of an image")
        image = str(image)
        if len(chosen.labels) > 1:
            label = [row.get(name) for name in chosen.labels]
        if targets == "class":
            refuse_other_kind(f"{path}:{line}", label)
        text = isinstance(label, str | int) and not isinstance(label, bool) and str(label).strip()
        if targets == "class" and not text:
            raise ValueError(
                f"{path}:{line}: got label {label!r} for {image}; need a class name or an "
                "integer; do: label the image, or remove its line"
            )
        file = files.find(image)
        if file is None:
            raise ValueError(
                f"{path}:{line}: got {image}, but there is no file {files.folder / image}; need "
                "an absolute path, or one relative to the list's folder; do: correct or remove it"
            )
        earlier, other = first.setdefault(image, (line, label))
        if other != label:
            raise ValueError(
                f"{path}:{line}: got label {label!r} for {image}, and {other!r} in line "
                f"{earlier}; need one line per image; do: remove one of them"
            )
        images.append(NamedSample(image, label, file))
    labels = [image.class_name for image in images]

    def where(row: int) -> str:
        return f"{path}:{rows[row][0]}"

    if targets != "class":
        labels = read_labels(targets, labels, where, columns=len(chosen.labels) > 1)
    else:
        refuse_numbers(str(path), chosen.labels[0], labels)
        labels = [str(label).strip() for label in labels]
        if all(_INTEGER.fullmatch(label) for label in labels):
            labels = [int(label) for label in labels]
    weights: list[float] | list[None] = [None] * len(rows)
    if chosen.weight:
        weights = read_weights([row.get(chosen.weight) for _, row in rows], where)
    return [
        image._replace(class_name=label, weight=weight)
        for image, label, weight in zip(images, labels, weights, strict=True)
    ]


def refuse_list_beside(folder: Path, above: Path, train: Path | None = None) -> None:
    """Raise ValueError if a list gives the images in a folder other classes than their names do.

    The list is in the folder or in one around it, up to `above`: ROOT/train.csv for ROOT/train.
    The message has what to convert instead. Lists that name no image of the folder are passed over.
    Beside several folders of classes, a list counts only if it plainly has other labels: see
    `_other_labels`. train: the training images, if the folder holds those for validation.
    """
    clear = _has_classes(folder)
    below: dict[Path, dict[str, list[Path]]] = {}
    around = [folder, *folder.parents][: len(folder.relative_to(above).parts) + 1]
    for place in (place for each in around for place in sorted(each.iterdir())):
        if place.suffix.lower() not in LISTS or place.name.startswith(".") or not place.is_file():
            continue
        places, rows = _places(place, below), []  # rows: those of the folder's images
        with suppress(ValueError, OSError):  # converting the list reports it
            for row in islice(_rows(place, LONGEST_LINE), ROWS_LOOKED_AT):
                found = _image_columns(places, row[1])
                inside = {n: f.relative_to(folder) for n, f in found.items() if folder in f.parents}
                if inside and len(row[1]) > 1:
                    rows.append((row, inside))
        if not rows:
            continue
        row, inside = rows[0]
        near = [place for place in places if isinstance(place, _Files)]
        ids = clear and not _image_columns(near, row[1])  # found in folders by their names
        labels = _labels_by_id(rows) if ids else []
        if not labels if ids else clear and not _other_labels(place, rows):
            continue
        if not clear and _class_of(inside) in {
            str(value) for name, value in row[1].items() if name not in inside
        }:
            continue  # the list and the folders say the same
        try:
            chosen = _choose(place, [row], {})
            columns, flag = f"{chosen.path} and {chosen.labels[0]}", ""
        except ValueError:
            image = next(iter(inside))
            _refuse_one_hot(place, [row for row, _ in rows], [n for n in row[1] if n != image])
            columns = ", ".join(row[1])
            label = next(name for name in labels or row[1] if name != image)
            others = f" ({', '.join(labels[1:])})" if labels[1:] else ""
            flag = f" --columns path={image},label={label}, or with another label{others}"
        raise ValueError(
            f"source: got the folder {place.parent}, which holds a list of its images, "
            f"{place.name} (columns {columns}); need one source of classes; do: convert "
            f"{f'{train} OUT --val {place}' if train else f'{place} OUT'}{flag}; or move the list "
            "away, to take the classes from the names of folders"
        )


def _has_classes(folder: Path) -> bool:
    """Return whether a folder holds no image directly, but several folders with images."""
    filled = 0
    for place in folder.iterdir():
        if is_passed_over(place.name):
            continue
        if not place.is_dir():
            if is_image_file(place):
                return False
        elif filled < 2:
            filled += next(image_files(place), None) is not None
    return filled > 1


def _class_of(inside: Mapping[str, Path]) -> str:
    """Return the class that the path of an image stands for: its folder, or a prefix."""
    first, *deeper = next(iter(inside.values())).parts
    return first if deeper else first.split("_")[0]


def _labels_by_id(rows: list[tuple[Row, dict[str, Path]]]) -> list[str]:
    """Return the columns that may be labels of images in several folders, named without these.

    rows: rows, each with its columns that name images. Empty if a column says the same as the
    folders, or if none looks like one of labels: see `_likely_labels`.
    """
    image = next(iter(rows[0][1]))
    others = [name for name in rows[0][0][1] if name != image]
    folders = [_class_of(inside) for _, inside in rows]
    parts = all(map(_PART.search, folders))  # names that stand for no class
    for name in others:
        values = [str(row[1].get(name)).strip() for row, _ in rows]
        pairs = set(zip(values, folders, strict=True))
        same = len(pairs) == len(set(values)) == len(set(folders))
        if same and not (parts and set(values) != set(folders)):
            return []
    return _likely_labels([row for row, _ in rows], others)


def _likely_labels(rows: list[Row], names: Sequence[str]) -> list[str]:
    """Return the columns that have a known name, or a text that is repeated; or the only one."""
    likely = []
    for name in names:
        values = {str(row.get(name)).strip() for _, row in rows}
        repeated = 1 < len(values) <= len(rows) * 2 / 3
        text = not all(map(_NUMBER.fullmatch, values))
        if str(name).lower() in LABEL_NAMES or (repeated and (text or len(names) == 1)):
            likely.append(name)
    return likely


def _other_labels(path: Path, rows: list[tuple[Row, dict[str, Path]]]) -> bool:
    """Return whether a list plainly has labels, and they are not one to one with the folders.

    rows: rows, each with its columns that name images. Labels are in a column of a known name, or
    in the only column beside that of the images if at least a third of them are repeated.
    """
    image = next(iter(rows[0][1]))
    others = [name for name in rows[0][0][1] if name != image]
    named = [name for name in others if str(name).lower() in LABEL_NAMES]
    label = (named or others)[0]
    pairs = {(str(row[1].get(label)).strip(), _class_of(inside)) for row, inside in rows}
    labels, folders = ({pair[i] for pair in pairs} for i in (0, 1))
    known = label in named and path.suffix.lower() != ".txt"  # .txt: named by `_rows_of_txt`
    if not known and (len(others) > 1 or len(labels) > len(rows) * 2 / 3):
        return False
    return len(pairs) > len(labels) or len(pairs) > len(folders)


# --------------------------------------------------------------------------------------- columns


def _choose(
    path: Path, rows: list[Row], columns: Mapping[str, str], targets: str = "class"
) -> _Columns:
    """Return the columns to read, by their names or by what the first row holds."""
    names = list(dict.fromkeys(name for _, row in rows[:100] for name in row))
    for role, name in columns.items():
        if role not in ("path", "label", "weight"):
            raise ValueError(
                f"--columns: got {role} with the list {path}; need path, label and weight"
            )
        if role != "label" and name not in names:
            raise ValueError(f"--columns: got {role}={name}; {path} has the columns {names}")
    first, places = rows[0][1], _places(path)
    image = columns.get("path") or ("path" if "path" in names else None)
    named = columns.get("label", "")
    if image is None:
        others = {*named.split(","), columns.get("weight")}
        found = [name for name in _image_columns(places, first) if name not in others]
        if any(place.find(name) for place in places for name in found[:1]):
            raise ValueError(
                f"{path}: got the image {found[0]} in the first line; need the names of columns "
                "there; do: put the line path,label before it"
            )
        if not found:
            raise ValueError(
                f"{path}: got columns {names}, of which none names a file in the first row; need "
                "the columns of paths and of labels; do: put the images next to the list, or add "
                "--columns path=NAME,label=NAME"
            )
        if len(found) > 1 and found[0] != "file_name":
            raise _unclear(path, names, "paths", found, f"path={found[0]},label=NAME")
        image = found[0]
    weight, labels = columns.get("weight", ""), []
    if "label" in columns:
        labels = named_columns(named, names, str(path), others=(image, weight))
        if len(labels) > 1 and targets in ("class", "values"):
            raise several_for_one(labels)
    elif "label" in names:
        labels = ["label"]
    if not labels:
        split, kinds = _split_column(rows)
        others = [name for name in names if name not in (image, weight, split if kinds else None)]
        labels = others
        if targets == "classes" and len(others) > 1:
            labels = _hot_columns(rows, others)
        if not labels or (targets != "classes" and len(labels) > 1):
            _refuse_one_hot(path, rows, others)
            example = next(iter(_likely_labels(rows, others) or others), "NAME")
            if targets in ("soft", "logits"):
                example = ",".join([*others[:2], "..."])
            raise _unclear(path, names, "labels", others, f"path={image},label={example}")
    files = next((p for p in places if p.find(str(first.get(image)))), places[0])
    return _Columns(image, labels, weight, files)


def _hot_columns(rows: list[Row], names: list[str]) -> list[str]:
    """Return the columns that have 0 or 1, or -1 or 1, in every row; none if there is only one."""
    values = {name: {str(row.get(name)).strip().lower() for _, row in rows} for name in names}
    hot = [name for name in names if values[name] <= HOT.keys()]
    return hot if len(hot) > 1 else []


def _refuse_one_hot(path: Path, rows: list[Row], names: list[str]) -> None:
    """Raise ValueError if each row has 0 or 1 in several columns, which stand for classes."""
    hot = _hot_columns(rows, names)
    if not hot:
        return
    shown = _some(hot)
    of_pandas = f"t['label'] = t[{hot[:MAX_NAMED]}{' + [...]' * (len(hot) > MAX_NAMED)}]"
    raise ValueError(
        f"{path}: got a column of 0 and 1 for each class ({shown}); need one column with the name "
        "of the class, and one class per image; do: --targets classes, if an image may have "
        "several; or write the name of the column that has the 1 into a column label, with pandas: "
        f"{of_pandas}.idxmax(axis=1)"
    )


def _unclear(path: Path, names: list[str], what: str, found: list[str], line: str) -> ValueError:
    could = ", ".join(found) or "none"
    return ValueError(
        f"{path}: got columns {names}, of which {could} could hold the {what}; need one column of "
        f"{what}; do: " + (f"name it, as in --columns {line}" if found else "add it to the list")
    )


def _image_columns(
    places: Sequence[_Files | _FilesBelow], row: Mapping[str, object]
) -> dict[str, Path]:
    """Return the columns of a row that name a file, with the file; those of known names first.

    Raises ValueError if the only columns that name images name several.
    """
    values = {
        name: str(row[name])
        for name in sorted(row, key=lambda name: name not in ("path", "file_name"))
        if name != "label" and isinstance(row[name], str | int) and not isinstance(row[name], bool)
    }
    problem = None
    for below in (False, True):
        found = {}
        nearby = [place for place in places if isinstance(place, _FilesBelow) == below]
        for name, value in values.items():
            try:
                file = next(filter(None, (place.find(value) for place in nearby)), None)
            except ValueError as error:
                if not below:
                    raise
                problem, file = problem or error, None
            if file:
                found[name] = file
        if found:
            return found
    if problem:
        raise problem
    return {}


def _places(
    path: Path, below: dict[Path, dict[str, list[Path]]] | None = None
) -> list[_Files | _FilesBelow]:
    """Return where the images of a list may be: next to it, in a folder with a likely name, below.

    below: see `_FilesBelow`, which is not for .txt, as that may be any text.
    """
    names = ["", path.stem, f"{path.stem}_images", "images"]
    if not _HELD_OUT.search(path.stem):  # those of train/ are no images for validation
        names += ["train", "train_images"]
    places: list[_Files | _FilesBelow] = [_Files(path.parent / name) for name in names]
    if path.suffix.lower() != ".txt":
        places.append(_FilesBelow(path, {} if below is None else below))
    return places


class _Files:
    """The files that the rows of a list name, with or without their suffix."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._by_stem: dict[str, dict[str, list[str]]] = {}  # folder -> stem -> names of images

    def find(self, image: str) -> Path | None:
        """Return a file; None if there is none. Raises ValueError if two have the stem `image`."""
        file = self.folder / image
        if os.path.isfile(file):
            return file
        if not image or "\0" in image:
            return None
        parent = str(file.parent)
        if parent not in self._by_stem:
            stems = self._by_stem[parent] = {}
            for name in sorted(os.listdir(parent)) if os.path.isdir(parent) else ():
                if name.lower().endswith(ALL_SUFFIXES):
                    stems.setdefault(os.path.splitext(name)[0], []).append(name)
        names = self._by_stem[parent].get(file.name, [])
        if len(names) > 1:
            raise ValueError(
                f"{parent}: got {names[0]} and {names[1]} for the image {image} of a list; need "
                "one file; do: write the suffix in the list"
            )
        return file.parent / names[0] if names else None


class _FilesBelow:
    """The images in all folders beside a list, by their names or stems: HAM10000's part_1, part_2.

    Folders that are named for another split than the list are left out.
    below: folder -> name, and stem -> images; the folder of the list is added when it is needed, so
    that several lists share one walk.
    """

    def __init__(self, path: Path, below: dict[Path, dict[str, list[Path]]]):
        self.folder = path.parent
        self._kinds = kinds_in(path.stem)
        self._below = below

    def find(self, image: str) -> Path | None:
        """Return an image; None if there is none. Raises ValueError if two have that name."""
        if self.folder not in self._below:
            found = self._below[self.folder] = {}
            for file in files_under(self.folder, lambda f: f.name.lower().endswith(ALL_SUFFIXES)):
                for name in (file.name, file.stem):
                    found.setdefault(name, []).append(file)
        files = [file for file in self._below[self.folder].get(image, ()) if self._takes(file)]
        if len(files) > 1:
            raise ValueError(
                f"{self.folder}: got {files[0].relative_to(self.folder)} and "
                f"{files[1].relative_to(self.folder)} for the image {image} of a list; need one "
                "file; do: write the folder and the suffix in the list"
            )
        return files[0] if files else None

    def _takes(self, file: Path) -> bool:
        first, *deeper = file.relative_to(self.folder).parts
        kinds = kinds_in(first) if deeper else set()
        return not (self._kinds and kinds) or not self._kinds.isdisjoint(kinds)


# ---------------------------------------------------------------------------------------- splits


def _split_column(rows: list[Row]) -> tuple[str | None, dict[str, str]]:
    """Return the column that is named for splits, and value -> "train", "val" or "test".

    The second is empty if a value is none of a split. Returns None and {} without such a column.
    """
    for name in rows[0][1]:
        if re.sub("[^a-z]", "", str(name).lower()) in SPLIT_NAMES:
            values = {str(row.get(name)).strip() for _, row in rows}
            kinds = {value: kinds_in(value) for value in values}
            if all(len(kind) == 1 for kind in kinds.values()):
                return name, {value: kind.pop() for value, kind in kinds.items()}
            return name, {}
    return None, {}


def _by_split(
    path: Path,
    rows: list[Row],
    columns: Mapping[str, str],
    splits: Sequence[str],
    targets: str,
) -> tuple[dict[str, list[Row]], list[str]]:
    """Return the rows of each split by the column that is named for splits, and remarks."""
    column, kinds = _split_column(rows)
    if column is None or column in columns.values():
        return {splits[0]: rows}, []
    if not kinds:
        chosen = _choose(path, rows, columns, targets)
        if column not in (chosen.path, *chosen.labels, chosen.weight):
            values = sorted({str(row.get(column)) for _, row in rows})
            shown = ", ".join(values[:3]) + ", ..." * (len(values) > 3)
            remark = f"{path.name}: the column {printable(column)} is not used ({printable(shown)})"
            return {splits[0]: rows}, [remark + "; splits are train, val and test"]
        return {splits[0]: rows}, []
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(kinds[str(row[1].get(column)).strip()], []).append(row)
    source = {"train": "train", "val": "val" if "val" in by_kind else "test"}
    if len(by_kind) == 1 or source[splits[0]] not in by_kind:
        return {splits[0]: rows}, []
    taken = {split: by_kind[source[split]] for split in splits if source[split] in by_kind}
    parts = [
        f"{count(len(rows), 'row')} of {source[split]} for {split}" for split, rows in taken.items()
    ]
    unused = sorted(by_kind.keys() - {source[split] for split in splits})
    parts += [f"{count(len(by_kind[kind]), 'row')} of {kind} not taken" for kind in unused]
    return taken, [f"by the column {printable(column)} of {path.name}: {', '.join(parts)}"]


# ------------------------------------------------------------------------------------------ rows


def _rows(path: Path, longest: int = -1) -> Iterator[Row]:
    """Yield the rows of a list with their columns.

    longest: do not read longer first lines; -1 for any length.
    """
    kind = path.suffix.lower()
    if longest > 0:
        with open(path, "rb") as file:
            if len(file.readline(longest)) == longest:
                return
    if kind == ".jsonl":
        yield from _rows_of_jsonl(path)
    elif kind == ".txt":
        yield from _rows_of_txt(path)
    else:
        yield from _rows_of_csv(path, "\t" if kind == ".tsv" else ",")


def _rows_of_csv(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV with a header (RFC 4180, UTF-8).

    delimiter: the usual one; the line of names may have another, as some spreadsheets write ";".
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            names = file.readline()
            file.seek(0)
            if delimiter not in names:
                delimiter = next((other for other in ";\t,|" if other in names), delimiter)
            rows = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            if not rows.fieldnames:
                raise ValueError(
                    f"{path}: got an empty file; need a first line with the names of the columns, "
                    "such as path,label; do: add it"
                )
            for row in rows:
                if None in row:
                    raise ValueError(
                        f"{path}:{rows.line_num}: got {len(row[None])} more values than columns; "
                        f'need "quotes" around a value with {delimiter!r}'
                    )
                yield rows.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got no valid UTF-8 CSV ({error}); do: save it again") from None


def _rows_of_jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line. Empty lines are skipped."""
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{line}: got no JSON ({error}); need an object") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line}: got {row!r}; need an object with path and label")
            yield line, row


def _rows_of_txt(path: Path) -> Iterator[Row]:
    """Yield path and label of each line: the first two fields between tabs.

    In a line without tabs, the label begins after the suffix of the image; after the last gap if
    the path has none. Empty lines are skipped.
    Raises ValueError for several numbers as label, which may be boxes, or labels of several kinds.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line, text in enumerate(file, start=1):
                text = text.strip()
                if not text:
                    continue
                if "\t" in text:
                    fields = text.split("\t")
                else:
                    match = _IMAGE_FIRST.fullmatch(text)
                    fields = match.groups() if match else text.rsplit(None, 1)
                    if match and _NUMBERS.fullmatch(fields[1]):
                        raise ValueError(
                            f"{path}:{line}: got {fields[1][:80]!r} for {fields[0]}; need one "
                            "label per image; do: give a .csv with a line of names, and name the "
                            "column of the label with --columns"
                        )
                if len(fields) < 2:
                    raise ValueError(
                        f"{path}:{line}: got {text[:80]!r}; need a path and a label in "
                        "every line; do: add the label, or give a .csv"
                    )
                yield line, {"path": fields[0].strip(), "label": fields[1].strip()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got no valid UTF-8 ({error}); do: save it again") from None
