"""Check what a program needs before it can begin: a new enough Python, and the packages.

Programs that are run by their path call `check` before they import anything else of the library.
This file must therefore be readable by any Python 3, and imports nothing but the standard library.
"""

import sys
from pathlib import Path

OLDEST_PYTHON = (3, 10)  # as in setup.cfg
TREE = Path(__file__).resolve().parents[2]
WRONG_USE, INTERRUPTED = 2, 130  # exit codes


def check():
    """End the process in one line, with code 2, if Python is too old.

    From now on, a package that is not installed ends it in the same way, wherever it is imported,
    and so does Ctrl-C while a program begins, with code 130.
    """
    if sys.version_info < OLDEST_PYTHON:
        got, need = (".".join(map(str, v)) for v in (sys.version_info[:3], OLDEST_PYTHON))
        print(
            f"error: got Python {got} ({sys.executable}); need {need} or newer; {_advice()}",
            file=sys.stderr,
        )
        raise SystemExit(WRONG_USE)
    sys.excepthook = _explain


def _explain(kind, error, trace):
    """Report an uncaught exception; a missing package and Ctrl-C take one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or package in ("", "ds_classifier", "launch"):
        sys.__excepthook__(kind, error, trace)
        return
    print(
        f"error: {sys.executable} has no module {package!r}; need the packages of setup.cfg; "
        f"{_advice()}",
        file=sys.stderr,
    )
    raise SystemExit(WRONG_USE)  # Python leaves with this code when its hook raises it


def _advice():
    return f"do: cd {TREE}; make install; . .venv/bin/activate (or: python -m pip install {TREE})"
