"""The process group: choosing a device, meeting the other ranks, joining and leaving."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import socket
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from ds_classifier.common.text import count
from ds_classifier.distributed import launcher, rendezvous
from ds_classifier.distributed.console import say, show
from ds_classifier.distributed.engine.deepspeed_versions import newer_than_tested
from ds_classifier.distributed.ranks import (
    AgreedError,
    adopt_tasks,
    check_variables,
    local_rank,
    local_world_size,
    rank,
    world_size,
)

_timeout = timedelta(minutes=30)  # of a collective; init sets it
_gloo_groups: list[Any] = []  # groups of this process whose threads must end before Python does
_REPORT_SECONDS = 5.0  # for a host's first rank to report why its ranks cannot meet


def pick_device():
    """Return this rank's torch.device: its GPU, or the CPU.

    On a CPU the ranks of a node share its cores, unless OMP_NUM_THREADS is set.
    Raises ValueError if this host has fewer GPUs than ranks.
    """
    import torch

    from ds_classifier.distributed import memory

    if torch.cuda.is_available():
        if (gpus := torch.cuda.device_count()) <= local_rank():
            raise ValueError(
                f"got {local_world_size()} ranks on this host, which has {count(gpus, 'GPU')}; do: "
                f"put slots={gpus} into the hostfile, or check CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        return device
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
    """Meet the other ranks and join the process group; return this rank's torch.device.

    The backend is nccl on GPUs, else gloo.
    timeout: of a collective; longer than anything that one rank does while the others wait for it.
    start_timeout: for all ranks to connect.
    same: facts besides the code that must not differ between ranks: {name: JSON-able value}.
    check: takes the device and returns why this rank cannot start, or None.
    Raises AgreedError on all ranks if one of them cannot start, or differs.
    """
    import torch.distributed

    global _timeout
    _timeout = timeout
    check_launch()
    try:
        device = pick_device()
    except ValueError as error:
        if world_size() > 1:  # the other ranks may have a device, and would wait
            refuse(str(error), start_timeout)
        raise
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = "0"  # the store takes a free one
    deepspeed = import_deepspeed()
    if warning := newer_than_tested():
        say(warning)
    card = {"host": socket.gethostname(), "problem": check(device)}
    card["same"] = code_versions() | (same or {})
    store, other_host = _meet(card, start_timeout)
    if world_size() > local_world_size():
        _set_gloo_interface(other_host)
    on_gpu = device.type == "cuda"
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=torch.distributed.PrefixStore("group", store),
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
        device_id=device if on_gpu and world_size() > 1 else None,
    )
    if not on_gpu:
        _gloo_groups.append(torch.distributed.group.WORLD)
    atexit.register(_end_gloo)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timeout,
    )
    return device


def check_launch() -> None:
    """Take ranks from srun or mpiexec, if one of them started this process.

    Raises ValueError if the launcher's variables are incomplete, no numbers, or contradict each
    other.
    """
    adopt_tasks()
    check_variables()


def refuse(problem: str, start_timeout: timedelta = timedelta(minutes=10)) -> NoReturn:
    """Raise AgreedError on this rank and on all others.

    Call it in place of `init` on a rank that cannot start.
    """
    _meet({"host": socket.gethostname(), "problem": problem, "same": {}}, start_timeout)
    raise AgreedError(problem)


def _meet(card: dict[str, Any], start_timeout: timedelta):
    """Agree with all ranks that the run can start. Raises AgreedError if it cannot.

    Returns torch's store, and an address on another host than rank 0's; "" if there is none.
    """
    names = launcher.host_names()
    seconds = start_timeout.total_seconds()
    meeting = rendezvous.Rendezvous(rank(), world_size(), names, seconds)
    try:
        store, verdict, other_host = meeting.meet(card, say)
    except OSError as error:
        if local_rank() > 0:
            # The launcher ends all ranks when one ends. Give the host's first rank, which reports
            # for all of them, the time to fail too.
            time.sleep(_REPORT_SECONDS)
            if local_rank() == 1:
                show(f"error: {error}", error=True)
        raise
    if verdict:
        raise AgreedError(verdict)
    return store, other_host


def code_versions() -> dict[str, str]:
    """Return the versions of all code that the numbers depend on: {name: version}.

    These are a hash of this package's source, and the versions of libraries.
    """
    import hashlib
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    source = hashlib.sha256()
    folder = Path(__file__).resolve().parents[1]  # the whole package
    for path in sorted(folder.rglob("*.py")):
        source.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script:  # in launch/, which is outside the package in a checkout
        source.update(Path(script).read_bytes())
    versions = {"the code (sha256)": source.hexdigest()[:12]}
    for name in ("torch", "torchvision", "deepspeed", "numpy", "pillow", "simplejpeg"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _set_gloo_interface(other_host: str) -> None:
    """Set the network interface that gloo uses between hosts. Gloo often guesses loopback.

    other_host: an address on another host than rank 0's.
    Raises OSError if no interface leads there.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        name, _ = rendezvous.interface_towards(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), other_host
        )
        os.environ["GLOO_SOCKET_IFNAME"] = name


def import_deepspeed():
    """Import DeepSpeed without log lines that no user can act on, and without compiling.

    Whatever imports it first in a process must do it by this function. Returns the module.
    """
    import torch

    if not torch.cuda.is_available():  # else it warns that it chose the CPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.INFO)  # before 0.17.6 it logs the device that it takes
    import deepspeed

    logging.disable(logging.NOTSET)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Without this line it looks for compilers, and on a CPU compiles for 40 s a collective that
    # only inference calls. The kernels of optimizers do not ask it.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


@contextmanager
def keep_port() -> Iterator[int]:
    """Keep a free TCP port of this host for a launcher's --master_port, and yield its number.

    No other program is given the port meanwhile. Rank 0 can serve its store there: a socket that
    does not listen shares its port with one that does, if both set SO_REUSEADDR, as torch does.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("", 0))
        yield keeper.getsockname()[1]


def finish() -> None:
    """Leave the process group."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _gloo_groups.clear()


def _end_gloo() -> None:
    """Leave gloo's groups when the program ends, on whatever path, so that their threads end.

    Such a thread frees the tensors of a collective, for which it needs the interpreter. If it asks
    for it while Python shuts down, the process aborts ("terminate called without an active
    exception"). NCCL has no such threads, and would wait for ranks that have not failed.
    """
    import torch.distributed

    while _gloo_groups and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group(_gloo_groups.pop())
    # A group's threads end with the last reference to it, which an error's frames may hold.
    traceback.clear_frames(getattr(sys, "last_traceback", None))
    gc.collect()


def cpu_group():
    """Return a gloo group of all ranks, for collectives that must not wait for a device.

    It has the time-out of the main group.
    """
    import torch.distributed

    group = torch.distributed.new_group(backend="gloo", timeout=_timeout)
    _gloo_groups.append(group)
    return group
