"""Parquet files as Hugging Face's datasets writes them: an image and a label in every row.

image: struct{bytes, path}, or binary, or lists within lists of numbers, [C, S, S] or [S, S, C], as
Array3D is. label: integer or text. The class names of integers come from
the ClassLabel in the schema's metadata, key "huggingface", if it exists. The columns may have other
names, such as img and fine_label.
Formats: Apache Parquet, read by pyarrow; https://huggingface.co/docs/datasets/about_arrow.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ds_classifier.common.files import sha256, size_of_file
from ds_classifier.data.arrays import to_npy
from ds_classifier.data.convert.formats import is_image_file
from ds_classifier.data.convert.other_kinds import refuse_pointer
from ds_classifier.data.convert.samples import NamedSample, PassedOver, files_under
from ds_classifier.data.convert.split_names import split_in
from ds_classifier.data.labels.reading import (
    named_columns,
    read_labels,
    read_weights,
    several_for_one,
)

PARQUET = ".parquet"
_TYPES = {
    "image": "struct with bytes, binary, or lists in lists of numbers",
    "label": "integer or text",
}
_ID = re.compile(  # a column that numbers or names the rows
    r"(.*(image|img|file|photo|row|sample|example)s?_?)?(id|idx|index|name|path|uuid|key)"
    r"|__index_level_0__|filename|url|md5|sha1|sha256|hash",
    re.IGNORECASE,
)
_PART = re.compile(r"(.*-)(\d+)-of-(\d+)(.*)")


class _Columns(NamedTuple):
    """The columns that are read: several of labels for targets with a column for each class.

    weight: "" without weights.
    """

    image: str
    labels: list[str]
    weight: str


class HiddenLabels(ValueError):
    """A file without any label, as sets on the hub have it for test images of a competition."""


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """The image in one row.

    Reading it reads its whole row group; each process keeps the row group it has read last.
    """

    file: Path
    column: str
    row_group: int
    row: int  # within the row group

    def read(self) -> bytes:
        return _row_group(self.file, self.column, self.row_group)[self.row].as_py()

    def size(self) -> int:
        """Return the size of the image in bytes. The first call for a file reads the whole file."""
        return int(_lengths(self.file, self.column)[self.row_group][self.row])

    def changed_ns(self) -> int:
        return os.stat(self.file).st_ctime_ns

    @property
    def origin(self) -> tuple[Path, int, int]:
        return self.file, self.row_group, self.row

    @property
    def group(self) -> tuple[str, int]:
        """The key of the row group, which is read as a whole: see `samples.Content`."""
        return str(self.file), self.row_group


@dataclass(frozen=True, slots=True)
class ParquetArray(ParquetCell):
    """The array in one row, of lists within lists. length: the bytes of its numbers."""

    length: int
    is_array = True

    def read(self) -> bytes:
        return to_npy(_array_group(self.file, self.column, self.row_group)[self.row])

    def size(self) -> int:
        return self.length


def read_parquet(
    files: list[Path], columns: Mapping[str, str], targets: str = "class"
) -> tuple[list[NamedSample], list[str] | None, str]:
    """Return the rows of the files of a split, the class names if they have them, and the column.

    The column of the labels is "" if it was given, or is called label.

    The class of a row is its class name, or an integer if the file has no class names.
    columns: names of columns for "image", "label" and "weight"; those not given are found if that
    is clear. "label" may name several, with commas or a pattern, for targets that have many.
    targets: what the labels are, one of `labels.targets.ASKED`.
    Raises ValueError for files that are damaged or differ in their class names, and for labels that
    are null or out of range, or that are all different in a column that is only taken for labels;
    HiddenLabels for a file whose labels are all null, or all -1.
    """
    images: list[NamedSample] = []
    classes = None
    for i, file in enumerate(files):
        rows, own_classes, label = _read_file(file, columns, targets)
        if i and own_classes != classes:
            raise ValueError(
                f"{file}: got other class names than {files[0]}; need the same in all files; do: "
                "convert one data set at a time"
            )
        classes = own_classes
        images += rows
    if not images:
        raise ValueError(f"{files[0]}: got no rows; need images; do: download it again")
    taken = "" if "label" in columns or label == "label" else label
    if targets == "class" and taken and not classes and _all_different(images):
        raise _no_label(files[0], taken, "whose values are all different")
    return images, classes, taken


def _all_different(images: Sequence[NamedSample]) -> bool:
    return len({image.class_name for image in images}) == len(images) > 1


def _no_label(path: Path, column: str, why: str) -> ValueError:
    return ValueError(
        f"{path}: got the column {column}, {why}, and no other that could hold the label; need "
        f"labels; do: if these are the labels, add --columns label={column}"
    )


def refuse_copies(train: list[Path], val: list[Path]) -> None:
    """Raise ValueError if a file of each split has the same bytes. Reads only files of equal size.

    The same images in files of other bytes are not found: that needs all images of both splits.
    """
    sizes = {file: size_of_file(file) for file in (*train, *val)}
    both = {sizes[file] for file in train} & {sizes[file] for file in val}
    hashes = {sha256(file): file for file in train if sizes[file] in both}
    for file in val:
        if sizes[file] in both and (copy := hashes.get(sha256(file))):
            raise ValueError(
                f"--val: got {file} with the same bytes as {copy}; need validation images that are "
                f"not trained on; do: convert {copy} OUT --val 10%, or name other files"
            )


def is_parquet(file: Path) -> bool:
    """Return whether a file has the suffix of parquet."""
    return file.suffix.lower() == PARQUET


def files_by_kind(folder: Path, passed: PassedOver) -> dict[str, list[Path]]:
    """Return the files under a folder by their split: "train", "val" or "test".

    The split is a word in the name of a file, or of a folder around it. If no name has such a word,
    all files are those of "". passed: see `files_under`.
    Raises ValueError if only some have such a word, if a file is missing, or if the files of a
    split lie in several folders.
    """
    by_kind = defaultdict(list)
    parts = defaultdict(set)
    for file in files_under(folder, lambda f: is_parquet(f) or is_image_file(f), passed):
        if not is_parquet(file):
            raise ValueError(
                f"source: got parquet files and an image ({file}) under {folder}; need one or the "
                "other; do: name the folder of one of them"
            )
        *parents, name = file.relative_to(folder).parts
        by_kind[split_in((name, *reversed(parents)))].append(file)
        if part := _PART.fullmatch(name):
            parts[file.parent, part[1], part[3], part[4]].add(int(part[2]))
    for (parent, prefix, total, _), numbers in parts.items():
        if numbers != set(range(int(total))):
            lacking = min(set(range(int(total))) - numbers, default=None)
            raise ValueError(
                f"source: got {len(numbers)} files {prefix}*-of-{total} in {parent}, without "
                f"number {lacking}; need all {int(total)}; do: download the rest"
            )
    for files in by_kind.values():
        if len(folders := sorted({file.parent for file in files})) > 1:
            raise ValueError(
                f"source: got parquet files of one split in {folders[0]} and {folders[1]}; need "
                "one folder per split, as several may hold the same images; do: convert "
                "PLACE/TRAIN OUT --val PLACE/VAL, with the folders or files of one of them"
            )
    if "" in by_kind and len(by_kind) > 1:
        raise ValueError(
            f"source: got {by_kind[''][0]} next to files of the splits {sorted(by_kind)[1:]}; "
            "need the split in every name, such as train-00000.parquet; do: name or move it"
        )
    return by_kind


def _pyarrow_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "source: got parquet files, which need pyarrow; do: pip install pyarrow"
        ) from None
    return pyarrow.parquet


def _read_file(
    path: Path, columns: Mapping[str, str], targets: str
) -> tuple[list[NamedSample], list[str] | None, str]:
    """Return the names and classes of the rows, the class names, and the column of the labels.

    Reads no image.
    """
    size_of_file(path)  # opening a FIFO would never return
    refuse_pointer(path)
    parquet = _pyarrow_parquet()
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            features = _features(path, schema.metadata or {})
            chosen = _choose(path, schema, features, columns, targets)
            image, (label, *more) = chosen.image, chosen.labels
            has_paths = "path" in _fields(schema.field(image).type)
            read = [*chosen.labels, *filter(None, [chosen.weight]), *[f"{image}.path"] * has_paths]
            classes = chosen.labels if more else _class_names(path, features.get(label))
            vectors = targets in ("soft", "logits") and not more
            length = None
            if _depth(schema.field(image).type) and file.num_row_groups:
                length = _array_group(path, image, 0)[0].nbytes
            rows = []
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=read, use_threads=False)
                names = [cell["path"] for cell in table[image].to_pylist()] if has_paths else []
                values = _array_group(path, label, group) if vectors else table[label].to_pylist()
                if more:
                    found = (table[name].to_pylist() for name in chosen.labels)
                    values = list(zip(*found, strict=True))
                elif not (group or vectors) and len(values) > 1 and _hidden(values):
                    raise HiddenLabels(
                        f"{path}: got label {values[0]} in all rows, as the hub has it for hidden "
                        "labels; need labels; do: leave this file out"
                    )
                weights = (
                    table[chosen.weight].to_pylist() if chosen.weight else [None] * len(values)
                )
                for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
                    name = f"{path}/{len(rows)}" + (f"_{names[i]}" if names and names[i] else "")
                    if targets == "class":
                        value = _class_of(value, classes, name)
                    cell = ParquetCell(path, image, group, i)
                    if length is not None:
                        cell = ParquetArray(path, image, group, i, length)
                    rows.append(NamedSample(name, value, cell, weight))
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None
    return _labelled(rows, targets, chosen, classes), classes, label


def _labelled(
    rows: list[NamedSample], targets: str, chosen: _Columns, classes: list[str] | None
) -> list[NamedSample]:
    """Return rows with their labels and weights read, which so far are as the file has them."""

    def where(row: int) -> str:
        return rows[row].name

    labels = [row.class_name for row in rows]
    several = len(chosen.labels) > 1
    if targets != "class":
        labels = read_labels(targets, labels, where, columns=several)
    if targets == "classes" and classes and not several:
        labels = [
            label if isinstance(label, np.ndarray) else _named(label, classes, where(i))
            for i, label in enumerate(labels)
        ]
    weights: list[float] | list[None] = [None] * len(rows)
    if chosen.weight:
        weights = read_weights([row.weight for row in rows], where)
    return [
        row._replace(class_name=label, weight=weight)
        for row, label, weight in zip(rows, labels, weights, strict=True)
    ]


def _hidden(values: Sequence[object]) -> bool:
    """Return whether all labels are null, or all -1."""
    return all(value is None for value in values) or all(value == -1 for value in values)


def _named(numbers: Sequence[int], classes: list[str], name: str) -> tuple[str, ...]:
    return tuple(str(_class_of(number, classes, name)) for number in numbers)


def _class_of(label: str | int | None, classes: list[str] | None, name: str) -> str | int:
    """Return the class of a row. Raises ValueError for a label that is null, empty or no class."""
    if isinstance(label, str):
        if not label.strip():
            raise ValueError(f"{name}: got label {label!r}; need a class name; do: remove the row")
        return label
    if label is None or not 0 <= label < len(classes or range(label + 1)):
        raise ValueError(
            f"{name}: got label {label}; need a class from 0"
            + (f" to {len(classes) - 1}" if classes else "")
            + "; do: remove the row"
        )
    return classes[label] if classes else label


def _choose(
    path: Path, schema, features: dict, columns: Mapping[str, str], targets: str
) -> _Columns:
    """Return the columns of images and labels: by the given names, by image and label, or by type.

    Raises ValueError if no column or several could be meant, and for columns of another type.
    """
    labels: list[str] = []

    def holds_label(kind) -> bool:
        return _holds_label(kind, targets, several=len(labels) > 1)

    def holds_image(kind) -> bool:
        flat = _is_bytes(kind) or _depth(kind) >= 2
        return flat or (bool(_fields(kind)) and _is_bytes(_fields(kind)["bytes"]))

    for role, name in columns.items():
        if role not in ("image", "label", "weight"):
            raise ValueError(
                f"--columns: got {role} with parquet ({path}); need image, label and weight"
            )
        if role == "label":
            others = columns.get("image", "image"), columns.get("weight")
            labels = named_columns(name, schema.names, str(path), others=others)
        elif name not in schema.names:
            raise ValueError(f"--columns: got {role}={name}; {path} has the columns {schema.names}")
    if len(labels) > 1 and targets in ("class", "values"):
        raise several_for_one(labels)
    chosen = []
    for role, holds in (("image", holds_image), ("label", holds_label)):
        given = labels[0] if role == "label" and labels else columns.get(role)
        name = given or (role if role in schema.names else None)
        if name is None:
            taken = {*chosen, columns.get("weight")}
            fitting = [n for n in schema.names if n not in taken and holds(schema.field(n).type)]
            names = [n for n in fitting if _is_class_label(features.get(n))]
            names = names if role == "label" and names else fitting
            if not names:
                raise _wrong_schema(path, f"columns {schema.names}, of which none holds the {role}")
            if len(names) > 1:
                line = ",".join([*(f"image={image}" for image in chosen), f"{role}={names[0]}"])
                raise ValueError(
                    f"{path}: got columns {schema.names}, of which {', '.join(names)} could hold "
                    f"the {role}; need one ({_TYPES[role]}); do: name it, as in --columns {line}"
                )
            name = names[0]
            if role == "label" and _ID.fullmatch(name) and not _is_class_label(features.get(name)):
                raise _no_label(path, name, "which seems to name the images")
        for each in labels if role == "label" and labels else [name]:
            if not holds(schema.field(each).type):
                raise _wrong_type(path, each, schema.field(each).type, role, targets)
        chosen.append(name)
    return _Columns(chosen[0], labels or chosen[1:], columns.get("weight", ""))


def _holds_label(kind, targets: str, *, several: bool) -> bool:
    """Return whether a column of this type may hold labels. several: it is one of several."""
    import pyarrow

    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    text, whole = types.is_string(kind) or types.is_large_string(kind), types.is_integer(kind)
    number = whole or types.is_floating(kind)
    if targets == "class":
        return text or whole
    if targets == "values":
        return number
    if several:
        return number or types.is_boolean(kind)
    if targets == "classes":
        return text or _is_list(kind)
    return _depth(kind) == 1


def _wrong_type(path: Path, name: str, kind, role: str, targets: str) -> ValueError:
    """Return the error for a column of another type, which says what it could be."""
    import pyarrow

    error = _wrong_schema(path, f"{name} of type {kind}")
    if role == "image":
        return error
    could = ""
    if pyarrow.types.is_floating(kind) and targets != "values":
        could = "--targets values, to learn bins of the number"
    elif _is_list(kind) and targets in ("class", "values"):
        could = (
            "--targets classes, for several classes, or --targets soft or logits, if it has a "
            "number for each class"
        )
    elif targets != "class":
        need = {"classes": "a list of classes", "values": "a number"}.get(
            targets, "a list of numbers"
        )
        return ValueError(
            f"{path}: got {name} of type {kind}; need {need} for --targets {targets}; do: name "
            "another column, as in --columns label=NAME, or drop --targets"
        )
    return ValueError(f"{error}; or {could}") if could else error


def _is_list(kind) -> bool:
    import pyarrow

    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_bytes(kind) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _depth(kind) -> int:
    """Return how deep lists of numbers are nested; 0 for anything else."""
    import pyarrow

    kind = getattr(kind, "storage_type", kind)  # of an extension type, such as Array3D
    depth, types = 0, pyarrow.types
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth if types.is_floating(kind) or types.is_integer(kind) else 0


def _fields(kind) -> dict:
    """Return name -> type of a struct's fields; empty if it is no struct with a field "bytes"."""
    import pyarrow

    fields = {field.name: field.type for field in kind} if pyarrow.types.is_struct(kind) else {}
    return fields if "bytes" in fields else {}


