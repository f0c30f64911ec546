"""Import a function of the user's that a flag names.

Such a function is code, and runs: only what the user typed may name it, never a file of weights.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ds_classifier.common.text import first_line

PACKAGE = os.path.dirname(os.path.dirname(__file__))
FORM = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def load_function(flag: str, name: str) -> Callable[..., Any]:
    """Import what "package.module:name" names, the current directory first.

    flag: the flag that names it, for errors, such as "--loss".
    Raises ValueError if the name has another form, if its module cannot be imported, or if the
    module has no function of that name.
    """
    form = FORM.fullmatch(name)
    if form is None:
        raise ValueError(
            f"{flag}: got {name!r}; need package.module:function, a function in a Python module"
        )
    module_name, function_name = form.groups()
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's can raise anything
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{flag}: got {name!r}, whose module cannot be imported ({cause}); do: start the "
            "program in the directory that holds it, or install it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        fault = "has no such name" if function is None else f"has {function!r:.40} there"
        raise ValueError(
            f"{flag}: got {name!r}, but {module_name} {fault}; need a function or a class"
        )
    return function


def json_object(flag: str, text: str) -> dict[str, Any]:
    """Return the object in a flag's JSON, by name; {} for "".

    Raises ValueError for text that is no JSON, or none of an object.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"""{flag}: got {text!r}; need a JSON object of keywords; do: write '{{"depth": 2}}'"""
        )
    return value


def described(error: Exception) -> str:
    """Return an error of the user's code with its place: "TypeError: ... (mine.py, line 3)"."""
    frames = traceback.extract_tb(error.__traceback__)
    others = ("site-packages", PACKAGE)
    own = [frame for frame in frames if not any(other in frame.filename for other in others)]
    place = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"
