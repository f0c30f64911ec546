"""Save checkpoints while training continues: take a snapshot, then write it in a thread.

1. save(), all ranks: compare what must be equal on all ranks, and gather the state into rank 0's
   memory. Training waits for this part only.
2. A thread of rank 0 commits the snapshot, with retries, and prunes old checkpoints. It writes one
   checkpoint at a time: a save that is due meanwhile waits.
3. check(), all ranks, after every step: all ranks learn rank 0's outcome at the same step.
4. finish(), all ranks: wait for the last write, which must succeed.
"""

from __future__ import annotations

import errno
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.fixed_state import fixed_tensors, trained_count
from ds_classifier.checkpoint.replicas import check_replicas
from ds_classifier.common import files
from ds_classifier.common.text import count, first_line
from ds_classifier.distributed.engine import deepspeed_engine, deepspeed_state

# Errors of a network file system or a failing-over disk that may not occur again.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOLCK)
RETRY_SECONDS = (1.0, 3.0, 9.0)  # pauses between tries
BYTES_A_PARAMETER = 12  # fp32 weight and two moments of a parameter that is trained


def checkpoint_bytes(classifier: nn.Module) -> int:
    """Return the size of a checkpoint of a classifier, in bytes."""
    fixed = sum(value.nbytes for value in fixed_tensors(classifier).values())
    return BYTES_A_PARAMETER * trained_count(classifier) + fixed


def check_room(checkpoints: Path, size: int) -> None:
    """Try to save a checkpoint, of nothing; raise ValueError if that fails.

    size: see `check_free`. Raises ValueError also if there is no room for two checkpoints.
    """
    probe = checkpoints / ".probe"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        disk.remove_leftovers(checkpoints)
        for _ in range(2):  # the second one replaces the first
            disk.commit(probe / disk.step_name(0), model={}, optimizer={}, state={})
        unsynced = files.fsync(probe)
        shutil.rmtree(probe)
    except OSError as error:
        raise ValueError(
            f"--run_dir: got {checkpoints.parent}, where no checkpoint can be saved "
            f"({first_line(error)}); do: choose another"
        ) from None
    if unsynced:
        distributed.say(
            f"note: the file system of {checkpoints} does not sync directories ({unsynced}): if "
            "its host fails, the newest checkpoint may be lost"
        )
    check_free(checkpoints, size)


def check_free(checkpoints: Path, size: int) -> None:
    """Raise ValueError if the disk of a directory, existing or not, lacks room for two checkpoints.

    size: of a checkpoint, in bytes.
    """
    free = shutil.disk_usage(files.nearest_directory(checkpoints)).free
    if free < 2 * size:
        raise ValueError(
            f"--run_dir: got {checkpoints.parent}, which has {free:,} bytes free; need "
            f"{2 * size:,} for two checkpoints of {size:,}; do: make room, or choose another"
        )


