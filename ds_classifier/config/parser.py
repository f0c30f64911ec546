"""The parser of all programs: errors of a line, and what was meant by a mistyped flag.

This module imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ds_classifier.common.version import __version__
from ds_classifier.config.other_names import MEANT
from ds_classifier.distributed import failures
from ds_classifier.distributed.console import complain

Malformed = argparse.ArgumentTypeError  # a value that a flag cannot have
_NUMBER = re.compile(r"-\.?\d")


class Parser(argparse.ArgumentParser):
    """A command line. An error is a line on the first rank of each node, without the usage.

    Flags are written in full, so that a flag added later changes no command; dashes may stand for
    underscores. Every parser has --version.
    advice: {name of a flag that this program does not have, without dashes: what to do}.
    passes_on: `parse_known_args` returns unknown words; else they are an error.
    """

    def __init__(
        self,
        *args: Any,
        advice: Mapping[str, str] | None = None,
        passes_on: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._negative_number_matcher = _NUMBER  # argparse's own takes -1e-3 for a flag
        self.advice, self.passes_on = advice or {}, passes_on
        self.register("type", int, whole_number)
        self.register("type", float, number)
        self.add_argument("--version", action="version", version=f"ds_classifier {__version__}")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, but end the process for unknown words, unless passes_on."""
        words = [self._underscored(word) for word in (sys.argv[1:] if args is None else args)]
        # Before argparse looks: it would first miss an argument that a mistyped flag stands for.
        if not self.passes_on and (unknown := self._unknown_flags(words)):
            self.error("\n".join(f"{flag}: unknown flag; {self._meant(flag)}" for flag in unknown))
        found, rest = super().parse_known_args(words, namespace)
        if rest and not self.passes_on:
            self.error(f"got {' '.join(rest)!r}, which belongs to no flag; {self._help()}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and end the process with code 2."""
        message = re.sub(r"^argument ([^\s/]+)\S*: ", r"\1: ", message)  # --a of --a/--alias
        if choice := re.fullmatch(r"(.*)invalid choice: '(.*)' \(choose from (.*)\)", message):
            names = re.findall(r"[\w.]+", choice[3])
            near = difflib.get_close_matches(choice[2], names, n=1)
            message = f"{choice[1]}got {choice[2]!r}; need one of {', '.join(names)}" + (
                f"; did you mean {near[0]}?" if near else ""
            )
        elif message.endswith(": expected one argument"):
            flag = message.partition(":")[0]
            action = self._option_string_actions[flag]
            message = f"{flag}: got no value; need {action.metavar or 'one'}"
            if action.help and action.help != argparse.SUPPRESS:
                message += f": {self._get_formatter()._expand_help(action)}"
        elif message.startswith("the following arguments are required: "):
            message = f"got no {message.partition(': ')[2]}; {self._help()}"
        complain(message)
        raise SystemExit(failures.WRONG_USE)

    def _help(self) -> str:
        return f"do: look at {self.prog} --help"

    def _underscored(self, word: str) -> str:
        """Return --a-b=c as --a_b=c if this program has the flag --a_b."""
        name, equals, value = word.partition("=")
        flag = "--" + name[2:].replace("-", "_")
        known = word.startswith("--") and flag in self._option_string_actions
        return f"{flag}{equals}{value}" if known else word

    def _unknown_flags(self, words: Iterable[str]) -> list[str]:
        """Return the flags that this program does not have, as they are written.

        A word is a flag where argparse takes it for one. After a command its own parser looks.
        """
        unknown = []
        for word in words:
            flag = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break
            if (
                len(word) > 1
                and word.startswith("-")
                and " " not in word
                and not _NUMBER.match(word)
                and flag not in self._option_string_actions
            ):
                unknown.append(flag)
        return list(dict.fromkeys(unknown))

    def _meant(self, flag: str) -> str:
        """Return what to do in place of an unknown flag."""
        name = flag.lstrip("-").replace("-", "_").lower()
        if name in self.advice:
            return self.advice[name]
        shown = [
            option.removeprefix("--")
            for option, action in self._option_string_actions.items()
            if option.startswith("--") and action.help != argparse.SUPPRESS
        ]
        near = did_you_mean(name, shown, "--")
        return near or self._help()


class Once(argparse.Action):
    """A flag that may be given once. Of two values, argparse would lose the first in silence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value; end the process if there is one already."""
        before = getattr(namespace, self.dest)
        if before != self.default:
            raise argparse.ArgumentError(self, f"got {before} and {values}; need one; do: drop one")
        setattr(namespace, self.dest, values)


def did_you_mean(name: str, known: Sequence[str], dashes: str = "") -> str:
    """Return "did you mean --lr?" for a name that is not among the known ones; "" if none is near.

    dashes: stands before each suggestion.
    """

    def plain(word: str) -> str:
        return word.replace("_", "").lower()

    near = (
        [word for word in known if plain(word) == plain(name)]
        or [word for word in MEANT.get(name, []) if word in known][:1]
        or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        or [word for word in known if plain(word).startswith(plain(name))][:3]
        or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        or [word for word in known if len(name) > 3 and name in word][:3]
        or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    )
    return f"did you mean {' or '.join(dashes + word for word in near)}?" if near else ""


def whole_number(text: str) -> int:
    """Read a whole number from a flag."""
    try:
        return int(text)
    except ValueError:
        raise Malformed(f"got {text!r}; need a whole number") from None


def number(text: str) -> float:
    """Read a number from a flag."""
    try:
        return float(text)
    except ValueError:
        raise Malformed(f"got {text!r}; need a number") from None


def boolean(text: str) -> bool:
    """Read True or False as the reference spells them: yes, true, t, y, 1 and their opposites."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise Malformed(f"got {text!r}; need True or False")
