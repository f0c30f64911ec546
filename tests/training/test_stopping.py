"""Stopping whole jobs, through the deepspeed launcher: whatever is killed, nothing is left alive.

Faults of one kind share a run: each interrupts it, the same command goes on, and at the end it must
be bit-equal to the uninterrupted run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import Job as AnyJob
from running import ROOT, read_log
from tiny_run import assert_same_state, train

STEPS = 60
FLAGS = ["--global_batch", "16", "--iterations", str(STEPS), "--save_interval", "5"]


class Job(AnyJob):
    """A run of this file's, and how far it is."""

    def __init__(self, ranks: int, digits: Path, run: Path, *flags: object, **extra: str):
        data = ("--data_dir", digits / "train")
        super().__init__(ranks, "zero1_fp32", run, *data, *FLAGS, *flags, **extra)

    def wait_for_steps(self, steps: int) -> None:
        before = last_step(self.run)
        self.wait_for(lambda: last_step(self.run) >= before + steps)


def listening(environments: dict[int, dict[str, str]]) -> int:
    """Return the number of ranks that have a handler for SIGUSR1, by the kernel's account."""
    count = 0
    for pid in (p for p, e in environments.items() if "RANK" in e):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
        count += bool(int(caught, 16) & 1 << (signal.SIGUSR1 - 1))
    return count


def last_step(run: Path) -> int:
    try:
        return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def saved_step(run: Path) -> int:
    """The newest checkpoint; latest always names a whole one."""
    name = (run / "checkpoints" / "latest").read_text().strip()
    assert (run / "checkpoints" / name / "manifest.json").exists()
    return int(name.removeprefix("step-"))


def terminate_launch_py(job):
    os.kill(job.launch_py(), signal.SIGTERM)


def terminate_deepspeed(job):
    job.process.terminate()


def terminate_launch_py_twice(job):
    target = job.launch_py()
    os.kill(target, signal.SIGTERM)
    time.sleep(1)
    os.kill(target, signal.SIGTERM)


def kill_deepspeed(job):
    job.process.kill()


def kill_launch_py(job):
    os.kill(job.launch_py(), signal.SIGKILL)


def ctrl_c(job):
    os.killpg(job.process.pid, signal.SIGINT)


def close_the_terminal(job):
    os.killpg(job.process.pid, signal.SIGHUP)


def signal_rank_1(job):
    os.kill(job.rank(1), signal.SIGUSR1)


def stop_file(job):
    (job.run / "STOP").touch()


# What is done; how `deepspeed` ends; what the ranks say.
STOPS = [
    (terminate_launch_py, 1, "stopped by SIGTERM after step"),
    (terminate_deepspeed, -15, "stopped by the launcher's death after step"),
    (kill_launch_py, 0, "stopped by the launcher's death after step"),
    (kill_deepspeed, -9, "stopped by the launcher's death after step"),
    (terminate_launch_py_twice, 1, "stopped by SIGTERM after step"),
    (ctrl_c, -signal.SIGINT, "after step"),
    (close_the_terminal, -signal.SIGHUP, "after step"),
    (signal_rank_1, 75, "stopped by SIGUSR1 after step"),
    (stop_file, 75, "stopped by the file STOP after step"),
]


HUNG_UP = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from ds_classifier.distributed.stopping import StopRequests
if sys.argv[2] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with StopRequests() as requests:
    requests.defer()
    os.kill(os.getpid(), signal.SIGHUP)
    until = time.monotonic() + 2
    while not requests.reason and time.monotonic() < until:
        time.sleep(0.02)
    print(requests.reason or "nothing")
