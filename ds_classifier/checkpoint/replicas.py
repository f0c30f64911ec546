"""Check that all ranks hold the same, finite weights before they are saved.

ZeRO 1 and 2 shard the optimizer, but every rank holds all parameters; ZeRO 3 leaves it the small
ones. Broken memory, a broken link or a bug can let them drift apart silently, and a checkpoint
of rank 0's weights would hide it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.distributed.engine.deepspeed_state import optimizer_share

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as integers modulo 2^64, [] int64.

    The order of the additions does not matter. They are 8 bytes wide, ten times as fast on a CPU as
    with smaller integers.
    """
    flat = value.detach().reshape(-1)
    in_words = len(flat) - len(flat) % (8 // value.element_size())
    words = flat[:in_words].clone().view(torch.int64)  # a clone is aligned to 8 bytes
    rest = flat[in_words:].view(_BITS[value.element_size()])
    return words.sum() + rest.sum(dtype=torch.int64)


def not_finite(value: Tensor) -> Tensor:
    """Return 1 if any number is infinite or nan, else 0, [] int64."""
    lowest, highest = value.detach().aminmax()  # either is nan if any number is
    return (~(lowest.isfinite() & highest.isfinite())).long()


def check_replicas(engine, tensors: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
    """Compare tensors that must be equal on all ranks, by their bit sums; every rank must call it.

    tensors: by name, the same names on all ranks. They must be finite, and so must this rank's
        share of the master weights and of the optimizer's state.
    fixed: more of them, which may be infinite, such as a mask.
    Reads each number once, sends two per tensor, and waits for the device.
    Raises FloatingPointError on all ranks if tensors differ or are not finite.
    """
    infinite = [not_finite(value) for value in tensors.values()]
    share = sum(not_finite(value).to(engine.device) for value in optimizer_share(engine))
    sums = [bit_sum(value) for value in (*tensors.values(), *fixed.values())]
    everyone = distributed.all_gather(torch.stack([*sums, *infinite, share])).cpu()  # [W, ...]
    rows, infinite_rows = everyone[:, : len(sums)], everyone[:, len(sums) :]
    again = (
        "nothing is saved at this step; do: run the same command again, it continues from the last "
        "good checkpoint"
    )
    step, names = engine.global_steps, [*tensors, *fixed]
    bad = infinite_rows.sum(dim=0).tolist()
    if any(bad):
        named = [name for name, count in zip(names, bad, strict=False) if count]
        first = (
            f"{named[0]} and {len(named) - 1} more"
            if named
            else "a master weight or the optimizer's state"
        )
        raise FloatingPointError(f"step {step}: weights are not finite ({first}); {again}")
    problem = describe_difference(rows, names)
    if problem is not None:
        raise FloatingPointError(
            f"step {step}: {problem}; {again}; if it happens again, test the memory and links of "
            "that rank's machine"
        )


def describe_difference(rows: Tensor, names: list[str]) -> str | None:
    """Return which ranks differ from the majority, and in which tensors; None if none does.

    rows: [W, n], a row per rank and a column per name.
    """
    same = Counter(map(tuple, rows.tolist()))
    if len(same) == 1:
        return None
    (usual, count), *_ = same.most_common()
    differing = [r for r, row in enumerate(rows.tolist()) if tuple(row) != usual]
    columns = (rows != torch.tensor(usual)).any(dim=0).nonzero().flatten().tolist()
    where = f"first in {names[columns[0]]}, {len(columns)} of {len(names)} tensors"
    if 2 * count <= len(rows):
        return f"the ranks hold different parameters, and no majority agrees ({where})"
    ranks = ", ".join(map(str, differing))
    return f"the parameters of rank {ranks} differ from those of the other ranks ({where})"
