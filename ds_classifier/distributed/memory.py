"""Memory of a rank: how much is in use, how much there is, and what to say of too little."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import torch

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed() -> None:
    """Have glibc reuse large tensors' memory, for a process that trains on a CPU.

    Given back to the kernel, as it is otherwise, each comes anew page by page, zeroed: 500,000 page
    faults, 1 s of 6, in a step of the default classifier (fp32, 2 cores).
    """
    with suppress(OSError, AttributeError):  # another C library
        c = ctypes.CDLL("libc.so.6")
        c.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        c.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _give_back_freed() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory_in_use(device: torch.device) -> int:
    """Peak bytes of this rank: allocated on the GPU, or resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def restart_peak(device: torch.device) -> None:
    """Count the peak of `peak_memory` from here on, of memory that is in use.

    Where a CPU's kernel refuses that, the peak is that of the process so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    _give_back_freed()
    try:
        (_PROC / "self/clear_refs").write_text("5")  # 5: proc(5), the peak resident set size
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this rank since `restart_peak`: allocated on the GPU, or resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") or memory_in_use(device)


def memory_for_rank(device: torch.device, *, ranks_here: int) -> int:
    """Bytes that this rank may have, those in use included; the ranks of a CPU node share alike.

    A GPU's: what is free and what this process has taken of it. A CPU's: what the kernel calls
    available, or less where the control group (a container, a job) has a limit.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = _kib(_PROC / "meminfo", "MemAvailable")
    left = _left_in_cgroups()
    if left is not None:
        available = min(available, left) if available else left
    return available // ranks_here + _resident("VmRSS")


def _kib(path: Path, name: str) -> int:
    """Bytes of a line "NAME:  123 kB" of a file in /proc; 0 if there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _resident(name: str) -> int:
    return _kib(_PROC / "self/status", name)


def _left_in_cgroups() -> int | None:
    """Bytes that the control groups of this process may still take; None without a limit."""
    own = {}  # controller -> path; version 2 has one hierarchy, without a name
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
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
                most, used = (group / limit).read_text(), int((group / usage).read_text())
                stat = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )
                if most.strip() != "max" and int(most) < 2**60:  # version 1 writes no limit so
                    # Files in the page cache are given up when memory is needed.
                    left.append(int(most) - used + int(stat.get(cache, 0)))
            except (OSError, ValueError):
                continue
    return max(0, min(left)) if left else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class MemoryAdvice:
    """What to do when a micro-batch does not fit, from what the run has used so far.

    Made when the engine stands and before the first step: what is in use then does not grow with
    the micro-batch.
    """

    def __init__(self, device: torch.device, *, micro_batch: int, image_size: int):
        self._device, self._micro, self._size = device, micro_batch, image_size
        self._resting = memory_in_use(device)

    def __call__(self, error: BaseException) -> str | None:
        """The message for an error that is about memory, or None."""
        if not is_out_of_memory(error):
            return None
        used = memory_in_use(self._device) - self._resting
        each = used / self._micro
        fits = self._micro // 2
        if self._device.type == "cuda" and each > 0:
            total = torch.cuda.get_device_properties(self._device).total_memory
            fits = min(fits, int(0.9 * (total - self._resting) / each))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "MemoryError"
        text = (
            f"out of memory: got micro-batch {self._micro} at {self._size} px, which had taken "
            f"{each / 2**20:.1f} MB an image when it failed, beside {self._resting / 2**30:.2f} GB "
            "for everything else"
        )
        if fits < 1:
            return f"{text}; do: train on a device with more memory ({reason})"
        return (
            f"{text}; need less; do: set train_micro_batch_size_per_gpu in the JSON to {fits} or "
            f"less (the accumulation makes up for it under --global_batch) ({reason})"
        )
