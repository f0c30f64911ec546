"""Shared fixtures: recorded numbers, pictures, shards of digits, the deepspeed launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
GOLDEN = Path(__file__).parent / "golden"


def shared(*parts: str) -> Path:
    """A file of the larger recorded set beside the checkout; skips where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the recorded set {'/'.join(parts)} is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    """Numbers recorded from guided-diffusion, beyond those in tests/golden."""
    return shared("reference")


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """A folder of real pictures, nNNNNNNNN_name.JPEG."""
    return shared("data", "imagenet-sample")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Shards of the digits: a directory with train/ and val/."""
    from ds_classifier.data.convert import convert
    from ds_classifier.data.sources import open_source

    out = tmp_path_factory.mktemp("digits")
    convert(open_source("digits"), out)
    return out


def pictures(folder: Path, names: list[str]) -> Path:
    """A folder of small different pictures, in the format of their suffix."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(i).randint(0, 256, (12, 10, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    names = [f"{c}/{c}_{i}.png" for c in ("cat", "dog", "emu") for i in range(5)]
    return pictures(tmp_path / "pictures", names)


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    output: str

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


def environment(**extra: str) -> dict[str, str]:
    """A clean environment: no rank variables of an outer launcher, no device talk."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"DS_ACCELERATOR": "cpu", **extra}


def run_python(*arguments: object, cwd: Path, timeout: float = 300) -> Finished:
    """Run a Python program to its end."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode, done.stdout)


def launcher_command(ranks: int, script: Path, *arguments: object) -> list[str]:
    """`deepspeed --num_gpus RANKS SCRIPT ...` on a free port."""
    from ds_classifier.distributed import _free_port

    launcher = Path(sys.executable).with_name("deepspeed")
    command = [sys.executable, launcher, "--quiet", "--master_port", _free_port()]
    command += ["--num_gpus", ranks, script, *arguments]
    return list(map(str, command))


def launch(
    ranks: int,
    *arguments: object,
    cwd: Path,
    script: Path = ROOT / "launch" / "train.py",
    timeout: float = 300,
) -> Finished:
    """Run a script to its end; on several ranks through the real deepspeed launcher."""
    command = launcher_command(ranks, script, *arguments)
    if ranks == 1:  # the launcher is only needed where there are several processes
        command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode % 256, done.stdout)


def read_log(run: Path) -> list[dict]:
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
