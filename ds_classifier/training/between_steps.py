"""The work between two steps: measure on held-out images, and save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from ds_classifier import distributed
from ds_classifier.checkpoint.disk import PREFIX
from ds_classifier.checkpoint.writer import CheckpointWriter
from ds_classifier.common.text import count
from ds_classifier.data.loader import Loader
from ds_classifier.distributed import failures
from ds_classifier.distributed.engine import deepspeed_state
from ds_classifier.distributed.stopping import Stopped
from ds_classifier.evaluation import evaluate as evaluation
from ds_classifier.evaluation.image_grid import marked_sheet, save_grid
from ds_classifier.evaluation.metrics import measured_of
from ds_classifier.evaluation.predictions import predict_grid
from ds_classifier.model import create_classifier
from ds_classifier.model.own import cast_floating
from ds_classifier.training.logs.log import TrainingLog
from ds_classifier.training.logs.lost import BadSamples
from ds_classifier.training.run_dir import append_event
from ds_classifier.training.setup import Setup


class Validation:
    """Measures the classifier on the whole validation set; every rank calls it.

    loader: the validation batches of this rank.
    """

    def __init__(self, setup: Setup, loader: Loader, log: TrainingLog):
        self._setup, self._loader, self._log = setup, loader, log

    def run(self) -> float | None:
        """Validate, log and show the means; return the loss, or None if asked to stop meanwhile."""
        began = time.perf_counter()
        step = self._setup.engine.global_steps
        with (
            self._log.pause("validation"),
            self._setup.watch.during("validation"),
            suppress(Stopped),
        ):
            row = {f"val_{name}": value for name, value in self._means().items()}
            row = {"step": step, **row, "val_seconds": time.perf_counter() - began}
            self._log.write_validation(row)
            return row["val_loss"]
        return None

    def _means(self) -> dict[str, float]:
        """Return the means over the trained levels, those at t = 0 as NAME_t0; draw the grid."""
        setup, engine = self._setup, self._setup.engine
        keywords: dict[str, Any] = dict(
            samples=setup.val_samples,
            device=engine.device,
            noised=setup.resolved.settings.noised,
            targets=setup.targets,
        )
        levels = setup.sampler.levels
        means, bad = evaluation.evaluate(
            engine.module, self._batches("all t"), levels=levels, **keywords
        )
        at_0, _ = evaluation.evaluate(engine.module, self._batches("t = 0"), t=0, **keywords)
        means |= {f"{shown.name}_t0": at_0[shown.name] for shown in measured_of(setup.targets)}
        classifier = self._own_classifier()
        if distributed.rank() == 0:
            failures.tolerate("the grid of images", lambda: self._draw_grid(classifier))
        return means | ({"bad_samples": bad} if bad else {})

    def _batches(self, levels: str) -> Iterator[Any]:
        """Yield this rank's batches; show on a terminal how many images all ranks have done."""
        done, samples = 0, self._setup.val_samples
        for batch in self._setup.stop.batches(self._setup.watch.batches(self._loader)):
            yield batch
            done = min(done + len(batch.positions) * distributed.world_size(), samples)
            self._log.show(f"validation at {levels}: {done:,} of {count(samples, 'image')}")

    def _own_classifier(self) -> nn.Module:
        """Return a classifier that this rank can call alone; every rank must call it.

        Under ZeRO 3 the engine's own waits for the other ranks in each layer.
        """
        engine, settings = self._setup.engine, self._setup.resolved.settings
        if not deepspeed_state.is_sharded(engine):
            return engine.module.classifier
        weights = deepspeed_state.whole_copies(engine)
        classifier = create_classifier(**settings.model_kwargs())
        cast_floating(classifier.to(engine.device), engine.get_data_types()[0])
        classifier.load_state_dict({n.removeprefix(PREFIX): v for n, v in weights.items()})
        return classifier

    def _draw_grid(self, classifier: nn.Module) -> None:
        """Keep a grid of images and predictions of this step, for the report and TensorBoard."""
        setup, engine = self._setup, self._setup.engine
        settings = setup.resolved.settings
        grid = predict_grid(
            classifier,
            engine.module.diffusion,
            setup.val_shards,
            image_size=settings.image_size,
            channels=settings.in_channels,
            device=engine.device,
            step=engine.global_steps,
        )
        if grid is not None:
            folder = setup.run_dir / "eval"
            folder.mkdir(exist_ok=True)
            save_grid(grid, folder / "validation.pictures.png")
            sheet = marked_sheet(grid, setup.shards.manifest.classes)
            self._log.image("val/pictures", sheet, engine.global_steps)


class Checkpoints:
    """Writes the checkpoints of a run behind its following steps; every rank calls it."""

    def __init__(self, setup: Setup, log: TrainingLog, bad_samples: BadSamples):
        settings, run_dir = setup.resolved.settings, setup.run_dir
        self._setup, self._log, self._bad_samples = setup, log, bad_samples
        self._writer = CheckpointWriter(
            run_dir / "checkpoints",
            engine=setup.engine,
            sampler=setup.sampler,
            fixed=setup.fixed,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
            max_failed=settings.max_failed_saves,
            on_failure=lambda step, message: append_event(
                run_dir, "save failed", step=step, message=message
            ),
        )

    def save(self, val_loss: float | None) -> None:
        """Take a snapshot and start to write it. val_loss: of this step, if it was validated."""
        batch = self._setup.resolved.batch
        with self._log.pause("saving"), self._setup.watch.during("save"):
            counts = {
                "samples": self._setup.engine.global_steps * batch.total,
                "bad_samples": self._bad_samples.total(),
                "world_size": batch.world_size,
            }
            self._writer.save(self._setup.facts | counts, val_loss=val_loss)

    def check(self) -> None:
        """Learn whether the last write has ended well; see CheckpointWriter.check."""
        self._writer.check()

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk; see CheckpointWriter.finish."""
        self._log.show("writing the checkpoint", at_once=True)
        with self._setup.watch.during("save"):
            self._writer.finish()
