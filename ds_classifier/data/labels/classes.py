"""The class list: its order, and the names that every manifest and export can hold."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile("-?[0-9]{1,18}")


def class_list(name: str, found: set[str | int]) -> list[str]:
    """Return the names of the classes in the order of their numbers.

    name: the data source, for messages. found: the class of every training image, a name or an
    integer. Names are in the order of in_order. If all classes are integers, the list is "0" to the
    largest one.
    Raises ValueError for negative integers, and if an integer in between has no image.
    """
    if not all(isinstance(class_name, int) for class_name in found):
        return in_order(map(str, found))
    if min(found) < 0:
        raise ValueError(
            f"{name}: got label {min(found)}; need integers from 0; do: remove its images, or "
            "renumber the classes"
        )
    gap = next(i for i in range(len(found) + 1) if i not in found)
    if gap != len(found):
        raise ValueError(
            f"{name}: got integer labels up to {max(found)} but none is {gap}; need 0, 1, 2, ... "
            "without a gap; do: renumber the classes, or give them names"
        )
    return [str(i) for i in range(len(found))]


def in_order(names: Iterable[str]) -> list[str]:
    """Return class names sorted: by their numbers if all are whole numbers, else as text."""
    names = sorted(names)
    return sorted(names, key=int) if all(map(_NUMBER.fullmatch, names)) else names


def class_lines(text: bytes, where: str) -> list[str]:
    """Return the class names in a file with one name per line.

    Raises ValueError for an empty line, and for bytes that are not UTF-8.
    """
    lines = text.decode("utf-8-sig", "surrogateescape").rstrip().splitlines()
    lines = [line.strip() for line in lines]
    if not lines or "" in lines:
        raise ValueError(f"{where}: got an empty line or file; need a class name in every line")
    refuse_not_utf8(where, lines)
    return lines


def refuse_not_utf8(where: str, classes: list[str]) -> None:
    """Raise ValueError for a class name that is not UTF-8, read with surrogateescape."""
    for class_name in classes:
        try:
            class_name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where}: got the class {class_name!r}, which is not UTF-8; need a name that "
                "every manifest and export can hold; do: rename its folder, or save its list as "
                "UTF-8"
            ) from None
