"""The process group: which device, meeting the other ranks, joining and leaving."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

from ds_classifier.distributed import launcher, rendezvous
from ds_classifier.distributed.console import say, show
from ds_classifier.distributed.ranks import (
    AgreedError,
    local_rank,
    local_world_size,
    rank,
    world_size,
)

_patience = timedelta(minutes=30)  # of a collective; init sets it
_SPEAK_SECONDS = 5.0  # that a host's first rank has to say what keeps its ranks from meeting


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