class CheckpointWriter:
    """Writes checkpoints of one engine into one directory; every rank must create one.

    fixed: the state that training does not change, see fixed_state.py; {} on ranks but 0.
    keep_last, keep_every: see disk.prune.
    max_failed: the number of writes in a row that may fail. At one more, check() raises OSError on
        all ranks. The last write of a run may not fail.
    on_failure: called in rank 0's thread with the step and the message of a failed write.
    Rank 0 keeps the snapshot, 12 bytes per trained parameter, in host memory (pinned if there is a
    GPU).
    """

    def __init__(
        self,
        checkpoints: Path,
        *,
        engine,
        sampler,
        fixed: dict[str, Tensor],
        keep_last: int,
        keep_every: int,
        max_failed: int,
        on_failure: Callable[[int, str], None] = lambda step, message: None,
    ):
        self._checkpoints, self._engine, self._sampler = checkpoints, engine, sampler
        self._keep = dict(keep_last=keep_last, keep_every=keep_every)
        self._max_failed, self._on_failure = max_failed, on_failure
        self._group = distributed.cpu_group()
        self.under_way: int | None = None  # the step being written; the same on all ranks
        self._failed, self._error = 0, ""  # failed writes in a row, on all ranks; the last error
        self._news: tuple[Any, Tensor] | None = None  # (handle, 1 if rank 0's thread has ended)
        # On rank 0 only:
        self._thread: threading.Thread | None = None
        self._outcome: dict[str, str] = {}  # empty: written; else the error, and its kind
        self._model: dict[str, Tensor] = dict(fixed)
        self._optimizer: dict[str, Tensor] = {}
        self._state: dict[str, Any] = {}
        self._warned_of_pruning = False

    def save(self, state: dict[str, Any], *, val_loss: float | None = None) -> None:
        """Take a snapshot of this step and start to write it; every rank must call it.

        state: the caller's entries of state.json, JSON-able.
        val_loss: the validation loss at this step; None if it was not validated.
        Raises FloatingPointError on all ranks if weights are not finite or differ between ranks.
        """
        engine, sampler = self._engine, self._sampler
        if self.under_way is not None:
            if self._busy():
                distributed.say(
                    f"{'':>6} step {engine.global_steps} waits for the checkpoint of step "
                    f"{self.under_way}, which is still being written"
                )
            self._settle()
        sampled = {disk.SAMPLER + name: v for name, v in sampler.state().items()}
        changing, fixed = (
            {name.removeprefix(disk.PREFIX): value for name, value in copies.items()}
            for copies in (deepspeed_state.copies(engine), deepspeed_state.fixed_copies(engine))
        )
        check_replicas(engine, changing | sampled, fixed)
        optimizer = deepspeed_state.OptimizerState(engine)
        self._snapshot(optimizer, sampled)
        finite = val_loss is not None and math.isfinite(val_loss)
        self._state = {
            "format": disk.FORMAT,
            "version": disk.VERSION,
            "step": engine.global_steps,
            "skipped_steps": engine.skipped_steps,
            "optimizer": {"kind": optimizer.kind, "scalars": optimizer.scalars()},
            "loss_scaler": deepspeed_engine.loss_scaler_state(engine),
            "val_loss": val_loss if finite else None,
            **state,
        }
        self._begin()

    def check(self) -> None:
        """Take in the outcome of a write that has ended; every rank must call it after every step.

        All ranks learn at the same step that a write has ended. A broadcast started in one step is
        waited for in the next; without a write under way nothing is sent.
        Raises OSError on all ranks when more than max_failed writes failed in a row.
        """
        if self.under_way is None:
            return
        if self._news is not None:
            handle, ended = self._news
            handle.wait()
            self._news = None
            if ended.item():
                self._settle()
                return
        ended = torch.tensor([0.0 if self._busy() else 1.0])
        self._news = (
            torch.distributed.broadcast(ended, src=0, group=self._group, async_op=True),
            ended,
        )

    def finish(self) -> None:
        """Wait for the write under way, if any; every rank must call it.

        If the last write failed it is tried once more. Raises OSError on all ranks if it fails
        again.
        """
        self._settle(final=True)
        if self._failed:
            distributed.say(f"{'':>6} trying once more to write the checkpoint")
            self._begin()
            self._settle(final=True)
        if self._failed:
            raise OSError(f"the last checkpoint is not written: {self._error}")

    # ------------------------------------------------------------------------- all ranks

    def _snapshot(
        self, optimizer: deepspeed_state.OptimizerState, sampled: dict[str, Tensor]
    ) -> None:
        """Copy whole fp32 weights and optimizer state into rank 0's buffers, which are reused."""
        kept = optimizer.names()
        for name, parameter in deepspeed_state.trained(self._engine.module).items():
            name = name.removeprefix(disk.PREFIX)
            self._keep_copy(self._model, name, deepspeed_state.whole_weight(parameter))
            for state in kept[parameter]:
                whole = optimizer.whole(parameter, state)
                self._keep_copy(self._optimizer, f"{state}.{name}", whole)
        for name, value in sampled.items():
            self._keep_copy(self._optimizer, name, value)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)

    def _keep_copy(self, buffers: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Copy a tensor into a buffer of its name, on rank 0."""
        if distributed.rank() != 0:
            return
        if name not in buffers:
            pinned = value.device.type == "cuda"
            buffers[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        buffers[name].copy_(value, non_blocking=True)

    def _begin(self) -> None:
        """Start to write the snapshot, in a thread of rank 0."""
        self.under_way = self._state["step"]
        if distributed.rank() == 0:
            # Not a daemon: a process that exits finishes the write first.
            self._thread = threading.Thread(target=self._write, name="checkpoint writer")
            self._thread.start()

    def _settle(self, *, final: bool = False) -> None:
        """Wait for the write under way, and share its outcome with all ranks.

        final: do not raise OSError for too many failed writes.
        """
        if self.under_way is None:
            return
        if self._news is not None:
            self._news[0].wait()
            self._news = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        # The other ranks wait for the disk here, on the CPU, so no GPU kernel spins meanwhile.
        torch.distributed.broadcast(torch.zeros(1), src=0, group=self._group)
        outcome = distributed.broadcast_json(self._outcome, self._engine.device)
        self.under_way = None
        if "bug" in outcome:
            raise RuntimeError(outcome["bug"])
        self._failed = self._failed + 1 if outcome else 0
        self._error = outcome.get("error", "")
        if self._failed > self._max_failed and not final:
            times = count(self._failed, "checkpoint") + " in a row" * (self._failed > 1)
            raise OSError(
                f"{times} could not be written, more than --max_failed_saves {self._max_failed}: "
                f"{self._error}"
            )

    def _busy(self) -> bool:
        """Return whether rank 0's thread is writing; False on other ranks."""
        return self._thread is not None and self._thread.is_alive()

    # ------------------------------------------------------------------------- rank 0's thread

    def _write(self) -> None:
        """Commit the snapshot and keep the outcome for `_settle`."""
        self._outcome = {}
        final = self._checkpoints / disk.step_name(self._state["step"])
        try:
            with_retries(
                lambda: disk.commit(
                    final, model=self._model, optimizer=self._optimizer, state=self._state
                )
            )
        except OSError as error:
            values = [*self._model.values(), *self._optimizer.values()]
            needed = sum(value.numel() * value.element_size() for value in values)
            message = (
                f"{error.filename or final}: cannot write: {error.strerror or error}; need "
                f"{needed:,} bytes, {_free(final.parent)} are free; the checkpoints before it "
                "are kept; do: make room, or check the disk"
            )
            self._outcome = {"error": message}
            distributed.say(f"{'':>6} the checkpoint of step {self._state['step']}: {message}")
            self._on_failure(self._state["step"], message)
            return
        except Exception as error:
            self._outcome = {"bug": f"while writing {final}: {type(error).__name__}: {error}"}
            raise
        self._clear_up()

    def _clear_up(self) -> None:
        """Name the best checkpoint and prune old ones. Failures are reported once and ignored."""
        try:
            disk.name_best(self._checkpoints)
            problems = disk.prune(self._checkpoints, **self._keep)
        except OSError as error:
            problems = [str(error)]
        if problems and not self._warned_of_pruning:
            self._warned_of_pruning = True
            distributed.say(
                f"{'':>6} warning: old checkpoints in {self._checkpoints} cannot be deleted "
                f"({problems[0]}); the disk will fill; do: delete them"
            )


def with_retries(task: Callable[[], None]) -> None:
    """Run a task, again after a pause if the disk's error may be transient.

    Raises the last OSError.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            task()
            return
        except OSError as error:
            if pause is None or error.errno not in TRANSIENT:
                raise
            distributed.say(f"{'':>6} {first_line(error)}; trying again in {pause:g} s")
            time.sleep(pause)


def _free(folder: Path) -> str:
    """Return the number of bytes free on the disk of a directory, as text."""
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "unknown numbers"
