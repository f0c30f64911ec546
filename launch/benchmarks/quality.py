"""Measure after how many images and seconds a way to train is as good as the first one at its end.

The first way is guided-diffusion's own script where a checkout is given, else the first of ours.
As good means: the cross-entropy over all noise levels is no higher than the mean with which the
runs of the first way end. All classifiers see the same validation images, timesteps and noise.
"""

from __future__ import annotations

import math
import shlex
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ds_classifier import distributed
from ds_classifier.checkpoint.weights import load_classifier, read_weights
from ds_classifier.config import Settings
from ds_classifier.config.deepspeed_json import Resolved
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.splits import open_splits, settled_by_data, with_validation
from ds_classifier.evaluation.data import create_validation_loader
from ds_classifier.evaluation.evaluate import evaluate
from ds_classifier.evaluation.record import compute_reproducibly
from ds_classifier.guidance.fidelity import Judge, judge_of
from ds_classifier.guidance.guided_sampling import GuidedSampling, load_guided_sampling
from ds_classifier.guidance.known_distribution import KnownDistribution
from ds_classifier.loss import noised_classifier
from ds_classifier.model import create_classifier

from .measuring import spread
from .programs import (
    OURS_OF_QUALITY,
    ProgramFailed,
    check_reference,
    resolve_way,
    run_reference,
    run_trainer,
    split_of_shards,
    training_command,
)

REFERENCE = "guided-diffusion"
VALIDATIONS = 20  # of a run, unless --eval_interval says otherwise
SAMPLES, SAMPLING_STEPS = 100, "25"  # guided samples per classifier, and their steps
BATCH = 64  # images of a validation at a time


@dataclass(frozen=True)
class Trained:
    """A classifier, and how it was trained.

    path: of its weights. seconds: of its training steps, without validations and saving.
    curve: after each validation the images and seconds so far, and the cross-entropy.
    """

    path: Path
    images: int
    seconds: float
    curve: list[tuple[int, float, float]]


@dataclass(frozen=True)
class Yardstick:
    """The validation images and the judge of samples, the same for every classifier.

    scale: of guided samples; None: none are drawn, and the next two are None.
    sampling: draws from the exact denoiser of the training set, or of its known distribution.
    judge: says which class a sample shows.
    """

    val_shards: ShardSet
    device: torch.device
    scale: float | None
    sampling: GuidedSampling | None
    judge: Judge | KnownDistribution | None

    @classmethod
    def of(cls, val_shards: ShardSet, settings: Settings, scale: float | None) -> Yardstick:
        """Prepare it. settings: those of the images and the noise, with data_dir.

        Raises ValueError if samples are to be judged, and scikit-learn is missing.
        """
        distributed.quiet_libraries()
        compute_reproducibly()
        device, sampling, judge = distributed.init(), None, None
        if scale is not None:
            names = ("image_size", "in_channels", *settings.diffusion_kwargs())
            given = {name: getattr(settings, name) for name in names}
            sampling = load_guided_sampling(
                None,
                given | {"timestep_respacing": SAMPLING_STEPS},
                unguided=True,
                data_dir=settings.data_dir,
                model_path="",
                unet={},
                classifier_fp16=False,
                unet_fp16=False,
                device=device,
            )
            judge = judge_of(sampling)
        return cls(val_shards, device, scale, sampling, judge)

    def figures(self, path: Path, settings: Settings) -> dict[str, float]:
        """Return what the weights at a path reach. settings: those that they were trained with."""
        _, classifier = load_classifier(path, settings.model_kwargs())
        classifier.to(self.device)
        loader = create_validation_loader(
            self.val_shards, settings, batch_size=BATCH, workers=settings.workers
        )
        means, _ = evaluate(
            noised_classifier(classifier, settings.replace(compile=False)),
            loader,
            samples=self.val_shards.manifest.samples,
            device=self.device,
            noised=settings.noised,
        )
        reached = {"cross-entropy": means["loss"], "accuracy, %": 100 * means["acc@1"]}
        if self.sampling is not None:
            share = self._share(replace(self.sampling, classifier=classifier))
            reached[f"class asked for at scale {self.scale:g}, %"] = 100 * share
        return reached

    def _share(self, guided: GuidedSampling) -> float:
        """Return the share of samples that show the class asked for; nan if they are not finite."""
        labels = np.arange(SAMPLES) % guided.settings.num_classes
        try:
            samples = guided.draw(
                labels,
                self.scale,
                joint_temperature=1.0,
                marginal_temperature=1.0,
                batch_size=SAMPLES,
                use_ddim=False,
                clip_denoised=True,
                seed=0,
                progress=lambda done, total: None,
            )
        except FloatingPointError:
            return math.nan
        return self.judge.share(samples, labels)


