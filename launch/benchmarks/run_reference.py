"""Run guided-diffusion's classifier_train.py unchanged, and write the times at which steps ended.

The commands of benchmark.py with `--reference CHECKOUT` start it, with the arguments CHECKOUT
MOMENTS STEPS SEED FLAGS... It ends after STEPS optimizer steps; with 0 steps the script ends by
itself, and saves its weights. Three things are adapted from outside. The script's DDP call names a
device even if that is a CPU, which torch refuses. mpi4py and blobfile are replaced if they are not
installed: one process with local files does not need them. And the script has no seed: SEED is set
before it begins.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import distributed
from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    """Run the script to its end, or until the given number of steps is done."""
    checkout, moments = Path(sys.argv[1]), Path(sys.argv[2])
    steps, seed = int(sys.argv[3]), int(sys.argv[4])
    script = checkout / "scripts" / "classifier_train.py"
    stand_in()
    if not torch.cuda.is_available():
        distributed.DistributedDataParallel = OnCPU
    ended: list[float] = []

    def stepped(*_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended.append(time.perf_counter())
        if len(ended) == steps:
            moments.write_text(json.dumps(ended), encoding="utf-8")
            os._exit(0)

    register_optimizer_step_post_hook(stepped)
    sys.path.insert(0, str(checkout))
    sys.argv = [str(script), *sys.argv[5:]]
    torch.manual_seed(seed)  # of the weights, the order, crops and noise
    np.random.seed(seed)  # of the timesteps
    runpy.run_path(str(script), run_name="__main__")
    moments.write_text(json.dumps(ended), encoding="utf-8")


class OnCPU(distributed.DistributedDataParallel):
    """A DistributedDataParallel that ignores the device it is given."""

    def __init__(self, module, device_ids=None, output_device=None, **rest):
        super().__init__(module, **rest)


def stand_in() -> None:
    """Replace mpi4py and blobfile, if not installed, by what one process on local files needs."""
    if importlib.util.find_spec("mpi4py") is None:
        sys.modules["mpi4py"] = types.ModuleType("mpi4py")
        world = types.SimpleNamespace(
            rank=0,
            size=1,
            Get_rank=lambda: 0,
            Get_size=lambda: 1,
            bcast=lambda value, root=0: value,
        )
        sys.modules["mpi4py"].MPI = types.SimpleNamespace(COMM_WORLD=world)
    if importlib.util.find_spec("blobfile") is None:
        path = types.ModuleType("blobfile")
        for name in ("basename", "dirname", "exists", "isdir", "join"):
            setattr(path, name, getattr(os.path, name))
        path.listdir, path.BlobFile = os.listdir, open
        sys.modules["blobfile"] = path


if __name__ == "__main__":
    main()
