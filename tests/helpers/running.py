"""Start programs on one rank or several and wait for their end; paths of the checkout."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


@dataclass
class Finished:
    """A command that has ended. output: stdout and stderr together."""

    code: int
    output: str

    @property
    def lines(self) -> list[str]:
        """The lines of the output."""
        return self.output.splitlines()


def environment(**extra: str) -> dict[str, str]:
    """Return the environment for a program on the CPU, without an outer launcher's rank.

    A program that is ended by SIGABRT, or crashes, prints where its threads stand.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1", **extra}


def free_port() -> int:
    """Return a TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_python(*arguments: object, cwd: Path, timeout: float = 300, **variables: str) -> Finished:
    """Run a Python program to its end; variables: added to its environment."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode, done.stdout)


def launch(
    ranks: int,
    *arguments: object,
    cwd: Path,
    script: Path = ROOT / "launch" / "train.py",
    launcher: bool = False,
    timeout: float = 300,
) -> Finished:
    """Run a script on several ranks to its end.

    launcher: True starts it through the deepspeed launcher. False starts the ranks directly, which
    saves 6 s, with the environment that the launcher would give them.
    """
    port = str(free_port())
    command = [sys.executable, str(script), *map(str, arguments)]
    if launcher:
        from ds_classifier.distributed.engine.deepspeed_versions import quiet_flag

        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        head = [
            sys.executable,
            deepspeed,
            *quiet_flag(),
            "--master_port",
            port,
            "--num_gpus",
            str(ranks),
        ]
        commands = [([*head, *command[1:]], environment())]
    else:
        group = dict(WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
        commands = [
            (command, environment(RANK=str(r), LOCAL_RANK=str(r), MASTER_PORT=port, **group))
            for r in range(ranks)
        ]
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(c, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT)
            for c, env in commands
        ]
        code = _first_failure(processes, time.monotonic() + timeout)
        output.seek(0)
        text = output.read()
    assert code is not None, f"not ended after {timeout:.0f} s:\n{text}"
    return Finished(code % 256, text)


def _first_failure(processes: list[subprocess.Popen], deadline: float) -> int | None:
    """Wait for all, ending the others 5 s after a failure; return the first code that is not 0.

    Returns None at the deadline, when each has printed where its threads stand, and was ended.
    """
    failed = 0
    while any(process.poll() is None for process in processes):
        failed = failed or next((p.returncode for p in processes if p.returncode), 0)
        if failed:
            deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for process in processes:
                _end(process.pid, signal.SIGKILL if failed else signal.SIGABRT)
            if not failed:
                return None
        time.sleep(0.05)
    return failed or next((p.returncode for p in processes if p.returncode), 0)


def _end(pid: int, number: int) -> None:
    """Send a signal to a process and to those that it started, and see to it that they end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        family = [*first.children(recursive=True), first]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        for process in psutil.wait_procs(family, timeout=5)[1]:
            process.kill()


def read_log(run: Path) -> list[dict]:
    """Return the rows of a run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
