"""The state of a classifier that training does not change: buffers, and frozen parameters.

A frozen parameter has requires_grad False. Neither is in the optimizer. The engine casts both to
the precision that the model computes in, so a copy in their own dtypes is taken before it is
created, and goes into model.safetensors of each checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.distributed.engine.deepspeed_state import trained


def fixed_tensors(classifier: nn.Module) -> dict[str, Tensor]:
    """Return the fixed tensors of a state dict, by name; they share the classifier's memory."""
    changing = trained(classifier)
    return {n: value for n, value in classifier.state_dict().items() if n not in changing}


def refuse_unstorable(classifier: nn.Module, name: str) -> None:
    """Raise ValueError if a checkpoint cannot store all of a network's state dict.

    name: its --classifier.
    """
    for key, value in classifier.state_dict().items():
        kind = value.dtype if torch.is_tensor(value) else type(value).__name__
        if kind not in disk.SAFETENSORS_DTYPE:
            raise ValueError(
                f"--classifier: got {name}, whose state dict has {key}, a {kind}, which "
                "checkpoints do not store; need tensors of real numbers; do: make it a buffer with "
                "persistent=False that the network computes itself"
            )


def trained_count(classifier: nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(p.numel() for p in trained(classifier).values())


def settle_fixed_state(
    classifier: nn.Module, checkpoint: Path | None, device: torch.device
) -> dict[str, Tensor]:
    """Give all ranks the same fixed state, and return a copy of it on rank 0; {} elsewhere.

    Every rank must call it, before the engine is created.
    classifier: on the CPU. Its fixed tensors are set to rank 0's.
    checkpoint: where rank 0 reads them; None, as on other ranks: it has them already.
    The copy is on the CPU, by the names of the classifier's state dict, in its dtypes.
    Raises ValueError on all ranks if the checkpoint lacks tensors, or has other shapes.
    """
    fixed = fixed_tensors(classifier)
    distributed.on_rank_0(lambda: _read(fixed, checkpoint) if checkpoint else None, device)
    for value in fixed.values():
        distributed.broadcast_bytes(value, device)
    if distributed.rank() != 0:
        return {}
    return {name: value.clone() for name, value in fixed.items()}


def _read(fixed: dict[str, Tensor], checkpoint: Path) -> None:
    """Set tensors to those of the same names in a checkpoint."""
    with safe_open(checkpoint / disk.MODEL, framework="pt") as opened:
        names = list(opened.keys())
        shapes = {name: opened.get_slice(name).get_shape() for name in names}
        needed = {name: value.shape for name, value in fixed.items()}
        disk.check_shapes(checkpoint / disk.MODEL, needed, shapes)
        for name, value in fixed.items():
            value.copy_(opened.get_tensor(name))
