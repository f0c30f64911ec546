"""Watch a step of the trainer on one rank: what waits for the device, and what it launches.

Prints JSON: {"waits": [["ds_classifier/training/loop.py:60", "item"], ...], "launches": {"step:
noise": 12, ...}}. Each wait is attributed to the innermost line of this package or of DeepSpeed.
Copies to the host do nothing on a CPU, so calls such as .cpu() are watched, not their effect.
DeepSpeed is told that the CPU works in the background as a GPU does: else it would leave out its
own calls of synchronize.
Launches are operations that compute, of which each starts a kernel on a GPU or several; they are
counted by the step's marks for the profiler. Arguments: those of launch/train.py.
"""

import json
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ds_classifier import loss
from ds_classifier.training import step as step_module
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
# Calls that copy to the host, or from memory of the host that is not pinned.
COPYING = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.tensor}
NO_LAUNCH = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "set_", "resize_"}
NO_LAUNCH |= {"_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size", "record_stream"}
LIBRARIES = Path(deepspeed.__file__).parents[1]
PACKAGES = (f"{ROOT}/ds_classifier/", f"{LIBRARIES}/deepspeed/")


def is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(PACKAGES[0])


def place() -> str:
    known = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGES)]
    path = Path(known[-1].filename).relative_to(ROOT if is_ours(known[-1]) else LIBRARIES)
    return f"{path}:{known[-1].lineno}"


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits, self.launches, self.marks = [], Counter(), ["elsewhere"]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = args[1] if function in (ATEN.index.Tensor, ATEN.index_put_.default) else []
        masked = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if function in WAITING or masked:
            self.waits.append([place(), str(function)])
        elif function.namespace == "aten" and not (
            function.is_view or function.__name__.partition(".")[0] in NO_LAUNCH
        ):
            self.launches[self.marks[-1]] += 1
        return function(*args, **(kwargs or {}))

    @contextmanager
    def mark(self, name):
        self.marks.append(name)
        yield
        self.marks.pop()


class WatchCalls(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in COPYING:
            self.waits.append([place(), function.__name__])
        return function(*args, **(kwargs or {}))


class Stream:
    """A stream of a device, which a CPU does not have."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        watch.waits.append([place(), "synchronize"])


watch = Watch()
accelerator = get_accelerator()
accelerator.is_synchronized_device = lambda: False
accelerator.current_stream = lambda device_index=None: Stream()
accelerator.synchronize = lambda device_index=None: Stream().synchronize()
type(accelerator).Stream = Stream
torch.Tensor.record_stream = lambda tensor, stream: None

bench = Bench.of([*sys.argv[1:], "--num_classes", "10"])
step = bench.trainer_step()
step()
watch.waits.clear()
step_module.span = loss.span = watch.mark
with watch, WatchCalls(watch.waits):
    step()
print(json.dumps({"waits": watch.waits, "launches": watch.launches}))
