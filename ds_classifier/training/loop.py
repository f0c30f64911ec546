"""The training loop: step s trains on positions [sB, (s+1)B) of the stream, on all ranks together.

B is the global batch. `run.py` builds what the loop uses; `step.py` is one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.profiler import record_function as span

from ds_classifier.data.loader import Batch
from ds_classifier.distributed.stopping import StopVote
from ds_classifier.distributed.watchdog import Watchdog
from ds_classifier.evaluation.meter import Meter
from ds_classifier.training.between_steps import Checkpoints, Validation
from ds_classifier.training.logs.log import TrainingLog
from ds_classifier.training.logs.lost import Lost
from ds_classifier.training.logs.profile import Profile
from ds_classifier.training.start import Start
from ds_classifier.training.step import Objective, train_step


class Due(NamedTuple):
    """The things to do after a step."""

    log: bool
    validate: bool
    save: bool
    last: bool


@dataclass(frozen=True)
class Cadence:
    """The number of steps of the run, and of steps between log rows, validations and checkpoints.

    validate: 0 if there is nothing to validate on.
    """

    iterations: int
    log: int
    validate: int
    save: int

    def at(self, step: int) -> Due:
        """Return what is due after a step; after the last one, everything is."""
        last = step == self.iterations
        return Due(
            log=last or step % self.log == 0,
            validate=bool(self.validate) and (last or step % self.validate == 0),
            save=last or step % self.save == 0,
            last=last,
        )


@dataclass(frozen=True)
class Run:
    """The parts of a training run, as one rank holds them."""

    start: Start  # where the run begins
    cadence: Cadence  # what is due after which step
    engine: Any  # DeepSpeed's: the model, its optimizer, and the number of the last step
    batches: Iterator[Batch]  # this rank's micro-batches, from the engine's step on
    objective: Objective  # what a step's loss depends on
    meter: Meter  # sums of loss and accuracy since the last log row
    log: TrainingLog  # rows in files, lines on the screen
    lost: Lost  # samples that did not decode, and steps that were skipped
    checkpoints: Checkpoints  # writes them behind the following steps
    validation: Validation  # measures on held-out images
    stop: StopVote  # whether any rank was asked to stop
    watch: Watchdog  # ends all ranks if one hangs
    profile: Profile  # records a few steps, if asked to

    @property
    def step(self) -> int:
        """The number of steps done since the run's first start."""
        return self.engine.global_steps


def train(run: Run) -> bool:
    """Train from the engine's step to the last one; return False if asked to stop before it.

    Raises FloatingPointError after too many steps without a finite gradient, TooManyBadSamples,
    and OSError when checkpoints cannot be written; each on all ranks.
    """
    if run.stop.decide(now=True):
        return False
    run.log.begin()
    if run.start.initialized and run.cadence.validate:  # weights from elsewhere: measure them first
        run.validation.run()
        if run.stop.decide(now=True):
            return False
    while run.step < run.cadence.iterations:
        run.watch.stepping(run.step + 1)
        with run.profile.step(run.step + 1):
            trained = train_step(run.engine, run.batches, run.objective, run.meter)
            with span("step: bookkeeping"):
                run.log.count(trained)
                run.lost.check(trained)  # raises when too many steps were skipped
                run.checkpoints.check()  # raises when too many could not be written
        due = run.cadence.at(run.step)
        if due.log:
            run.log.write_window(trained)  # means over all ranks since the last row
        val_loss = run.validation.run() if due.validate else None
        if due.save:
            run.checkpoints.save(val_loss)
        if not due.last and run.stop.decide():  # a vote: all ranks stop after the same step
            if not due.save:
                run.checkpoints.save(val_loss)
            return False
    return True
