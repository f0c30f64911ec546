"""ImageNet as it is distributed: tars that are read in place, and the labels of the validation set.

    ILSVRC2012_img_train.tar       nNNNNNNNN.tar, one per class (a WordNet id), with its images
    ILSVRC2012_img_val.tar         ILSVRC2012_val_00000001.JPEG ..., without classes
    ILSVRC2012_devkit_t12.tar.gz   data/meta.mat: ILSVRC2012_ID -> WNID (IDs do not follow the
                                   sorted WNIDs); data/ILSVRC2012_validation_ground_truth.txt: line
                                   i is the ILSVRC2012_ID of image i, counted from 1
    LOC_val_solution.csv           Kaggle's labels: ImageId,PredictionString (a WNID, then boxes)

Formats: POSIX.1-1988 ustar, with pax and GNU headers; the devkit's readme.txt; MATLAB 5.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

from ds_classifier.data.convert.formats import ALL_SUFFIXES, image_files
from ds_classifier.data.convert.samples import NamedSample, PassedOver, Slice
from ds_classifier.data.tars import tar_members

LARGEST_FILE = 1 << 26  # bytes of a file in the devkit, unpacked; the real ones have < 2 MB
META = "data/meta.mat"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
NEED_LABELS = (
    "the devkit ILSVRC2012_devkit_t12.tar.gz, its folder, or Kaggle's LOC_val_solution.csv"
)


def train_images(tar: Path) -> list[NamedSample]:
    """Return the images in a tar of tars, each named after a class; nothing is unpacked.

    Raises ValueError for other tars, for a damaged or incomplete one, and for members that are
    links or devices, that have names outside of the tar, or that appear twice.
    """
    images = []
    with open(tar, "rb") as file:
        inner_tars = list(tar_members(file, tar, 0, os.fstat(file.fileno()).st_size))
        for inner in inner_tars:
            if not inner.name.endswith(".tar"):
                raise ValueError(
                    f"{tar}: got member {inner.name}; need a tar of tars, one per class, such as "
                    "ILSVRC2012_img_train.tar; do: unpack other tars and convert the folder"
                )
        for inner in inner_tars:
            where = f"{tar}/{inner.name}"
            class_name = os.path.basename(inner.name).removesuffix(".tar")
            found = [
                NamedSample(f"{where}/{name}", class_name, Slice(tar, offset, size))
                for name, offset, size in tar_members(
                    file, where, inner.offset, inner.offset + inner.size
                )
                if name.lower().endswith(ALL_SUFFIXES)
            ]
            if not found:
                raise ValueError(f"{where}: got no image; need at least one; do: download again")
            images += found
    if not images:
        raise ValueError(f"{tar}: got an empty tar; need one tar per class; do: download again")
    return images


def val_images(place: Path, labels: Path, passed: PassedOver) -> list[NamedSample]:
    """Return the images in a tar or a folder, with classes from a devkit or Kaggle's CSV.

    passed: see `files_under`.
    Raises ValueError if an image has no label or a label no image: one of the files is incomplete.
    """
    if place.is_dir():
        found = [(str(file), file) for file in image_files(place, passed)]
    else:
        with open(place, "rb") as file:
            found = [
                (f"{place}/{name}", Slice(place, offset, size))
                for name, offset, size in tar_members(
                    file, place, 0, os.fstat(file.fileno()).st_size
                )
                if name.lower().endswith(ALL_SUFFIXES)
            ]
    wnids = kaggle_labels(labels) if labels.suffix.lower() == ".csv" else devkit_labels(labels)
    seen = set()
    images = []
    for name, content in found:
        stem = os.path.splitext(os.path.basename(name))[0]
        if stem not in wnids:
            raise ValueError(
                f"{name}: got no label for {stem} in {labels}; need one for every image; do: "
                "give the --val_labels that belong to --val"
            )
        if stem in seen:
            raise ValueError(f"{name}: got a second image named {stem}; need each name once")
        seen.add(stem)
        images.append(NamedSample(name, wnids[stem], content))
    if len(seen) != len(wnids):
        lacking = next(stem for stem in wnids if stem not in seen)
        raise ValueError(
            f"--val: got {len(seen)} images in {place}, without {lacking}; need all {len(wnids)} "
            f"that {labels} labels; do: download the images again"
        )
    return images


# ---------------------------------------------------------------------------------------- labels


def kaggle_labels(path: Path) -> dict[str, str]:
    """Return image name without suffix -> WNID, from LOC_val_solution.csv.

    Raises ValueError for a line without image or WNID, and for an image that appears twice.
    """
    wnids: dict[str, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
                raise ValueError(
                    f"{path}: got columns {rows.fieldnames}; need ImageId and PredictionString, as "
                    "in Kaggle's LOC_val_solution.csv; do: give that file or the devkit"
                )
            for row in rows:
                stem, tokens = row["ImageId"], (row["PredictionString"] or "").split()
                if not stem or not tokens or stem in wnids:
                    raise ValueError(
                        f"{path}:{rows.line_num}: got {stem!r} with {tokens[:1]}"
                        f"{' for the second time' if stem in wnids else ''}; need each image "
                        "once, with its class first; do: download the file again"
                    )
                wnids[stem] = tokens[0]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got no valid CSV ({error}); need LOC_val_solution.csv") from None
    return wnids


def devkit_labels(devkit: Path) -> dict[str, str]:
    """Return image name without suffix -> WNID, from the devkit's tar.gz or its unpacked folder.

    Raises ValueError if a file is missing or damaged, or an ID has no WNID.
    """
    meta, ground_truth = _devkit_files(devkit)
    wnid_of = _wnid_of_id(meta, f"{devkit}: {META}")
    labels = {}
    for line, text in enumerate(ground_truth.decode("ascii", "replace").splitlines(), start=1):
        if not text.strip().isdigit() or int(text) not in wnid_of:
            raise ValueError(
                f"{devkit}: {GROUND_TRUTH}:{line}: got {text!r}; need an ILSVRC2012_ID of {META}; "
                "do: download the devkit again"
            )
        labels[f"ILSVRC2012_val_{line:08d}"] = wnid_of[int(text)]
    return labels


def _wnid_of_id(meta: bytes, name: str) -> dict[int, str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(
            "--val_labels: got a devkit, whose meta.mat needs scipy; do: pip install scipy, or "
            "give Kaggle's LOC_val_solution.csv"
        ) from None
    _refuse_swelling(meta, name)
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"].reshape(-1)
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # scipy raises many types of errors for damaged files
        raise ValueError(
            f"{name}: got no MATLAB 5 table of synsets ({type(error).__name__}: {error}); need "
            "ILSVRC2012_ID and WNID; do: download the devkit again"
        ) from None


def _refuse_swelling(meta: bytes, name: str) -> None:
    """Raise ValueError if a MATLAB 5 file is larger than LARGEST_FILE bytes when unpacked.

    Scipy would unpack 300 MB from a file of 300 KB. A file is a header of 128 bytes and elements:
    type (u4), number of bytes (u4), content. The content of type 15 is a zlib stream.
    """
    order = ">" if meta[126:128] == b"MI" else "<"
    at, total = 128, len(meta)
    while at + 8 <= len(meta) and total <= LARGEST_FILE:
        kind, size = struct.unpack(f"{order}II", meta[at : at + 8])
        at += 8
        if kind == 15:
            stream = zlib.decompressobj()
            try:
                total += len(stream.decompress(meta[at : at + size], LARGEST_FILE + 1))
            except zlib.error:  # scipy reports it
                return
        at += size
    if total > LARGEST_FILE:
        raise ValueError(
            f"{name}: got more than {LARGEST_FILE} bytes when unpacked; need {NEED_LABELS}"
        )


def _devkit_files(devkit: Path) -> tuple[bytes, bytes]:
    """Return the contents of META and GROUND_TRUTH, at the top of the devkit or one folder down."""
    contents: dict[str, bytes] = {}
    if devkit.is_dir():
        for name in (META, GROUND_TRUTH):
            for path in (devkit / name, *sorted(devkit.glob(f"*/{name}"))):
                if name not in contents and path.is_file():
                    with open(path, "rb") as file:
                        contents[name] = _read(file, path.stat().st_size, path)
    else:
        try:
            with tarfile.open(devkit, "r:gz") as tar:
                for member in filter(tarfile.TarInfo.isreg, tar):
                    for name in (META, GROUND_TRUTH):
                        if f"/{member.name}".endswith(f"/{name}"):
                            where = f"{devkit}/{member.name}"
                            contents[name] = _read(tar.extractfile(member), member.size, where)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"--val_labels: got {devkit}, which is not a complete .tar.gz ({error}); "
                f"need {NEED_LABELS}"
            ) from None
    missing = [name for name in (META, GROUND_TRUTH) if name not in contents]
    if missing:
        raise ValueError(
            f"--val_labels: got {devkit} without {' and '.join(missing)}; need {NEED_LABELS}"
        )
    return contents[META], contents[GROUND_TRUTH]


def _read(file: BinaryIO, size: int, name: Path | str) -> bytes:
    """Read a file of the devkit. Raises ValueError if it is larger than any real one."""
    if size > LARGEST_FILE:
        raise ValueError(f"--val_labels: got {name} of {size} bytes; need {NEED_LABELS}")
    return file.read()
