"""Do every step on the handwritten digits, in a few minutes.

The steps are shards, training, evaluation with a report, export, and guided samples.
`make quickstart` runs this. The results are in data/digits/ and runs/quickstart/.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier import distributed
from ds_classifier.common import files, text
from ds_classifier.config import RECIPES
from ds_classifier.config.parser import Parser
from ds_classifier.config.shipped import choose_config
from ds_classifier.distributed import failures
from ds_classifier.distributed.engine.deepspeed_versions import quiet_flag

ROOT = Path(__file__).resolve().parents[1]
DATA, RUN = Path("data/digits"), Path("runs/quickstart")
LOG = RUN / "quickstart.log"
LAST_LINES = 12  # of a program that failed
RANKS = 2
GUIDANCE_SCALE = 10  # the smallest of 1, 3, 10, 30 at which most samples show the class asked for

stopped = threading.Event()  # by Ctrl-C


def main() -> int:
    """Do all steps, and return the exit code of the first that fails, or 0; 130 after Ctrl-C."""
    Parser(prog="quickstart.py", description=__doc__).parse_args()
    signal.signal(signal.SIGINT, lambda *_: stopped.set())  # the programs receive it too
    code = do_all()
    if code and stopped.is_set():
        print(f"stopped: {saved()}; run the same command again", flush=True)
        return 128 + signal.SIGINT
    return code


def do_all() -> int:
    """Do the steps one after the other; return the exit code of the first that fails, or 0."""
    for place in (DATA, RUN):
        try:
            files.refuse_unwritable("results", place)
        except ValueError as error:
            problem = str(error).partition("; do: ")[0]
            print(f"error: {problem}; do: start in another folder", file=sys.stderr)
            return failures.WRONG_USE
    RUN.mkdir(parents=True, exist_ok=True)
    print(f"From images to guided samples, in some minutes. What the programs print: {LOG}")
    print("1. The 1,797 handwritten digits of scikit-learn become shards.", flush=True)
    if code := call([sys.executable, ROOT / "launch/make_shards.py", "convert", "digits", DATA]):
        return code
    print(f"   {DATA}/train and {DATA}/val: what is learnt from, and what is held out")
    trained_before = (RUN / "DONE").exists()
    chosen = choose_config()
    # The recipe's batch of 64 is divided by the number of ranks.
    ranks = max((n for n in range(1, chosen.gpus + 1) if 64 % n == 0), default=RANKS)
    print(f"2. Training on {ranks} ranks with {chosen.name}, since {chosen.why}", flush=True)
    began = time.monotonic()
    with distributed.keep_port() as port:
        if code := call(training_command(chosen.name, ranks, port), new_rows()):
            return code
    minutes = (time.monotonic() - began) / 60
    if trained_before:
        print(f"   it was trained before; to train again: rm -r {RUN}")
    else:
        print(f"   trained in {minutes:.1f} minutes, start-up included")
    print("3. Evaluation of the classifier at each noise level", flush=True)
    if code := call([sys.executable, ROOT / "launch/evaluate.py", RUN]):
        return code
    print("4. Export of the classifier, for other programs", flush=True)
    if code := call([sys.executable, ROOT / "launch/export.py", RUN]):
        return code
    print("5. Digits guided by the classifier, and unguided ones from the same noise", flush=True)
    if code := call(sampling_command()):
        return code
    report()
    return 0


def saved() -> str:
    """Return what a stopped quickstart keeps, in words."""
    if (RUN / "DONE").exists():
        return "the trained classifier is saved"
    try:
        newest = (RUN / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return "no step is saved yet"
    return f"step {int(newest.removeprefix('step-'))} is saved"


def training_command(config: str, ranks: int, port: int) -> list[object]:
    """Return the command that trains on a number of ranks, which meet at a port."""
    launcher = [Path(sys.executable).with_name("deepspeed"), *quiet_flag(), "--num_gpus", ranks]
    launcher += ["--master_port", port]
    script = [ROOT / "launch/train.py", "--deepspeed_config", config]
    flags = ["--recipe", "digits32", "--run_dir", RUN]
    flags += ["--data_dir", DATA / "train", "--val_data_dir", DATA / "val"]
    return [*launcher, *script, *flags]


def sampling_command() -> list[object]:
    """Return the command that samples eight digits per class, unguided and guided."""
    script = [sys.executable, ROOT / "launch/sample.py", "--classifier_path", RUN]
    flags = ["--data_dir", DATA / "train", "--classifier_scale", 0, GUIDANCE_SCALE]
    # DDPM: with this few steps, DDIM's samples follow the classifier less.
    flags += ["--num_samples", 80, "--batch_size", 40, "--timestep_respacing", 25]
    return [*script, *flags, "--out_dir", RUN / "samples"]


def call(command: list[object], news: Callable[[], list[str]] = list) -> int:
    """Run a command and return its exit code; that of a program stopped by Ctrl-C is not 0.

    All its output goes to LOG. The screen shows the news, a line that lives on a terminal, and the
    end of the output if it failed.
    news: returns new lines for the screen; called whenever there was output.
    """
    if stopped.is_set():
        return 128 + signal.SIGINT
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    began, rest, last = time.monotonic(), b"", deque([""], maxlen=LAST_LINES)
    with open(LOG, "ab", buffering=0) as log:
        while True:
            if select.select([process.stdout], [], [], 1.0)[0]:
                received = process.stdout.read(1 << 16)
                if not received:  # all processes that hold the pipe have ended
                    break
                log.write(received)
                *lines, rest = (rest + received).split(b"\n")
                words = [line.decode(errors="replace").rstrip() for line in lines]
                # A line like [time] [level] is a library's.
                last.extend(line for line in words if line and not line.startswith("["))
                distributed.live("")
                for line in news():
                    print(f"   {line}", flush=True)
            distributed.live(f"   {text.duration(time.monotonic() - began)}  {last[-1].strip()}")
    distributed.live("")
    code = process.wait()
    if code and not stopped.is_set():
        first = next((i for i, line in enumerate(last) if line.startswith("error")), 0)
        print("\n".join([*last][first:]), file=sys.stderr)
        print(f"failed with exit code {code}; all output: {LOG}", file=sys.stderr)
    return 128 + signal.SIGINT if stopped.is_set() else code


def new_rows() -> Callable[[], list[str]]:
    """Return a function that returns a line for each validation since its last call."""
    path, steps = RUN / "log.jsonl", RECIPES["digits32"]["iterations"]
    seen = {row["step"] for row in validations(path)}

    def news() -> list[str]:
        new = [row for row in validations(path) if row["step"] not in seen]
        seen.update(row["step"] for row in new)
        return [
            f"step {row['step']} of {steps}: {100 * row['val_acc@1_t0']:.0f} % of the held-out "
            f"digits are named right, {100 * row['val_acc@1']:.0f} % under noise of all levels"
            for row in new
        ]

    return news


def validations(path: Path) -> list[dict[str, float]]:
    """Return the rows of validations in a log; a line that is being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [row for row in map(json.loads, lines) if "val_acc@1" in row]


def report() -> None:
    """Print the accuracies of the last validation, and the paths of the results."""
    row = validations(RUN / "log.jsonl")[-1]
    quartiles = ", ".join(f"{100 * row[f'val_acc@1_q{q}']:.0f}" for q in range(4))
    print("Done.")
    print(
        f"  held-out accuracy   {100 * row['val_acc@1_t0']:.1f} % on (almost) clean digits, t = 0"
    )
    print(f"                      {100 * row['val_acc@1']:.1f} % over all noise levels")
    print(f"                      {quartiles} % in each quarter of them, from little noise to much")
    print(f"  report              {RUN}/report.html, for a browser")
    print(f"  guided digits       {RUN}/samples/overview.png")
    print(f"  exported            {RUN}/export/, with a model card")
    print(f"  curves              {RUN}/progress.csv, log.jsonl, and tb/ for TensorBoard")
    print("  next                . .venv/bin/activate, then the commands of the README")


if __name__ == "__main__":
    sys.exit(main())
