"""The floating-point operations of a classifier, and the peak of the device that computes them.

A multiply and an add are two operations, as in the data sheets of GPUs. Convolutions, matrix
products and attention are counted; norms and activations are not, as is usual (PaLM, appendix B).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ds_classifier.model import create_classifier, create_without_storage

BACKWARD = 2  # a backward costs two forwards: gradients of the inputs and of the weights

# Dense 16-bit tensor TFLOP/s with fp32 accumulation, by the name that CUDA gives the device, from
# NVIDIA's data sheets (half of a figure that is stated with sparsity). A device that is not listed
# is not known, or its figure depends on how it was partitioned or clocked.
PEAK_TFLOPS = {
    r"(Tesla )?V100-SXM[23]-\d+GB(-LS)?": {"fp16": 125.0},  # V100 data sheet, 2020
    r"(Tesla )?V100-PCIE-\d+GB": {"fp16": 112.0},  # the same
    r"(Tesla )?V100S-PCIE-\d+GB": {"fp16": 130.0},  # the same
    r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": 312.0,  # A100 data sheet, 2021
    r"(NVIDIA )?A30": 165.0,  # A30 data sheet
    r"(NVIDIA )?A40": 149.7,  # A40 data sheet
    r"NVIDIA H100 80GB HBM3": 989.4,  # H100 data sheet: SXM, 1,979 with sparsity
    r"NVIDIA H100 PCIe": 756.0,  # H100 data sheet of 2022: 1,513 with sparsity
    r"NVIDIA H100 NVL": 835.5,  # H100 data sheet: 1,671 with sparsity
    r"NVIDIA H200": 989.4,  # H200 data sheet: SXM, 1,979 with sparsity
    r"NVIDIA H200 NVL": 835.5,  # the same: 1,671 with sparsity
    r"NVIDIA L4": 121.0,  # L4 data sheet: 242 with sparsity
    r"NVIDIA L40": 181.05,  # L40 data sheet
    r"NVIDIA L40S": 362.05,  # L40S data sheet
    r"NVIDIA GeForce RTX 3090": 71.0,  # GA102 white paper, appendix A
    r"NVIDIA GeForce RTX 4090": 165.2,  # Ada white paper, appendix A
}


def forward_flops(model_kwargs: dict[str, Any]) -> int:
    """Return the operations of one image's forward through the classifier of these keywords.

    Only shapes go through it, and nothing is computed, unless a network needs numbers.
    """
    return _count(model_kwargs, None)


def training_flops_with(frozen: Collection[str], model_kwargs: dict[str, Any]) -> int:
    """Return the operations of one image's forward and backward with frozen parameters.

    frozen: their names. Only what leads to a trained parameter has a backward.
    """
    return _count(model_kwargs, frozen)


def _count(model_kwargs: dict[str, Any], frozen: Collection[str] | None) -> int:
    """Return the operations of a forward, and, unless `frozen` is None, of a backward."""
    try:
        return _counted(create_without_storage(**model_kwargs), model_kwargs, frozen)
    except Exception:
        if not model_kwargs.get("classifier"):
            raise
    return _counted(create_classifier(**model_kwargs), model_kwargs, frozen)


def _counted(
    classifier: nn.Module, model_kwargs: dict[str, Any], frozen: Collection[str] | None
) -> int:
    """Do the same as `_count` on the device of the classifier."""
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_(frozen is not None and name not in frozen)
    size, device = model_kwargs["image_size"], next(classifier.parameters()).device
    x = torch.zeros(1, model_kwargs["in_channels"], size, size, device=device)
    timesteps = torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        logits = classifier(x, timesteps)
        if frozen is not None:
            logits.sum().backward()
    return counter.get_total_flops()


def training_flops(forward: int) -> int:
    """Return the operations of one image's forward and backward."""
    return (1 + BACKWARD) * forward


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the most operations per second of a device, or None if that is not known.

    device_name: by torch.cuda.get_device_name. precision: fp16 or bf16; fp32 may or may not run on
    tensor cores, so its peak is not known.
    """
    if precision not in ("fp16", "bf16"):
        return None
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.fullmatch(pattern, device_name):
            known = tflops.get(precision) if isinstance(tflops, dict) else tflops
            return None if known is None else 1e12 * known
    return None


class Arithmetic:
    """The FLOP/s that a rank achieves, and their share of the device's peak (MFU).

    forward, training: the operations of one image's forward, and of its forward and backward.
    device_name: None for a CPU.
    """

    def __init__(self, forward: int, training: int, *, device_name: str | None, precision: str):
        self.forward, self.training = forward, training
        self._peak = None if device_name is None else peak_flops(device_name, precision)

    def achieved(self, images_per_sec: float) -> dict[str, float]:
        """Return gflops_per_sec, and mfu (0 to 1) if the peak is known, for a rank's images/s.

        mfu: model FLOPs utilization (PaLM, appendix B).
        """
        flops = images_per_sec * self.training
        row = {"gflops_per_sec": flops / 1e9}
        return row if self._peak is None else row | {"mfu": flops / self._peak}
