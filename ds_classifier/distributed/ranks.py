"""Who this process is, and what the ranks agree on: collectives, JSON, errors.

Ranks are started by the deepspeed launcher or torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*), or
by nobody: then this process is rank 0 of 1. No MPI.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from ds_classifier.common import files


class AgreedError(ValueError):
    """What all ranks raise alike: each may leave by itself, and one of them tells."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Ranks on this node: LOCAL_SIZE from deepspeed, LOCAL_WORLD_SIZE from torchrun."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def all_reduce_sum(tensor):
    """The elementwise sum over all ranks, in place; returns the tensor."""
    import torch.distributed

    torch.distributed.all_reduce(tensor)
    return tensor


def all_gather(tensor):
    """Every rank's tensor of this shape, stacked: [W, ...]."""
    import torch
    import torch.distributed

    flat = tensor.reshape(-1)
    gathered = torch.empty(world_size() * len(flat), dtype=tensor.dtype, device=tensor.device)
    torch.distributed.all_gather_into_tensor(gathered, flat)
    return gathered.view(world_size(), *tensor.shape)


def broadcast(tensor):
    """Rank 0's tensor on every rank, in place; returns it."""
    import torch.distributed

    torch.distributed.broadcast(tensor, src=0)
    return tensor


def broadcast_json(value: Any, device) -> Any:
    """Rank 0's value on every rank; JSON travels, so nothing received can run code."""
    import torch

    text = json.dumps(value).encode() if rank() == 0 else b""
    length = broadcast(torch.tensor([len(text)], device=device))
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return json.loads(bytes(broadcast(buffer).cpu().tolist()))


def gather_json(value: Any, device) -> list[Any]:
    """Every rank's JSON-able value, on every rank, in rank order."""
    import torch

    text = json.dumps(value).encode()
    lengths = all_gather(torch.tensor([len(text)], device=device)).flatten().tolist()
    row = torch.zeros(max(lengths), dtype=torch.uint8)
    row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = all_gather(row.to(device)).cpu().numpy()
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def on_rank_0(task: Callable[[], Any], device) -> Any:
    """Run a task on rank 0; every rank gets its JSON-able result, or raises AgreedError for its
    ValueError or OSError.

    So that one rank's trouble with a file ends all ranks with the same message, at once.
    """
    outcome: dict[str, Any] = {}
    if rank() == 0:
        try:
            outcome["result"] = task()
        except (ValueError, OSError) as error:
            outcome["error"] = files.problem(error)
        except Exception as error:
            # A bug: the others must not wait for a result that will not come.
            broadcast_json({"error": f"rank 0: {type(error).__name__}: {error}"}, device)
            raise
    outcome = broadcast_json(outcome, device)
    if "error" in outcome:
        raise AgreedError(outcome["error"])
    return outcome.get("result")


def together(task: Callable[[], Any], device) -> Any:
    """A task that every rank does; if one fails, all raise its ValueError or OSError's message."""
    result = problem = None
    try:
        result = task()
    except (ValueError, OSError) as error:
        problem = files.problem(error)
    raise_together(problem, device)
    return result


def raise_together(problem: str | None, device) -> None:
    """Every rank names its problem or None; if any has one, all raise AgreedError."""
    problems: dict[str, list[int]] = {}
    for number, message in enumerate(gather_json(problem, device)):
        if message:
            problems.setdefault(message, []).append(number)
    if problems:
        everywhere = [*problems.values()] == [list(range(world_size()))]
        raise AgreedError(
            "\n".join(
                message if everywhere else f"rank {', '.join(map(str, ranks))}: {message}"
                for message, ranks in problems.items()
            )
        )
