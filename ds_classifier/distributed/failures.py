"""The end of a failed run: every rank's traceback in a file, one message per host on the screen.

runs/NAME/errors/2026-01-31_12-00-00/rank3.txt      what rank 3 was doing, with all its stacks
                                     HOST.json      the first error of that host, as printed
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from ds_classifier import distributed
from ds_classifier.common import files

FAILED = 1  # exit code: an error that is not the user's
WRONG_USE = 2  # exit code: the request cannot be carried out
INTERRUPTED = 130  # exit code: Ctrl-C
HUNG = 70  # exit code: no progress within a time-out (EX_SOFTWARE of sysexits.h)

# Code in which a rank waits for other ranks: collectives of torch and deepspeed, and our vote.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_VOTE = ("ds_classifier/distributed/stopping.py", "_count")


def summary(error: BaseException) -> str:
    """Return the line that says what is wrong.

    The text of a loader worker's error contains its traceback, whose last line counts: the type of
    the error, and what is wrong.
    """
    text = files.problem(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return text
    return f"{type(error).__name__}: {text}"


def exit_code(error: BaseException) -> int:
    """Return WRONG_USE for a ValueError, else FAILED."""
    return WRONG_USE if isinstance(error, ValueError) else FAILED


def report(error: BaseException) -> int:
    """Print an error, once per node, or once if all ranks raise it; return the exit code."""
    if not isinstance(error, distributed.AgreedError):
        distributed.complain(summary(error))
    elif distributed.rank() == 0:
        distributed.show(f"error: {error}", error=True)
    elif distributed.local_rank() == 0:
        distributed.show("ended; rank 0 prints the reason", error=True)
    return exit_code(error)


def interrupted() -> int:
    """Print that Ctrl-C ended the program, once per node; return the exit code."""
    distributed.complain("interrupted; what was written before stands")
    return INTERRUPTED


def tolerate(what: str, task: Callable[[], Any]) -> Any:
    """Run a task that training does not need; return its result, or warn and return None.

    what: the name of its product, for the warning.
    """
    try:
        return task()
    except Exception as error:  # even a bug in it must not end a training
        distributed.warn(f"{what}: not made, and nothing else is lost: {summary(error)}")
        return None


def is_waiting(frame: FrameType | None) -> bool:
    """Return True if a stack, given by its innermost frame, is in a collective."""
    while frame is not None:
        if _is_collective(frame.f_code):
            return True
        frame = frame.f_back
    return False


def broke_in_collective(error: BaseException) -> bool:
    """Return True if an error came out of a collective: another rank may have caused it."""
    return any(_is_collective(f.f_code) for f, _ in traceback.walk_tb(error.__traceback__))


def _is_collective(code: CodeType) -> bool:
    path = code.co_filename
    return any(folder in path for folder in _COLLECTIVES) or (
        path.endswith(_VOTE[0]) and code.co_name == _VOTE[1]
    )


def stacks() -> str:
    """Return the stacks of all threads of this process, the main thread first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread.name != "MainThread")
    return "\n".join(
        f"thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident]))
        for thread in threads
        if thread.ident in frames
    )


def record(folder: Path, text: str) -> bool:
    """Write this rank's file; return False if that failed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{distributed.rank()}.txt").write_text(text, encoding="utf-8")
    except OSError:
        return False
    return True


def claim(folder: Path, verdict: dict[str, Any]) -> bool:
    """Return True if this rank is the first of its host to write a verdict, and may print it.

    If the folder cannot be written, every rank may print.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return files.create(_claimed(folder), json.dumps(verdict))
    except OSError:
        return True


def claimed(folder: Path) -> dict[str, Any] | None:
    """Return the verdict that another rank of this host has printed, or None."""
    try:
        return json.loads(_claimed(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _claimed(folder: Path) -> Path:
    return folder / f"{socket.gethostname()}.json"
