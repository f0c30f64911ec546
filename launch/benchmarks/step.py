"""Images per second of training: bare, in an engine, in the whole trainer, in the reference.

Each layer does the work of the one before it and more, so the ratio of two rows is the cost of the
difference. The bare model and the engine run in this process, on one batch in memory. The trainer
and the reference are whole programs, started again for each repeat, on the same images.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ds_classifier import distributed
from ds_classifier.checkpoint.writer import CheckpointWriter
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.config.deepspeed_json import Resolved
from ds_classifier.data.loader import Batch
from ds_classifier.data.shards import open_shards
from ds_classifier.diffusion import UniformSampler
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.evaluation.meter import Meter
from ds_classifier.loss import noised_classifier
from ds_classifier.model import create_classifier
from ds_classifier.training.logs.flops import forward_flops, training_flops
from ds_classifier.training.step import Objective, train_step

from .measuring import in_turn, spread, wait_for
from .programs import (
    check_reference,
    reference_images_per_sec,
    resolve_words,
    shards_for,
    split_of_shards,
    trainer_row,
    training_command,
)

# Sides of the square matrices whose product gives the device's peak: the fastest size counts.
GEMM_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
PRODUCTS = 10  # matrix products per timed call
SLOW_S = 1.0  # seconds of such a call after which no larger size is tried
GEMM, TRAINER, REFERENCE = "matrix product", "whole trainer", "guided-diffusion, fp32"
SAVING = "trainer's step while saving"


@dataclass(frozen=True)
class Bench:
    """The model, engine and batch of one rank, as a training command describes them."""

    resolved: Resolved
    engine: Any
    batch: Batch

    @classmethod
    def of(cls, words: list[str]) -> Bench:
        """Build them. words: flags of launch/train.py. Raises ValueError if they do not fit."""
        resolved = resolve_words(words, 1)
        settings = resolved.settings
        device = join()
        if problem := deepspeed_engine.precision_problem(resolved.ds_config, device):
            raise ValueError(problem)
        deepspeed_engine.emulate_fp16(resolved.ds_config, device)
        module = noised_classifier(create_classifier(**settings.model_kwargs()), settings)
        parameters = sum(p.numel() for p in module.parameters())
        ds_config = resolved.with_parameters(parameters).ds_config
        engine = deepspeed_engine.create_engine(module, ds_config, None)
        count, size = resolved.batch.micro, settings.image_size
        shape = (count, size, size, settings.in_channels)
        batch = Batch(
            images=torch.randint(0, 256, shape, dtype=torch.uint8),
            labels=torch.randint(0, settings.num_classes, (count,)),
            positions=torch.arange(count),
            weights=torch.ones(count),
            importance=torch.ones(count),
            bad=[],
        )
        if device.type == "cuda":  # as the loader's batches are
            batch = Batch(*(tensor.pin_memory() for tensor in batch[:-1]), [])
        return cls(resolved, engine, batch)

    @property
    def precision(self) -> str:
        """The engine's precision, such as "bf16"."""
        return deepspeed_engine.precision(self.engine)

    @property
    def images(self) -> int:
        """The number of images of a step."""
        return self.resolved.batch.total

    def trainer_step(self) -> Callable[[], int]:
        """Return a step of the trainer without its loader: noise, metrics, engine.

        Calling it returns the number of images.
        """
        settings, engine = self.resolved.settings, self.engine
        meter = Meter(engine.module.diffusion.num_timesteps, engine.device)
        sampler = UniformSampler(engine.module.diffusion.num_timesteps)
        objective = Objective(sampler, settings.seed, settings.noised)

        def step() -> int:
            accumulation = engine.gradient_accumulation_steps()
            train_step(engine, iter([self.batch] * accumulation), objective, meter)
            return self.images

        return waited_for(step, engine.device)

    def engine_step(self) -> Callable[[], int]:
        """Return the engine's forward, backward and step, on noise drawn beforehand."""
        engine = self.engine
        inputs = self._inputs()

        def step() -> int:
            for _ in range(engine.gradient_accumulation_steps()):
                losses, _ = engine(*inputs)
                engine.backward(losses.mean())
                engine.step()
            return self.images

        return waited_for(step, engine.device)

    def bare_step(self) -> Callable[[], int]:
        """Return a step of the same module in the same precision, without DeepSpeed, by AdamW."""
        device, accumulation = self.engine.device, self.engine.gradient_accumulation_steps()
        settings = self.resolved.settings
        module = noised_classifier(create_classifier(**settings.model_kwargs()), settings)
        module = module.to(device=device, dtype=deepspeed_engine.DTYPES[self.precision])
        optimizer = torch.optim.AdamW(module.parameters(), lr=settings.lr, fused=True)
        inputs = self._inputs()

        def step() -> int:
            for _ in range(accumulation):
                losses, _ = module(*inputs)
                (losses.mean() / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
            return self.images

        return waited_for(step, device)

    def _inputs(self) -> tuple[torch.Tensor, ...]:
        batch = self.batch.to(self.engine.device)
        t = torch.randint(
            0,
            self.engine.module.diffusion.num_timesteps,
            batch.labels.shape,
            device=self.engine.device,
        )
        noise = keyed_noise(0, "noise", batch.positions, tuple(batch.images.shape[1:]))
        return batch.images, batch.labels, t, noise


@functools.cache
def join() -> torch.device:
    """Make this process the only rank, once, and return its device."""
    return distributed.init()


def gemm(
    side: int, dtype: torch.dtype, device: torch.device, *, as_convolution: bool
) -> Callable[[], int]:
    """Return a function that multiplies two square matrices and returns its number of operations.

    as_convolution: use the library of convolutions, which is faster on some CPUs.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    pixels = a.view(1, 32, side // 32, side).permute(0, 3, 1, 2)  # [1, side, 32, side / 32]

    def product() -> int:
        before = torch.get_float32_matmul_precision()
        if device.type == "cuda":  # in TF32, which cuDNN's convolutions use for fp32 by default
            torch.set_float32_matmul_precision("high")
        for _ in range(PRODUCTS):
            if as_convolution:
                F.conv2d(pixels, b[:, :, None, None])
            else:
                torch.mm(a, b)
        torch.set_float32_matmul_precision(before)
        return PRODUCTS * 2 * side**3

    return product


def matrix_products(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], int]]:
    """Return products of all sizes by their names, without those that would take long.

    They would on CPUs that only emulate bf16: there the smallest size is as fast as any.
    """
    products = {}
    for convolution in (False, True):
        for side in GEMM_SIDES[device.type]:
            product = waited_for(gemm(side, dtype, device, as_convolution=convolution), device)
            products[f"{GEMM} {side}, {convolution}"] = product
            began = time.perf_counter()
            product()
            if time.perf_counter() - began > SLOW_S:  # twice the side takes 8 times as long
                break
    return products


def waited_for(step: Callable[[], int], device: torch.device) -> Callable[[], int]:
    """Return the step, made to wait until the device has done it."""

    def whole() -> int:
        done = step()
        wait_for(device)
        return done

    return whole


def make_room(device: torch.device) -> None:
    """Free the GPU memory that this process caches, so that another program can use it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Saves:
    """Saves checkpoints into a folder, each written in the background of training steps.

    step: a training step, which returns its number of images.
    """

    def __init__(self, bench: Bench, folder: Path, step: Callable[[], int]):
        self._writer = CheckpointWriter(
            folder,
            engine=bench.engine,
            sampler=UniformSampler(bench.engine.module.diffusion.num_timesteps),
            fixed={},
            keep_last=1,
            keep_every=0,
            max_failed=0,
        )
        self._step = step
        self._snapshot: list[float] = []
        self._written: list[float] = []

    def rate(self) -> float:
        """Save, and train until the checkpoint is written. Returns images per second."""
        began = time.perf_counter()
        self._writer.save({})
        self._snapshot.append(time.perf_counter() - began)
        images = self._step()
        self._writer.check()
        while self._writer.under_way is not None:
            images += self._step()
            self._writer.check()
        seconds = time.perf_counter() - began
        self._written.append(seconds)
        return images / seconds

    def seconds(self) -> dict[str, float]:
        """Return medians: how long the snapshot stops training, and when a save is written."""
        return {  # the first save, which allocates the buffers, is left out
            "snapshot, s": statistics.median(self._snapshot[1:]),
            "written after, s": statistics.median(self._written[1:]),
        }


def measure(
    words: list[str],
    *,
    program: Path,
    images: str,
    reference: Path | None,
    save: Path | None,
    ranks: list[int],
    steps: int,
    repeats: int,
) -> list[dict]:
    """Measure every layer, interleaved, and return a row per layer.

    words: flags of launch/train.py, `program`. images: shards, or a source that convert takes.
    ranks: the numbers of ranks to run the trainer on, with the same flags: --batch_size is per
    rank, --global_batch over all ranks. steps: steps timed per layer and repeat.
    save: a directory on the disk to save checkpoints to; None: measure no saves.
    reference: a checkout of guided-diffusion to run too, unchanged; None: do not.
    Raises ValueError if the reference cannot be run with these images or this classifier.
    """
    settings = training_command(words).settings
    if reference is not None:
        check_reference(reference, settings)
        if not Path(images).is_dir() or split_of_shards(Path(images)) is not None:
            raise ValueError(
                f"--reference: got the images {images}; need a folder of image files: it reads "
                "nothing else"
            )
    if save is not None and not save.is_dir():
        raise ValueError(f"--save: got {save}, which is no directory; need one on the disk")
    with (
        tempfile.TemporaryDirectory() as temporary,
        tempfile.TemporaryDirectory(dir=save) as checkpoints,
    ):
        folder = Path(temporary)
        shards = shards_for(words, images, folder)
        words = [*words, "--data_dir", str(shards)]
        classes = open_shards(shards).manifest.classes
        bench = Bench.of([*words, "--num_classes", str(len(classes))])
        start_up: dict[str, list[float]] = {}

        def trainer(count: int) -> float:
            make_room(bench.engine.device)
            row = trainer_row(program, words, folder / "run", ranks=count, steps=steps)
            start_up.setdefault(trainer_name(count), []).append(row["start_s"])
            return row["images_per_sec"]

        def theirs() -> float:
            make_room(bench.engine.device)
            return reference_images_per_sec(
                program.parent / "benchmarks" / "run_reference.py",
                reference,
                Path(images),
                folder,
                settings,
                batch=bench.images,
                microbatch=bench.resolved.batch.micro,
                steps=steps,
            )

        ways = layers_here(bench, steps)
        saves = None
        if save is not None:
            saves = Saves(bench, Path(checkpoints), bench.trainer_step())
            ways[SAVING] = saves.rate
        in_turn(ways, 1)  # the first call is the slowest; programs warm up by themselves
        ways |= {trainer_name(count): partial(trainer, count) for count in ranks}
        if reference is not None:
            ways[REFERENCE] = theirs
        print(described(bench, steps=steps, repeats=repeats), flush=True)
        rates = in_turn(ways, repeats)
        seconds = {
            name: {"start-up, s": statistics.median(values)} for name, values in start_up.items()
        }
        if saves is not None:
            seconds[SAVING] = saves.seconds()
        return rows_of(rates, bench, ranks, seconds)


def layers_here(bench: Bench, steps: int) -> dict[str, Callable[[], float]]:
    """Return the layers measured in this process.

    Each measures `steps` calls and returns images, or operations of a matrix product, per second.
    """
    device, dtype = bench.engine.device, deepspeed_engine.DTYPES[bench.precision]

    def rate(step: Callable[[], int]) -> float:
        began = time.perf_counter()
        return sum(step() for _ in range(steps)) / (time.perf_counter() - began)

    layers = matrix_products(dtype, device)
    layers["bare model + AdamW"] = bench.bare_step()
    layers["engine"] = bench.engine_step()
    layers["trainer's step"] = bench.trainer_step()
    return {name: partial(rate, step) for name, step in layers.items()}


def trainer_name(ranks: int) -> str:
    """Return the name of the trainer's layer."""
    return TRAINER + f", {ranks} ranks" * (ranks > 1)


def described(bench: Bench, *, steps: int, repeats: int) -> str:
    """Return a line on what is measured."""
    settings, device = bench.resolved.settings, bench.engine.device
    flops = training_flops(forward_flops(settings.model_kwargs())) / 1e9
    parameters = sum(p.numel() for p in bench.engine.module.parameters())
    return (
        f"{settings.image_size} px, {parameters:,} parameters, {flops:,.1f} GFLOP per image; "
        f"{bench.precision}, {bench.resolved.batch}, on "
        f"{deepspeed_engine.describe_device(device)}; "
        f"medians of {repeats} repeats of {steps} steps each"
    )


def rows_of(
    measured: dict[str, list[float]],
    bench: Bench,
    ranks: list[int],
    seconds: dict[str, dict[str, float]],
) -> list[dict[str, object]]:
    """Return a row of medians per layer; ratios are medians of each repeat's ratios.

    measured: images per second by layer, and operations per second of matrix products, one number
    per repeat. ranks: the numbers of ranks of the trainer. seconds: more columns by layer.
    """
    devices = {trainer_name(count): count for count in ranks}
    if bench.engine.device.type == "cpu":  # one rank uses all cores, unless OMP_NUM_THREADS is set
        cores = len(os.sched_getaffinity(0)) // torch.get_num_threads()
        devices = {name: min(count, max(1, cores)) for name, count in devices.items()}
    rates = {name: np.array(values) for name, values in measured.items()}
    peak = np.max([rates.pop(name) for name in measured if name.startswith(GEMM)], axis=0)
    flops = training_flops(forward_flops(bench.resolved.settings.model_kwargs()))
    rows = [{"layer": GEMM, "precision": bench.precision, "GFLOP/s": median(peak) / 1e9}]
    above = None
    slowest = rates.get(REFERENCE)
    for name, rate in rates.items():
        theirs = name == REFERENCE
        row = {
            "layer": name,
            "precision": "" if theirs else bench.precision,
            "images/s": median(rate),
            "GFLOP/s": median(rate) * flops / 1e9,
        }
        if not theirs:
            row["of GEMM peak"] = median(rate * flops / (peak * devices.get(name, 1)))
        if above is not None and not theirs:
            row["of the layer above"] = median(rate / above)
        if slowest is not None:
            row["x guided-diffusion"] = median(rate / slowest)
        row |= seconds.get(name, {})
        row["spread"] = spread(measured[name])
        row["each repeat's images/s"] = measured[name]
        rows.append(row)
        if name != SAVING:  # the whole trainer is compared with the step that saves nothing
            above = rate
    return rows


def median(values: np.ndarray) -> float:
    """Return the median as a Python float, which JSON can hold."""
    return float(np.median(values))
