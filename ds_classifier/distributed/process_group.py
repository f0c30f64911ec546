"""The process group: who this process is, one door for printing, agreement between ranks.

Ranks are started by the deepspeed launcher or torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*), or
by nobody: then this process is rank 0 of 1. No MPI.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

from ds_classifier.common import files
from ds_classifier.distributed import launcher, rendezvous

_patience = timedelta(minutes=30)  # of a collective; init sets it
_SPEAK_SECONDS = 5.0  # that a host's first rank has to say what keeps its ranks from meeting


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


def show(message: str, *, error: bool = False) -> None:
    """Print a line, to stderr for an error.

    A closed terminal, or a pipe whose reader ended (tee, at Ctrl-C), is no reason to lose a
    training: nothing is shown from then on, and the run goes on. So it does while the disk under a
    redirected screen is full.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        print(message, file=stream, flush=True)
    except OSError as problem:
        if problem.errno in (errno.EPIPE, errno.EIO):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def say(message: str = "") -> None:
    """Print a line, on rank 0 alone."""
    if rank() == 0:
        show(message)


def complain(message: str) -> None:
    """Print an error once a node, whichever rank finds it first in its own files."""
    if local_rank() == 0:
        host = f"{socket.gethostname()}: " if world_size() > local_world_size() else ""
        show(f"{host}error: {message}", error=True)


def warn(message: str) -> None:
    """Print a line about this rank alone, with its number; the run goes on."""
    show(f"rank {rank()}: {message}", error=True)


def quiet_libraries() -> None:
    """Keep off the screen what no user can act on; call before torch is imported."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def pick_device():
    """This rank's torch.device: its GPU, or the CPU, whose cores the ranks of a node share.

    Raises ValueError where this host has fewer GPUs than ranks.
    """
    import torch

    from ds_classifier.distributed import memory

    if torch.cuda.is_available():
        if (gpus := torch.cuda.device_count()) <= local_rank():
            raise ValueError(
                f"got {local_world_size()} ranks on this host, which shows {gpus} "
                f"GPU{'s' * (gpus > 1)}; do: put slots={gpus} into the hostfile, or look at "
                "CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        return device
    # DeepSpeed warns about a choice that is no user's business.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_world_size()))
    memory.keep_freed()
    return torch.device("cpu")


def init(
    timeout: timedelta = timedelta(minutes=30),
    *,
    start_timeout: timedelta = timedelta(minutes=10),
    same: dict[str, Any] | None = None,
    check: Callable[[Any], str | None] = lambda device: None,
):
    """Meet the other ranks and join the process group; returns this rank's torch.device.

    nccl where there are GPUs, gloo elsewhere. timeout: of a collective, longer than whatever a rank
    may do while the others wait for it. start_timeout: for all ranks to come. same: what must be
    alike on all of them, beside the code: {what: JSON-able value}. check: takes the device and
    tells why this rank cannot start. Raises AgreedError on all ranks if one cannot, or differs.
    """
    import torch.distributed

    global _patience
    _patience = timeout
    check_launch()
    try:
        device = pick_device()
    except ValueError as error:
        if world_size() > 1:  # the others may have theirs, and would wait
            refuse(str(error), start_timeout)
        raise
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    deepspeed = _import_deepspeed_quietly()
    card = {"host": socket.gethostname(), "problem": check(device)}
    card["same"] = code_versions() | (same or {})
    store, elsewhere = _meet(card, start_timeout)
    if world_size() > local_world_size():
        _name_interface(elsewhere)
    on_gpu = device.type == "cuda"
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=torch.distributed.PrefixStore("group", store),
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
        device_id=device if on_gpu and world_size() > 1 else None,
    )
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timeout,
    )
    return device


def check_launch() -> None:
    """Raises ValueError for variables that no launcher sets so."""
    if "RANK" not in os.environ:
        return
    missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ValueError(f"RANK is set, but not {', '.join(missing)}; do: use a launcher")
    if not 0 <= rank() < world_size():
        raise ValueError(f"RANK: got {rank()}; need 0 to {world_size() - 1}, by WORLD_SIZE")


def refuse(problem: str, start_timeout: timedelta = timedelta(minutes=10)) -> NoReturn:
    """Instead of `init`, on a rank that cannot start: raises AgreedError here and on all others."""
    _meet({"host": socket.gethostname(), "problem": problem, "same": {}}, start_timeout)
    raise AgreedError(problem)


def _meet(card: dict[str, Any], start_timeout: timedelta):
    """Agree with all ranks that the run can start. Raises AgreedError.

    Returns torch's store, and the address of a rank on another host than rank 0 ("": none).
    """
    names = launcher.host_names()
    seconds = start_timeout.total_seconds()
    place = rendezvous.Rendezvous(rank(), world_size(), names, seconds)
    try:
        store, verdict, elsewhere = place.meet(card, say)
    except OSError as error:
        if local_rank() > 0:
            # The launcher ends all when one ends: let the rank that speaks for the host find out.
            time.sleep(_SPEAK_SECONDS)
            if local_rank() == 1:
                show(f"error: {error}", error=True)
        raise
    if verdict:
        raise AgreedError(verdict)
    return store, elsewhere


def code_versions() -> dict[str, str]:
    """What computes: this package's source, and the libraries that the numbers depend on."""
    import hashlib
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    source = hashlib.sha256()
    folder = Path(__file__).resolve().parents[1]  # the whole package
    for path in sorted(folder.rglob("*.py")):
        source.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script:  # of launch/, which in a checkout lies beside the package
        source.update(Path(script).read_bytes())
    versions = {"the code (sha256)": source.hexdigest()[:12]}
    for name in ("torch", "deepspeed", "numpy", "pillow", "simplejpeg"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _name_interface(elsewhere: str) -> None:
    """Tell gloo by which interface the hosts reach each other; it would guess, and often loopback.

    elsewhere: an address on another host than rank 0. Raises OSError where there is none.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        name, _ = rendezvous.interface_towards(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), elsewhere
        )
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _import_deepspeed_quietly():
    """DeepSpeed without its remarks that no user can act on, and without compiling at start-up."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # No op of DeepSpeed's own is used: without this it probes for compilers, and on a CPU compiles
    # a collective for 40 s that only inference would call.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish() -> None:
    """Leave the process group."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def cpu_group():
    """A group of all ranks for what must not wait for a device; as patient as the main one."""
    import torch.distributed

    return torch.distributed.new_group(backend="gloo", timeout=_patience)


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


def gather_json(value: Any, device) -> list[Any]:
    """Every rank's JSON-able value, on every rank, in rank order."""
    import torch

    text = json.dumps(value).encode()
    lengths = all_gather(torch.tensor([len(text)], device=device)).flatten().tolist()
    row = torch.zeros(max(lengths), dtype=torch.uint8)
    row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = all_gather(row.to(device)).cpu().numpy()
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def raise_together(problem: str | None, device) -> None:
    """Every rank names its problem or None; if any has one, all raise AgreedError."""
    problems: dict[str, list[int]] = {}
    for number, message in enumerate(gather_json(problem, device)):
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
