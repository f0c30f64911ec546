"""Kill a training run at random moments until it finishes, again and again.

Starts a run of the digits on two ranks through the deepspeed launcher. After a random time, one of
these gets SIGKILL: one rank, all ranks, launch.py, or `deepspeed` itself. When every process of the
job is gone, the same command is given again, until the run finishes. Its weights and Adam moments
must then be bit-equal to those of a run that was never killed, and the last training of each step
must have used the same samples as that run. Prints a line per kill and a table at the end.

    python tests/helpers/chaos.py --kills 200     # about an hour on 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs import ALIVE_SECONDS, Job, command_line
from safetensors.torch import load_file
from tiny_run import traced

VICTIMS = ("one rank", "all ranks", "launch.py", "deepspeed")
LONG_S = 300  # seconds within which an undisturbed run finishes


def start(folder: Path, data: Path, steps: int) -> Job:
    """Start or continue the run; each start traces into a directory of its own."""
    flags = ["--data_dir", data, "--global_batch", 16, "--iterations", steps]
    flags += ["--save_interval", 5, "--log_interval", 5]
    trace = folder / "trace" / uuid.uuid4().hex
    return Job(2, "zero2_bf16", folder / "run", *flags, TRACE=str(trace))


def kill(job: Job) -> str:
    """Send SIGKILL to a random victim that is running; return its name."""
    ranks = list(job.ranks().values())
    there = {
        "one rank": random.sample(ranks, min(len(ranks), 1)),
        "all ranks": ranks,
        "launch.py": [p for p in job.alive() if "deepspeed.launcher.launch" in command_line(p)],
        "deepspeed": [job.process.pid],
    }
    victim = random.choice([name for name in VICTIMS if there[name]])
    for pid in there[victim]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return victim


def last_trained(folder: Path) -> list:
    """Return the trace of each step's last training, over all starts of the run in time order."""
    steps: dict[int, list] = {}
    for start in sorted((folder / "trace").iterdir(), key=lambda path: path.stat().st_ctime):
        mine: dict[int, list] = {}
        for row in traced(start):
            mine.setdefault(row[0], []).append(row)
        steps |= mine
    return [row for step in sorted(steps) for row in steps[step]]


def same_state(one: Path, other: Path) -> bool:
    """Return whether two checkpoints hold the same bits."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        if a.keys() != b.keys() or any(not a[key].equal(b[key]) for key in a):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="minimum number of kills [20]")
    parser.add_argument("--steps", type=int, default=60, help="steps of the run [60]")
    parser.add_argument("--seed", type=int, default=0, help="seed for victims and moments [0]")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        return chaos(Path(folder), **vars(arguments))


def chaos(root: Path, *, kills: int, steps: int, seed: int) -> int:
    """Kill runs; return 0 if every one finished like the undisturbed run, else 1."""
    from ds_classifier.data.convert.convert import convert
    from ds_classifier.data.convert.sources import open_source

    convert(open_source("digits"), root / "data")
    data, final = root / "data" / "train", f"run/checkpoints/step-{steps:08d}"
    golden = root / "golden"
    golden.mkdir()
    began = time.monotonic()
    job = start(golden, data, steps)
    assert job.wait_until_gone(LONG_S) is not None, "the undisturbed run does not finish"
    whole = time.monotonic() - began
    assert (golden / final).is_dir(), job.output()
    print(f"undisturbed: {steps} steps in {whole:.1f} s", flush=True)

    killed, ends, gone, orphans = Counter(), Counter(), [], 0
    while sum(killed.values()) < kills or not ends:
        folder = root / f"run{sum(ends.values())}"
        folder.mkdir()
        while not (folder / "run" / "DONE").exists():
            job = start(folder, data, steps)
            # A moment during start, steps or end; once there were enough kills, let the run finish.
            moment = random.uniform(0, whole) if sum(killed.values()) < kills else LONG_S
            left = job.wait_until_gone(moment)
            if left is None and moment < LONG_S:
                victim = kill(job)
                seconds = job.wait_until_gone(ALIVE_SECONDS)
                killed[victim] += 1
                saved = sorted(path.name for path in folder.glob("run/checkpoints/step-*"))
                print(
                    f"kill {sum(killed.values()):3}  {victim:9}  after {moment:4.1f} s at "
                    f"{saved[-1] if saved else 'no checkpoint':13}  all gone after "
                    f"{'never' if seconds is None else f'{seconds:.1f} s'}",
                    flush=True,
                )
                if seconds is None:
                    orphans += 1
                    print("still alive:", *map(command_line, job.alive()), sep="\n  ")
                    print(job.output()[-2000:], flush=True)
                    job.kill_all()
                else:
                    gone.append(seconds)
            elif left is None:
                job.kill_all()
                print(job.output()[-3000:])
                print("an undisturbed run does not finish")
                return 1
        equal = same_state(folder / final, golden / final)
        samples = last_trained(folder) == last_trained(golden)
        ends["finished"] += 1
        ends["bit-equal"] += equal
        ends["same samples"] += samples
        print(f"finished: weights and moments bit-equal: {equal}; same samples: {samples}")
        shutil.rmtree(folder)
    result = {
        "kills": dict(killed),
        "runs finished": ends["finished"],
        "bit-equal to the undisturbed run": ends["bit-equal"],
        "with the same samples in each step": ends["same samples"],
        f"kills after which processes lived on for {ALIVE_SECONDS} s": orphans,
        "seconds from kill to all gone, median": statistics.median(gone) if gone else None,
        "seconds from kill to all gone, worst": max(gone, default=None),
    }
    print(json.dumps(result, indent=1))
    good = ends["finished"] == ends["bit-equal"] == ends["same samples"] and not orphans
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