def _features(path: Path, metadata: dict[bytes, bytes]) -> dict:
    """Return the features that datasets has written to the schema, by column."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features")
        return dict(features or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise _wrong_schema(path, f"unreadable metadata 'huggingface' ({error})") from None


def _is_class_label(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("names") is not None


def _class_names(path: Path, feature: object) -> list[str] | None:
    """Return the names of a ClassLabel, or of a list of them, or None if the column is none."""
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    if not _is_class_label(feature):
        return None
    names = feature["names"]
    if not isinstance(names, list) or len({str(name) for name in names}) != len(names):
        raise _wrong_schema(path, "class names that are not a list, or one of them twice")
    return [str(name) for name in names]


def _wrong_schema(path: Path, got: str) -> ValueError:
    return ValueError(
        f"{path}: got {got}; need an image ({_TYPES['image']}) and a label ({_TYPES['label']}), as "
        "Hugging Face's datasets writes them; do: cast the columns, or name others with --columns"
    )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: got no complete parquet file ({error}); do: download it again")


def _images(file, name: str, group: int):
    """Return the encoded images of a row group, a pyarrow.ChunkedArray of bytes."""
    import pyarrow.compute

    flat = _is_bytes(file.schema_arrow.field(name).type)
    column = file.read_row_group(
        group, columns=[name if flat else f"{name}.bytes"], use_threads=False
    )[name]
    return column if flat else pyarrow.compute.struct_field(column, "bytes")


def _cells(path: Path, column: str, first: int = 0, last: int | None = None):
    """Yield the encoded images of the row groups [first, last). last: None means all others.

    Raises ValueError for an image that is null, and for a damaged file.
    """
    parquet = _pyarrow_parquet()
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            for group in range(first, file.num_row_groups if last is None else last):
                images = _images(file, column, group)
                if images.null_count:
                    row = images.is_null().index(True).as_py()
                    raise ValueError(
                        f"{path}: got no bytes in row {row} of row group {group}; need the "
                        "image itself; do: embed the images in the file, or remove the row"
                    )
                yield images
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None


@lru_cache(maxsize=1)
def _row_group(path: Path, column: str, group: int):
    return next(_cells(path, column, group, group + 1))


@lru_cache(maxsize=1)
def _array_group(path: Path, column: str, group: int):
    """Return the arrays of a row group, stacked: [rows, ...].

    Raises ValueError if they differ in shape, or if a number is null.
    """
    import pyarrow
    import pyarrow.compute

    try:
        with _pyarrow_parquet().ParquetFile(path) as file:
            table = file.read_row_group(group, columns=[column], use_threads=False)
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None
    values = pyarrow.concat_arrays(table[column].chunks)
    values = getattr(values, "storage", values)
    shape, whole = [len(values)], True
    for _ in range(_depth(values.type)):
        lengths = pyarrow.compute.list_value_length(values).unique().to_pylist()
        whole = whole and len(lengths) == 1 and lengths[0] is not None
        shape, values = [*shape, lengths[0] if whole else 0], values.flatten()
    if not whole or values.null_count:
        raise ValueError(
            f"{path}: got arrays of several shapes in {column}, or with null; need one shape; do: "
            "leave the others out"
        )
    return values.to_numpy(zero_copy_only=False).reshape(shape)


@cache
def _lengths(path: Path, column: str) -> list:
    """Return the size of every image in bytes, [row group][row]. Reads the whole file once."""
    import pyarrow.compute

    return [pyarrow.compute.binary_length(c).to_numpy() for c in _cells(path, column)]