"""


@pytest.mark.parametrize(("how", "reason"), [("", "SIGHUP"), ("nohup", "nothing")])
def test_a_closed_terminal_asks_to_stop_unless_it_is_to_be_ignored(how, reason):
    command = [sys.executable, "-c", HUNG_UP, str(ROOT), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, reason), done.stderr


@pytest.mark.slow
def test_every_way_to_stop_saves_the_step_and_leaves_nothing(digits, tmp_path, capsys):
    golden, run = tmp_path / "golden", tmp_path / "run"
    for stop, code, words in STOPS:
        job = Job(2, digits, run, PACE="0.3")
        job.wait_for_steps(2)
        stop(job)
        seconds = job.gone()
        output = job.output()
        with capsys.disabled():
            print(f"\n{stop.__name__}: gone in {seconds:.1f} s, at step {last_step(run)}", end="")
        # Python's own word on deepspeed's parent, after Ctrl-C, is not ours to silence.
        assert job.code == code
        assert words in output, output
        if stop is not ctrl_c:
            assert "Traceback" not in output, output
        assert output.count("stopped by") == 1
        assert saved_step(run) == last_step(run), "the step in hand was saved"
        assert not (run / "STOP").exists()
        assert not (run / "LOCK").exists()
    train(2, "zero1_fp32", digits, run, *FLAGS)
    train(2, "zero1_fp32", digits, golden, *FLAGS)
    assert_same_state(*(folder / "checkpoints" / f"step-{STEPS:08d}" for folder in (run, golden)))
    steps = [row["step"] for row in read_log(run) if "train_loss" in row]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_stops_at_awkward_moments(digits, tmp_path):
    """Ctrl-C in start-up, --max_minutes before step 1, SIGTERM in a validation and in a save."""
    golden, run = tmp_path / "golden", tmp_path / "run"

    job = Job(2, digits, run)
    job.wait_for(lambda: listening(job.alive()) == 2)
    os.killpg(job.process.pid, signal.SIGINT)
    job.gone()
    output = job.output()
    assert output.count("before the first step") == 1, output
    assert "traced_train.py" not in output, "a rank left a traceback"

    job = Job(2, digits, run, "--max_minutes", "0.0001")
    job.wait_for(lambda: any("RANK" in e for e in job.alive().values()))
    job.gone()
    assert job.code == 75, job.output()
    assert not any((run / "checkpoints").glob("step-*"))

    extra = ["--val_data_dir", digits / "val", "--eval_interval", "3"]
    job = Job(2, digits, run, *extra, FAULT="0:all:validation 2")
    job.wait_for(lambda: last_step(run) == 3)
    time.sleep(1)
    os.kill(job.launch_py(), signal.SIGTERM)
    job.gone()
    assert "stopped by SIGTERM after step 3" in job.output()
    assert saved_step(run) == 3
    assert not any("val_loss" in row for row in read_log(run))

    job = Job(2, digits, run, FAULT="0:all:save 4")
    job.wait_for(lambda: last_step(run) == 5)
    time.sleep(1)
    os.kill(job.launch_py(), signal.SIGTERM)
    job.gone()
    assert saved_step(run) == last_step(run) >= 5  # what was being written, and the step in hand

    train(2, "zero1_fp32", digits, run, *FLAGS)
    train(2, "zero1_fp32", digits, golden, *FLAGS)
    assert_same_state(*(folder / "checkpoints" / f"step-{STEPS:08d}" for folder in (run, golden)))


@pytest.mark.slow
def test_one_ranks_error_and_too_little_memory(digits, tmp_path):
    """The first error stands last on the screen, and no rank outlives it."""
    run = tmp_path / "run"
    flags = [*FLAGS, "--val_data_dir", digits / "val", "--eval_interval", "2"]
    fault = {"FAULT": "0:1:raise-validation"}.items()
    done = train(2, "zero1_fp32", digits, run, *flags, environment=fault, expect=1)
    assert done.lines[-1] == "error: RuntimeError: a fault of the test", done.output
    assert done.lines[-2].startswith("rank 1 at step 2, validation; tracebacks in ")
    assert done.output.count("Traceback") == 1
    assert {p.name for p in run.glob("errors/*/rank*")} == {"rank0.txt", "rank1.txt"}

    fault = {"FAULT": "7:0:memory"}.items()
    done = train(1, "zero1_fp32", digits, run, *FLAGS, environment=fault, expect=1)
    assert done.lines[-1].startswith("error: out of memory: got micro-batch 16 at 8 px"), done.lines
    assert "MB per image" in done.lines[-1]
    assert "set train_micro_batch_size_per_gpu in the JSON to 8 or less" in done.lines[-1]
    assert "Traceback" not in done.output
    assert saved_step(run) == 5
    assert [p.name for p in (run / "checkpoints").glob(".*")] == []


@pytest.mark.slow
def test_killed_ranks_leave_nothing_and_the_run_goes_on(digits, tmp_path, capsys):
    """Kill {0}, {1, 2} and all of 4 ranks, with their loader workers, by SIGKILL."""
    golden, run = tmp_path / "golden", tmp_path / "run"
    for victims in ([0], [1, 2], [0, 1, 2, 3]):
        job = Job(4, digits, run, PACE="0.2")
        job.wait_for_steps(6)
        pids = [job.rank(number) for number in victims]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        seconds = job.gone()
        with capsys.disabled():
            print(f"\nkilled {victims}: gone in {seconds:.1f} s", end="")
        assert job.code not in (0, 75)
        errors = [line for line in job.output().splitlines() if line.startswith("error: ")]
        assert len(errors) == (0 if len(victims) == 4 else 1), job.output()
        for number, pid in zip(victims, pids, strict=True):
            assert not errors or f"rank {number} (process {pid} on" in errors[0]
        assert "Traceback" not in job.output()
    train(4, "zero1_fp32", digits, run, *FLAGS)
    train(4, "zero1_fp32", digits, golden, *FLAGS)
    assert_same_state(*(folder / "checkpoints" / f"step-{STEPS:08d}" for folder in (run, golden)))
