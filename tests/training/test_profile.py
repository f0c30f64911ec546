"""--profile: a trace and a table of four steps."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny_run import losses, train
from torch.autograd import DeviceType

from ds_classifier.config.settings import Settings, check_settings
from ds_classifier.training.logs.profile import Profile, dearest, shares


@pytest.mark.slow
def test_four_steps_are_recorded(digits, tmp_path):
    """The trace holds steps 3 to 6 alone, the table adds up, and training stays as it was."""
    size = ("--iterations", "8", "--global_batch", "16", "--microbatch", "8")
    plain, run = tmp_path / "plain", tmp_path / "run"
    train(1, "zero1_fp32", digits, plain, *size)
    done = train(1, "zero1_fp32", digits, run, *size, "--profile", "3")
    assert losses(run) == losses(plain)
    assert any("profile of steps 3 to 6" in line for line in done.lines), done.output
    assert "STAGE:" not in done.output
    assert "gpuGetDeviceCount" not in done.output
    with gzip.open(run / "profile" / "step-00000003.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    times = {
        name: [e["dur"] for e in events if e.get("name") == name and e.get("ph") == "X"]
        for name in ("step: data", "step: forward", "model: forward", "step: update")
    }
    assert [len(spans) for spans in times.values()] == [8] * 4  # 4 steps of 2 micro-batches
    assert sum(times["model: forward"]) < sum(times["step: forward"])
    table = (run / "profile" / "step-00000003.txt").read_text()
    parts = [float(line.split("%")[0]) for line in table.splitlines() if "%  " in line[:12]]
    assert sum(parts) == pytest.approx(100, abs=0.6)
    assert min(parts) >= 0
    assert "aten::" in table

    done = train(1, "zero1_fp32", digits, run, *size, "--profile", "3", "--extend", "12")
    assert "step 3 is done; nothing is recorded" in done.output


def test_writing_is_no_time_of_a_step(tmp_path):
    """All files appear while the clock of the log is paused."""
    folder, seen = tmp_path / "profile", []

    @contextmanager
    def pause(doing):
        seen.append((doing, folder.exists()))
        yield
        seen.append(len(list(folder.iterdir())))

    engine = SimpleNamespace(device=torch.device("cpu"), global_steps=0)
    profile = Profile(tmp_path, 1, engine=engine, pause=pause)
    for step in range(1, 6):
        with profile.step(step):
            torch.zeros(1)
    assert seen == [("writing the profile", False), 2]


def on_device(device, seconds, part=False):
    """Return what an event of the profiler says of its device.

    An operation has the time of its kernels.
    """
    return dict(device_type=device, self_device_time_total=1e6 * seconds, is_user_annotation=part)


def test_shares_are_those_of_the_events():
    """Each part is the time of its events; a part around another one is the difference."""
    seconds = {
        "step: data": 1,
        "step: noise": 0.5,
        "step: forward": 3,
        "model: forward": 2.5,
        "step: backward": 5,
        "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad": 1,
        "step: update": 2,
        "Optimizer.step#AdamW.step": 1.5,
        "step: bookkeeping": 0.25,
        "aten::mm": 4,
    }
    averages = [
        SimpleNamespace(key=k, cpu_time_total=1e6 * v, **on_device(DeviceType.CPU, 0.1 * v))
        for k, v in seconds.items()
    ]
    averages += [  # the kernels, and the parts as they appear on the GPU
        SimpleNamespace(key="gemm", cpu_time_total=0, **on_device(DeviceType.CUDA, 2)),
        SimpleNamespace(key="Memcpy HtoD", cpu_time_total=0, **on_device(DeviceType.CUDA, 0.5)),
        SimpleNamespace(key="step: noise", cpu_time_total=0, **on_device(DeviceType.CUDA, 2, True)),
    ]
    lines = shares(averages, 12.5, on_gpu=True)
    assert [float(line.split("%")[0]) for line in lines] == pytest.approx(
        [8, 4, 20, 4, 32, 8, 12, 4, 2, 6, 20]  # the last: 2.5 of 12.5 seconds
    )


def test_the_dearest_operations_are_no_parts_of_ours():
    mark, cpu = torch.profiler.record_function, [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profiler, mark("step: forward"):
        with mark("model: forward"):
            time.sleep(0.01)  # by far the longest
        torch.ones(3).sum()
    table = dearest(profiler.key_averages(), on_gpu=False)
    assert "aten::sum" in table
    assert "forward" not in table


def test_a_run_too_short_to_profile_is_refused():
    """Four steps are needed from the first one on."""
    assert check_settings(Settings(iterations=12, profile=9, eval_interval=1)) == []
    (problem,) = check_settings(Settings(iterations=12, profile=10, eval_interval=1))
    assert "--profile: got 10" in problem
    assert "12" in problem
