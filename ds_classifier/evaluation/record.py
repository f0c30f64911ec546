"""Evaluate one set of weights, and write the result: RUN/eval/NAME.json."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_classifier import distributed
from ds_classifier.checkpoint.weights import WeightsFile
from ds_classifier.common import files
from ds_classifier.common.progress import Progress
from ds_classifier.common.urls import shown, without_logins
from ds_classifier.config import Settings
from ds_classifier.data.labels.targets import ONE_CLASS
from ds_classifier.data.shards import ShardSet
from ds_classifier.diffusion import (
    GaussianDiffusion,
    create_gaussian_diffusion,
    timestep_range,
)
from ds_classifier.distributed import failures
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.evaluation import evaluate
from ds_classifier.evaluation.data import (
    create_validation_loader,
    labels_of,
    open_training_set,
    open_validation_data,
)
from ds_classifier.evaluation.format import (
    EVALUATION_FORMAT,
    EVALUATION_VERSION,
    evaluation_name,
)
from ds_classifier.evaluation.image_grid import ImageGrid, save_grid
from ds_classifier.evaluation.levels import Confusion
from ds_classifier.evaluation.metrics import scores_of_guessing
from ds_classifier.evaluation.predictions import predict_grid
from ds_classifier.evaluation.sources import build_classifier, read_source
from ds_classifier.guidance.exact_denoiser import ExactDenoiser

BATCH_PIXELS = 1 << 20  # pixels of a batch if no batch size is given
MOST_IMAGES = 64  # of such a batch


@dataclass(frozen=True)
class Request:
    """The data to evaluate weights on, and the way to do it.

    given: settings from the command line, for a file of weights that records none.
    val_data_dir: shards or their URL; "": those that the run validates on.
    levels: number of noise levels besides t = 0; timesteps: these levels instead.
    class_timesteps: levels with numbers per class; None: t = 0 and where signal equals noise.
    bayes: training shards whose exact posterior is evaluated too; "": the run's, if it is small.
    precision: one of PRECISIONS. batch_size: images at a time; 0: MOST_IMAGES, fewer if large.
    cache_dir, cache_gb: of shards read by URL; None: as in training.
    workers: loader processes per rank; below 0: as many as suit the machine.
    """

    given: dict[str, Any]
    val_data_dir: str
    levels: int
    timesteps: list[int] | None
    class_timesteps: list[int] | None
    bayes: str
    precision: str
    batch_size: int
    cache_dir: str | None
    cache_gb: float | None
    workers: int


@dataclass(frozen=True)
class Evaluation:
    """The result for one set of weights.

    record: the JSON, the same on all ranks. grid: a few images with their predictions, on rank 0
    only; None if there is none.
    """

    source: WeightsFile
    record: dict[str, Any]
    grid: ImageGrid | None

    def write(self, folder: Path) -> int:
        """Write NAME.json and NAME.pictures.png.

        Returns the number of noise levels in the evaluation that was replaced; 0 if there was none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.record['name']}.json"
        try:
            before = len(json.loads(path.read_text(encoding="utf-8"))["classifier"]["levels"])
        except (OSError, ValueError, LookupError, TypeError):
            before = 0
        files.replace_text(path, json.dumps(self.record, indent=1))
        if self.grid is not None:
            save_grid(self.grid, path.with_name(f"{self.record['name']}.pictures.png"))
        return before


