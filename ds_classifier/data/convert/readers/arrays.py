"""Sets of arrays: .npz of arrays and labels, .npy with its labels in another file, one .npy each.

An .npz is read into memory. An .npy is mapped, so it may be larger than that.
"""

from __future__ import annotations

import functools
import os
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ds_classifier.common.files import size_of_file
from ds_classifier.common.text import count
from ds_classifier.data.arrays import (
    SUFFIX,
    Arrays,
    arrays_like,
    channels_first,
    described,
    to_npy,
    values_of,
)
from ds_classifier.data.convert.samples import DataSource, NamedSample, Sample
from ds_classifier.data.convert.split_names import WORDS
from ds_classifier.data.labels.reading import Label, read_labels, read_weights
from ds_classifier.data.tars import printable

NPZ = ".npz"
FILES = (SUFFIX, NPZ)
# Names in an .npz; guided-diffusion and others save without names, which makes arr_0 and arr_1.
VALUE_NAMES = ("images", "x", "arr_0", "latents", "data")
LABEL_NAMES = ("labels", "y", "arr_1", "label", "targets")
_KIND = {word: kind for kind, words in WORDS.items() for word in words}
MOST_TRIED = 100  # arrays that are read to find one that is whole


@dataclass(frozen=True, slots=True)
class ArrayRow:
    """An array in a file that holds many: arrays[index] of an .npy, or of the member of an .npz.

    length: the bytes of its numbers.
    """

    path: Path
    member: str
    index: int
    length: int

    def read(self) -> bytes:
        return to_npy(_mapped(self.path, self.member)[self.index])

    def size(self) -> int:
        return self.length

    def changed_ns(self) -> int:
        return os.stat(self.path).st_ctime_ns

    @property
    def origin(self) -> tuple[Path, str, int]:
        return self.path, self.member, self.index


def is_array_file(file: Path) -> bool:
    """Return whether a file has the suffix of one array."""
    return file.suffix.lower() == SUFFIX


def refuse_whole_set(folder: Path) -> None:
    """Raise ValueError if a folder holds an array of arrays, which is converted by its own name."""
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        if file.is_file() and (values := _mapped(file, "")).ndim == 4:
            raise ValueError(
                f"source: got {folder}, with the set {file.name} of {described(values)}; need the "
                f"file itself; do: convert {file} OUT --labels LABELS.npy"
            )


def whole_set(
    path: Path,
    columns: Mapping[str, str],
    labels: Path | None,
    splits: Sequence[str],
    targets: str = "class",
) -> tuple[dict[str, list[NamedSample]], list[str]]:
    """Return the arrays in an .npz or .npy by their split, and remarks for the user.

    columns: names of members for "image", "label" and "weight"; those not given are found if that
        is clear.
    labels: another file with the labels, .npy or text with one in each line.
    targets: what the labels are, one of `labels.targets.ASKED`.
    splits: those to take, "train", "val" or both. A file without splits is of the first; one that
        has them names its members for them: x_train, test_labels.
    Raises ValueError for a file that cannot be read, without labels, or with others in number.
    """
    if path.suffix.lower() == SUFFIX:
        if columns:
            raise ValueError(
                f"--columns: got {dict(columns)} with {path}; need an .npz, whose arrays have "
                "names; do: np.savez(FILE, images=x, labels=y, weight=w), or drop it"
            )
        found = labels or _labels_beside(path)
        remarks = [f"labels: {found}"] if labels is None else []
        return {splits[0]: _samples(path, "", _labels_in(found, targets))}, remarks
    members = _members(path)
    chosen = _choose(path, members, columns, labels)
    val = "val" if "val" in chosen else "test"
    kinds = {split: "train" if split == "train" else val for split in splits}
    if len(chosen) == 1:  # whatever it is called
        kinds = {splits[0]: next(iter(chosen))}
    if kinds[splits[0]] not in chosen:
        raise ValueError(
            f"{path}: got the splits {', '.join(sorted(chosen))}; need {kinds[splits[0]]}; do: "
            "--columns image=NAME,label=NAME"
        )
    taken, remarks, weight = {}, [], columns.get("weight")
    for split, kind in kinds.items():
        if kind not in chosen:
            continue
        values, own = chosen[kind]
        if labels is not None:
            named = _labels_in(labels, targets)
        else:
            named = _as_labels(_mapped(path, own), f"{path}: {own}", targets)
        taken[split] = _samples(path, values, named)
        if weight:
            taken[split] = _weighted(taken[split], _mapped(path, weight), f"{path}: {weight}")
        remarks.append(f"{split} is '{values}' with labels '{own if labels is None else labels}'")
    used = {weight, *(name for kind in kinds.values() for name in chosen.get(kind, ()))}
    unused = sorted(members - used)
    more = f"; not taken: {', '.join(map(printable, unused))}" if unused else ""
    return taken, [f"by the names in {path.name}: {', '.join(remarks)}{more}"]


