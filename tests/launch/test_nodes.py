"""Several hosts: trained through ssh and the deepspeed launcher, as one; lost, cut off and slowed.

The hosts of cluster.py have no files in common but the code. The steps of every run are compared
with those of one that nobody disturbed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from cluster import missing
from hosts import FLAGS, STEPS, Hosts, Start
from running import launch, read_log
from tiny_run import CONFIGS, TINY, TRAIN, assert_same_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no hosts can be made here: {missing()}"),
]

GONE_SECONDS = 60  # of processes on all hosts, once a time-out has run out


@pytest.fixture(scope="module")
def golden(digits, tmp_path_factory) -> Path:
    """The run of two ranks on one host, undisturbed."""
    run = tmp_path_factory.mktemp("golden") / "run"
    done = launch(
        2,
        *["--deepspeed_config", CONFIGS / "zero1_fp32.json", "--data_dir", digits / "train"],
        *["--run_dir", run, *TINY, *FLAGS],
        cwd=run.parent,
    )
    assert done.code == 0, done.output
    return run


def losses(run: Path) -> list[float]:
    """Return the losses of steps 1, 2, ..., each of which must be logged once."""
    rows = read_log(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train_loss"] for row in rows]


def assert_same_end(one: Path, other: Path) -> None:
    name = f"checkpoints/step-{STEPS:08d}"
    assert_same_state(one / name, other / name)
    assert losses(one) == losses(other)


def test_hosts_train_as_one_and_a_run_moves_between_them(golden, digits, tmp_path, capsys):
    with Hosts(tmp_path, digits, 3) as hosts:
        one, two, three = hosts.nodes
        began = time.monotonic()
        start = hosts.start(one, two)
        start.wait_for_step(1)
        seconds = time.monotonic() - began
        start.gone()
        with capsys.disabled():
            print(f"\ntwo hosts: command to first step in {seconds:.1f} s", end="")
        run = hosts.inside(one) / "run"
        assert (run / "DONE").exists(), start.output()
        assert_same_end(run, golden)
        assert not (hosts.inside(two) / "run").exists(), "rank 0 alone keeps the run"

        # Three hosts, half of the way; then the run is carried to another, which becomes rank 0.
        shutil.rmtree(run)
        (hosts.inside(one) / "run").mkdir()
        start = hosts.start(one, two, three, PACE="0.3")
        start.wait_for_step(9)
        (run / "STOP").touch()
        start.gone()
        assert "stopped by the file STOP" in start.output()
        stopped = losses(run)
        assert stopped == pytest.approx(losses(golden)[: len(stopped)], rel=1e-5)
        shutil.move(run, hosts.inside(three) / "run")
        start = hosts.start(three, one)
        start.gone()
        assert losses(hosts.inside(three) / "run") == pytest.approx(losses(golden), rel=1e-5)


def test_torchrun_starts_hosts_too(golden, digits, tmp_path):
    with Hosts(tmp_path, digits, 2) as hosts:
        head = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
        head += ["--master-addr", "node-1", "--master-port", 29511]
        commands = {
            node: [*head, "--node-rank", number, TRAIN, *hosts.flags()]
            for number, node in enumerate(hosts.nodes)
        }
        run = hosts.inside(hosts.nodes[0]) / "run"
        start = Start(hosts, run, commands)
        start.gone()
        assert (run / "DONE").exists(), start.output()
        assert_same_end(run, golden)


def test_a_lost_host_ends_the_others_and_the_run_goes_on(golden, digits, tmp_path, capsys):
    """A host loses its processes, its cable, its bandwidth and its power, in one run."""
    with Hosts(tmp_path, digits, 2) as hosts:
        one, two = hosts.nodes
        run = hosts.inside(one) / "run"

        def disturb(name: str, fault, *words: str, after: int) -> None:
            start = hosts.start(one, two, flags=["--step_timeout", "0.2"], PACE="0.4")
            start.wait_for_step(after)
            fault()
            seconds = start.gone(GONE_SECONDS)
            errors = [line for line in start.lines() if "error: " in line]
            with capsys.disabled():
                print(f"\n{name}: all gone in {seconds:.1f} s; {errors}", end="")
            assert any(all(word in line for word in words) for line in errors), start.output()
            assert not any("Traceback" in line for line in start.lines()), start.output()

        def kill_rank_1() -> None:
            for pid in two.processes():
                subprocess.run(["kill", "-9", str(pid)], check=False)

        disturb("processes killed", kill_rank_1, "rank 1 ", "node-2", after=3)
        disturb("cable pulled", lambda: two.set_link("down"), "rank 1 ", "node-2", after=7)
        two.set_link("up")
        disturb("link slowed", lambda: two.slow_link("1mbit"), "--step_timeout", after=13)
        two.run("tc", "qdisc", "del", "dev", "eth0", "root")
        hosts.start(one, two, PACE="0.2").gone()
        assert_same_end(run, golden)

        # A host fewer: the same command, the same global batch.
        name = f"checkpoints/step-{STEPS:08d}"
        shutil.rmtree(run / name)
        (run / "DONE").unlink()
        two.cut_power()
        start = hosts.start(one)
        start.gone()
        assert "12 micro-batch x 1 accumulation x 1 rank" in start.output()
        assert losses(run) == pytest.approx(losses(golden), rel=1e-5)


def test_what_differs_between_hosts_is_told_before_the_start(digits, tmp_path):
    with Hosts(tmp_path, digits, 2) as hosts:
        one, two = hosts.nodes

        def preflight(*flags: str) -> list[str]:
            start = hosts.start(one, two, flags=[*flags, "--preflight"])
            start.gone()
            assert not (hosts.inside(one) / "run" / "LOCK").exists()
            return start.lines()

        lines = preflight()
        (table,) = [line.split() for line in lines if "10.77.0.2" in line]
        assert table[:4] == ["node-2", "10.77.0.2", "(eth0)", "1"]
        assert any(line.startswith("all 2 ranks can start: code") for line in lines), lines

        index = hosts.inside(two) / "data" / "train" / "manifest.json"
        manifest = json.loads(index.read_text())
        index.unlink()
        (error,) = [line for line in preflight() if "error: " in line]
        assert error.startswith("error: node-2: --data_dir: ")

        index.write_text(json.dumps(manifest | {"classes": ["other"] * 10}))
        (error,) = [line for line in preflight() if "error: " in line]
        assert error.startswith("error: node-2: "), error

        two.kill()
        start = hosts.start(one, two, flags=["--start_timeout", "1"])
        start.gone()
        assert "rank 1 (node-2) did not connect within" in start.output()
