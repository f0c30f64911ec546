"""The ranks: which one this process is, collectives, and errors that all of them raise.

Ranks are started by the deepspeed launcher or torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*).
Tasks of srun and mpiexec become ranks where MASTER_* is set; MPI itself is not used.
A process without a launcher is rank 0 of 1.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from ds_classifier.common import files


class AgreedError(ValueError):
    """An error that every rank raises with the same message: each exits, and rank 0 prints it."""


# Who numbers tasks -> its variables of rank, world size, local rank and local world size. PRRTE, on
# which Open MPI 5 is built, tells a process its own number alone.
_TASK_VARIABLES = {
    "mpirun": tuple(
        f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    "mpirun_rsh": tuple(  # of MVAPICH
        f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    "jsrun": tuple(
        f"JSM_NAMESPACE_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    "flux run": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "prterun": ("PMIX_RANK", "", "", ""),
}
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of every rank
# Variable -> its least value.
_NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
_NUMBERS |= {"MASTER_PORT": 0}
_LAST_PORT = 65535


def adopt_tasks() -> None:
    """Make the tasks of srun, mpirun or mpiexec ranks, by setting the variables of ranks.

    Does nothing if there is one task, or if RANK is set. Raises ValueError, with the line that
    starts them rightly, if the tasks do not know where to meet.
    """
    if "RANK" in os.environ:
        return
    for starter, (number, *_) in _TASK_VARIABLES.items():
        if number in os.environ and not _is_batch_script(starter):
            break
    else:
        return
    task, tasks, local, local_tasks = _tasks(starter)
    if tasks == "1":
        return
    command = shlex.join(sys.orig_argv[1:])
    alone = f"or, to let each work alone, unset {number}"
    if not tasks:
        raise ValueError(
            f"got process {task} of several that {starter} started, which would each work alone; "
            f"need their number, which {starter} does not tell; do: deepspeed --num_gpus N "
            f"{command} (on several hosts: --hostfile HOSTS); {alone}"
        )
    if "" in (local, os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")):
        raise ValueError(
            f"got process {task} of {tasks} that {starter} started, which would each work alone; "
            "need MASTER_ADDR and MASTER_PORT, where they meet; do: export MASTER_ADDR=HOST "
            f"MASTER_PORT=29500 (HOST is that of process 0) before {starter}; or, on one host, "
            f"deepspeed --num_gpus {tasks} {command}; {alone}"
        )
    os.environ.update(RANK=task, WORLD_SIZE=tasks, LOCAL_RANK=local, LOCAL_SIZE=local_tasks)


def _is_batch_script(starter: str) -> bool:
    """Return whether slurm numbers this process as its batch script, and not as a task of srun."""
    variables = os.environ
    in_step = "SLURM_STEP_NUM_TASKS" in variables
    return starter == "srun" and "SLURM_JOB_ID" in variables and not in_step


def _tasks(starter: str) -> list[str]:
    """Return rank, world size, local rank and local world size; "" for what is not known.

    Raises ValueError that names the variables that are no numbers.
    """
    names = _TASK_VARIABLES[starter]
    least = dict(zip(names, (0, 1, 0, 1), strict=True))
    if starter == "srun":
        del least[names[3]]
        least |= {"SLURM_NTASKS": 1, "SLURM_NODEID": 0}
    _refuse_other_than_numbers(least)
    task, tasks, local, here = (os.environ.get(name, "") for name in names)
    if starter == "srun":
        tasks = tasks or os.environ.get("SLURM_NTASKS", "")
        # "2(x3),1": two tasks on each of three nodes, then one.
        groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", here)
        per_node = [size for size, nodes in groups for _ in range(int(nodes or 1))]
        here = dict(enumerate(per_node)).get(int(os.environ.get("SLURM_NODEID", 0)), "")
    return [task, tasks, local, here or tasks]


def check_variables() -> None:
    """Raise ValueError, naming the variables, if those of a rank are incomplete or impossible."""
    given = [name for name in _NEEDED[:3] if name in os.environ]
    if not given:
        return
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise ValueError(
            f"got {', '.join(given)}, but no {', '.join(missing)}; need all variables of a rank; "
            f"do: use the deepspeed launcher or torchrun; or, to work alone, unset "
            f"{' '.join(given)}"
        )
    _refuse_other_than_numbers(_NUMBERS)
    for name, value, size, of in (
        ("RANK", rank(), world_size(), "WORLD_SIZE"),
        ("LOCAL_RANK", local_rank(), local_world_size(), "LOCAL_SIZE (torchrun: LOCAL_WORLD_SIZE)"),
        ("MASTER_PORT", _number("MASTER_PORT", 0), _LAST_PORT + 1, "the number of ports"),
    ):
        if value >= size:
            raise ValueError(f"{name}: got {value}; need 0 to {size - 1}, as {of} is {size}")


def _refuse_other_than_numbers(least: dict[str, int]) -> None:
    """Raise ValueError that names every variable that is set to no whole number, or too small.

    least: {variable: its least value}.
    """
    found = {name: os.environ[name] for name in least if name in os.environ}
    problems = [
        f"{name}: got {text!r}; need a whole number, {least[name]} or more"
        for name, text in found.items()
        if not text.isdecimal() or int(text) < least[name]
    ]
    if problems:
        raise ValueError("; ".join(problems) + "; do: look at what the launcher sets")


def _number(name: str, default: int) -> int:
    """Return the number in a variable. Messages need it too, also the one that refuses the text."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def rank() -> int:
    """Return the number of this process, 0 to world_size() - 1."""
    return _number("RANK", 0)


