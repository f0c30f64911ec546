"""Names of files and folders: those that are passed over, and words that stand for splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ds_classifier.common.text import count
from ds_classifier.data.tars import printable

# Folders of file servers, archive programs and Python. What begins with a dot is hidden anyway.
NO_DATA = {
    "__macosx",
    "__pycache__",
    "lost+found",
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "@__thumb",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
}
WORDS = {
    "train": ("train", "training", "trainset", "trainval"),
    "val": ("val", "valid", "validation", "dev", "valset", "validset", "validationset", "devset"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
MAX_NAMED = 3  # kinds of folders in a message
_KIND = {word: kind for kind, words in WORDS.items() for word in words}


def is_passed_over(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or was not made by the user."""
    return name.startswith(".") or name.lower() in NO_DATA


def passed_over(passed: Counter[str]) -> str:
    """Return "passed over: 3 hidden files, 1 folder __MACOSX", or "" for nothing.

    passed: names of folders, and "" for files -> number.
    """
    names = sorted(name for name in passed if name)
    found = [count(passed[""], "hidden file")] if passed[""] else []
    found += [f"{count(passed[n], 'folder')} {printable(n)}" for n in names[:MAX_NAMED]]
    if more := sum(passed[name] for name in names[MAX_NAMED:]):
        found.append(f"{count(more, 'other folder')}")
    return f"passed over: {', '.join(found)}" if found else ""


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
