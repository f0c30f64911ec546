"""Count the bytes that a rank sends per step, by the kernel's counters between two hosts.

    python tests/helpers/traffic.py

Trains the tiny classifier on two hosts of cluster.py for ZeRO 1 and 2, with accumulation 1 and 4,
and prints bytes per step and parameter, next to the number that docs/scaling.md computes. Needs
root.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster import missing
from hosts import Hosts, Start
from tiny_run import CONFIGS, TINY, TRAIN

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.distributed.engine.deepspeed_versions import quiet_flag

STEPS = (6, 26)  # the traffic is steady between these
MICRO = 4


def main() -> int:
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print(f"{'JSON':12} {'accumulation':>12} {'bytes per step and parameter':>28} {'computed':>9}")
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits"
        convert(open_source("digits"), digits)
        for config in ("zero1_fp32", "zero1_bf16", "zero2_bf16"):
            for accumulation in (1, 4):
                place = Path(folder) / f"{config}{accumulation}"
                place.mkdir()
                measured = bytes_a_parameter(place, digits, config, accumulation)
                width = 4 if config.endswith("fp32") else 2
                reductions = accumulation if config.startswith("zero2") else 1
                computed = width * (reductions + 0.5)  # W = 2: sums, and one gather
                print(f"{config:12} {accumulation:12} {measured:28.2f} {computed:9.1f}", flush=True)
    return 0


def bytes_a_parameter(folder: Path, digits: Path, config: str, accumulation: int) -> float:
    """Return the bytes that rank 1 sends per step, divided by the number of parameters."""
    with Hosts(folder, digits, 2) as hosts:
        one, two = hosts.nodes
        here = hosts.inside(one)
        hosts.hostfile(here / "hosts")
        flags = ["--deepspeed_config", CONFIGS / f"{config}.json", "--data_dir", "data/train"]
        flags += ["--run_dir", "run", *TINY, "--microbatch", MICRO, "--iterations", STEPS[1] + 2]
        flags += ["--global_batch", 2 * MICRO * accumulation]
        deepspeed = Path(sys.executable).with_name("deepspeed")
        command = [deepspeed, *quiet_flag(), "--hostfile", "hosts", TRAIN, *flags]
        start, sent = Start(hosts, here / "run", {one: command}), []
        for step in STEPS:
            start.wait_for_step(step)
            counters = json.loads(two.run("ip", "-json", "-statistics", "link", "show", "eth0"))
            sent.append(counters[0]["stats64"]["tx"]["bytes"])
        start.gone()
        state = next((here / "run" / "checkpoints").glob("step-*/state.json"))
        parameters = sum_of_parameters(state.with_name("model.safetensors"))
        return (sent[1] - sent[0]) / (STEPS[1] - STEPS[0]) / parameters


def sum_of_parameters(path: Path) -> int:
    """Return the number of parameters in a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    sys.exit(main())
