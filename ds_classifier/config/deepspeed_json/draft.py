"""The JSON while it is checked and completed, with all problems and all that is to be said."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
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

    A check that finds a problem mends the copy in the way that its message advises, so that the
    later checks see the JSON as it will be in the next round.

    ds: the JSON. advised: what the user wrote, with all that the messages advise, and nothing else.
    settings: those of the command, completed from the JSON. problems: a message each. notes: lines
    for the user. autos: {key: the value that stands for "auto"}.
    takes_decay: whether the optimizer has a weight decay.
    known: the keys that DeepSpeed reads at the top level, with the defaults that it has.
    """

    def __init__(self, raw: dict[str, Any], command: CommandLine, known: dict[str, Any]):
        self.ds, self.advised = copy.deepcopy(raw), copy.deepcopy(raw)
        self.command, self.settings, self.known = command, command.settings, known
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.autos: dict[str, Any] = {}
        self.takes_decay = True
        self.spelt: dict[str, str] = {}  # section -> its old name, under which the JSON has it
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
        *path, value = path_and_value
        _set(self.ds, path, value)

    @property
    def has_muon(self) -> bool:
        """Shows whether Muon trains; for a JSON whose optimizer has its type."""
        return self.get("optimizer", "type").lower() == "muon"

    def drop(self, *path: str) -> Any:
        """Remove a key and return its value; None where the JSON has none."""
        return self.section(*path[:-1]).pop(path[-1], None)

    def refuse(self, path: Path, message: str, *mended: Any, advice: str = "") -> None:
        """Note a problem with a key, and mend the copy: remove the key, or give it a value.

        message: without the key's name. mended: the value, if there is one. advice: what to do, in
        other words than those for which this stands.
        """
        if not advice:
            advice = f"do: write {shown(*mended)}" if mended else "do: correct or remove it"
        as_written = (self.spelt.get(path[0], path[0]), *path[1:])
        self.problems.append(f"{name_of(as_written)}: {message}; {advice}")
        for values, name in ((self.ds, path), (self.advised, as_written)):
            if mended:
                _set(values, name, *mended)
            else:
                _drop(values, name)

    def rename(self, path: Path, message: str, name: str) -> None:
        """Note that a key's name is a slip of the keyboard, and give its value to the right key."""
        value, right = self.get(*path), (*path[:-1], name)
        there = self.get(*right, default=AUTO) != AUTO
        advice = f"{name!r} is there already; do: remove it" if there else f"did you mean {name!r}?"
        self.refuse(path, message, advice=advice)
        if not there:
            for values in (self.ds, self.advised):
                _set(values, right, copy.deepcopy(value))

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
        need = wanted if least is None else f"{wanted} of at least {least}"
        fits = has_type(value, wanted) and (least is None or value >= least)
        if not fits:
            meant = _unquoted(value)
            right = has_type(meant, wanted) and (least is None or meant >= least)
            self.refuse(path, f"got {shown(value)}; need {need}", *[meant] * right)
            value = meant if right else None
        if value is not None and wanted == INT:
            self.set(*path, int(value))

    def settle(self, path: Path, name: str) -> None:
        """Give a number that is a key and a setting one value, in both places."""
        value, set_to = self.get(*path, default=AUTO), getattr(self.settings, name)
        if value == AUTO:
            self.set(*path, set_to)
        elif name in self.owners and set_to != value:
            owner, advice = self.owners[name], f'do: write "auto" for {set_to}'
            if owner.startswith("--"):
                advice += f", or give --{name} {value}"
            message = f"got {value}, but {owner} is {set_to}; need one number"
            self.refuse(path, message, AUTO, advice=advice)
            self.set(*path, set_to)
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


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *sections, key = path
    for name in sections:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[key] = value


def _drop(values: dict[str, Any], path: Sequence[str]) -> None:
    *sections, key = path
    for name in sections:
        values = values.get(name, {})
        if not isinstance(values, dict):
            return
    values.pop(key, None)


def _unquoted(value: Any) -> Any:
    """Return the number, true or false that a string holds; else None."""
    try:
        return json.loads(value.lower()) if isinstance(value, str) else None
    except ValueError:
        return None


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
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