def world_size() -> int:
    """Return the number of ranks on all nodes."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the number of this process on its node, 0 to local_world_size() - 1."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of ranks on this node.

    deepspeed sets it as LOCAL_SIZE, torchrun as LOCAL_WORLD_SIZE.
    """
    return _number("LOCAL_SIZE", 0) or _number("LOCAL_WORLD_SIZE", 1)


def all_reduce_sum(tensor):
    """Sum a tensor elementwise over all ranks, in place; return it."""
    import torch.distributed

    torch.distributed.all_reduce(tensor)
    return tensor


def all_gather(tensor):
    """Return the tensors of all ranks, which have one shape, stacked: [W, ...]."""
    import torch
    import torch.distributed

    flat = tensor.reshape(-1)
    gathered = torch.empty(world_size() * len(flat), dtype=tensor.dtype, device=tensor.device)
    torch.distributed.all_gather_into_tensor(gathered, flat)
    return gathered.view(world_size(), *tensor.shape)


def broadcast(tensor):
    """Replace a tensor by rank 0's, in place, on every rank; return it."""
    import torch.distributed

    torch.distributed.broadcast(tensor, src=0)
    return tensor


def broadcast_bytes(tensor, device=None):
    """Do the same as `broadcast` for a tensor of any dtype, since no backend sends all of them.

    device: to send it from; None: its own.
    """
    import torch

    sent = tensor.to(device or tensor.device).reshape(-1).view(torch.uint8)
    return tensor.copy_(broadcast(sent).view(tensor.dtype).view(tensor.shape))


def broadcast_json(value: Any, device) -> Any:
    """Return rank 0's value on every rank.

    value: JSON-able; ignored on other ranks. It is sent as JSON, so nothing received can run code.
    """
    import torch

    text = json.dumps(value).encode() if rank() == 0 else b""
    length = broadcast(torch.tensor([len(text)], device=device))
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return json.loads(bytes(broadcast(buffer).cpu().tolist()))


def gather_json(value: Any, device) -> list[Any]:
    """Return the JSON-able values of all ranks, in rank order, on every rank."""
    import torch

    text = json.dumps(value).encode()
    lengths = all_gather(torch.tensor([len(text)], device=device)).flatten().tolist()
    row = torch.zeros(max(lengths), dtype=torch.uint8)
    row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = all_gather(row.to(device)).cpu().numpy()
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def on_rank_0(task: Callable[[], Any], device) -> Any:
    """Run a task on rank 0, and return its JSON-able result on every rank.

    Raises AgreedError on every rank if the task raises ValueError or OSError, so that a problem
    with a file on rank 0 ends all ranks at once, with one message.
    """
    outcome: dict[str, Any] = {}
    if rank() == 0:
        try:
            outcome["result"] = task()
        except (ValueError, OSError) as error:
            outcome["error"] = files.problem(error)
        except Exception as error:
            # A bug. The other ranks must not wait for a result that will never come.
            broadcast_json({"error": f"rank 0: {type(error).__name__}: {error}"}, device)
            raise
    outcome = broadcast_json(outcome, device)
    if "error" in outcome:
        raise AgreedError(outcome["error"])
    return outcome.get("result")


def together(task: Callable[[], Any], device) -> Any:
    """Run a task on every rank, and return each rank's own result.

    Raises AgreedError on every rank if the task raises ValueError or OSError on any of them.
    """
    result = problem = None
    try:
        result = task()
    except (ValueError, OSError) as error:
        problem = files.problem(error)
    raise_together(problem, device)
    return result


def raise_together(problem: str | None, device) -> None:
    """Raise AgreedError on all ranks if any of them has a problem; every rank must call it.

    problem: this rank's message, or None.
    """
    problems: dict[str, list[int]] = {}
    for number, message in enumerate(gather_json(problem, device)):
        if message:
            problems.setdefault(message, []).append(number)
    if problems:
        on_all_ranks = [*problems.values()] == [list(range(world_size()))]
        raise AgreedError(
            "\n".join(
                message if on_all_ranks else f"rank {', '.join(map(str, ranks))}: {message}"
                for message, ranks in problems.items()
            )
        )
