"""The global batch: how many images a step trains on, and how they are divided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ds_classifier.common.text import count
from ds_classifier.config.settings import Settings

AUTO = "auto"  # in the JSON: the number is a setting, or is derived
MOST = 2**31  # images in a step; divisors of larger numbers would take long to find
AUTO_MICRO_BATCH = 32  # the size that "auto" aims at; a number in the JSON may be larger


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of a global batch: micro x accumulation x world_size images per step."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def total(self) -> int:
        """The global batch: images per step over all ranks."""
        return self.micro * self.accumulation * self.world_size

    def ds_numbers(self) -> dict[str, int]:
        """Return the sizes under their names in DeepSpeed's JSON."""
        return dict(
            train_batch_size=self.total,
            train_micro_batch_size_per_gpu=self.micro,
            gradient_accumulation_steps=self.accumulation,
        )

    def __str__(self) -> str:
        return (
            f"global batch {self.total} = {self.micro} micro-batch x {self.accumulation} "
            f"accumulation x {count(self.world_size, 'rank')}"
        )


class BatchError(ValueError):
    """The batch sizes do not fit each other, the settings or the number of ranks.

    advised: {key: what the message says to write; "auto" also stands for removing it}. ranks: the
    number of ranks that it advises, or None.
    """

    def __init__(self, message: str, ranks: int | None = None, **advised: int | str):
        super().__init__(message)
        self.ranks, self.advised = ranks, advised


def settle_batch(ds: dict[str, Any], settings: Settings, world_size: int) -> BatchSizes:
    """Resolve global batch = micro-batch x accumulation x ranks.

    ds: the JSON, with numbers or "auto". Raises BatchError if it and the settings disagree.
    """
    total, micro, accumulation = (_number(ds, key) for key in BatchSizes(1, 1, 1).ds_numbers())
    asked = _global_batch(settings, world_size, total, micro, accumulation)
    if settings.microbatch > 0 and micro not in (None, settings.microbatch):
        raise BatchError(
            f"train_micro_batch_size_per_gpu: got {micro}, but --microbatch is "
            f'{settings.microbatch}; need one number; do: write "auto" in the JSON',
            train_micro_batch_size_per_gpu=AUTO,
        )
    if asked > MOST:
        if settings.global_batch or settings.batch_size:
            raise BatchError(f"global batch: got {asked}; need at most {MOST:,}")
        sizes = dict(
            train_batch_size=total,
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=accumulation,
        )
        largest = max(sizes, key=lambda key: sizes[key] or 0)
        raise BatchError(
            f"{largest}: got {sizes[largest]}; need a global batch of at most {MOST:,}; do: "
            "correct or remove it",
            **{largest: AUTO},
        )
    if asked % world_size:
        fits = _divisors(asked)
        near = [n for n in fits if n <= world_size][-1:] + [n for n in fits if n > world_size][:1]
        raise BatchError(
            f"global batch: got {asked} on {world_size} ranks; need a multiple of the number of "
            f"ranks; do: run on {' or '.join(map(str, near))} ranks, or choose another "
            "--global_batch",
            ranks=near[0],
        )
    per_rank = asked // world_size
    if settings.microbatch > 0:
        micro = min(settings.microbatch, per_rank)  # as in the reference, if it is larger
    elif micro is None and accumulation is not None and per_rank % accumulation == 0:
        micro = per_rank // accumulation
    elif micro is None:
        micro = _auto_micro_batch(per_rank)
    if per_rank % micro or accumulation not in (None, per_rank // micro):
        got = f"{micro} micro-batch"
        got += f" x {accumulation} accumulation" if accumulation is not None else ""
        near = sorted(sorted(_divisors(per_rank), key=lambda n: abs(n - micro))[:3])
        raise BatchError(
            f"train_micro_batch_size_per_gpu: got {got} x {world_size} ranks for a global batch of "
            f"{asked}; need micro-batch x accumulation = {per_rank}; do: use a micro-batch of "
            f'{" or ".join(map(str, near))} and accumulation "auto"',
            train_micro_batch_size_per_gpu=near[0],
            gradient_accumulation_steps=AUTO,
        )
    return BatchSizes(micro, per_rank // micro, world_size)


def _number(ds: dict[str, Any], key: str) -> int | None:
    """Return a number of the JSON; None for "auto" or if it is absent."""
    value = ds.get(key, AUTO)
    return None if value == AUTO else value


def _global_batch(
    settings: Settings,
    world_size: int,
    total: int | None,
    micro: int | None,
    accumulation: int | None,
) -> int:
    """Return the global batch that flags, recipe and JSON ask for; the last three are the JSON's.

    Raises BatchError if they disagree.
    """
    from_ranks = settings.batch_size * world_size
    asked = settings.global_batch or from_ranks
    if from_ranks not in (0, asked):
        raise BatchError(
            f"--global_batch {settings.global_batch}, --batch_size {settings.batch_size}: they "
            f"disagree on {world_size} ranks; do: give one of them"
        )
    if not asked:  # by the JSON's numbers, or the reference's 4 per rank
        return total or (micro or 4) * (accumulation or 1) * world_size
    if total not in (None, asked):
        instead = f"give --global_batch {total}" if settings.global_batch else "drop --batch_size"
        raise BatchError(
            f"train_batch_size: got {total}, but the settings' global batch is {asked}; need one "
            f'number; do: write "auto" for {asked}, or {instead}',
            train_batch_size=AUTO,
        )
    return asked


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _auto_micro_batch(per_rank: int) -> int:
    """Return the largest divisor up to AUTO_MICRO_BATCH, or the next one above if that is tiny."""
    divisors = _divisors(per_rank)
    below = max(n for n in divisors if n <= AUTO_MICRO_BATCH)
    above = min((n for n in divisors if n > AUTO_MICRO_BATCH), default=below)
    return above if 4 * below < AUTO_MICRO_BATCH and above <= 4 * AUTO_MICRO_BATCH else below
