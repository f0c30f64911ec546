"""The global batch: how many images a step trains on, and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_classifier.config.settings import Settings

AUTO = "auto"  # in the JSON: a number that the settings own, or that is derived
AUTO_MICRO_BATCH = 32  # the most that "auto" takes at a time; a number in the JSON may be any


@dataclass(frozen=True)
class BatchSizes:
    """How a global batch comes about: micro x accumulation x world_size images a step."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.world_size

    def ds_numbers(self) -> dict[str, int]:
        """The same by the names of DeepSpeed's JSON."""
        return dict(
            train_batch_size=self.total,
            train_micro_batch_size_per_gpu=self.micro,
            gradient_accumulation_steps=self.accumulation,
        )

    def __str__(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return (
            f"global batch {self.total} = {self.micro} micro-batch x {self.accumulation} "
            f"accumulation x {ranks}"
        )


def settle_batch(
    ds: dict[str, Any],
    settings: Settings,
    world_size: int,
    problems: list[str],
) -> BatchSizes | None:
    """Resolve global batch = micro-batch x accumulation x ranks, here alone.

    ds: the JSON, its numbers or "auto". problems: disagreements are added to it; then None.
    """

    def number(key: str) -> int | None:
        value = ds.get(key, AUTO)
        return None if value == AUTO else int(value)

    total, micro = number("train_batch_size"), number("train_micro_batch_size_per_gpu")
    accumulation = number("gradient_accumulation_steps")
    for key, value in (
        ("train_batch_size", total),
        ("train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value is not None and value < 1:
            problems.append(f"{key}: got {value}; need at least 1")
            return None

    of_ranks = settings.batch_size * world_size
    asked = settings.global_batch or of_ranks
    if of_ranks not in (0, asked):
        problems.append(
            f"--global_batch {settings.global_batch}, --batch_size {settings.batch_size}: they "
            f"disagree on {world_size} ranks; do: give one of them"
        )
        return None
    if not asked:
        # Nobody named a batch: the JSON's numbers do, else the reference's 4 a rank.
        asked = total or (micro or 4) * (accumulation or 1) * world_size
    if total is not None and total != asked:
        problems.append(
            f"train_batch_size: got {total}, but the settings' global batch is {asked}; need one "
            'number; do: write "auto" in the JSON'
        )
        return None
    from_flag = False
    if settings.microbatch > 0:
        if micro is not None and micro != settings.microbatch:
            problems.append(
                f"train_micro_batch_size_per_gpu: got {micro}, but --microbatch is "
                f'{settings.microbatch}; need one number; do: write "auto" in the JSON'
            )
            return None
        micro = settings.microbatch
        from_flag = True
    if asked % world_size:
        fits = [n for n in range(1, asked + 1) if asked % n == 0]
        near = [n for n in fits if n <= world_size][-1:] + [n for n in fits if n > world_size][:1]
        problems.append(
            f"global batch: got {asked} on {world_size} ranks; need a multiple of the ranks; do: "
            f"run on {' or '.join(map(str, near))} ranks, or choose another --global_batch"
        )
        return None
    per_rank = asked // world_size
    if from_flag:
        micro = min(micro, per_rank)  # as the reference: a larger one means all at once
    if micro is None and accumulation is not None and per_rank % accumulation == 0:
        micro = per_rank // accumulation
    elif micro is None:
        micro = _auto_micro_batch(per_rank)
    if per_rank % micro or accumulation not in (None, per_rank // micro):
        got = f"{micro} micro-batch"
        got += f" x {accumulation} accumulation" if accumulation is not None else ""
        fits = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - micro))[:3])
        problems.append(
            f"train_micro_batch_size_per_gpu: got {got} x {world_size} ranks for a global batch of "
            f"{asked}; need micro-batch x accumulation = {per_rank}; do: use a micro-batch of "
            f'{" or ".join(map(str, near))} and accumulation "auto"'
        )
        return None
    return BatchSizes(micro, per_rank // micro, world_size)


def _auto_micro_batch(per_rank: int) -> int:
    """The largest divisor up to AUTO_MICRO_BATCH; where those are tiny, the next above it."""
    divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
    below = max(n for n in divisors if n <= AUTO_MICRO_BATCH)
    above = min((n for n in divisors if n > AUTO_MICRO_BATCH), default=below)
    return above if 4 * below < AUTO_MICRO_BATCH and above <= 4 * AUTO_MICRO_BATCH else below
