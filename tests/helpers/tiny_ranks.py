"""Ranks that only reduce a number, under the watchdog: python tiny_ranks.py FOLDER FAULT...

The ranks are forked, so that a group starts within a second. A fault is NAME=RANKS:KIND, with RANKS
like 1,2 and KIND one of kill, stop, raise, data, compute, slow-first-step, none. It happens at step
5 of 8. Prints one JSON line per fault: per rank, the exit code and the seconds from the first
death, stop or stall to its end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as launch/train.py sets it

import torch
import torch.distributed
from running import free_port

from ds_classifier import distributed
from ds_classifier.distributed.stopping import StopRequests
from ds_classifier.distributed.watchdog import Watchdog

WORLD, FAULTY_STEP = 4, 5
MINUTES = {"start": 0.5, "step": 0.07, "save": 0.5, "validation": 0.5}


def happen(kind: str, step: int, folder: Path) -> None:
    if kind in ("none", "data") or step != (1 if kind == "slow-first-step" else FAULTY_STEP):
        return
    (folder / "fired").write_text(str(time.monotonic()))
    if kind == "raise":
        raise RuntimeError("a fault of the test")
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    else:
        time.sleep(7 if kind == "slow-first-step" else 60)


def batches(kind: str):
    for step in range(1, 9):
        time.sleep(60 if kind == "data" and step == FAULTY_STEP else 0.02)
        yield step


def train(watch: Watchdog, kind: str, folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    watch.join()
    batch = watch.batches(batches(kind))
    for step in range(1, 9):
        watch.stepping(step)
        if kind == "data" and step == FAULTY_STEP:
            (folder / "fired").write_text(str(time.monotonic()))
        next(batch)
        happen(kind, step, folder)
        distributed.all_reduce_sum(torch.ones(1))
    watch.leave()
    distributed.finish()


def be_rank(rank: int, kind: str, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(LOCAL_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with open(folder / "screen", "ab", buffering=0) as screen:
        os.dup2(screen.fileno(), 1)
        os.dup2(screen.fileno(), 2)
    with StopRequests(), Watchdog(folder, minutes=MINUTES) as watch:
        train(watch, kind, folder)


def run(name: str, faulty: list[int], kind: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    port = free_port()
    ranks = {}
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                be_rank(rank, kind if rank in faulty else "none", folder, port)
                code = 0
            finally:
                os._exit(code)
        ranks[pid] = rank
    codes, ended = {}, {}
    while len(codes) < WORLD:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
            ended[ranks[pid]] = time.monotonic()
            continue
        if kind == "stop" and len(codes) == WORLD - len(faulty):
            for pid, rank in ranks.items():
                if rank in faulty:
                    os.kill(pid, signal.SIGKILL)  # the launcher does the same
        time.sleep(0.02)
    fired = float((folder / "fired").read_text()) if (folder / "fired").exists() else None
    seconds = {r: round(t - fired, 1) for r, t in ended.items()} if fired else {}
    print(json.dumps({"name": name, "codes": codes, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        name, _, rest = argument.partition("=")
        where, _, kind = rest.partition(":")
        run(name, [int(r) for r in where.split(",")], kind, Path(sys.argv[1]) / name)
