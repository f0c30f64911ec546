"""The chain of launchers above a process, with real processes that are started and orphaned."""

import subprocess
import sys
import time

import pytest
from running import ROOT

CHILD = """
import os, sys, time
from ds_classifier.distributed import processes
while os.getppid() == int(sys.argv[2]):
    time.sleep(0.01)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(processes.broken(processes.launcher_chain())))
os.rename(sys.argv[1] + ".new", sys.argv[1])
"""


def orphan_finds(folder, *words: str, **variables: str) -> str:
    """Return what an orphan finds about its launcher, which died before the orphan looked."""
    answer = folder / "answer"
    child = ["env", "PYTHONPATH=" + str(ROOT), *(f"{k}={v}" for k, v in variables.items())]
    child += [sys.executable, "-c", CHILD, str(answer)]
    # The shell starts it in the background and ends.
    line = '"$@" $$ ' + " ".join(words) + " &"
    subprocess.run(["sh", "-c", line, "sh", *child], check=True, cwd=folder)
    deadline = time.monotonic() + 60
    while not answer.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return answer.read_text()


@pytest.mark.parametrize("mark", ["CROSS_RANK", "TORCHELASTIC_RUN_ID"])
def test_a_rank_whose_launcher_died_before_it_looked(tmp_path, mark):
    assert orphan_finds(tmp_path, **{mark: "0"}) == "True"


def test_a_launch_py_whose_deepspeed_died_before_its_rank_looked(tmp_path):
    assert orphan_finds(tmp_path, "deepspeed.launcher.launch") == "True"


def test_a_launch_py_that_a_batch_system_started(tmp_path):
    assert orphan_finds(tmp_path, "deepspeed.launcher.launch", "--node_rank=0") == "False"


def test_a_process_that_no_launcher_started(tmp_path):
    assert orphan_finds(tmp_path) == "False"
