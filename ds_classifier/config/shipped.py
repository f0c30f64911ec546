"""The DeepSpeed JSON files that come with the package: by name, and the one for this machine."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

SHIPPED_CONFIGS = ("zero2_fp16", "zero2_bf16", "zero1_fp16", "zero1_bf16", "zero1_fp32")
FOLDER = "ds_configs"
BF16_CAPABILITY = (8, 0)  # Ampere, the first NVIDIA GPUs that compute in bf16


@dataclass(frozen=True)
class ChosenConfig:
    """The shipped JSON that suits this machine.

    why: the reason in words, after "since". gpus: the number of GPUs of this machine.
    """

    name: str
    why: str
    gpus: int


def find_config(path: Path) -> Path:
    """Return the file that a value of --deepspeed_config means.

    An existing file is itself. Else NAME, NAME.json and ds_configs/NAME.json are the shipped file
    of that name, in any directory. Raises ValueError, with the names, for anything else.
    """
    if path.is_file():
        return path
    name = path.name.removesuffix(".json")
    if name in SHIPPED_CONFIGS and path.parent in (Path(), Path(FOLDER)):
        package = Path(__file__).resolve().parents[1]
        folders = (package / FOLDER, package.parent / FOLDER)  # installed; a checkout
        return next(folder for folder in folders if folder.is_dir()) / f"{name}.json"
    near = difflib.get_close_matches(name, SHIPPED_CONFIGS, n=1)
    reason = "no file" if path.exists() else "which does not exist"
    raise ValueError(
        f"--deepspeed_config: got {path}, {reason}; need a DeepSpeed JSON, or the name of one that "
        f"comes with the package: {', '.join(SHIPPED_CONFIGS)}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def choose_config() -> ChosenConfig:
    """Return the fastest shipped JSON that this machine can run; it imports torch.

    Without a GPU it also sets DS_ACCELERATOR=cpu, for DeepSpeed in this and in started programs.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        name = torch.cuda.get_device_name(0)
        if "bf16" in fast_precisions():
            return ChosenConfig("zero1_bf16", f"{name} computes in bf16", gpus)
        return ChosenConfig("zero1_fp16", f"{name} has fp16, but not bf16", gpus)
    os.environ["DS_ACCELERATOR"] = "cpu"
    fast = fast_precisions()
    if "fp16" in fast:
        return ChosenConfig("zero2_fp16", "this CPU has fp16", 0)
    if "bf16" in fast:
        return ChosenConfig("zero2_bf16", "this CPU has bf16, but not fp16", 0)
    return ChosenConfig("zero1_fp32", "this CPU has neither fp16 nor bf16", 0)


def fast_precisions() -> list[str]:
    """Return bf16 and fp16, as far as this machine computes in them; it imports torch."""
    import torch

    if torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        ampere = min(map(torch.cuda.get_device_capability, gpus)) >= BF16_CAPABILITY
        return ["bf16", "fp16"] if ampere else ["fp16"]
    cpu = torch.ops.mkldnn
    has = {"bf16": cpu._is_mkldnn_bf16_supported(), "fp16": cpu._is_mkldnn_fp16_supported()}
    return [name for name in has if has[name]]
