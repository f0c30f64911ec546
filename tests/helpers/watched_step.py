"""Watch a step of the trainer on one rank for operations that wait for the device.

Prints JSON: {"waits": [["ds_classifier/training/loop.py:60", "aten.nonzero.default"], ...]}. Each
wait is attributed to the innermost line of this package or of DeepSpeed. Copies from the device
(.cpu(), .tolist()) do nothing on a CPU and are not seen. Arguments: those of launch/train.py.
"""

import json
import sys
import traceback
from pathlib import Path

import deepspeed
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.benchmarks.step import Bench

ROOT = Path(__file__).resolve().parents[2]
ATEN = torch.ops.aten
# Operations whose result, or whose result's shape, the host must know before it continues.
WAITING = {
    ATEN._local_scalar_dense.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
    ATEN.bincount.default,
}
LIBRARIES = Path(deepspeed.__file__).parents[1]
PACKAGES = (f"{ROOT}/ds_classifier/", f"{LIBRARIES}/deepspeed/")


def is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(PACKAGES[0])


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = args[1] if function in (ATEN.index.Tensor, ATEN.index_put_.default) else []
        masked = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if function in WAITING or masked:
            frames = traceback.extract_stack()
            known = [f for f in frames if f.filename.startswith(PACKAGES)]
            path = Path(known[-1].filename).relative_to(ROOT if is_ours(known[-1]) else LIBRARIES)
            self.waits.append([f"{path}:{known[-1].lineno}", str(function)])
        return function(*args, **(kwargs or {}))


bench = Bench.of([*sys.argv[1:], "--num_classes", "10"])
step = bench.trainer_step()
step()
with Watch() as watch:
    step()
print(json.dumps({"waits": watch.waits}))
