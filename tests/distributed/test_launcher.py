"""Facts about the launcher, read from the command lines of real parent processes of a rank."""

import base64
import json
import subprocess
import sys

import pytest
from running import ROOT

RUN_CHILD = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:2] + ['-c', {child!r}]))"


def ask(folder, question: str, *words: str, program: str = "deepspeed"):
    """Return the answer of a rank whose parent is a program of this name, called with `words`."""
    child = "import json; from ds_classifier.distributed import launcher; "
    child += f"print(json.dumps({question}))"
    parent = folder / program
    parent.write_text(RUN_CHILD.format(child=child))
    done = subprocess.run(
        [sys.executable, parent, sys.executable, *words],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def world_info(text: str) -> str:
    return "--world_info=" + base64.urlsafe_b64encode(text.encode()).decode()


def test_hosts_are_in_rank_order_one_per_rank(tmp_path):
    # deepspeed's launch.py numbers ranks host by host, in the order of the hostfile.
    word = world_info('{"node-2": [0, 1, 2], "node-10": [5], "node-1": [0, 1]}')
    assert ask(tmp_path, "launcher.host_names()", word) == [
        *["node-2", "node-2", "node-2", "node-10", "node-1", "node-1"]
    ]


@pytest.mark.parametrize("words", [[], ["--world_info=?"], [world_info("no json")]])
def test_without_world_info_the_hosts_are_unknown(tmp_path, words):
    assert ask(tmp_path, "launcher.host_names()", *words) == []


@pytest.mark.parametrize(
    "words",
    [["--hostfile", "nodes", "a.py"], ["--hostfile=nodes", "a.py"], ["-H", "nodes", "a.py"]],
)
def test_a_missing_hostfile_is_reported(tmp_path, words):
    problem = ask(tmp_path, "launcher.hostfile_problem()", *words)
    assert problem.startswith("--hostfile: got nodes, which does not exist")
    (tmp_path / "nodes").write_text("node-1 slots=1\n")  # where the launcher looks for it
    assert ask(tmp_path, "launcher.hostfile_problem()", *words) is None


@pytest.mark.parametrize("words", [[], ["--num_gpus", "1", "a.py"], ["a.py", "--hostfile", "no"]])
def test_no_hostfile_no_problem(tmp_path, words):
    """A flag of that name after the script belongs to the script."""
    assert ask(tmp_path, "launcher.hostfile_problem()", *words) is None


def test_a_parent_that_is_no_launcher_says_nothing(tmp_path):
    words = ["--hostfile", "nodes", "a.py"]
    assert ask(tmp_path, "launcher.hostfile_problem()", *words, program="other") is None