def measure(
    words: list[str],
    *,
    program: Path,
    images: str,
    ways: list[str],
    reference: Path | None,
    classifier_scale: float | None,
    repeats: int,
) -> list[dict]:
    """Return a row per way: what it reaches, and when it is as good as row 1, means over seeds.

    words: flags of the training command that all ways share. program: launch/train.py.
    images: shards with a validation split. ways: the flags of each way, in one string.
    reference: a checkout of guided-diffusion, whose script is the first row; None: leave it out.
    classifier_scale: also draw guided samples at this scale. repeats: the number of seeds.
    Raises ValueError if something cannot be trained or compared.
    """
    shared = resolve_way("the flags of all ways", words, 1, OURS_OF_QUALITY)
    commands = {f"--way '{way}'": [*words, *shlex.split(way)] for way in ways}
    resolved = {
        name: resolve_way(name, command, 1, OURS_OF_QUALITY) for name, command in commands.items()
    }
    if reference is not None:
        check_reference(reference, shared.settings)
        resolved = {REFERENCE: shared, **resolved}
    train, val_shards, data = _open_data(images, shared.settings)
    for name, one in resolved.items():
        given = training_command(commands.get(name, words), OURS_OF_QUALITY).given
        resolved[name] = one.with_settings(
            settled_by_data(one.settings, train.manifest, given=given)
        )
    _check_ways({name: one.settings for name, one in resolved.items()})
    first = next(iter(resolved.values())).settings.replace(**data)
    yardstick = Yardstick.of(val_shards, first, classifier_scale)
    place = [word for name, value in data.items() for word in (f"--{name}", value)]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in resolved}
    curves: dict[str, list[list[tuple]]] = {name: [] for name in resolved}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if reference is not None:
            _write_images(train, folder / "images")
        for repeat in range(repeats):
            for name, one in resolved.items():
                seed = one.settings.seed + repeat
                one = replace(one, settings=one.settings.replace(seed=seed))
                try:
                    if name == REFERENCE:
                        trained = _train_theirs(program, reference, one, folder)
                    else:
                        command = [*commands[name], *place]
                        trained = _train_ours(program, command, one, folder / "run")
                except ProgramFailed as error:
                    raise ProgramFailed(f"{name}: {error}") from None
                reached = yardstick.figures(trained.path, one.settings)
                used = {"images": trained.images, "seconds": trained.seconds}
                figures[name].append(used | reached)
                curves[name].append(trained.curve)
                results = ", ".join(
                    f"{key} {value:.4g}" for key, value in figures[name][-1].items()
                )
                print(f"{name}, seed {seed}: {results}", flush=True)
    return _rows(figures, curves)


def _open_data(images: str, settings: Settings) -> tuple[ShardSet, ShardSet, dict[str, str]]:
    """Return the training and the validation shards, and the settings that name them.

    Raises ValueError if images are no shards with both splits.
    """
    split = split_of_shards(Path(images))
    if split is not None:
        settings = with_validation(settings.replace(data_dir=str(split.resolve())))
        train, val = open_splits(settings, found_beside=True)
        if val is not None:
            return train, val, {n: getattr(settings, n) for n in ("data_dir", "val_data_dir")}
    raise ValueError(
        f"got the images {images}; need a directory of shards with a validation split; do: "
        "ds-classifier convert IMAGES data --val 10%, and give data"
    )


def _check_ways(settings: dict[str, Settings]) -> None:
    """Raise ValueError if a way has no classifier, or would be measured on other images or noise.

    The trainer would say the first, but perhaps only after hours of the ways before.
    """
    first, *_ = settings
    for name in settings:
        try:
            with torch.device("meta"):
                create_classifier(**settings[name].model_kwargs())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for field in ("image_size", "in_channels", "noised", *Settings().diffusion_kwargs()):
            got, need = getattr(settings[name], field), getattr(settings[first], field)
            if got != need:
                raise ValueError(
                    f"{name}: got --{field} {got}; need {need}, as {first} has: cross-entropies "
                    "are compared on the same images with the same noise"
                )


