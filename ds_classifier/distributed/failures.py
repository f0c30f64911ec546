"""How a failed run ends: each rank's traceback in a file, one message a host on the screen.

runs/NAME/errors/2026-01-31_12-00-00/rank3.txt      what rank 3 was doing, with all its stacks
                                     HOST.json      the first error, as it stood on the screen
"""

from __future__ import annotations

import json
import os
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
WRONG_USE = 2  # exit code: what the user asked for cannot be done
HUNG = 70  # exit code: no progress within a time-out (EX_SOFTWARE of sysexits.h)

# Code in which a rank waits for others: torch's and deepspeed's collectives, and our vote.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_VOTE = ("ds_classifier/distributed/stopping.py", "_count")


def summary(error: BaseException) -> str:
    """The line that says what is wrong; a loader worker's error comes with its whole traceback."""
    text = files.problem(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return text
    return f"{type(error).__name__}: {text}"


def exit_code(error: BaseException) -> int:
    return WRONG_USE if isinstance(error, ValueError) else FAILED


def tell(error: BaseException) -> int:
    """Put the error on the screen, once a node, or once where all know it; the exit code."""
    if not isinstance(error, distributed.AgreedError):
        distributed.complain(summary(error))
    elif distributed.rank() == 0:
        distributed.show(f"error: {error}", error=True)
    elif distributed.local_rank() == 0:
        distributed.show("ended; rank 0 tells why", error=True)
    return exit_code(error)


def tolerate(what: str, task: Callable[[], Any]) -> Any:
    """Do what a run can do without: its result, or a line on the screen and None if it fails."""
    try:
        return task()
    except Exception as error:  # a bug in it, too, is no reason to lose a training
        distributed.warn(f"{what}: not made, and nothing else is lost: {summary(error)}")
        return None


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a stack, given by its innermost frame, stands in a collective."""
    while frame is not None:
        if _is_collective(frame.f_code):
            return True
        frame = frame.f_back
    return False


def broke_in_collective(error: BaseException) -> bool:
    """Whether an error came out of a collective, so that another rank's may be behind it."""
    return any(_is_collective(f.f_code) for f, _ in traceback.walk_tb(error.__traceback__))


def _is_collective(code: CodeType) -> bool:
    path = code.co_filename
    return any(place in path for place in _COLLECTIVES) or (
        path.endswith(_VOTE[0]) and code.co_name == _VOTE[1]
    )


def stacks() -> str:
    """Where every thread of this process stands, the main thread first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread.name != "MainThread")
    return "\n".join(
        f"thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident]))
        for thread in threads
        if thread.ident in frames
    )


def record(folder: Path, text: str) -> bool:
    """Write this rank's file; whether that worked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{distributed.rank()}.txt").write_text(text)
    except OSError:
        return False
    return True


def claim(folder: Path, verdict: dict[str, Any]) -> bool:
    """Be the one of this host that speaks: the first whose verdict appears in the folder.

    Where nothing can be written, everybody speaks.
    """
    path = _claimed(folder)
    staging = path.with_suffix(f".rank{distributed.rank()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging.write_text(json.dumps(verdict))
        os.link(staging, path)  # fails if another was first, on network file systems too
    except FileExistsError:
        return False
    except OSError:
        return True
    finally:
        staging.unlink(missing_ok=True)
    return True


def claimed(folder: Path) -> dict[str, Any] | None:
    """The verdict that another rank of this host has put on the screen, or None."""
    try:
        return json.loads(_claimed(folder).read_text())
    except (OSError, ValueError):
        return None


def _claimed(folder: Path) -> Path:
    return folder / f"{socket.gethostname()}.json"
