"""Train on several hosts of cluster.py, and watch the launchers that run there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from cluster import Cluster, Node
from running import ROOT, read_log
from tiny_run import CONFIGS, TINY, TRACED

from ds_classifier.distributed.engine.deepspeed_versions import quiet_flag

STEPS = 24
FLAGS = ["--global_batch", "12", "--iterations", str(STEPS), "--save_interval", "6"]


class Hosts(Cluster):
    """A cluster whose hosts have the digits at the same path, each in a directory of its own."""

    def __init__(self, folder: Path, digits: Path, nodes: int):
        self.place = folder / "place"
        self.place.mkdir()
        self.digits, self.folder = digits, folder
        super().__init__(folder / "cluster", nodes, separate=[self.place])

    def _add(self, number: int, switch: str) -> Node:
        node = super()._add(number, switch)
        shutil.copytree(self.digits, self.inside(node) / "data", dirs_exist_ok=True)
        return node

    def inside(self, node: Node) -> Path:
        """Return the path by which this machine sees the host's own directory."""
        return self._root / node.name / str(self.place).strip("/").replace("/", "_")

    def start(self, *nodes: Node, flags=(), script: Path = TRACED, **environment: str) -> Start:
        """Start training on these hosts. The first has rank 0, and the command is given there."""
        here = self.inside(nodes[0])
        self.hostfile(here / "hosts", *nodes)
        # A user passes variables to all hosts like this. One thread, as two ranks of a host have.
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # training sets it, but the seams import torch
        variables = {"OMP_NUM_THREADS": "1"} | quiet | environment
        (here / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()))
        deepspeed = Path(sys.executable).with_name("deepspeed")
        command = [deepspeed, *quiet_flag(), "--hostfile", "hosts", script, *self.flags(), *flags]
        return Start(self, here / "run", {nodes[0]: command})

    def flags(self) -> list[object]:
        """Return the flags of train.py."""
        config = ["--deepspeed_config", CONFIGS / "zero1_fp32.json"]
        return [*config, "--data_dir", "data/train", "--run_dir", "run", *TINY, *FLAGS]


class Start:
    """A start of training. commands: per host, the Python program and its arguments."""

    def __init__(self, hosts: Hosts, run: Path, commands: dict[Node, list[object]]):
        self._hosts, self._run = hosts, run
        self._path = hosts.folder / f"output{time.monotonic_ns()}"
        place = ["env", "-C", hosts.place, f"PYTHONPATH={ROOT}", "DS_ACCELERATOR=cpu"]
        place += ["OMP_NUM_THREADS=1"]
        with open(self._path, "w") as output:
            self._processes = [
                subprocess.Popen(
                    node.command([*place, sys.executable, *command]),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for node, command in commands.items()
            ]

    def output(self) -> str:
        """Return everything that was printed."""
        return self._path.read_text()

    def lines(self) -> list[str]:
        """Return the lines that the hosts printed, without the launchers' own."""
        lines = [line.partition(": ")[2] for line in self.output().splitlines()]
        return [line for line in lines if line and not line.startswith("[")]

    def wait_for_step(self, step: int) -> None:
        """Wait until the log has a row of this step or a later one."""
        deadline = time.monotonic() + 200
        while not any(row["step"] >= step for row in self._rows()):
            assert self._running(), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def _running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def _rows(self) -> list[dict]:
        try:
            return read_log(self._run)
        except (OSError, ValueError):
            return []

    def gone(self, seconds: float = 300) -> float:
        """Wait until none of its processes runs on any host; return the seconds it took."""
        began = time.monotonic()
        while self._running() or self._hosts.processes():
            assert time.monotonic() < began + seconds, (self.output(), self._hosts.processes())
            time.sleep(0.1)
        return time.monotonic() - began
