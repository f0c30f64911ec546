"""The way in which the threads of OpenMP wait, with which torch computes on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, and under WSL


def wait_asleep() -> None:
    """Let threads of OpenMP sleep while they wait, on a machine without a GPU.

    By default they spin, and keep a core from whatever else runs there: docs/performance.md has
    what that costs. Call it before torch is imported, since its OpenMP reads the environment once.
    Child processes inherit the setting. Variables that are set stay as they are.
    """
    if not any(Path(path).exists() for path in _GPUS):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for Intel's and LLVM's OpenMP