def _choose(
    path: Path, members: set[str], columns: Mapping[str, str], labels: Path | None
) -> dict[str, tuple[str, str]]:
    """Return the members with arrays and labels, by split; "" for a file without splits."""
    roles = {"image": VALUE_NAMES, "label": LABEL_NAMES}
    if columns.get("weight", next(iter(members), "")) not in members:
        raise ValueError(
            f"--columns: got weight={columns['weight']}; {path} has {_listed(members)}"
        )
    columns = {role: name for role, name in columns.items() if role != "weight"}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"image": [], "label": []})
    for role, name in columns.items():
        if role not in roles or name not in members:
            raise ValueError(
                f"--columns: got {role}={name}; need image=NAME,label=NAME of {_listed(members)}, "
                f"which {path} has"
            )
        found[""][role] = [name]
    for name in sorted(members) if not columns else ():
        words = name.lower().replace("-", "_").split("_")
        kind = next((_KIND[word] for word in words if word in _KIND), "")
        rest = "_".join(word for word in words if word not in _KIND)
        for role, names in roles.items():
            if rest in names:
                found[kind][role].append(name)
    if len(found) > 1:
        found.pop("", None)
    chosen = {}
    for kind, by_role in found.items():
        if by_role["image"] and not by_role["label"] and labels is None:
            raise ValueError(
                f"{path}: got {by_role['image'][0]} without labels (it has {_listed(members)}); "
                "need a class for each array; do: save them too, as np.savez(FILE, images=x, "
                "labels=y), add --labels LABELS.npy, or name them: --columns image=NAME,label=NAME"
            )
        sizes = [len(by_role[role]) for role in roles]
        if sizes not in ([1, 1], [1, 0]) and not (sizes[0] == 1 and labels is not None):
            continue
        chosen[kind] = (by_role["image"][0], *by_role["label"][:1], "")[:2]
    if not chosen:
        raise ValueError(
            f"{path}: got {_listed(members)}; need arrays ({', '.join(VALUE_NAMES)}) and labels "
            f"({', '.join(LABEL_NAMES)}); do: --columns image=NAME,label=NAME"
        )
    return chosen


def _listed(members: set[str]) -> str:
    return ", ".join(printable(name) for name in sorted(members)) or "nothing"


def _samples(path: Path, member: str, labels: list[Label]) -> list[NamedSample]:
    values = _mapped(path, member)
    if values.ndim not in (3, 4):
        raise ValueError(
            f"{path}: got {described(values)}{member and f' in {member}'}; need [N, C, S, S], "
            "[N, S, S, C] or [N, S, S]"
        )
    if values.size == 0:
        raise ValueError(
            f"{path}: got {described(values)}{member and f' in {member}'}, which is empty; need at "
            "least one array"
        )
    if len(labels) != len(values):
        raise ValueError(
            f"{path}: got {count(len(labels), 'label')} for {count(len(values), 'array')}; need "
            "one for each"
        )
    length = values[0].nbytes
    return [
        NamedSample(f"{path}/{path.stem}_{i:06d}", label, ArrayRow(path, member, i, length))
        for i, label in enumerate(labels)
    ]


# ---------------------------------------------------------------------------------------- labels


def _labels_beside(path: Path) -> Path:
    """Return the file of labels next to a .npy."""
    names = (f"{path.stem}_labels{SUFFIX}", f"labels{SUFFIX}", f"y{SUFFIX}")
    found = [path.with_name(name) for name in names if path.with_name(name).is_file()]
    if not found or found[0] == path:
        raise ValueError(
            f"{path}: got an array without labels; need a class for each of its rows; do: add "
            f"--labels LABELS.npy, or put them beside it as {names[0]}"
        )
    return found[0]


def _weighted(samples: list[NamedSample], values: np.ndarray, place: str) -> list[NamedSample]:
    """Return samples with weights, [N]. place: of these, for messages."""
    if values.shape != (len(samples),):
        raise ValueError(
            f"{place}: got weights of {described(values)}; need one for each of "
            f"{count(len(samples), 'array')}"
        )
    weights = read_weights(values.tolist(), lambda row: f"{place}[{row}]")
    pairs = zip(samples, weights, strict=True)
    return [sample._replace(weight=weight) for sample, weight in pairs]


def _labels_in(path: Path, targets: str) -> list[Label]:
    """Return the labels in an .npy, or in a text with one in each line."""
    if path.suffix.lower() == SUFFIX:
        return _as_labels(_mapped(path, ""), str(path), targets)
    lines = path.read_text(encoding="utf-8").splitlines()
    if targets != "class":
        return read_labels(targets, lines, lambda row: f"{path}:{row + 1}", columns=False)
    if all(line.strip().isdigit() for line in lines):
        return [int(line) for line in lines]
    return [line.strip() for line in lines]


