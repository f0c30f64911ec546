"""One door for printing: which rank says what, and where it goes."""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings

from ds_classifier.distributed.ranks import local_rank, local_world_size, rank, world_size


def show(message: str, *, error: bool = False) -> None:
    """Print a line, to stderr for an error.

    A closed terminal, or a pipe whose reader ended (tee, at Ctrl-C), is no reason to lose a
    training: nothing is shown from then on, and the run goes on. So it does while the disk under a
    redirected screen is full.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        print(message, file=stream, flush=True)
    except OSError as problem:
        if problem.errno in (errno.EPIPE, errno.EIO):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def say(message: str = "") -> None:
    """Print a line, on rank 0 alone."""
    if rank() == 0:
        show(message)


def complain(message: str) -> None:
    """Print an error once a node, whichever rank finds it first in its own files."""
    if local_rank() == 0:
        host = f"{socket.gethostname()}: " if world_size() > local_world_size() else ""
        show(f"{host}error: {message}", error=True)


def warn(message: str) -> None:
    """Print a line about this rank alone, with its number; the run goes on."""
    show(f"rank {rank()}: {message}", error=True)


def quiet_libraries() -> None:
    """Keep off the screen what no user can act on; call before torch is imported."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
