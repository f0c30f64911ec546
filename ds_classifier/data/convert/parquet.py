"""Parquet files as Hugging Face's datasets writes them: `image` and `label` in every row.

image: struct{bytes, path}, or binary. label: integer. The class names come from the ClassLabel in
the schema's metadata, key "huggingface", if it exists.
Formats: Apache Parquet, read by pyarrow; https://huggingface.co/docs/datasets/about_arrow.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from ds_classifier.common.files import size_of_file
from ds_classifier.data.convert.names import split_in
from ds_classifier.data.convert.samples import NamedSample, files_under
from ds_classifier.data.tars import IMAGE_SUFFIXES

PARQUET = ".parquet"
_PART = re.compile(r"(.*-)(\d+)-of-(\d+)(.*)")


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """The image in one row.

    Reading it reads its whole row group; each process keeps the row group it has read last.
    """

    file: Path
    row_group: int
    row: int  # within the row group

    def read(self) -> bytes:
        return _row_group(self.file, self.row_group)[self.row].as_py()

    def size(self) -> int:
        """Return the size of the image in bytes. The first call for a file reads the whole file."""
        return int(_lengths(self.file)[self.row_group][self.row])

    def changed_ns(self) -> int:
        return os.stat(self.file).st_ctime_ns

    @property
    def origin(self) -> tuple[Path, int, int]:
        return self.file, self.row_group, self.row

    @property
    def group(self) -> tuple[str, int]:
        """The key of the row group, which is read as a whole: see `samples.Content`."""
        return str(self.file), self.row_group


def read_parquet(files: list[Path]) -> tuple[list[NamedSample], list[str] | None]:
    """Return the rows of the files of a split, and the class names if they have them.

    The class of a row is its class name, or an integer if the file has no class names.
    Raises ValueError for files that are damaged or differ in their class names, and for labels that
    are null or out of range.
    """
    images: list[NamedSample] = []
    classes = None
    for i, file in enumerate(files):
        rows, own_classes = _read_file(file)
        if i and own_classes != classes:
            raise ValueError(
                f"{file}: got other class names than {files[0]}; need the same in all files; do: "
                "convert one data set at a time"
            )
        classes = own_classes
        images += rows
    if not images:
        raise ValueError(f"{files[0]}: got no rows; need images; do: download it again")
    return images, classes


def files_by_kind(folder: Path, passed: Counter[str]) -> dict[str, list[Path]]:
    """Return the files under a folder by their split: "train", "val" or "test".

    The split is a word in the name of a file, or of a folder around it. If no name has such a word,
    all files are those of "". passed: see `files_under`.
    Raises ValueError if only some have such a word, or if a file is missing.
    """
    by_kind = defaultdict(list)
    parts = defaultdict(set)
    for file in files_under(folder, (*IMAGE_SUFFIXES, PARQUET), passed):
        if file.suffix.lower() != PARQUET:
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


def _read_file(path: Path) -> tuple[list[NamedSample], list[str] | None]:
    """Return the names and classes of the rows, and the class names; read no image."""
    size_of_file(path)  # opening a FIFO would never return
    parquet = _pyarrow_parquet()
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            image = schema.field("image").type if "image" in schema.names else None
            if image is None or "label" not in schema.names:
                raise _wrong_schema(path, f"columns {schema.names}")
            if not _is_bytes(image) and not (_fields(image) and _is_bytes(_fields(image)["bytes"])):
                raise _wrong_schema(path, f"image of type {image}")
            if not pyarrow.types.is_integer(schema.field("label").type):
                raise _wrong_schema(path, f"label of type {schema.field('label').type}")
            columns = ["label", "image.path"] if "path" in _fields(image) else ["label"]
            classes = _class_names(path, schema.metadata or {})
            rows = []
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns, use_threads=False)
                labels = table["label"].to_pylist()
                names = [cell["path"] for cell in table["image"].to_pylist()] if columns[1:] else []
                for i, label in enumerate(labels):
                    name = f"{path}/{len(rows)}" + (f"_{names[i]}" if names and names[i] else "")
                    if label is None or not 0 <= label < len(classes or range(label + 1)):
                        raise ValueError(
                            f"{name}: got label {label}; need a class from 0"
                            + (f" to {len(classes) - 1}" if classes else "")
                            + "; do: remove the row"
                        )
                    class_name = classes[label] if classes else label
                    rows.append(NamedSample(name, class_name, ParquetCell(path, group, i)))
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None
    return rows, classes


def _is_bytes(kind) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _fields(kind) -> dict:
    """Return name -> type of a struct's fields; empty if it is no struct with a field "bytes"."""
    import pyarrow

    fields = {field.name: field.type for field in kind} if pyarrow.types.is_struct(kind) else {}
    return fields if "bytes" in fields else {}


def _class_names(path: Path, metadata: dict[bytes, bytes]) -> list[str] | None:
    """Return the names of the label column's ClassLabel, or None if there are none."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))
        names = features.get("info", {}).get("features", {}).get("label", {}).get("names")
    except (ValueError, AttributeError) as error:
        raise _wrong_schema(path, f"unreadable metadata 'huggingface' ({error})") from None
    if names is None:
        return None
    if not isinstance(names, list) or len({str(name) for name in names}) != len(names):
        raise _wrong_schema(path, "class names that are not a list, or one of them twice")
    return [str(name) for name in names]


def _wrong_schema(path: Path, got: str) -> ValueError:
    return ValueError(
        f"{path}: got {got}; need image (struct with bytes, or binary) and label (integer), as "
        "Hugging Face's datasets writes them; do: rename or cast the columns"
    )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: got no complete parquet file ({error}); do: download it again")


def _images(file, group: int):
    """Return the encoded images of a row group, a pyarrow.ChunkedArray of bytes."""
    import pyarrow.compute

    flat = _is_bytes(file.schema_arrow.field("image").type)
    column = file.read_row_group(
        group, columns=["image" if flat else "image.bytes"], use_threads=False
    )["image"]
    return column if flat else pyarrow.compute.struct_field(column, "bytes")


def _cells(path: Path, first: int = 0, last: int | None = None):
    """Yield the encoded images of the row groups [first, last). last: None means all others.

    Raises ValueError for an image that is null, and for a damaged file.
    """
    parquet = _pyarrow_parquet()
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            for group in range(first, file.num_row_groups if last is None else last):
                column = _images(file, group)
                if column.null_count:
                    row = column.is_null().index(True).as_py()
                    raise ValueError(
                        f"{path}: got no bytes in row {row} of row group {group}; need the "
                        "image itself; do: embed the images in the file, or remove the row"
                    )
                yield column
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int):
    return next(_cells(path, group, group + 1))


@cache
def _lengths(path: Path) -> list:
    """Return the size of every image in bytes, [row group][row]. Reads the whole file once."""
    import pyarrow.compute

    return [pyarrow.compute.binary_length(c).to_numpy() for c in _cells(path)]