def _train_ours(program: Path, words: list[str], resolved: Resolved, run_dir: Path) -> Trained:
    """Train by launch/train.py, on one rank."""
    settings = resolved.settings
    every = settings.eval_interval or max(1, settings.steps // VALIDATIONS)
    often = {"eval_interval": every, "log_interval": every, "save_interval": settings.steps}
    often["seed"] = settings.seed
    more = [word for name, value in often.items() for word in (f"--{name}", str(value))]
    rows, _ = run_trainer(program, [*words, *more], run_dir, ranks=1)
    images, seconds, curve = 0, 0.0, []
    for row in rows:
        if "images_per_sec" in row:  # of the steps since the row before; validations are left out
            seconds += (row["samples"] - images) / row["images_per_sec"]
            images = row["samples"]
        elif row["val_loss"] is not None:
            curve.append((images, seconds, row["val_loss"]))
    return Trained(run_dir, images, seconds, curve)


def _train_theirs(program: Path, checkout: Path, resolved: Resolved, folder: Path) -> Trained:
    """Train by guided-diffusion's script, with the learning rate falling to 0 as in its README."""
    settings, batch = resolved.settings, resolved.batch
    ended = run_reference(
        program.parent / "benchmarks" / "run_reference.py",
        checkout,
        folder / "images",
        folder,
        settings,
        batch=batch.total,
        microbatch=batch.micro,
        stop_after=0,
        iterations=settings.steps,
        anneal_lr=True,
        noised=settings.noised,
    )
    seconds = (ended[-1] - ended[0]) * len(ended) / max(1, len(ended) - 1)  # no time of the start
    path = folder / "log" / f"model{settings.steps - 1:06}.pt"
    # It has outputs for 1,000 classes. Without those that the data lacks, p is given one of these.
    expected = create_classifier(**settings.model_kwargs()).state_dict()
    weights = {name: value[: len(expected[name])] for name, value in read_weights(path).items()}
    torch.save(weights, path)
    return Trained(path, settings.steps * batch.total, seconds, [])


def _write_images(shards: ShardSet, folder: Path) -> None:
    """Write the images as the files that guided-diffusion reads: CLASS_NUMBER.

    It takes the classes from the names, in sorted order. Raises ValueError if one has no images.
    """
    classes = shards.manifest.classes
    if missing := sorted(set(range(len(classes))) - set(shards.index["label"].tolist())):
        raise ValueError(
            f"--reference: got no training images of class {classes[missing[0]]}; need some: it "
            "knows the classes from them alone"
        )
    folder.mkdir()
    for number, row in enumerate(shards.index):
        data = shards.store.read(int(row["shard"]), int(row["offset"]), int(row["length"]))
        # The decoder looks at the content; the suffix only says that this is an image.
        (folder / f"{row['label']:06}_{number:08}.png").write_bytes(data)


def _rows(
    figures: dict[str, list[dict[str, float]]], curves: dict[str, list[list[tuple]]]
) -> list[dict]:
    """Return the table. figures, curves: of each way, the first one first, an entry per seed."""
    loss = "cross-entropy"
    first, *_ = figures.values()
    aim = statistics.mean(run[loss] for run in first)
    whole = statistics.mean(run["images"] for run in first)
    rows = []
    for name, runs in figures.items():
        row: dict = {"way": name.removeprefix("--way ")}
        for column in runs[0]:
            row[column] = statistics.mean(run[column] for run in runs)
            if column == loss:
                row["spread"] = spread([run[loss] for run in runs])
        if runs is not first:
            met = [next((point for point in c if point[2] <= aim), None) for c in curves[name]]
            met = [point for point in met if point is not None]
            row["as good"] = f"{len(met)} of {len(runs)}"
            if met:
                images, seconds, _ = map(statistics.mean, zip(*met, strict=True))
                row["images needed"], row["seconds needed"] = images, seconds
                row["of row 1's images"] = images / whole
        row["each seed"], row["validations"] = runs, curves[name]
        rows.append(row)
    return rows
