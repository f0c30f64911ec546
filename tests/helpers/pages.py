"""Read the project's pages: their blocks of Python, and the commands that they give."""

from __future__ import annotations

import argparse
import ast
import os
import re
import runpy
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from running import ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands of `ds-classifier` that are not the name of a file of launch/.
OF_MAKE_SHARDS = ("convert", "merge", "index", "verify")
# Words that stand for any flags.
ANY_FLAGS = re.compile(r"\[(?:\w+ )?flags(?: of [\w/.]+)?\]|(?<!')\b(?:MODEL_)?FLAGS\b(?!')")


def split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a page's prose, and its blocks of code: (language or "", code without indentation).

    A block is fenced by ```, or indented by four spaces after an empty line.
    """
    prose, blocks, code, language = [], [], [], None  # language: None outside a fence
    for line in [*text.splitlines(), "."]:
        fence = line.startswith("```")
        indented = language is None and line.startswith("    ")
        begins = not prose or not prose[-1].strip()
        if (language is not None and not fence) or (indented and (code or begins)):
            code.append(line)
        elif language is None and code and not line.strip():
            code.append("")
        else:
            if code:
                blocks.append((language or "", textwrap.dedent("\n".join(code)).strip("\n")))
                prose.append("")
                code = []
            if not fence:
                prose.append(line)
            language = line.removeprefix("```").strip() if fence and language is None else None
    return "\n".join(prose[:-1]), blocks


def is_python(language: str, code: str) -> bool:
    """Return whether a block is Python: it is marked so, or parses and calls something.

    Raises SyntaxError for a block that is marked as Python, or looks like it, and does not parse.
    """
    try:
        tree = ast.parse(code)
    except SyntaxError:
        if language == "python" or re.search(
            r"^(import|from) \w|\bds_classifier\.\w+\(", code, re.M
        ):
            raise
        return False
    return language == "python" or any(isinstance(node, ast.Call) for node in ast.walk(tree))


def python_blocks(text: str) -> list[str]:
    """Return the blocks of a page that are Python."""
    return [code for language, code in split(text)[1] if is_python(language, code)]


@dataclass(frozen=True)
class Command:
    """A command line of a program of this project, as a page gives it.

    argv: its arguments.
    whole: False if something is left out ("..."), or if it stands inside a sentence.
    """

    line: str
    script: Path
    argv: list[str]
    whole: bool


def commands(text: str) -> list[Command]:
    """Return the commands of a page that start a program of this project."""
    prose, blocks = split(text)
    lines = [
        (line, "..." not in line)
        for language, code in blocks
        if not is_python(language, code)
        for line in code.replace("\\\n", " ").splitlines()
    ]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)
    found = [_command(line, whole) for line, whole in lines]
    found += [_command(" ".join(span.split()), False) for span in spans]
    return [command for command in found if command]


def _command(line: str, whole: bool) -> Command | None:
    """Return the command in a line; None if it starts no program of this project."""
    plain = ANY_FLAGS.sub("", line)
    plain = re.sub(r"(?<=\w)\|[\w:]+", "", plain)  # cls|json:KEY: the first of them
    plain = re.sub(r"[][]|\.\.\.|(?<= )\|(?= )", "", plain)  # optional parts count as given
    try:
        words = shlex.split(plain, comments=True)
    except ValueError:  # an apostrophe in a sentence
        return None
    words = ["1" if word == "N" else word for word in words]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable for the environment
        words.pop(0)
    if words and words[0] == "python":
        words.pop(0)
    if not words:
        return None
    first, rest = words[0], words[1:]
    if first in ("deepspeed", "torchrun"):
        first, rest = _behind_launcher(first, rest)
    elif first == "ds-classifier" and rest:
        first, rest = rest[0], rest[1:]
        if first in OF_MAKE_SHARDS:
            first, rest = "make_shards", [first, *rest]
        first += ".py"
    elif first.startswith("ds-classifier-"):
        first = f"{first.removeprefix('ds-classifier-').replace('-', '_')}.py"
    for script in (ROOT / first, ROOT / "launch" / first):
        if not first.endswith(".py") or first.endswith("__init__.py") or not script.exists():
            continue
        if script.parent == ROOT / "launch" or "ArgumentParser(" in script.read_text():
            return Command(line, script, rest, whole)
    return None


def _behind_launcher(launcher: str, words: list[str]) -> tuple[str, list[str]]:
    """Parse a launcher's own flags. Return the script, or "", and the script's arguments."""
    if not any(word.endswith(".py") or word == "--module" for word in words):
        return "", []
    if launcher == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(words)
        script = parsed.user_script
        if parsed.module:
            script = script.removeprefix("ds_classifier.").replace(".", "/") + ".py"
        return script, parsed.user_args
    from torch.distributed.run import parse_args

    parsed = parse_args(words)
    return parsed.training_script, parsed.training_script_args


class _Reached(BaseException):
    """Raised in a program's parser, in place of parsing."""


def parser_of(script: Path, argv: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """Start a program up to its parser. Return the parser, and the arguments that it would parse.

    The environment, sys.argv and sys.path are as they were afterwards.
    """

    def stop(parser, args=None, namespace=None):
        raise _Reached(parser, list(sys.argv[1:] if args is None else args))

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [str(script), *argv]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.dict(os.environ),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Reached as reached:
            return reached.args
    raise AssertionError(f"{script} has no parser")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags of a parser and of its commands."""
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags |= set().union(*(flags_of(command) for command in action.choices.values()))
    return flags
