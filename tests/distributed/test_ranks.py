"""Tasks of srun, mpirun and mpiexec: which of them become ranks, and which are refused."""

import os
import re
import subprocess
import sys

import pytest
from running import ROOT, environment, free_port

from ds_classifier import distributed

MEET = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
STEP = dict(SLURM_JOB_ID="7", SLURM_STEP_NUM_TASKS="5", SLURM_LOCALID="0")
OPEN_MPI = dict(
    OMPI_COMM_WORLD_RANK="1",
    OMPI_COMM_WORLD_SIZE="2",
    OMPI_COMM_WORLD_LOCAL_RANK="0",
    OMPI_COMM_WORLD_LOCAL_SIZE="1",
)
HYDRA = dict(PMI_RANK="3", PMI_SIZE="4", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
OF_A_LAUNCHER = re.compile("(RANK|WORLD_SIZE|LOCAL_|MASTER_|SLURM_|OMPI_|PMI_|MPI_)")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Run without the variables of a launcher, and put back those of before."""
    kept = {k: v for k, v in os.environ.items() if not OF_A_LAUNCHER.match(k)}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def ranks() -> tuple[int, int, int, int]:
    distributed.check_launch()
    return (
        distributed.rank(),
        distributed.world_size(),
        distributed.local_rank(),
        distributed.local_world_size(),
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (dict(SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1"), (1, 2, 1, 2)),
        (
            STEP | dict(SLURM_PROCID="4", SLURM_NODEID="2", SLURM_STEP_TASKS_PER_NODE="2(x2),1"),
            (4, 5, 0, 1),
        ),
        (
            STEP | dict(SLURM_PROCID="2", SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="2(x2),1"),
            (2, 5, 0, 2),
        ),
        (OPEN_MPI, (1, 2, 0, 1)),
        (OPEN_MPI | dict(SLURM_PROCID="0", SLURM_NTASKS="1"), (1, 2, 0, 1)),
        (HYDRA, (3, 4, 1, 2)),
    ],
)
def test_tasks_that_know_where_to_meet_are_ranks(variables, expected, no_launcher):
    no_launcher.update(variables | MEET)
    assert ranks() == expected


@pytest.mark.parametrize(
    "variables",
    [
        {},
        dict(SLURM_JOB_ID="7", SLURM_NTASKS="4"),  # the shell of salloc
        dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0"),  # sbatch
        dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1"),
        dict(SLURM_PROCID="0", SLURM_NTASKS="1"),
        dict(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="1"),
    ],
)
@pytest.mark.parametrize("meet", [{}, MEET])
def test_one_process_is_alone(variables, meet, no_launcher):
    no_launcher.update(variables | meet)
    assert ranks() == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("variables", "starter"),
    [
        (dict(SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1"), "srun"),
        (STEP | dict(SLURM_PROCID="0"), "srun"),
        (OPEN_MPI, "mpirun"),
        (HYDRA, "mpiexec"),
        (dict(PMI_RANK="1", PMI_SIZE="2") | MEET, "mpiexec"),  # without a local rank
    ],
)
def test_tasks_that_would_train_alone_are_refused(variables, starter, no_launcher, monkeypatch):
    no_launcher.update(variables)
    monkeypatch.setattr(sys, "orig_argv", ["python", "launch/train.py", "--lr", "1e-4"])
    tasks = next(v for k, v in variables.items() if "SIZE" in k or "TASKS" in k)
    words = rf"{starter} started.*deepspeed --num_gpus {tasks} launch/train.py --lr 1e-4;.*unset"
    with pytest.raises(ValueError, match=words):
        distributed.check_launch()


def test_a_launchers_rank_counts_more(no_launcher):
    no_launcher.update(OPEN_MPI | MEET | dict(RANK="5", WORLD_SIZE="6"))
    assert ranks()[:2] == (5, 6)


def test_two_tasks_of_srun_meet(tmp_path):
    code = (
        "import torch; from ds_classifier import distributed as d; device = d.init()\n"
        "print(d.all_gather(torch.tensor([d.rank()], device=device)).tolist()); d.finish()"
    )
    port = str(free_port())
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(
                PYTHONPATH=str(ROOT),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                SLURM_PROCID=number,
                SLURM_LOCALID=number,
                SLURM_NTASKS="2",
            ),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    assert [task.communicate(timeout=200)[0] for task in tasks] == ["[[0], [1]]\n"] * 2
