"""Hangs and deaths of ranks: four gloo ranks that only reduce a number (tiny_ranks.py)."""

import ast
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ROOT, environment, run_python

from ds_classifier.distributed import failures

FAULTS = {
    "peace": "9:none",
    "killed0": "0:kill",
    "killed12": "1,2:kill",
    "raised": "1:raise",
    "stopped": "2:stop",
    "data": "1:data",
    "compute": "3:compute",
    "slow_start": "1:slow-first-step",
}


def run_tiny(folder: Path, faults: dict[str, str]) -> dict[str, dict]:
    command = [sys.executable, ROOT / "tests" / "helpers" / "tiny_ranks.py", folder]
    done = subprocess.run(
        [*command, *(f"{name}={fault}" for name, fault in faults.items())],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    for name, row in rows.items():
        row["screen"] = (folder / name / "screen").read_text().splitlines()
        row["files"] = {p.name: p.read_text() for p in (folder / name).glob("errors/*/rank*.txt")}
    return rows


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, dict]:
    return run_tiny(tmp_path_factory.mktemp("tiny"), FAULTS)


def check_last_line(row: dict, *words: str) -> None:
    """Check that there is one error on the screen, in the last line, with these words."""
    assert [line[:7] for line in row["screen"]].count("error: ") == 1, row["screen"]
    assert row["screen"][-1].startswith("error: ")
    for word in words:
        assert word in row["screen"][-1]


BROKEN_LOADER = """
from pathlib import Path
from ds_classifier import distributed
from ds_classifier.distributed.watchdog import Watchdog

def batches():
    yield "the first"
    raise FileNotFoundError(2, "No such file or directory", "train-000003.tar")

minutes = dict(start=1, step=1, save=1, validation=1)
with Watchdog(Path("run"), minutes=minutes) as watch:
    distributed.init()
    watch.join()
    watch.stepping(5)
    for batch in watch.batches(batches()):
        pass
"""


def test_an_error_of_the_loader_happens_in_the_phase_data(tmp_path):
    done = run_python("-c", BROKEN_LOADER, cwd=tmp_path)
    assert done.code == 1
    assert any("at step 5, data" in line for line in done.lines), done.output
    assert done.lines[-1] == "error: train-000003.tar: No such file or directory"


NO_DATA = """
import os, signal, time
from pathlib import Path
from ds_classifier import distributed
from ds_classifier.distributed import watchdog
from ds_classifier.distributed.stopping import StopRequests

def batches():
    yield "the first"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)

watchdog._STOP_SECONDS = 1.5
minutes = dict(start=1, step=1, save=1, validation=1)
with StopRequests() as requests, watchdog.Watchdog(Path("run"), minutes=minutes) as watch:
    distributed.init()
    requests.defer()
    watch.stop_asked = lambda: requests.reason
    watch.join()
    watch.stepping(5)
    for batch in watch.batches(batches()):
        pass
"""


def test_a_request_to_stop_ends_a_run_whose_data_does_not_come(tmp_path):
    began = time.monotonic()
    done = run_python("-c", NO_DATA, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.code == 75
    assert time.monotonic() - began < 50  # it would sleep for 100 s, and be overdue after 60 s
    assert done.lines[-1].startswith("error: stopped by SIGTERM before the step ended: rank 0 ")
    assert "has been in data at step 5" in done.lines[-1]


def test_the_vote_is_known_by_its_name():
    """A rank that waits in the vote counts as waiting for others, which failures finds by name."""
    path, function = failures._VOTE
    tree = ast.parse((ROOT / path).read_text())
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow
def test_without_a_fault_nothing_is_printed(ended):
    assert set(ended["peace"]["codes"].values()) == {0}
    assert ended["peace"]["screen"] == []
    assert set(ended["slow_start"]["codes"].values()) == {0}, "the first step may be slow"
    assert ended["slow_start"]["seconds"]["1"] > 7


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dead"), [("killed0", [0]), ("killed12", [1, 2])])
def test_killed_ranks_end_the_others_in_seconds_and_are_named(ended, name, dead):
    row = ended[name]
    for rank in range(4):
        assert row["codes"][str(rank)] == (-9 if rank in dead else 1)
    assert max(row["seconds"].values()) < 15
    check_last_line(row, *(f"rank {rank} (process" for rank in dead), "died")
    assert set(row["files"]) == {f"rank{rank}.txt" for rank in range(4) if rank not in dead}
    assert "all_reduce_sum" in "".join(row["files"].values())


@pytest.mark.slow
def test_the_first_error_is_printed_last(ended):
    row = ended["raised"]
    assert set(row["codes"].values()) == {1}
    assert max(row["seconds"].values()) < 15
    check_last_line(row, "RuntimeError: a fault of the test")
    assert sum("Traceback" in line for line in row["screen"]) == 1
    assert row["screen"][-2].startswith("rank 1 at step 5, forward/backward")
    assert len(row["files"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "phase"), [("data", 1, "data"), ("compute", 3, "forward/backward")]
)
def test_a_rank_that_hangs_is_named_with_step_and_phase(ended, name, rank, phase):
    row = ended[name]
    assert set(row["codes"].values()) == {70}
    check_last_line(
        row, f"rank {rank} (process", f"has been in {phase} at step 5", "--step_timeout"
    )
    waiting = ", ".join(str(r) for r in range(4) if r != rank)
    assert f"ranks {waiting} wait" in row["screen"][-1]
    assert len(row["files"]) == 4
    stalled = "batches" if phase == "data" else "happen"
    assert f"in {stalled}\n" in row["files"][f"rank{rank}.txt"]


@pytest.mark.slow
def test_a_stopped_rank_is_named(ended):
    row = ended["stopped"]
    assert row["codes"] == {"0": 70, "1": 70, "2": -9, "3": 70}
    check_last_line(row, "rank 2 (process", "does not answer")
    assert set(row["files"]) == {"rank0.txt", "rank1.txt", "rank3.txt"}


@pytest.mark.slow
def test_seconds_from_the_first_death_to_the_last_end(tmp_path, capsys):
    """Kill one rank or two, ten times. The README quotes the printed figures."""
    victims = ["0", "1", "2", "3", "0,1", "1,2", "2,3", "0,3", "1,3", "0,2"]
    rows = run_tiny(tmp_path, {f"killed{i}": f"{who}:kill" for i, who in enumerate(victims)})
    seconds = [max(row["seconds"].values()) for row in rows.values()]
    with capsys.disabled():
        print(f"\nfirst death to last end: median {statistics.median(seconds):.1f} s, ", end="")
        print(f"worst of {len(seconds)} {max(seconds):.1f} s")
    assert max(seconds) < 30
