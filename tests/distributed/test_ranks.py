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
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
JSRUN = {name.replace("OMPI_COMM_WORLD", "JSM_NAMESPACE"): v for name, v in OPEN_MPI.items()}
FLUX = dict(FLUX_TASK_RANK="2", FLUX_JOB_SIZE="4", FLUX_TASK_LOCAL_ID="0")
OF_A_LAUNCHER = re.compile(
    "(RANK|WORLD_SIZE|LOCAL_|MASTER_|SLURM_|OMPI_|PMI_|PMIX_|MPI_|MV2_|JSM_|FLUX_)"
)


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
        (MVAPICH, (1, 2, 0, 1)),
        (JSRUN, (1, 2, 0, 1)),
        (FLUX, (2, 4, 0, 4)),
        (FLUX | dict(PMI_RANK="2", PMI_SIZE="4"), (2, 4, 0, 4)),
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
        (MVAPICH, "mpirun_rsh"),
        (JSRUN, "jsrun"),
        (FLUX, "flux run"),
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


@pytest.mark.parametrize(
    ("variables", "starter"),
    [
        (dict(PMIX_RANK="0", PMIX_NAMESPACE="prterun-host-7@1"), "prterun"),
        (dict(PMI_RANK="1"), "mpiexec"),
        (dict(OMPI_COMM_WORLD_RANK="1"), "mpirun"),
    ],
)
@pytest.mark.parametrize("meet", [{}, MEET])
def test_tasks_of_unknown_number_are_refused(variables, starter, meet, no_launcher, monkeypatch):
    no_launcher.update(variables | meet)
    monkeypatch.setattr(sys, "orig_argv", ["python", "launch/train.py", "--lr", "1e-4"])
    name = next(iter(variables))
    words = rf"that {starter} started.*deepspeed --num_gpus N launch/train.py --lr.*unset {name}"
    with pytest.raises(ValueError, match=words):
        distributed.check_launch()


def test_who_tells_more_than_pmix_counts_more(no_launcher):
    """Open MPI 5 and srun --mpi=pmix set PMIX_RANK too."""
    for variables, expected in (
        (OPEN_MPI, (1, 2, 0, 1)),
        (dict(SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1"), (1, 2, 1, 2)),
    ):
        for name in list(no_launcher):
            if OF_A_LAUNCHER.match(name):
                del no_launcher[name]
        no_launcher.update(variables | MEET | dict(PMIX_RANK="1"))
        assert ranks() == expected


RANK_1 = MEET | dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_SIZE="2")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (RANK_1 | dict(MASTER_PORT="abc"), "MASTER_PORT: got 'abc'; need a whole number"),
        (RANK_1 | dict(MASTER_PORT="99999"), "MASTER_PORT: got 99999; need 0 to 65535"),
        (RANK_1 | dict(RANK="banana"), "RANK: got 'banana'; need a whole number, 0 or more"),
        (RANK_1 | dict(RANK="-1"), "RANK: got '-1'"),
        (RANK_1 | dict(RANK="2"), "RANK: got 2; need 0 to 1, as WORLD_SIZE is 2"),
        (RANK_1 | dict(WORLD_SIZE="0"), "WORLD_SIZE: got '0'; need a whole number, 1 or more"),
        (RANK_1 | dict(LOCAL_RANK="x"), "LOCAL_RANK: got 'x'"),
        (RANK_1 | dict(LOCAL_RANK="2"), "LOCAL_RANK: got 2; need 0 to 1, as LOCAL_SIZE"),
        (RANK_1 | dict(LOCAL_SIZE=""), "LOCAL_SIZE: got ''"),
        (RANK_1 | dict(RANK="a", WORLD_SIZE="b"), "RANK: got 'a'.*; WORLD_SIZE: got 'b'"),
        (OPEN_MPI | MEET | dict(OMPI_COMM_WORLD_RANK="banana"), "OMPI_COMM_WORLD_RANK: got 'ban"),
        (dict(SLURM_PROCID="0", SLURM_NTASKS="x", SLURM_LOCALID="0"), "SLURM_NTASKS: got 'x'"),
        (dict(SLURM_PROCID="0", SLURM_NTASKS="2", SLURM_NODEID="x"), "SLURM_NODEID: got 'x'"),
        (HYDRA | MEET | dict(MPI_LOCALNRANKS="0"), "MPI_LOCALNRANKS: got '0'"),
    ],
)
def test_variables_that_are_no_numbers_are_named(variables, message, no_launcher, capsys):
    no_launcher.update(variables)
    with pytest.raises(ValueError, match=message) as error:
        distributed.check_launch()
    no_launcher["LOCAL_RANK"] = "0"
    distributed.complain(str(error.value))  # which must not need the numbers
    assert message.partition(":")[0] in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", *MEET])
def test_variables_of_a_rank_that_are_missing_are_named(missing, no_launcher):
    """All ranks of a host would take its first GPU if LOCAL_RANK were not needed."""
    no_launcher.update({name: text for name, text in RANK_1.items() if name != missing})
    with pytest.raises(ValueError, match=f"but no {missing}; need all variables of a rank"):
        distributed.check_launch()


def test_a_launchers_rank_counts_more(no_launcher):
    own = dict(RANK="5", WORLD_SIZE="6", LOCAL_RANK="0", LOCAL_SIZE="1")
    no_launcher.update(OPEN_MPI | MEET | own)
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
