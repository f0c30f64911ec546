"""Processes of this host: whether they are alive, who started them, and how to die with a parent.

Facts come from psutil, but for the start time: psutil reports seconds since the epoch, which change
when the clock is set, so the kernel's clock ticks since boot are read from /proc.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import psutil

LAUNCHER_PROGRAMS = ("deepspeed", "torchrun")
LAUNCHER_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
)
RANK_MARKS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # variables that only launchers set, for ranks
_PR_SET_PDEATHSIG = 1


def started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if it is gone or a zombie.

    The kernel reuses process numbers: number and start together identify a process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()  # from the state
    return int(fields[19]) if fields[0] not in "ZX" else 0


def parent(pid: int) -> int:
    """Return the process that started another, or adopted it as an orphan; 0 if `pid` is gone."""
    return _ask(pid, "ppid", 0)


def command_line(pid: int) -> list[str]:
    """Return the words that a process was started with; [] if it is gone."""
    return _ask(pid, "cmdline", [])


def working_directory(pid: int) -> Path:
    """Return a process's working directory; Path() if it is gone or another user's."""
    return Path(_ask(pid, "cwd", ""))


def _ask(pid: int, fact: str, missing: Any) -> Any:
    """Return what a psutil method says of a process; `missing` if it is gone or another user's."""
    try:
        return getattr(psutil.Process(pid), fact)()
    except psutil.Error:
        return missing


def launcher_chain(pid: int | None = None) -> list[tuple[int, int]]:
    """Return (child, parent) pairs from this process up to the launcher's first one.

    On one node: (rank, launch.py), (launch.py, deepspeed). On other nodes the chain ends at sshd,
    which ends when the connection does. The shell that started the launcher is left out, because
    its user may log out. [] for a process that no launcher started. A launcher that died before
    this call appears as 0.
    """
    chain = []
    child = os.getpid() if pid is None else pid
    while above := parent(child):
        is_launcher = _is_launcher(above)
        if not is_launcher and not (chain and _ask(above, "name", "").startswith("sshd")):
            if _adopts_orphans(above) and _needs_launcher(child):
                chain.append((child, 0))
            break
        chain.append((child, above))
        if not is_launcher:
            break
        child = above
    return chain


def broken(chain: list[tuple[int, int]]) -> bool:
    """Return True if a parent in a `launcher_chain` has died."""
    return any(parent(child) != above for child, above in chain)


def _adopts_orphans(pid: int) -> bool:
    return pid == 1 or _ask(pid, "name", "") == "systemd"


def _needs_launcher(pid: int) -> bool:
    """Return True if only a launcher can have started a process.

    That is a rank, or the launch.py of a job on one node. On several nodes, sshd or a batch system
    starts launch.py.
    """
    words = command_line(pid)
    if LAUNCHER_MODULES[0] in words:
        return not any(word.startswith("--node_rank") for word in words)
    return not _ask(pid, "environ", {}).keys().isdisjoint(RANK_MARKS)


def _is_launcher(pid: int) -> bool:
    """Return True for a process of deepspeed or torchrun, or the shell in which pdsh runs one."""
    words = command_line(pid)[:8]
    return any(
        os.path.basename(word) in LAUNCHER_PROGRAMS
        or any(module in word for module in LAUNCHER_MODULES)
        for word in words
    )


def die_with(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent dies (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def pid_space() -> str:
    """Return a name of the space in which process numbers are unique: boot and container.

    "unknown" if the kernel does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown"
