"""The process group: who this process is, one door for printing, agreement between ranks.

Ranks are started by the deepspeed launcher or torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*), or
by nobody: then this process is rank 0 of 1. No MPI.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ds_classifier import files


class AgreedError(ValueError):
    """What all ranks raise alike: each may leave by itself, and one of them tells."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Ranks on this node: LOCAL_SIZE from deepspeed, LOCAL_WORLD_SIZE from torchrun."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def say(message: str = "") -> None:
    """Print a line, on rank 0 alone."""
    if rank() == 0:
        print(message, flush=True)


def complain(message: str) -> None:
    """Print an error once a node, whichever rank finds it first in its own files."""
    if local_rank() == 0:
        host = f"{socket.gethostname()}: " if world_size() > local_world_size() else ""
        print(f"{host}error: {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a line about this rank alone, with its number; the run goes on."""
    print(f"rank {rank()}: {message}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keep off the screen what no user can act on; call before torch is imported."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def init(timeout: timedelta = timedelta(minutes=30)):
    """Join the process group and pick this rank's device; returns the torch.device.

    nccl where there are GPUs, gloo elsewhere. On CPUs the ranks of a node share its cores.
    timeout: of a collective, longer than whatever a rank may do while the others wait for it.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # DeepSpeed warns about a choice that is no user's business.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // local_world_size()))
    alone = "RANK" not in os.environ
    if alone:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    device = torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    _import_deepspeed_quietly().init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timeout,
    )
    return device


def _import_deepspeed_quietly():
    """DeepSpeed without its remarks that no user can act on, and without compiling at start-up."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # No op of DeepSpeed's own is used: without this it probes for compilers, and on a CPU compiles
    # a collective for 40 s that only inference would call.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish() -> None:
    """Leave the process group."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_reduce_sum(tensor):
    """The elementwise sum over all ranks, in place; returns the tensor."""
    import torch.distributed

    torch.distributed.all_reduce(tensor)
    return tensor


def all_gather(tensor):
    """Every rank's tensor of this shape, stacked: [W, ...]."""
    import torch
    import torch.distributed

    flat = tensor.reshape(-1)
    gathered = torch.empty(world_size() * len(flat), dtype=tensor.dtype, device=tensor.device)
    torch.distributed.all_gather_into_tensor(gathered, flat)
    return gathered.view(world_size(), *tensor.shape)


def broadcast(tensor):
    """Rank 0's tensor on every rank, in place; returns it."""
    import torch.distributed

    torch.distributed.broadcast(tensor, src=0)
    return tensor


def broadcast_json(value: Any, device) -> Any:
    """Rank 0's value on every rank; JSON travels, so nothing received can run code."""
    import torch

    text = json.dumps(value).encode() if rank() == 0 else b""
    length = broadcast(torch.tensor([len(text)], device=device))
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return json.loads(bytes(broadcast(buffer).cpu().tolist()))


def on_rank_0(task: Callable[[], Any], device) -> Any:
    """Run a task on rank 0; every rank gets its JSON-able result, or raises AgreedError for its
    ValueError or OSError.

    So that one rank's trouble with a file ends all ranks with the same message, at once.
    """
    outcome: dict[str, Any] = {}
    if rank() == 0:
        try:
            outcome["result"] = task()
        except (ValueError, OSError) as error:
            outcome["error"] = files.problem(error)
        except Exception as error:
            # A bug: the others must not wait for a result that will not come.
            broadcast_json({"error": f"rank 0: {type(error).__name__}: {error}"}, device)
            raise
    outcome = broadcast_json(outcome, device)
    if "error" in outcome:
        raise AgreedError(outcome["error"])
    return outcome.get("result")


def together(task: Callable[[], Any], device) -> Any:
    """A task that every rank does; if one fails, all raise its ValueError or OSError's message."""
    result = problem = None
    try:
        result = task()
    except (ValueError, OSError) as error:
        problem = files.problem(error)
    raise_together(problem, device)
    return result


def raise_together(problem: str | None, device) -> None:
    """Every rank names its problem or None; if any has one, all raise AgreedError."""
    import torch

    width = 2000
    row = torch.zeros(width, dtype=torch.uint8, device=device)
    if problem is not None:
        text = torch.tensor(list(problem.encode()[:width]), dtype=torch.uint8)
        row[: len(text)] = text.to(device)
    problems: dict[str, list[int]] = {}
    for number, other in enumerate(all_gather(row).cpu().tolist()):
        message = bytes(other).rstrip(b"\0").decode("utf-8", "replace")
        if message:
            problems.setdefault(message, []).append(number)
    if problems:
        everywhere = [*problems.values()] == [list(range(world_size()))]
        raise AgreedError(
            "\n".join(
                message if everywhere else f"rank {', '.join(map(str, ranks))}: {message}"
                for message, ranks in problems.items()
            )
        )
