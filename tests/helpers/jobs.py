"""Start whole jobs through the deepspeed launcher; find and kill any of their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

from running import environment, free_port
from tiny_run import CONFIGS, TINY, TRACED

from ds_classifier.distributed.engine.deepspeed_versions import quiet_flag
from ds_classifier.distributed.processes import parent

ALIVE_SECONDS = 40  # a job must be gone within this time; the launcher alone waits up to 30 s


class Job:
    """A training job through the launcher. A mark in their environment identifies its processes.

    config: a file of ds_configs/, without suffix. flags: added to those of the tiny classifier.
    extra: variables of its environment.
    """

    def __init__(self, ranks: int, config: str, run: Path, *flags: object, **extra: str):
        self.mark, self.run = uuid.uuid4().hex, run
        self._output = open(run.parent / f"{self.mark}.out", "w+")
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [sys.executable, deepspeed, *quiet_flag(), "--master_port", free_port()]
        command += ["--num_gpus", ranks, TRACED, "--deepspeed_config", CONFIGS / f"{config}.json"]
        command += ["--run_dir", run, *TINY, *flags]
        self.process = subprocess.Popen(
            list(map(str, command)),
            env=environment(JOB_MARK=self.mark, **extra),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell that runs the tests in the background makes them and their children ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def alive(self) -> dict[int, dict[str, str]]:
        """Return the environments of the job's processes, by process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                words = path.read_bytes().decode(errors="replace").split("\0")
                zombie = (path.parent / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except OSError:
                continue
            if f"JOB_MARK={self.mark}" in words and not zombie:
                found[int(path.parent.name)] = dict(w.split("=", 1) for w in words if "=" in w)
        return found

    def launch_py(self) -> int:
        """Return the process id of DeepSpeed's launch.py."""
        return next(p for p in self.alive() if "deepspeed.launcher.launch" in command_line(p))

    def ranks(self) -> dict[int, int]:
        """Return the process id of each running rank; loader workers are left out."""
        alive = self.alive()
        own = {p: e["RANK"] for p, e in alive.items() if "RANK" in e}
        return {int(r): p for p, r in own.items() if own.get(parent(p)) != r}

    def rank(self, number: int) -> int:
        """Return the process id of a rank."""
        return self.ranks()[number]

    def wait_for(self, ready, seconds: float = 240) -> None:
        """Wait until ready() is true; fail if the job ends before, or takes too long."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def wait_until_gone(self, limit: float) -> float | None:
        """Return the seconds until no process of the job is alive; None after the limit."""
        began = time.monotonic()
        while self.process.poll() is None or self.alive():
            if time.monotonic() > began + limit:
                return None
            time.sleep(0.1)
        self.code = self.process.wait()
        return time.monotonic() - began

    def gone(self) -> float:
        """Return the seconds until no process is alive; fail if that takes over ALIVE_SECONDS."""
        seconds = self.wait_until_gone(ALIVE_SECONDS)
        lines = [command_line(p) for p in self.alive()]
        assert seconds is not None, (lines, self.output())
        return seconds

    def kill_all(self) -> None:
        """Send SIGKILL to every process of the job."""
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def output(self) -> str:
        """Return everything that was printed."""
        self._output.flush()
        return (self.run.parent / f"{self.mark}.out").read_text()


def command_line(pid: int) -> str:
    """Return the command line of a process, or an empty string if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
