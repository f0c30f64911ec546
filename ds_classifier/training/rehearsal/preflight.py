"""--preflight, and before it: join the ranks of a run, which must be equal and able to start."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ds_classifier import distributed
from ds_classifier.checkpoint.writer import check_free
from ds_classifier.common import files, limits, text
from ds_classifier.common.text import count
from ds_classifier.config.deepspeed_json import Resolved
from ds_classifier.config.settings import PER_NODE_SETTINGS, Settings
from ds_classifier.data.loader import worker_count
from ds_classifier.data.shards import ShardSet
from ds_classifier.distributed import launcher, rendezvous
from ds_classifier.distributed.engine import deepspeed_engine

# Counted in /proc/PID/fd on a CPU. Rank 0 serves the store, to which all other ranks connect.
FILES_OF_A_RUN, FILES_PER_WORKER, FILES_PER_RANK = 40, 4, 6
PROBE_BYTES = 2**24
_PROBES = 4
# Variables that libraries read and that deepspeed's launcher does not pass on to other nodes.
_NOT_PASSED_ON = ("GLOO_", "TORCH_", "OMP_", "MKL_", "DS_", "DEEPSPEED_", "CUDA_", "NVIDIA_")
_OF_THE_LAUNCHER = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR")


def join(resolved: Resolved, shards: ShardSet, val_shards: ShardSet | None) -> torch.device:
    """Join the other ranks; raise AgreedError on all of them if one cannot start, or differs."""
    minutes = resolved.settings.time_outs()
    device = distributed.init(
        # Longer than the watchdog's own time-outs, whose messages say more.
        timedelta(minutes=5 + max(minutes.values())),
        start_timeout=timedelta(minutes=minutes["start"] / 2),  # the rest for the first step
        same=same_on_all_ranks(resolved, shards, val_shards),
        check=lambda device: (
            deepspeed_engine.precision_problem(resolved.ds_config, device)
            or limits.open_files_problem(_files_to_open(resolved.settings))
        ),
    )
    if emulated := deepspeed_engine.emulate_fp16(resolved.ds_config, device):
        distributed.say(f"  NOTE      {emulated}")
    return device


def _files_to_open(settings: Settings) -> int:
    """Return how many files and sockets this rank opens later: those of gloo, the log, the loaders.

    The shards need one more; how many stay open follows from what is left.
    """
    workers = worker_count(settings.workers)
    ranks = distributed.world_size()
    if distributed.rank() > 0:
        ranks = min(ranks, 3)
    sockets = FILES_PER_RANK * ranks * (ranks > 1)
    return FILES_OF_A_RUN + FILES_PER_WORKER * (workers + 1) + sockets


def same_on_all_ranks(
    resolved: Resolved, shards: ShardSet, val_shards: ShardSet | None
) -> dict[str, Any]:
    """Return what must be equal on all ranks: flags, the completed JSON, images and classes."""
    same = {f"--{name}": v for name, v in dataclasses.asdict(resolved.settings).items()}
    for name in PER_NODE_SETTINGS:
        same.pop(f"--{name}")
    same |= {f"the JSON's {name}": value for name, value in resolved.ds_config.items()}
    for name, split in (("training", shards), ("validation", val_shards)):
        same[f"the {name} data (fingerprint)"] = split and split.manifest.fingerprint[:12]
    return same


def look(
    resolved: Resolved, shards: ShardSet, device: torch.device, *, checkpoint_size: int
) -> None:
    """Print a table of the nodes and the network's speed; check the run directory's disk.

    Every rank calls it, after `join`. checkpoint_size: in bytes.
    """
    began = time.monotonic()
    run_dir = Path(resolved.settings.run_dir)
    distributed.on_rank_0(lambda: look_at_run_dir(run_dir, checkpoint_size), device)
    folders = [run_dir] if distributed.rank() == 0 else []
    if shards.store.remote:
        folders.append(shards.store.folder.parent)
    found = look_at_rank(deepspeed_engine.describe_device(device), folders)
    ranks = distributed.gather_json(found, device)
    rate = reduction_rate(device)
    say = distributed.say
    say("\n".join(table(ranks)))
    say(f"batch: {resolved.batch}")
    if rate:
        say(f"all ranks sum {PROBE_BYTES >> 20} MiB at {rate / 1e9:.2f} GB/s")
    for note in notes(ranks) if distributed.rank() == 0 else []:
        say(distributed.wrapped(f"note: {note}", indent=6))
    equal = (
        f"{'all ' if len(ranks) > 1 else ''}{count(len(ranks), 'rank')} can start: code, "
        "libraries, settings, JSON and images are equal; "
        f"checked in {time.monotonic() - began:.1f} s"
    )
    say(distributed.wrapped(equal, indent=2))


def look_at_run_dir(run_dir: Path, checkpoint_size: int) -> None:
    """Raise ValueError if nothing can be written there, or there is no room for checkpoints.

    checkpoint_size: in bytes. It only looks, since a job may be at work there.
    """
    place = files.nearest_directory(run_dir)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"--run_dir: got {run_dir}, where nothing can be written; do: choose another"
        )
    check_free(run_dir / "checkpoints", checkpoint_size)


def look_at_rank(description: str, folders: list[Path]) -> dict[str, Any]:
    """Return what the table shows of this rank.

    description: of its device. folders: those that it writes to.
    """
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    address = rendezvous.address_of(interface)
    if not address:
        try:
            interface, address = rendezvous.interface_towards(master, port)
        except OSError:  # a host without a network trains alone
            interface, address = "no network", ""
    return {
        "host": socket.gethostname(),
        "address": address,
        "interface": interface,
        "device": description,
        "cores": len(os.sched_getaffinity(0)),
        "free": {
            str(folder): shutil.disk_usage(files.nearest_directory(folder)).free
            for folder in folders
        },
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_NOT_PASSED_ON) and name not in _OF_THE_LAUNCHER
        },
    }


def reduction_rate(device: torch.device) -> float | None:
    """Return the bytes per second at which all ranks sum a vector, the best of some tries.

    Every rank calls it; None for a single rank.
    """
    if distributed.world_size() == 1:
        return None
    vector, best = torch.zeros(PROBE_BYTES // 4, device=device), float("inf")
    for _ in range(_PROBES):
        began = time.perf_counter()
        float(distributed.all_reduce_sum(vector)[0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return PROBE_BYTES / best


def table(ranks: list[dict[str, Any]]) -> list[str]:
    """Return a table with a line per node."""
    rows = []
    for number, of_node in _by_host(ranks).items():
        first = ranks[of_node[0]]
        free = ", ".join(f"{bytes / 1e9:.0f} GB in {f}" for f, bytes in first["free"].items())
        address = f"{first['address']} ({first['interface']})"
        numbers = f"{of_node[0]}-{of_node[-1]}" if len(of_node) > 1 else str(of_node[0])
        rows.append((number, address, numbers, first["device"], str(first["cores"]), free))
    heads = ["node", "address", "rank", "device", "cores", "free"]
    return text.table(heads, rows, left=len(heads))


def _by_host(ranks: list[dict[str, Any]]) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        hosts.setdefault(rank["host"], []).append(number)
    return hosts


def notes(ranks: list[dict[str, Any]]) -> list[str]:
    """Return a line for each thing that does not keep a run from starting, but is rarely meant."""
    lines, own = [], ranks[0]["variables"]
    for host, numbers in _by_host(ranks).items():
        other = ranks[numbers[0]]["variables"]
        odd = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        if odd:
            lines.append(
                f"{', '.join(odd)}: {host} differs from {ranks[0]['host']}; the launcher does not "
                "pass them on; do: write them as NAME=VALUE lines into ./.deepspeed_env"
            )
    hosts = launcher.host_names()
    if len(set(hosts)) > 1 and _keepalive(hosts[-1]) == 0:
        lines.append(
            "ssh would not notice here when a node is lost, and the launcher would hang: put "
            "'ServerAliveInterval 15' into ~/.ssh/config"
        )
    return lines


def _keepalive(host: str) -> int | None:
    """Return the seconds after which ssh asks a silent host for a sign of life.

    0: never. None: ssh is not installed here.
    """
    try:
        done = subprocess.run(["ssh", "-G", host], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = dict(
        line.split(" ", 1)
        for line in done.stdout.decode(errors="replace").splitlines()
        if " " in line
    )
    return int(words.get("serveraliveinterval", 0)) if done.returncode == 0 else None
