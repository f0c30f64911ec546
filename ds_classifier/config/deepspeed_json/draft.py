"""The JSON while it is checked and completed, with all problems and all that is to be said."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from ds_classifier.config.batch_sizes import AUTO
from ds_classifier.config.command_line import CommandLine

BOOL, INT, NUMBER, STR = "true or false", "a whole number", "a number", "a string"
Path = tuple[str, ...]  # of a key: the names of its sections, then its own


def name_of(path: Path) -> str:
    """Return a key as messages name it, like fp16.enabled."""
    return ".".join(path)


class Draft:
    """A copy of the JSON that the checks complete one after the other.

    A check that finds a problem mends the copy in the way that its message advises. So the later
    checks see the JSON as it will be in the next round, and all problems come in one message.

    ds: the JSON. settings: those of the command, completed from the JSON. problems: a message
    each. notes: lines for the user. autos: {key: the value that stands for "auto"}.
    takes_decay: whether the optimizer has a weight decay.
    known: the keys that DeepSpeed reads at the top level, with the defaults that it has.
    """

    def __init__(self, raw: dict[str, Any], command: CommandLine, known: dict[str, Any]):
        self.ds = copy.deepcopy(raw)
        self.command, self.settings, self.known = command, command.settings, known
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.autos: dict[str, Any] = {}
        self.takes_decay = True
        # Name of a setting -> who set it.
        self.owners = {name: f"--{name} (flag, file or recipe)" for name in command.given}

    def section(self, *path: str) -> dict[str, Any]:
        """Return a section, or {} where the JSON has none."""
        section: Any = self.ds
        for name in path:
            section = section.get(name)
            if not isinstance(section, dict):
                return {}
        return section

    def get(self, *path: str, default: Any = None) -> Any:
        """Return the value of a key; the default where the JSON has none."""
        return self.section(*path[:-1]).get(path[-1], default)

    def set(self, *path_and_value: Any) -> None:
        """Give a key a value, in sections that are made where there are none."""
        *path, key, value = path_and_value
        section = self.ds
        for name in path:
            section = section.setdefault(name, {})
        section[key] = value

    def drop(self, *path: str) -> Any:
        """Remove a key and return its value; None where the JSON has none."""
        return self.section(*path[:-1]).pop(path[-1], None)

    def refuse(self, path: Path, message: str, *mended: Any) -> None:
        """Note a problem with a key, and mend the copy: remove the key, or give it a value.

        message: without the key's name. mended: the value, if there is one.
        """
        self.problems.append(f"{name_of(path)}: {message}")
        if mended:
            self.set(*path, *mended)
        else:
            self.drop(*path)

    def fill_auto(self, path: Path, value: Any) -> None:
        """Give a key a value, which is said, if it is "auto"."""
        if self.get(*path) == AUTO:
            self.autos[name_of(path)] = value
            self.set(*path, value)

    def check_type(self, path: Path, wanted: str, least: float | None = None) -> None:
        """Refuse a key whose value is not of a type, or is too small; "auto" and none pass."""
        value = self.get(*path, default=AUTO)
        if value == AUTO:
            return
        if not has_type(value, wanted):
            self.refuse(path, f"got {shown(value)}; need {wanted}")
        elif least is not None and value < least:
            self.refuse(path, f"got {shown(value)}; need at least {least}")
        elif wanted == INT:
            self.set(*path, int(value))

    def settle(self, path: Path, name: str) -> None:
        """Give a number that is a key and a setting one value, in both places."""
        value, set_to = self.get(*path, default=AUTO), getattr(self.settings, name)
        if value == AUTO:
            self.set(*path, set_to)
        elif name in self.owners and set_to != value:
            self.refuse(
                path,
                f"got {value}, but {self.owners[name]} is {set_to}; need one number; do: write "
                '"auto" in the JSON',
                set_to,
            )
        else:
            self.settings = self.settings.replace(**{name: value})
            self.owners.setdefault(name, name_of(path))

    def autos_left(self) -> Iterator[Path]:
        """Yield the keys that are still "auto"."""
        yield from list(_autos(self.ds, ()))


def _autos(values: dict[str, Any], path: Path) -> Iterator[Path]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _autos(value, (*path, key))
        elif value == AUTO:
            yield (*path, key)


def has_type(value: Any, wanted: str) -> bool:
    """Return True if a value is of a type: BOOL, INT, NUMBER or STR.

    A whole number may be written as 5e8.
    """
    if wanted == BOOL:
        return isinstance(value, bool)
    if wanted == STR:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and (wanted == NUMBER or float(value).is_integer())


def type_of(default: Any) -> str | None:
    """Return the type that a key with this default must have; None if it does not say."""
    kinds = {bool: BOOL, int: INT, float: NUMBER, str: STR}
    return kinds.get(type(default))


def shown(value: Any) -> str:
    """Return a value as the JSON writes it."""
    import json

    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
