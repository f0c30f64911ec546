"""Splits by words in names of folders and files: ROOT/Training beside ROOT/Testing, dev.parquet."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ds_classifier.data.convert.formats import is_image_file
from ds_classifier.data.convert.samples import PassedOver, files_under, is_passed_over
from ds_classifier.data.tars import printable

WORDS = {
    "train": ("train", "training", "trainset", "trainval"),
    "val": ("val", "valid", "validation", "dev", "valset", "validset", "validationset", "devset"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
_EVAL = {"eval", "evaluation"}
_KIND = {word: kind for kind, words in WORDS.items() for word in words}
_JOINED = "dataset|data|set|folder|dir|images|image|imgs|img|pictures|photos|partial|split|seg"
_SPLIT_WORD = re.compile(  # also trainA, traindata
    f"(?:{_JOINED})*({'|'.join(_KIND)})(?:{_JOINED})*[ab]?"
)
_USUAL = re.compile(f"{_SPLIT_WORD.pattern}|(?:{_JOINED})+|.")
_HUMPS = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case: runs of letters, cut before capitals if need be."""
    words = []
    for run in re.findall("[A-Za-z]+", name):
        whole = _SPLIT_WORD.fullmatch(run.lower())
        words += [run] if whole else _HUMPS.findall(run)
    return [word.lower() for word in words]


def kinds_in(name: str) -> set[str]:
    """Return the splits that the words of a name stand for: "train", "val", "test".

    Words are runs of letters, in any case: Training, val2017, test_set, partial-train; or the parts
    of a run that begin with a capital, as in MyTrainData.
    """
    found = filter(None, map(_SPLIT_WORD.fullmatch, _words(name)))
    return {_KIND[match[1]] for match in found}


def own_words(name: str) -> tuple[str, ...]:
    """Return the words of a name that neither stand for a split nor are usual beside such a word.

    bullet_train has "bullet"; train, trainA, val_images and seg_test have none.
    """
    return tuple(word for word in _words(name) if not _USUAL.fullmatch(word))


def are_splits(names: Iterable[str]) -> bool:
    """Return whether all names are those of splits, of more than one, with the same own words."""
    kinds = [(kinds_in(name), own_words(name)) for name in names]
    several = len(set().union(*(kind for kind, _ in kinds))) > 1
    return several and all(kind for kind, _ in kinds) and len({own for _, own in kinds}) == 1


def refuse_loose_images(
    root: Path, taken: Mapping[str, Path], wanted: Callable[[Path], bool] = is_image_file
) -> None:
    """Raise ValueError if images lie directly in the training folder of what `take_folders` took.

    They may be those of a class as well as a split of files named CLASS_image.jpg.
    """
    folder, val = taken["train"], taken.get("val", "10%")
    for name in sorted(os.listdir(folder)):
        file = folder / name
        if not is_passed_over(name) and not file.is_dir() and wanted(file):
            raise ValueError(
                f"source: got {file} directly in a folder named for a split; need to know whether "
                f"the folders in {root} are splits or classes; do: if they are splits of "
                f"CLASS_image.jpg files, convert {folder} OUT --val {val}; if they are "
                "classes, list the images in a .csv, or give the folders other names"
            )


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
    root: Path,
    splits: Sequence[str],
    passed: PassedOver,
    wanted: Callable[[Path], bool] = is_image_file,
) -> tuple[dict[str, Path], list[str]]:
    """Return the folders of the splits in root, and remarks; nothing if its folders are classes.

    splits: "train", "val" or both. passed, wanted: see `files_under`.
    If the folder of a split holds another one for the same split, that is the one.
    Raises ValueError if a name stands for two splits, or if two folders are named for one.
    """
    hidden = PassedOver()
    by_kind = _folders_by_kind(root, hidden, wanted)
    tests = by_kind.get("test", [])
    evals = [path for path in tests if _EVAL & set(_words(path.name))]
    if "val" not in by_kind and len(evals) == 1 and len(tests) == 2:  # eval beside test
        by_kind |= {"val": evals, "test": [path for path in tests if path not in evals]}
    taken, remark = take(root, by_kind, splits)
    if splits[0] not in taken:
        return {}, []
    passed.update(hidden)
    folders, remarks = {}, [remark]
    for split, (folder, *others) in taken.items():
        if others:
            raise ValueError(
                f"source: got {folder} and {others[0].name}, which are both named for {split}; "
                f"need one folder per split; do: {_naming_both(root, by_kind)}"
            )
        inner = {}
        if not folder.is_symlink():  # it may contain itself, which `files_under` refuses
            inner, more = take_folders(folder, [split], passed, wanted)
            remarks += more
        folders[split] = inner.get(split, folder)
    return folders, remarks


def _folders_by_kind(
    root: Path, hidden: PassedOver, wanted: Callable[[Path], bool]
) -> dict[str, list[Path]]:
    """Return the folders in root by the split that their names stand for; {} if they are classes.

    They are splits if the name of each folder with images has a word for a split, if these names
    have the same other words, and if there is just one, or several splits. Folders without images
    are those of "".
    """
    by_kind = defaultdict(list)
    for name in sorted(os.listdir(root)):
        path = root / name
        if not path.is_dir():
            if not is_passed_over(name) and wanted(path):
                return {}
            hidden.leave_out(name)
        elif is_passed_over(name):
            hidden.folders[name] += 1
        else:
            kind = " and ".join(sorted(kinds_in(name)))
            if not kind and next(files_under(path, wanted), None) is not None:
                return {}
            by_kind[kind].append(path)
    named = [path.name for kind, paths in by_kind.items() if kind for path in paths]
    if len(set(map(own_words, named))) > 1:
        return {}
    kinds = by_kind.keys() - {""}
    if len(kinds) < 2 and sum(map(len, by_kind.values())) > 1:
        return {}
    for kind in kinds - WORDS.keys():
        raise ValueError(
            f"source: got {by_kind[kind][0]}, a name for {kind}, beside other folders of splits; "
            f"need one split per folder; do: {_naming_both(root, by_kind)}"
        )
    return by_kind


def _naming_both(root: Path, by_kind: Mapping[str, list[Path]]) -> str:
    train, val, test = (by_kind.get(kind, [None])[0] for kind in ("train", "val", "test"))
    return (
        f"name the folders of both splits, such as convert {train or root / 'TRAIN'} OUT --val "
        f"{val or test or root / 'VAL'}"
    )
