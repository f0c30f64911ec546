"""Train a tiny classifier on the digits, and compare runs of it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import torch
from running import ROOT, launch, read_log
from safetensors.torch import load_file

CONFIGS = ROOT / "ds_configs"
TRAIN = ROOT / "launch" / "train.py"
TRACED = ROOT / "tests" / "helpers" / "traced_train.py"
TINY = shlex.split(
    "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1 "
    "--classifier_attention_resolutions 4 --noise_schedule cosine --random_flip False --lr 1e-3 "
    "--log_interval 1 --workers 1 --val_data_dir none"
)
# Fields of a log row that depend on the machine's speed.
CLOCKS = ("images_per_sec", "data_wait_frac", "gflops_per_sec", "memory_gib", "val_seconds")


def train(
    ranks, config, digits, run, *flags, script=TRACED, environment=(), expect=0, launcher=False
):
    """Train the tiny classifier on the digits and return the finished command.

    config: a file of ds_configs/, without suffix. environment: pairs of name and value.
    expect: the exit code; a tuple where ranks end in no fixed order and several codes are right.
    """
    os.environ.update(environment)
    try:
        done = launch(
            ranks,
            "--deepspeed_config",
            CONFIGS / f"{config}.json",
            "--data_dir",
            digits / "train",
            "--run_dir",
            run,
            *TINY,
            *flags,
            script=script,
            launcher=launcher,
            cwd=run.parent,
        )
    finally:
        for name in dict(environment):
            del os.environ[name]
    assert done.code in (expect if isinstance(expect, tuple) else (expect,)), done.output
    return done


def losses(run: Path) -> list[float]:
    """Return the training losses that a run has logged."""
    return [row["train_loss"] for row in read_log(run) if "train_loss" in row]


def traced(folder: Path) -> list:
    """Return the rows that traced_train.py wrote, one per sample, in order of their position."""
    rows = [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row[1])


def without_clocks(rows: list[dict]) -> list[dict]:
    """Return the rows of a log without the fields that measure speed and memory."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def assert_same_state(one: Path, other: Path) -> None:
    """Check that two checkpoints have the same weights, Adam moments, schedule and loss scaler."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    a, b = (json.loads((c / "state.json").read_text()) for c in (one, other))
    for key in ("step", "skipped_steps", "optimizer", "loss_scaler", "samples", "classes", "data"):
        assert a[key] == b[key], key


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Check that two runs have the same checkpoint of a step, and the same log but its clocks."""
    assert_same_state(*(run / "checkpoints" / f"step-{step:08d}" for run in (one, other)))
    assert without_clocks(read_log(one)) == without_clocks(read_log(other))