def _as_labels(values: np.ndarray, name: str, targets: str) -> list[Label]:
    """Return an array of labels as a list: names, or whole numbers from 0; or other targets.

    Several classes, probabilities and logits are [N, K], values are [N].
    """
    if targets != "class":
        dimensions = 1 if targets == "values" else 2
        if values.ndim != dimensions or values.dtype.kind not in "biuf":
            need = "[N]" if dimensions == 1 else "[N, K], with a number for each class"
            raise ValueError(
                f"{name}: got labels of {described(values)}; need numbers of shape {need}, for "
                f"--targets {targets}; do: save them so, or drop --targets"
            )
        return read_labels(
            targets, list(values), lambda row: f"{name}[{row}]", columns=dimensions == 2
        )
    column = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    whole = column.dtype.kind in "uib" or (
        column.dtype.kind == "f" and bool((column == np.floor(column)).all())
    )
    if column.ndim != 1 or not (whole or column.dtype.kind == "U"):
        one_hot = ""
        if column.ndim == 2:
            one_hot = "; do: --targets classes, soft or logits, or save labels.argmax(axis=1)"
        elif column.ndim == 1 and column.dtype.kind == "f":
            one_hot = "; do: --targets values, to learn bins of the number"
        raise ValueError(
            f"{name}: got labels of {described(values)}; need one whole number or name for each "
            f"array{one_hot}"
        )
    if column.dtype.kind == "U":
        return column.tolist()
    if len(column) and column.min() < 0:
        raise ValueError(f"{name}: got label {int(column.min())}; need a class from 0")
    return column.astype(np.int64).tolist()


# --------------------------------------------------------------------------------------- reading


def _members(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz."""
    try:
        size_of_file(path)  # opening a FIFO would never return
        with np.load(path, allow_pickle=False) as file:
            return set(file.files)
    except (ValueError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise _damaged(path, error) from None


@functools.cache
def _mapped(path: Path, member: str) -> np.ndarray:
    """Return an array of a file: mapped from an .npy, read from an .npz."""
    try:
        size_of_file(path)
        if not member:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as file:
            return file[member]
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    if "pickle" in str(error).lower() or "Python objects" in str(error):
        return ValueError(
            f"{path}: got objects of Python, which need pickle, and that can run code; need "
            "numbers; do: save arrays of one shape, as np.stack(list)"
        )
    return ValueError(f"{path}: cannot be read ({error}); need a whole .npy or .npz of NumPy")


# ----------------------------------------------------------------------------------- any source


def as_arrays(
    source: DataSource, scale: Sequence[float] | None, shift: Sequence[float] | None
) -> DataSource:
    """Return a source that says what its arrays have in common; a source of images as it is.

    The first array that is whole decides; the conversion refuses those that differ.
    scale, shift: see `Arrays.with_scaling`; None: 1 and 0, or as the shards have it that are
        converted again.
    Raises ValueError for a scale or shift of images, and for arrays that cannot be stored.
    """
    arrays, remarks = source.arrays, list(source.remarks)
    scaled = scale is not None or shift is not None
    if arrays is None and _holds_array(source.splits["train"][0]):
        values = _first_values(source.splits["train"])
        stored = channels_first(values)
        if stored.shape != values.shape and values.ndim == 3:
            remarks.append(
                f"arrays of {described(values)}: the channels are last, and are stored first"
            )
        if values.dtype.name == "float64":
            remarks.append("float64 is stored as float32, which training computes in")
        arrays = _stored_as(stored, scaled)
        if arrays is None:
            remarks.append("uint8 with one or three channels: stored as images, PNG without loss")
        _refuse_other_validation(source, arrays, scaled)
    if arrays is None and scaled:
        name = "scale" if scale is not None else "shift"
        raise ValueError(f"--{name}: got it with images; need arrays (.npy, .npz); do: drop it")
    if arrays is not None:
        arrays = arrays.with_scaling(scale, shift)
    return replace(source, arrays=arrays, remarks=tuple(remarks))


def _stored_as(values: np.ndarray, scaled: bool) -> Arrays | None:
    """Return what arrays like this one, [C, S, S], have in common; None if they become images."""
    arrays = arrays_like(values)
    return None if arrays.pixels and arrays.channels in (1, 3) and not scaled else arrays


def _refuse_other_validation(source: DataSource, train: Arrays | None, scaled: bool) -> None:
    """Raise ValueError if the validation arrays have another shape or type. train: see above."""
    samples = source.splits.get("val", ())
    if not samples or not _holds_array(samples[0]):
        return
    val = _stored_as(channels_first(_first_values(samples)), scaled)
    if str(train) != str(val):
        ours, theirs = (arrays or "pixels, stored as images" for arrays in (train, val))
        raise ValueError(
            f"--val: got val with arrays of {theirs}, and train with arrays of {ours}; need one "
            "shape and type; do: save both splits alike"
        )


def _holds_array(sample: Sample) -> bool:
    if isinstance(sample.content, Path):
        return is_array_file(sample.content)
    return isinstance(sample.content, ArrayRow) or getattr(sample.content, "is_array", False)


def _first_values(samples: Sequence[Sample]) -> np.ndarray:
    """Return the first array that is whole and can be stored; ValueError if none is."""
    first = None
    for sample in samples[:MOST_TRIED]:
        try:
            sample.size()  # OSError for a FIFO
            channels_first(values := values_of(sample.read()))
            return values
        except (OSError, ValueError) as error:
            first = first or ValueError(f"{sample.name}: {error}")
    raise first
