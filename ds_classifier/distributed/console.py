"""The only place that prints: which rank prints what, and to which stream."""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings

from ds_classifier.distributed.ranks import local_rank, local_world_size, rank, world_size


def show(message: str, *, error: bool = False) -> None:
    """Print a line, to stderr if it is an error.

    A failing print must not end a training. If the terminal was closed, or the reader of a pipe has
    ended (tee, at Ctrl-C), later lines are discarded. If the disk under a redirected output is
    full, this line is lost. Characters that the terminal's encoding does not have are escaped.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        try:
            print(message, file=stream, flush=True)
        except UnicodeEncodeError as error:
            plain = message.encode(error.encoding, "backslashreplace").decode(error.encoding)
            print(plain, file=stream, flush=True)
    except OSError as problem:
        if problem.errno in (errno.EPIPE, errno.EIO):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def say(message: str = "") -> None:
    """Print a line on rank 0 only."""
    if rank() == 0:
        show(message)


def complain(message: str) -> None:
    """Print an error on the first rank of each node, with the host's name if there are several."""
    if local_rank() == 0:
        host = f"{socket.gethostname()}: " if world_size() > local_world_size() else ""
        show(f"{host}error: {message}", error=True)


def warn(message: str) -> None:
    """Print a warning about this rank alone, with its number."""
    show(f"rank {rank()}: {message}", error=True)


def quiet_libraries() -> None:
    """Set filters for library warnings that no user can act on. Call it before importing torch."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
