"""Do every step on the handwritten digits, in a few minutes.

The steps are shards, training, evaluation with a report, export, and guided samples.
`make quickstart` runs this. The results are in data/digits/ and runs/quickstart/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(ROOT)

DATA, RUN = Path("data/digits"), Path("runs/quickstart")
RANKS = 2
GUIDANCE_SCALE = 10  # the smallest of 1, 3, 10, 30 at which most samples show the class asked for


def main() -> int:
    """Run all steps, and return the exit code of the first that fails, or 0."""
    argparse.ArgumentParser(prog="quickstart.py", description=__doc__).parse_args()
    RUN.mkdir(parents=True, exist_ok=True)
    print("1. shards of the 1,797 handwritten digits in scikit-learn", flush=True)
    if code := call([sys.executable, ROOT / "launch/make_shards.py", "convert", "digits", DATA]):
        return code
    trained_before = (RUN / "DONE").exists()
    config, why, ranks = choose_config()
    print(f"2. training on {ranks} ranks with ds_configs/{config} ({why})", flush=True)
    began = time.monotonic()
    if code := call(training_command(config, ranks)):
        return code
    minutes = (time.monotonic() - began) / 60
    print("3. evaluation at each noise level", flush=True)
    if code := call([sys.executable, ROOT / "launch/evaluate.py", RUN]):
        return code
    print("4. export of the classifier", flush=True)
    if code := call([sys.executable, ROOT / "launch/export.py", RUN]):
        return code
    print("5. digits guided by it, and unguided ones from the same noise", flush=True)
    if code := call(sampling_command()):
        return code
    if trained_before:
        print(f"it was trained before; to train again: rm -r {RUN}")
    else:
        print(f"trained in {minutes:.1f} minutes, start-up included")
    report()
    return 0


def choose_config() -> tuple[str, str, int]:
    """Return the fastest shipped JSON that this machine can run, the reason, and how many ranks."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        ranks = max(n for n in range(1, gpus + 1) if 64 % n == 0)  # the recipe's batch is 64
        return "zero2_fp16.json", f"{torch.cuda.get_device_name(0)}", ranks
    os.environ["DS_ACCELERATOR"] = "cpu"
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "zero2_fp16.json", "this CPU has fp16", RANKS
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "zero2_bf16.json", "this CPU has bf16, but no fp16 for zero2_fp16.json", RANKS
    return "zero1_fp32.json", "this CPU has neither fp16 nor bf16", RANKS


def training_command(config: str, ranks: int) -> list[object]:
    """Return the command that trains on a number of ranks."""
    launcher = [Path(sys.executable).with_name("deepspeed"), "--quiet", "--num_gpus", ranks]
    script = [ROOT / "launch/train.py", "--deepspeed_config", ROOT / "ds_configs" / config]
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


def call(command: list[object]) -> int:
    """Run a command and return its exit code.

    All its output goes to RUN/quickstart.log, and to the screen without the libraries' log lines.
    """
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with open(RUN / "quickstart.log", "a", encoding="utf-8") as log:
        for line in process.stdout:
            log.write(line)
            log.flush()
            if not line.startswith("["):  # a library's log record: [time] [level] ...
                print(f"   {line}", end="", flush=True)
    code = process.wait()
    if code:
        print(
            f"failed with exit code {code}; all output: {RUN / 'quickstart.log'}", file=sys.stderr
        )
    return code


def report() -> None:
    """Print the accuracies of the last validation, and the paths of the results."""
    rows = [
        json.loads(line) for line in (RUN / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    row = next(row for row in reversed(rows) if "val_acc@1" in row)
    quartiles = ", ".join(f"{100 * row[f'val_acc@1_q{q}']:.0f}" for q in range(4))
    print(
        f"  held-out accuracy   {100 * row['val_acc@1_t0']:.1f} % on (almost) clean digits, t = 0"
    )
    print(f"                      {100 * row['val_acc@1']:.1f} % over all noise levels")
    print(f"                      {quartiles} % by quartile of t, from little noise to much")
    print(f"  exported            {RUN}/export/, with a model card")
    print(f"  guided digits       {RUN}/samples/overview.png")
    print(f"  report              {RUN}/report.html, for a browser")
    print(f"  curves              {RUN}/progress.csv, log.jsonl, and tb/ for TensorBoard")
    print("  next                . .venv/bin/activate, then the commands of the README")


if __name__ == "__main__":
    sys.exit(main())
