"""Memory of a rank: how much is in use, how much there is, and what to do when it runs out."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ds_classifier.common.text import first_line

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed() -> None:
    """Let glibc keep the memory of freed large tensors, for a process that trains on a CPU.

    By default glibc returns it to the kernel, which gives it out again page by page, zeroed:
    500,000 page faults, 1 s of 6, in a step of the default classifier (fp32, 2 cores).
    """
    with suppress(OSError, AttributeError):  # another C library
        c = ctypes.CDLL("libc.so.6")
        c.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        c.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _release_freed() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def restart_peak(device: torch.device) -> None:
    """Restart the count of `peak_memory` at the memory now in use.

    Does nothing if the kernel refuses it to a CPU process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    _release_freed()
    with suppress(OSError):
        (_PROC / "self/clear_refs").write_bytes(b"5")  # 5: proc(5), the peak resident set size


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of this rank: allocated on the GPU, or resident in memory.

    The peak is that since `restart_peak`, or since the start of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in (_PROC / "self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])  # psutil does not report it
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_for_rank(device: torch.device, *, ranks_here: int) -> int:
    """Return the bytes that this rank may have, those in use included.

    On a GPU: what is free and what this process has reserved. On a CPU: an equal share for each of
    the ranks_here ranks of what the kernel calls available, or of what the control group (a
    container, a job) may still take if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = psutil.virtual_memory().available
    left = _left_in_cgroups()
    if left is not None:
        available = min(available, left)
    return available // ranks_here + psutil.Process().memory_info().rss


def _left_in_cgroups() -> int | None:
    """Return the bytes that this process's control groups may still take; None without a limit."""
    own = {}  # controller -> path; version 2 has one hierarchy, without a name
    try:
        lines = (_PROC / "self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    versions = [
        (_CGROUPS, own.get("", "/"), "memory.max", "memory.current", "inactive_file"),
        (
            _CGROUPS / "memory",
            own.get("memory", "/"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ]
    left = []
    for root, path, limit, usage, cache in versions:
        folder = root / path.strip("/")
        for group in [root, *(p for p in (folder, *folder.parents) if root in p.parents)]:
            try:
                most, used = (
                    (group / limit).read_text("utf-8"),
                    int((group / usage).read_text("utf-8")),
                )
                stat = dict(
                    line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines()
                )
                if most.strip() != "max" and int(most) < 2**60:  # version 1 writes no limit so
                    # The kernel drops files from the page cache when memory is needed.
                    left.append(int(most) - used + int(stat.get(cache, 0)))
            except (OSError, ValueError):
                continue
    return max(0, min(left)) if left else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class MemoryAdvice:
    """Says what to do when a micro-batch does not fit, from what the run has used so far.

    Make it after the engine and before the first step: the memory in use then does not grow with
    the micro-batch.
    """

    def __init__(self, device: torch.device, *, micro_batch: int, image_size: int):
        self._device, self._micro, self._size = device, micro_batch, image_size
        self._resting = peak_memory(device)

    def __call__(self, error: BaseException) -> str | None:
        """Return the message for an error that is about memory, or None for another error."""
        if not is_out_of_memory(error):
            return None
        used = peak_memory(self._device) - self._resting
        each = used / self._micro
        fits = self._micro // 2
        if self._device.type == "cuda" and each > 0:
            total = torch.cuda.get_device_properties(self._device).total_memory
            fits = min(fits, int(0.9 * (total - self._resting) / each))
        text = (
            f"out of memory: got micro-batch {self._micro} at {self._size} px, which had taken "
            f"{each / 2**20:.1f} MB per image when it failed, and {self._resting / 2**30:.2f} GB "
            "for everything else"
        )
        reason = first_line(error)
        if fits < 1:
            return f"{text}; do: train on a device with more memory ({reason})"
        return (
            f"{text}; need less; do: set train_micro_batch_size_per_gpu in the JSON to {fits} or "
            f"less (the accumulation makes up for it under --global_batch) ({reason})"
        )
