"""Processes of this host as /proc shows them: alive or gone, who started whom, dying together."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

LAUNCHER_PROGRAMS = ("deepspeed", "torchrun")
LAUNCHER_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
)
RANK_MARKS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # which the launchers give to their ranks alone
_PR_SET_PDEATHSIG = 1


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if it is gone, or dead and unburied.

    A number may be given to another process later: number and start together name one for good.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else 0


def parent(pid: int) -> int:
    """The process that started another, or adopted it when that one died; 0 if it is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def launcher_chain(pid: int | None = None) -> list[tuple[int, int]]:
    """(child, parent) from this process up to the launcher's first one.

    On one node: (rank, launch.py), (launch.py, deepspeed). On others the chain ends at sshd, whose
    end is that of the connection. A shell that started the launcher is not in it: one may log out.
    Empty for a process that no launcher started. A launcher that died before it could be seen
    stands in it as 0.
    """
    chain = []
    child = os.getpid() if pid is None else pid
    while above := parent(child):
        is_launcher = _is_launcher(above)
        if not is_launcher and not (chain and _name(above).startswith("sshd")):
            if _is_adopter(above) and _needs_launcher(child):
                chain.append((child, 0))
            break
        chain.append((child, above))
        if not is_launcher:
            break
        child = above
    return chain


def _is_adopter(pid: int) -> bool:
    """Whether a process takes in those whose parent died."""
    return pid == 1 or _name(pid) == "systemd"


def _needs_launcher(pid: int) -> bool:
    """Whether a process cannot have been started but by a launcher's: a rank, or the launch.py of a
    job on one node; on several, sshd or a batch system starts launch.py."""
    words = command_line(pid)
    if LAUNCHER_MODULES[0] in words:
        return not any(word.startswith("--node_rank") for word in words)
    return any(f"{mark}=" in _environment(pid) for mark in RANK_MARKS)


def broken(chain: list[tuple[int, int]]) -> bool:
    """Whether a parent of the chain has died."""
    return any(parent(child) != above for child, above in chain)


def _is_launcher(pid: int) -> bool:
    """Whether a process is deepspeed's or torchrun's, or the shell in which pdsh runs it."""
    words = command_line(pid)[:8]
    return any(
        os.path.basename(word) in LAUNCHER_PROGRAMS
        or any(module in word for module in LAUNCHER_MODULES)
        for word in words
    )


def command_line(pid: int) -> list[str]:
    """The words a process was started with; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _environment(pid: int) -> str:
    """NAME=value, NAME=value, ... as the process was started with."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def working_directory(pid: int) -> Path:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:
        return Path()


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, of whatever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def pid_space() -> str:
    """Where process numbers mean the same: this boot of this host, and the container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown"