class Evaluator:
    """Evaluates sets of weights one after the other; every rank calls it.

    The numbers of an exact posterior are computed once for all weights that share its data.
    """

    def __init__(self, request: Request, device: torch.device):
        self._request, self._device = request, device
        self._bayes: dict[str, dict[str, Any]] = {}  # by everything that decides the numbers

    def evaluate(self, path: Path) -> Evaluation:
        """Evaluate the weights at a path and describe them in a record.

        path: a run, a checkpoint, an export or a file of weights, as for open_weights.
        Raises ValueError for weights, settings or data that do not fit.
        """
        request, device = self._request, self._device
        source, weights = read_source(path, request.given, device)
        for note in source.notes():
            distributed.say(note)
        settings = source.settings
        location, shards = open_validation_data(
            source,
            request.val_data_dir,
            cache_dir=request.cache_dir,
            cache_gb=request.cache_gb,
            device=device,
        )
        diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
        levels, chosen = _levels(request, diffusion)
        classifier = build_classifier(settings, weights, request.precision, device)
        samples, targets = shards.manifest.samples, shards.manifest.targets
        distributed.say(
            f"{source.path}: {sum(p.numel() for p in classifier.parameters()):,} parameters, "
            f"{settings.image_size} px, {settings.num_classes} {targets.nouns}"
        )
        distributed.say(f"{samples:,} images in {shown(location)}")
        if settings.loss:
            distributed.say(f"the loss is cross-entropy, and not training's --loss {settings.loss}")
        distributed.say(
            f"at {len(levels)} noise levels and under uniform t, {request.precision}, on "
            f"{distributed.world_size()} x {deepspeed_engine.describe_device(device)}"
        )
        numbers, bad = self._measure(source, shards, diffusion, classifier, levels, chosen)
        record = {
            "format": EVALUATION_FORMAT,
            "version": EVALUATION_VERSION,
            "name": evaluation_name(source.name, request.precision),
            "weights": str(source.path),
            "weights_sha256": source.sha256,
            "step": source.step,
            "settings": settings.model_kwargs() | settings.diffusion_kwargs(),
            "classes": shards.manifest.classes,
            "data": {
                "location": without_logins(location),
                "fingerprint": shards.manifest.fingerprint,
                "samples": samples,
                "bad_samples": bad,
                "guessing": scores_of_guessing(labels_of(shards), targets),
            },
            **({} if targets == ONE_CLASS else {"targets": targets.to_json()}),
            "precision": request.precision,
            "batch_size": self._batch_size(settings, samples),
            "noise": f"keyed by ({evaluate.VALIDATION_SEED}, 'validation', position)",
            **_trained(settings, diffusion),
            **numbers,
        }

        def predict() -> ImageGrid | None:
            return predict_grid(
                classifier,
                diffusion,
                shards,
                image_size=settings.image_size,
                channels=settings.in_channels,
                device=device,
                step=source.step,
            )

        grid = None
        if distributed.rank() == 0:
            grid = failures.tolerate("the images", predict)
        return Evaluation(source, record, grid)

    def _measure(
        self,
        source: WeightsFile,
        shards: ShardSet,
        diffusion: GaussianDiffusion,
        classifier: nn.Module,
        levels: list[int],
        chosen: list[int],
    ) -> tuple[dict[str, Any], int]:
        """Return the measured part of a record, and the number of undecodable images."""
        request, device, settings = self._request, self._device, source.settings
        samples, targets = shards.manifest.samples, shards.manifest.targets
        posteriors = [evaluate.classifier_posterior(classifier, diffusion, targets.kind)]
        training_set, denoiser = open_training_set(source, request.bayes, shards, device)
        key = json.dumps(
            [
                *(training_set, shards.manifest.fingerprint, levels, chosen),
                *(settings.image_size, settings.in_channels, settings.diffusion_kwargs()),
            ]
        )
        if denoiser is not None:
            if key not in self._bayes:
                posteriors.append(evaluate.bayes_posterior(denoiser, diffusion))
            distributed.say(f"compared with the exact posterior of {denoiser} ({training_set})")
        confusion = None if targets.kind == "classes" else Confusion(samples, device)
        loader = create_validation_loader(
            shards,
            settings,
            batch_size=self._batch_size(settings, samples),
            workers=request.workers,
        )
        began = time.perf_counter()
        with Progress("images", shown=distributed.rank() == 0) as progress:
            (numbers, *optimum), bad = evaluate.evaluate_levels(
                posteriors,
                diffusion,
                loader,
                levels=levels,
                num_classes=settings.num_classes,
                samples=samples,
                device=device,
                targets=targets,
                confusion=confusion,
                # All ranks have done about as many positions as this one.
                progress=lambda done: progress(
                    min(done * distributed.world_size(), samples), samples
                ),
            )
        seconds = time.perf_counter() - began
        distributed.say(f"{samples:,} images in {seconds:.1f} s, {samples / seconds:,.1f}/s\n")
        if bad:
            distributed.say(
                f"{bad} images could not be decoded and are not counted; "
                "ds-classifier verify --decode names them"
            )
        measured = {
            "classifier": evaluate.describe_levels(numbers, diffusion, levels, chosen=chosen),
            **({} if confusion is None else {"confusion": {"t": levels[0], **confusion.read()}}),
            "machine": {
                "world_size": distributed.world_size(),
                "device": deepspeed_engine.describe_device(device),
                "torch": torch.__version__,
                "seconds": round(seconds, 3),
                "samples_per_sec": round(samples / seconds, 3),
            },
        }
        if optimum:
            self._bayes[key] = {
                "location": training_set,
                "pictures": len(denoiser) if isinstance(denoiser, ExactDenoiser) else None,
                **evaluate.describe_levels(optimum[0], diffusion, levels, chosen=chosen),
            }
        if denoiser is not None:
            measured["bayes"] = self._bayes[key]
        return measured, bad

    def _batch_size(self, settings: Settings, samples: int) -> int:
        fitting = max(1, min(MOST_IMAGES, BATCH_PIXELS // settings.image_size**2))
        return min(self._request.batch_size or fitting, samples)


def write_series(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Write the records of several sets of weights as one JSON list."""
    records = [evaluation.record for evaluation in evaluations]
    files.replace_text(path, json.dumps(records, indent=1))


def compute_reproducibly() -> None:
    """Make torch compute in full fp32, and in the same order in every run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.fp32_precision = "ieee"


def _trained(settings: Settings, diffusion: GaussianDiffusion) -> dict[str, Any]:
    """Return the levels that were trained, as a record has them; nothing if all were."""
    if not settings.t_range:
        return {}
    levels = timestep_range(settings.t_range, diffusion)
    return {"trained": {"t_range": settings.t_range, "first": levels[0], "last": levels[-1]}}


def _levels(request: Request, diffusion: GaussianDiffusion) -> tuple[list[int], list[int]]:
    """Return the noise levels, and those among them that get numbers per class."""
    asked = [*(request.timesteps or []), *(request.class_timesteps or [])]
    if asked and not 0 <= min(asked) <= max(asked) < diffusion.num_timesteps:
        raise ValueError(
            f"--timesteps, --class_timesteps: got {min(asked)} to {max(asked)}; need 0 to "
            f"{diffusion.num_timesteps - 1}"
        )
    levels = request.timesteps or evaluate.level_grid(diffusion, request.levels)
    chosen = request.class_timesteps
    if chosen is None:
        chosen = sorted({levels[0], evaluate.middle_level(diffusion, levels)})
    return sorted({*levels, *chosen}), chosen
