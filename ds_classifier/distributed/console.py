"""The only place that prints: which rank prints what, and to which stream."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import sys
import textwrap
import time
import warnings
from typing import TextIO

from ds_classifier.distributed.ranks import local_rank, local_world_size, rank, world_size

ERASE = "\r\x1b[K"  # moves the cursor to the left of the terminal's line, and empties that
LABEL = 12  # columns of the label before a line of a run's header
LIVE_SECONDS = 0.2  # between two drawings of the live line
_LIBRARIES = ("torch", "multiprocessing", "deepspeed", "tensorboardX")
_drawn = float("-inf")  # when the live line was drawn last, by time.monotonic


def show(message: str, *, error: bool = False) -> None:
    """Print a line, to stderr if it is an error. On a terminal it takes the live line's place.

    A failing print must not end a training. If the terminal was closed, or the reader of a pipe has
    ended (tee, at Ctrl-C), later lines are discarded. If the disk under a redirected output is
    full, this line is lost. Characters that the terminal's encoding does not have are escaped.
    """
    stream = sys.stderr if error else sys.stdout
    # Always: another rank may have drawn its live line on this terminal. Each call is one write,
    # so that threads and ranks need no lock.
    _write(stream, f"{ERASE if _is_terminal(stream) else ''}{message}\n")


def live(text: str, *, at_once: bool = False) -> None:
    """Draw rank 0's live line, the last one of its terminal, until the next call of any function.

    Nothing is written unless stdout is a terminal and this job runs in its foreground, so no log
    has a live line. text: cut to the width of the terminal; "" removes the line.
    at_once: draw it however short ago the last one was drawn, as before a phase that takes long.
    """
    global _drawn
    now = time.monotonic()
    if rank() != 0 or (text and not at_once and now - _drawn < LIVE_SECONDS):
        return
    if (width := columns()) is not None and _in_foreground(sys.stdout):
        _drawn = now
        _write(sys.stdout, ERASE + text[:width])


def columns() -> int | None:
    """Return how many columns a line on stdout may have; None if stdout is not a terminal.

    The last column of the terminal stays empty, since some wrap a line that fills it.
    """
    return shutil.get_terminal_size().columns - 1 if _is_terminal(sys.stdout) else None


def _is_terminal(stream: TextIO) -> bool:
    """Return whether the stream is a terminal that can erase a line."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _in_foreground(stream: TextIO) -> bool:
    """Return whether the terminal's user waits for this job; a job after `&` draws nothing."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:  # a session of its own, as torchrun gives its ranks
        return True


def _write(stream: TextIO, text: str) -> None:
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError as error:
            stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        stream.flush()
    except OSError as problem:
        if problem.errno in (errno.EPIPE, errno.EIO):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def say(message: str = "") -> None:
    """Print a line on rank 0 only."""
    if rank() == 0:
        show(message)


def say_labelled(line: str) -> None:
    """Print a line that begins with a label of LABEL columns on rank 0, wrapped on a terminal."""
    say(wrapped(line, indent=LABEL))


def wrapped(line: str, *, indent: int) -> str:
    """Return a line broken between words where a terminal is too narrow; in a log it stays one."""
    width = columns()
    if width is None or len(line) <= width:
        return line
    whole_words = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(line, width, subsequent_indent=" " * indent, **whole_words)


def complain(message: str) -> None:
    """Print an error on the first rank of each node, with the host's name if there are several."""
    if local_rank() == 0:
        host = f"{socket.gethostname()}: " if world_size() > local_world_size() else ""
        show(f"{host}error: {message}", error=True)


def warn(message: str) -> None:
    """Print a warning about this rank alone, with its number."""
    show(f"rank {rank()}: {message}", error=True)


def quiet_libraries() -> None:
    """Set filters for what libraries print and no user can act on. Call it before importing torch.

    That is warnings, and the errors of destructors: of torch's loader, for example, if it could not
    be built, which is reported already.
    """
    before = sys.unraisablehook

    def shown(unraisable: sys.UnraisableHookArgs) -> None:
        place = getattr(unraisable.object, "__module__", None) or ""
        if place.partition(".")[0] not in _LIBRARIES:
            before(unraisable)

    sys.unraisablehook = shown
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
