"""Split words in the names of files and folders: train, Training, val2017, test_set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

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
    parts += [f"{_shown(place, by_kind[kind])} is not used" for kind in sorted(unused)]
    return taken, f"by the names in {place}: {', '.join(parts)}"


def _shown(place: Path, paths: list[Path]) -> str:
    """Return a path relative to a folder, and how many more there are."""
    more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
    return f"{paths[0].relative_to(place)}{more}"
