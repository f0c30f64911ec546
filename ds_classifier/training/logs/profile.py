"""--profile N: record steps N to N + 3 of rank 0 with torch.profiler.

The run directory gets profile/step-N.txt, a table of where the time went with the dearest
operations, and profile/step-N.trace.json.gz, a trace for chrome://tracing or ui.perfetto.dev.
The code of a step names its parts with torch.profiler.record_function.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager as ContextManager
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from ds_classifier import distributed
from ds_classifier.config.settings import PROFILED
from ds_classifier.distributed import failures
from ds_classifier.distributed.engine import deepspeed_engine

OPERATIONS = 15
HOOKS = "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"
OPTIMIZER = "Optimizer.step#"
MARKS = ("step: ", "model: ")  # how the names of the parts begin


class Profile:
    """Records PROFILED steps of rank 0 and writes what they cost; other ranks do nothing.

    first: the first step to record; 0: none. engine: DeepSpeed's, before the first step of this
    start. pause: leaves what is done in its context out of the speed, see `TrainingLog.pause`.
    """

    def __init__(
        self, run_dir: Path, first: int, *, engine: Any, pause: Callable[[str], ContextManager]
    ):
        self._folder, self._device, self._pause = run_dir / "profile", engine.device, pause
        self._first = first if distributed.rank() == 0 else 0
        self._profiler: Any = None
        self._began = 0.0
        if 0 < first <= engine.global_steps:
            distributed.say(f"note: --profile {first}: step {first} is done; nothing is recorded")

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record a step, if it is one of those asked for. The last one writes the files."""
        if step == self._first:
            self._start()
        yield
        if self._profiler is not None and step == self._first + PROFILED - 1:
            self._stop()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it looks for a GPU, and complains
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._wait_for_device()
        self._began = time.perf_counter()

    def _stop(self) -> None:
        self._wait_for_device()
        wall = time.perf_counter() - self._began
        profiler, self._profiler = self._profiler, None
        with self._pause("writing the profile"):
            profiler.stop()
            failures.tolerate("the profile", lambda: self._write(profiler, wall))

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, profiler: Any, wall: float) -> None:
        """Write the table and the trace; print where they are."""
        self._folder.mkdir(exist_ok=True)
        averages, on_gpu = profiler.key_averages(), self._device.type == "cuda"
        last = self._first + PROFILED - 1
        where = deepspeed_engine.describe_device(self._device)
        lines = [
            f"Steps {self._first} to {last} of rank 0 on {where}, recorded: "
            f"{1000 * wall / PROFILED:.1f} ms per step. Recording itself takes part of that.",
            "",
            *shares(averages, wall, on_gpu=on_gpu),
            "",
            dearest(averages, on_gpu=on_gpu),
        ]
        table = self._folder / f"step-{self._first:08}.txt"
        table.write_text("\n".join(lines), encoding="utf-8")
        trace = table.with_suffix(".trace.json.gz")
        profiler.export_chrome_trace(str(trace))
        distributed.say(f"profile of steps {self._first} to {last}: {table} and {trace.name}")


def dearest(averages: Any, *, on_gpu: bool) -> str:
    """Return a table of the operations that took most time, without the parts of this program.

    averages: what torch.profiler's `key_averages` returns; the parts are removed from it.
    """
    averages[:] = [event for event in averages if not event.key.startswith(MARKS)]
    return averages.table(
        sort_by=f"self_{'device' if on_gpu else 'cpu'}_time_total",
        row_limit=OPERATIONS,
        max_name_column_width=60,
    )


def kernel_seconds(averages: Any) -> float:
    """Return the seconds for which kernels and copies ran on the GPU.

    averages: what torch.profiler's `key_averages` returns. Each operation there has the time of its
    kernels too, and each part the time from its first kernel to its last one.
    """
    kernels = (e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    return sum(e.self_device_time_total for e in kernels) / 1e6


def shares(averages: Any, wall: float, *, on_gpu: bool) -> list[str]:
    """Return lines that say how the wall time of the recorded steps divides.

    averages: what torch.profiler's `key_averages` returns. wall: seconds.
    On a GPU they are shares of the time of the processor that launches the work; a last line says
    how long the GPU itself worked.
    """

    def seconds(*names: str) -> float:
        return sum(e.cpu_time_total for e in averages if e.key.startswith(names)) / 1e6

    forward, model = seconds("step: forward"), seconds("model: forward")
    backward, hooks = seconds("step: backward"), seconds(HOOKS)
    update, optimizer = seconds("step: update"), seconds(OPTIMIZER)
    parts = {
        "waits for data": seconds("step: data"),
        "copies the batch, draws timesteps and noise": seconds("step: noise"),
        "forward: the model": model,
        "forward: DeepSpeed around it": forward - model,
        "backward: the model": backward - hooks,
        "backward: DeepSpeed's hooks on gradients": hooks,
        "update: the optimizer": optimizer,
        "update: DeepSpeed around it": update - optimizer,
        "our bookkeeping: sums, log, lost samples, checkpoints": seconds("step: bookkeeping"),
    }
    parts["the rest"] = wall - sum(parts.values())
    lines = [f"{100 * part / wall:6.1f} %  {name}" for name, part in parts.items()]
    if on_gpu:
        busy = kernel_seconds(averages)
        lines.append(f"{100 * busy / wall:6.1f} %  of the wall time, kernels ran on the GPU")
    return lines
