"""Kill a training run at random moments until it finishes, again and again.

A run of the digits on two ranks, through the deepspeed launcher, is started, and after a random
time one of these gets SIGKILL: one rank, all ranks, launch.py, or `deepspeed` itself. When every
process of the job is gone the same command is given again, until the run finishes. Its weights and
Adam moments must then be bit-equal to those of a run that nobody killed, and each step must last
have been trained on that run's samples. Prints a line a kill and a table at the end.

    python tests/chaos.py --kills 200     # about an hour on 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import environment
from safetensors.torch import load_file
from test_training import CONFIGS, TINY, TRACED, traced

VICTIMS = ("one rank", "all ranks", "launch.py", "deepspeed")
GONE_S = 40  # seconds after which no process of a killed job may be left
LONG_S = 300  # seconds in which a run that nobody disturbs finishes


class Job:
    """One start of the run, known by a word in the environment of all its processes."""

    def __init__(self, folder: Path, data: Path, steps: int):
        self.word = uuid.uuid4().hex
        command = [sys.executable, Path(sys.executable).with_name("deepspeed"), "--quiet"]
        command += ["--num_gpus", 2, "--master_port", random.randint(20000, 60000), TRACED]
        command += ["--deepspeed_config", CONFIGS / "zero2_bf16.json", "--data_dir", data]
        command += ["--run_dir", folder / "run", *TINY, "--global_batch", 16]
        command += ["--iterations", steps, "--save_interval", 5, "--log_interval", 5]
        self.output = open(folder / "output.txt", "a")
        self.parent = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env=environment(CHAOS=self.word, TRACE=str(folder / "trace" / self.word)),
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def processes(self) -> dict[int, str]:
        """Process id -> its command line, of all that live."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.word.encode() in (entry / "environ").read_bytes():
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                    found[int(entry.name)] = " ".join(words)
            except OSError:  # it has just ended
                continue
        return {pid: line for pid, line in found.items() if line.strip()}

    def kill(self, victim: str) -> int:
        """Send SIGKILL; returns how many got it."""
        running = self.processes()
        ranks = [
            pid
            for pid, line in running.items()
            if TRACED.name in line and "deepspeed" not in line.split(TRACED.name)[0]
        ]
        launchers = [pid for pid, line in running.items() if "deepspeed.launcher.launch" in line]
        chosen = {
            "one rank": random.sample(ranks, min(len(ranks), 1)),
            "all ranks": ranks,
            "launch.py": launchers,
            "deepspeed": [self.parent.pid],
        }[victim]
        for pid in chosen:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(chosen)

    def wait_until_gone(self, limit: float) -> float | None:
        """Seconds until no process is left; None if some are after the limit."""
        began = time.monotonic()
        while time.monotonic() - began < limit:
            self.parent.poll()
            if not self.processes():
                return time.monotonic() - began
            time.sleep(0.1)
        return None

    def end(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.parent.wait()
        self.output.close()


def last_trained(folder: Path) -> list:
    """What each step was last trained on, as the starts of a run lie in time."""
    steps: dict[int, list] = {}
    for start in sorted((folder / "trace").iterdir(), key=lambda path: path.stat().st_ctime):
        mine: dict[int, list] = {}
        for row in traced(start):
            mine.setdefault(row[0], []).append(row)
        steps |= mine
    return [row for step in sorted(steps) for row in steps[step]]


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        if a.keys() != b.keys() or any(not a[key].equal(b[key]) for key in a):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="at least so many [20]")
    parser.add_argument("--steps", type=int, default=60, help="of the run [60]")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments [0]")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        return chaos(Path(folder), **vars(arguments))


def chaos(root: Path, *, kills: int, steps: int, seed: int) -> int:
    """Returns 0 if every run finished as the undisturbed one did."""
    from ds_classifier.data.convert import convert
    from ds_classifier.data.sources import open_source

    convert(open_source("digits"), root / "data")
    data, final = root / "data" / "train", f"run/checkpoints/step-{steps:08d}"
    golden = root / "golden"
    golden.mkdir()
    began = time.monotonic()
    job = Job(golden, data, steps)
    assert job.wait_until_gone(LONG_S) is not None, "the undisturbed run does not finish"
    whole = time.monotonic() - began
    assert (golden / final).is_dir(), (golden / "output.txt").read_text()
    print(f"undisturbed: {steps} steps in {whole:.1f} s", flush=True)

    killed, ends, gone, orphans = Counter(), Counter(), [], 0
    while sum(killed.values()) < kills or not ends:
        folder = root / f"run{sum(ends.values())}"
        folder.mkdir()
        while not (folder / "run" / "DONE").exists():
            job = Job(folder, data, steps)
            # Until the kills are spent, a moment of the start, the steps or the end; then none.
            moment = random.uniform(0, whole) if sum(killed.values()) < kills else LONG_S
            left = job.wait_until_gone(moment)
            if left is None and moment < LONG_S:
                victim = random.choice(VICTIMS)
                count = job.kill(victim)
                seconds = job.wait_until_gone(GONE_S)
                orphans += seconds is None
                gone += [] if seconds is None else [seconds]
                saved = sorted(path.name for path in folder.glob("run/checkpoints/step-*"))
                if count:
                    killed[victim] += 1
                print(
                    f"kill {sum(killed.values()):3}  {victim:9}  after {moment:4.1f} s at "
                    f"{saved[-1] if saved else 'no checkpoint':13}  all gone after "
                    f"{'never' if seconds is None else f'{seconds:.1f} s'}",
                    flush=True,
                )
            elif left is None:
                job.end()
                print((folder / "output.txt").read_text()[-3000:])
                print("a run that nobody disturbs any more does not finish")
                return 1
            job.end()
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
        f"kills after which processes lived on for {GONE_S} s": orphans,
        "seconds from kill to all gone, median": statistics.median(gone) if gone else None,
        "seconds from kill to all gone, worst": max(gone, default=None),
    }
    print(json.dumps(result, indent=1))
    good = ends["finished"] == ends["bit-equal"] == ends["same samples"] and not orphans
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
