"""The whole way on the handwritten digits, in a few minutes: shards, training, evaluation with a
report, export, guided samples.

`make quickstart` runs it. Everything lands in data/digits/ and runs/quickstart/.
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
GUIDANCE_SCALE = 10  # of 1, 3, 10, 30 the least that most samples follow


def main() -> int:
    argparse.ArgumentParser(prog="quickstart.py", description=__doc__).parse_args()
    RUN.mkdir(parents=True, exist_ok=True)
    print("1. shards of the 1,797 handwritten digits that scikit-learn carries", flush=True)
    if code := call([sys.executable, ROOT / "launch/make_shards.py", "convert", "digits", DATA]):
        return code
    trained_before = (RUN / "DONE").exists()
    config, why, ranks = choose_config()
    print(f"2. training on {ranks} ranks with ds_configs/{config} ({why})", flush=True)
    began = time.monotonic()
    if code := call(training_command(config, ranks)):
        return code
    minutes = (time.monotonic() - began) / 60
    print("3. what it knows at each noise level", flush=True)
    if code := call([sys.executable, ROOT / "launch/evaluate.py", RUN]):
        return code
    print("4. the classifier to take away", flush=True)
    if code := call([sys.executable, ROOT / "launch/export.py", RUN]):
        return code
    print("5. digits guided by it, beside unguided ones", flush=True)
    if code := call(sampling_command()):
        return code
    if trained_before:
        print(f"trained before; to train again: rm -r {RUN}")
    else:
        print(f"trained in {minutes:.1f} minutes, start-up included")
    report()
    return 0


def choose_config() -> tuple[str, str, int]:
    """The fastest shipped JSON that this machine can run, why, and on how many ranks."""
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
    launcher = [Path(sys.executable).with_name("deepspeed"), "--quiet", "--num_gpus", ranks]
    script = [ROOT / "launch/train.py", "--deepspeed_config", ROOT / "ds_configs" / config]
    flags = ["--recipe", "digits32", "--run_dir", RUN]
    flags += ["--data_dir", DATA / "train", "--val_data_dir", DATA / "val"]
    return [*launcher, *script, *flags]


def sampling_command() -> list[object]:
    """Ten rows, one a class: eight digits unguided, and eight from the same noise guided."""
    script = [sys.executable, ROOT / "launch/sample.py", "--classifier_path", RUN]
    flags = ["--data_dir", DATA / "train", "--classifier_scale", 0, GUIDANCE_SCALE]
    # DDPM: in as few steps, DDIM's samples follow the classifier less.
    flags += ["--num_samples", 80, "--batch_size", 40, "--timestep_respacing", 25]
    return [*script, *flags, "--out_dir", RUN / "samples"]


def call(command: list[object]) -> int:
    """Run a command; show its lines and keep them all, less what libraries say of themselves."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with open(RUN / "quickstart.log", "a") as log:
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
    """Accuracies of the last validation, and where things lie."""
    rows = [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]
    row = next(row for row in reversed(rows) if "val_acc@1" in row)
    quartiles = ", ".join(f"{100 * row[f'val_acc@1_q{q}']:.0f}" for q in range(4))
    print(
        f"  held-out accuracy   {100 * row['val_acc@1_t0']:.1f} % on (almost) clean digits, t = 0"
    )
    print(f"                      {100 * row['val_acc@1']:.1f} % over all noise levels")
    print(f"                      {quartiles} % by quartile of t, from little noise to nearly all")
    print(f"  to take away        {RUN}/export/, with a model card")
    print(f"  guided digits       {RUN}/samples/overview.png")
    print(f"  report              {RUN}/report.html, for a browser")
    print(f"  curves              {RUN}/progress.csv, log.jsonl, and tb/ for TensorBoard")
    print("  next                . .venv/bin/activate, then the commands of the README")


if __name__ == "__main__":
    sys.exit(main())
