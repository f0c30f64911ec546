"""Folders of splits: ROOT/Training/CLASS/image.jpg beside ROOT/Testing/CLASS/image.jpg."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from ds_classifier.data.convert.names import WORDS, is_passed_over, kinds_in, take
from ds_classifier.data.convert.samples import files_under


def take_folders(
    root: Path, splits: Sequence[str], suffixes: Sequence[str], passed: Counter[str]
) -> tuple[dict[str, Path], list[str]]:
    """Return the folders of the splits in root, and remarks; nothing if its folders are classes.

    splits: "train", "val" or both. suffixes: those of images. passed: see `files_under`.
    If the folder of a split holds another one for the same split, that is the one.
    Raises ValueError if a name stands for two splits, or if two folders are named for one.
    """
    hidden: Counter[str] = Counter()
    by_kind = _folders_by_kind(root, suffixes, hidden)
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
            inner, more = take_folders(folder, [split], suffixes, passed)
            remarks += more
        folders[split] = inner.get(split, folder)
    return folders, remarks


def _folders_by_kind(
    root: Path, suffixes: Sequence[str], hidden: Counter[str]
) -> dict[str, list[Path]]:
    """Return the folders in root by the split that their names stand for; {} if they are classes.

    They are splits if the name of each folder with images has a word for a split, and if there is
    just one, or several splits. Folders without images are those of "".
    """
    by_kind = defaultdict(list)
    for name in sorted(os.listdir(root)):
        path = root / name
        if not path.is_dir():
            if name.lower().endswith(tuple(suffixes)) and not is_passed_over(name):
                return {}
        elif is_passed_over(name):
            hidden[name] += 1
        else:
            kind = " and ".join(sorted(kinds_in(name)))
            if not kind and next(files_under(path, suffixes), None) is not None:
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
