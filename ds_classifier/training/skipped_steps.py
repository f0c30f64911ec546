"""Steps that were skipped on all ranks because a loss or gradient was not finite.

DeepSpeed sees a gradient that is not finite in every precision here: fp16 and bf16 look for it
(bf16.check_grad_overflow, on by default), fp32 by the gradient's norm; the decision is reduced.
training.train_step lets a loss that is not finite make the gradient so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.distributed import deepspeed_engine
from ds_classifier.evaluation.metrics import by_position


class SkippedSteps:
    """Counts, tells and lists them, and gives up after too many.

    run_dir: rank 0 lists them there in FILE. limit: steps in a row, or at the floor of fp16's loss
    scale. key_of: the name of the sample at a position of the stream.
    """

    FILE = "skipped_steps.jsonl"

    def __init__(self, engine, *, run_dir: Path, limit: int, key_of: Callable[[int], str]):
        self._engine, self._limit, self._key_of = engine, limit, key_of
        self._path = run_dir / self.FILE
        self._in_a_row = 0
        self._at_floor, self._scale = 0, deepspeed_engine.loss_scale(engine)
        self._positions: list[int] = []  # of losses not finite, since the last news

    def check(self, trained: Tensor) -> None:
        """Call after every step, on every rank, with what `train_step` says it trained on.

        Raises FloatingPointError on all ranks after `limit` skipped in a row, or at the floor
        even with good steps between.
        """
        before, self._scale = self._scale, deepspeed_engine.loss_scale(self._engine)
        floor = deepspeed_engine.loss_scale_floor(self._engine)
        if floor is not None and self._scale > floor:
            self._at_floor = 0
        if self._engine.was_step_applied():
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._at_floor += floor is not None and before <= floor
        self._list(trained)
        step = self._engine.global_steps
        where = f"{self._path} lists them; the last good checkpoint stays"
        skipped = max(self._in_a_row, self._at_floor)
        if skipped >= self._limit and floor is not None and self._scale <= floor:
            raise FloatingPointError(
                f"fp16's loss scale is at its floor, {floor:g} (fp16.min_loss_scale), and still "
                f"the gradients are not finite: {_steps(skipped)} skipped, the last {step}; "
                f"{where}; do: use a bf16 config, or lower --lr"
            )
        if self._in_a_row >= self._limit:
            raise FloatingPointError(
                f"the gradients of {_steps(self._in_a_row)} in a row, up to step {step}, are not "
                f"finite; {where}; do: lower --lr, or use a bf16 config"
            )

    def _list(self, trained: Tensor) -> None:
        """Write the skipped step, with the samples whose loss was not finite."""
        positions, _, losses = by_position(trained)
        positions = positions[~losses.isfinite()].long().tolist()
        self._positions += positions
        batch = self._engine.train_batch_size()
        first = (self._engine.global_steps - 1) * batch
        if distributed.rank() == 0:
            row = {
                "step": self._engine.global_steps,
                "positions": [first, first + batch],
                "not_finite": [{"position": q, "key": self._key_of(q)} for q in positions],
                "loss_scale": deepspeed_engine.loss_scale(self._engine),
            }
            try:
                files.append(self._path, json.dumps(row) + "\n")
            except OSError as error:  # no reason to end a run that may go on
                distributed.say(f"{'':>6} {self._path}: not written: {error.strerror}: {row}")

    def news(self) -> str:
        """What is known of the skipped steps since the last news, for the screen."""
        known = ["gradient not finite"]
        if self._engine.fp16_enabled():
            known.append(f"loss scale {deepspeed_engine.loss_scale(self._engine):g}")
        if self._positions:
            shown = ", ".join(map(str, self._positions[:4]))
            more = f" and {len(self._positions) - 4} more" if len(self._positions) > 4 else ""
            known.append(f"loss not finite at {shown}{more}, see {self.FILE}")
            self._positions = []
        return "; ".join(known)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
