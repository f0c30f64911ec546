"""Do what a message about a DeepSpeed JSON says, word by word, as a user who knows nothing else."""

from __future__ import annotations

import copy
import json
import re

_LINE = re.compile(r"(?:  \d+\. )?([\w.\- ]+): (.*)")


class NoAdviceError(AssertionError):
    """A message that does not say what to write."""


def follow(raw: dict, ranks: int, message: str) -> tuple[dict, int]:
    """Return the JSON and the number of ranks after all that a message advises was done.

    Raises NoAdviceError for a problem without advice that can be followed.
    """
    raw = copy.deepcopy(raw)
    for line in message.splitlines():
        if re.match(r"\d+ problems ", line):
            continue
        if not (found := _LINE.fullmatch(line)):
            raise NoAdviceError(line)
        name, text = found[1], found[2]
        if advised := re.search(r"do: run on (\d+)", text):
            ranks = int(advised[1])
        else:
            _follow_one(raw, name.split("."), text)
    return raw, ranks


def _follow_one(raw: dict, path: list[str], text: str) -> None:
    *sections, key = path
    section = raw
    for name in sections:
        if not isinstance(section.get(name), dict):
            section[name] = {}  # the message names a key of it
        section = section[name]
    if advised := re.search(r"did you mean '(.+)'\?$", text):
        if text.startswith("unknown"):
            section[advised[1]] = section.pop(key)
        else:
            section[key] = advised[1]
    elif re.search(r"do: (correct or )?remove it\b", text):
        del section[key]
    elif advised := re.search(r"do: write (.*)$", text):
        section[key] = _value(advised[1], text)
    elif advised := re.search(r"do: use a micro-batch of (\d+).* and accumulation \"auto\"", text):
        section[key], section["gradient_accumulation_steps"] = int(advised[1]), "auto"
    elif advised := re.search(r"do: use (\w+), with ([\w, ]+) alone", text):
        kept, params = advised[2].split(", "), section.get("params") or {}
        section[key] = advised[1]
        section["params"] = {name: value for name, value in params.items() if name in kept}
    else:
        raise NoAdviceError(text)


def _value(written: str, text: str) -> object:
    """Return the value that a JSON begins with."""
    try:
        return json.JSONDecoder().raw_decode(written)[0]
    except json.JSONDecodeError:
        raise NoAdviceError(text) from None
