"""Splits by words in names of folders and files: ROOT/Training beside ROOT/Testing, dev.parquet."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ds_classifier.data.convert.formats import image_files, is_image_file
from ds_classifier.data.convert.samples import is_passed_over
from ds_classifier.data.tars import printable

WORDS = {
    "train": ("train", "training", "trainset", "trainval"),
    "val": ("val", "valid", "validation", "dev", "valset", "validset", "validationset", "devset"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
_KIND = {word: kind for kind, words in WORDS.items() for word in words}


def kinds_in(name: str) -> set[str]:
    """Return the splits that the words of a name stand for: "train", "val", "test".

    Words are runs of letters, in any case: Training, val2017, test_set, partial-train.
    """
    return {_KIND[word] for word in re.findall("[a-z]+", name.lower()) if word in _KIND}


def split_in(names: Iterable[str]) -> str:
    """Return the split of the first name whose words stand for just one; "" if there is none."""
    return next((kinds.pop() for kinds in map(kinds_in, names) if len(kinds) == 1), "")


def take(
    place: Path, by_kind: Mapping[str, list[Path]], splits: Sequence[str]
) -> tuple[dict[str, list[Path]], str]:
    """Return the paths of the splits in a folder, without those it lacks, and a remark about them.

    by_kind: "train", "val", "test" -> paths in the folder. splits: "train", "val" or both. Without
    a validation split, the test split is used for it.
    """
    kinds = {"train": "train", "val": "val" if by_kind.get("val") else "test"}
    taken = {split: by_kind[kinds[split]] for split in splits if by_kind.get(kinds[split])}
    parts = [f"{_shown(place, paths)} is {split}" for split, paths in taken.items()]
    unused = set(by_kind) - {kinds[split] for split in splits}
    parts += [f"not taken: {_shown(place, by_kind[kind])}" for kind in sorted(unused)]
    return taken, f"by the names in {place}: {', '.join(parts)}"


def _shown(place: Path, paths: list[Path]) -> str:
    """Return the first path, relative to a folder, and the number of the others."""
    others = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
    return f"{printable(str(paths[0].relative_to(place)))}{others}"


def take_folders(
    root: Path, splits: Sequence[str], passed: Counter[str]
) -> tuple[dict[str, Path], list[str]]:
    """Return the folders of the splits in root, and remarks; nothing if its folders are classes.

    splits: "train", "val" or both. passed: see `files_under`.
    If the folder of a split holds another one for the same split, that is the one.
    Raises ValueError if a name stands for two splits, or if two folders are named for one.
    """
    hidden: Counter[str] = Counter()
    by_kind = _folders_by_kind(root, hidden)
    taken, remark = take(root, by_kind, splits)
    if splits[0] not in taken:
        return {}, []
    passed.update(hidden)
    folders, remarks = {}, [remark]
    for split, (folder, *others) in taken.items():
        if others:
            raise ValueError(
                f"source: got {folder} and {others[0].name}, which are both named for {split}; "
                f"need one folder per split; do: {_naming_both(root)}"
            )
        inner = {}
        if not folder.is_symlink():  # it may contain itself, which `files_under` refuses
            inner, more = take_folders(folder, [split], passed)
            remarks += more
        folders[split] = inner.get(split, folder)
    return folders, remarks


def _folders_by_kind(root: Path, hidden: Counter[str]) -> dict[str, list[Path]]:
    """Return the folders in root by the split that their names stand for; {} if they are classes.

    They are splits if the name of each folder with images has a word for a split, and if there is
    just one, or several splits. Folders without images are those of "".
    """
    by_kind = defaultdict(list)
    for name in sorted(os.listdir(root)):
        path = root / name
        if not path.is_dir():
            if not is_passed_over(name) and is_image_file(path):
                return {}
        elif is_passed_over(name):
            hidden[name] += 1
        else:
            kind = " and ".join(sorted(kinds_in(name)))
            if not kind and next(image_files(path), None) is not None:
                return {}
            by_kind[kind].append(path)
    kinds = by_kind.keys() - {""}
    if len(kinds) < 2 and sum(map(len, by_kind.values())) > 1:
        return {}
    for kind in kinds - WORDS.keys():
        raise ValueError(
            f"source: got {by_kind[kind][0]}, a name for {kind}, beside other folders of splits; "
            f"need one split per folder; do: {_naming_both(root)}"
        )
    return by_kind


def _naming_both(root: Path) -> str:
    return f"name the folders of both splits: convert {root}/TRAIN OUT --val {root}/VAL"
