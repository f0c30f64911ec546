"""Images a second of training: bare, in an engine, in the whole trainer, in the reference.

Each layer does what the one below does and more, so that what it costs can be seen. The bare model
and the engine run in this process on one batch that lies ready; the trainer and the reference are
whole programs, started anew for each repeat, on the same images.
"""

from __future__ import annotations

import os
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
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.config import Settings
from ds_classifier.config.deepspeed_json import Resolved, fill_bucket_sizes
from ds_classifier.data.loader import Batch
from ds_classifier.data.shards import open_shards
from ds_classifier.diffusion import UniformSampler
from ds_classifier.distributed import deepspeed_engine
from ds_classifier.evaluation.meter import Meter
from ds_classifier.export.reference_flags import REFERENCE_CLASSES, reference_obstacles
from ds_classifier.loss import noised_classifier
from ds_classifier.model import create_classifier
from ds_classifier.training.flops import forward_flops, training_flops
from ds_classifier.training.step import Objective, train_step

from .measuring import in_turn, spread
from .programs import (
    REFERENCE_SCRIPT,
    reference_images_per_sec,
    resolve_words,
    shards_for,
    split_of_shards,
    trainer_row,
    training_command,
)

# Of the square matrices whose product is taken for the peak: the best of these.
GEMM_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
PRODUCTS = 10  # of them at a time
GEMM, TRAINER, REFERENCE = "matrix product", "whole trainer", "guided-diffusion, fp32"


@dataclass(frozen=True)
class Bench:
    """One rank's model, engine and batch, as the training command's words describe them."""

    resolved: Resolved
    engine: Any
    batch: Batch

    @classmethod
    def of(cls, words: list[str]) -> Bench:
        resolved = resolve_words(words, 1)
        settings = resolved.settings
        device = distributed.init()
        if problem := deepspeed_engine.precision_problem(resolved.ds_config, device):
            raise ValueError(problem)
        module = noised_classifier(create_classifier(**settings.model_kwargs()), settings)
        parameters = sum(p.numel() for p in module.parameters())
        ds_config = fill_bucket_sizes(resolved.ds_config, parameters)
        engine = deepspeed_engine.create_engine(module, ds_config, None)
        count, size = resolved.batch.micro, settings.image_size
        shape = (count, size, size, settings.in_channels)
        batch = Batch(
            images=torch.randint(0, 256, shape, dtype=torch.uint8),
            labels=torch.randint(0, settings.num_classes, (count,)),
            positions=torch.arange(count),
            weights=torch.ones(count),
            bad=[],
        )
        if device.type == "cuda":  # as the loader's
            batch = Batch(*(tensor.pin_memory() for tensor in batch[:4]), [])
        return cls(resolved, engine, batch)

    @property
    def precision(self) -> str:
        return deepspeed_engine.precision(self.engine)

    @property
    def images(self) -> int:
        """Of a step."""
        return self.resolved.batch.total

    def trainer_step(self) -> Callable[[], int]:
        """All of a step but the loader: noise, metrics, the engine. Returns the images of it."""
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
        """Forward, backward and step of the engine, the noise lying ready."""
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
        """The same module in the same precision, without DeepSpeed, and torch's AdamW for it."""
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


def gemm(
    side: int, dtype: torch.dtype, device: torch.device, *, as_convolution: bool
) -> Callable[[], int]:
    """A product of two square matrices, which returns its operations.

    as_convolution: by the library of convolutions, which on some CPUs is the quicker of the two.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    pixels = a.view(1, 32, side // 32, side).permute(0, 3, 1, 2)  # [1, side, 32, side / 32]

    def product() -> int:
        before = torch.get_float32_matmul_precision()
        if device.type == "cuda":  # in TF32, as cuDNN's convolutions take fp32 unless told not to
            torch.set_float32_matmul_precision("high")
        for _ in range(PRODUCTS):
            if as_convolution:
                F.conv2d(pixels, b[:, :, None, None])
            else:
                torch.mm(a, b)
        torch.set_float32_matmul_precision(before)
        return PRODUCTS * 2 * side**3

    return product


def waited_for(step: Callable[[], int], device: torch.device) -> Callable[[], int]:
    """The step, until the device has done it."""

    def whole() -> int:
        done = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return done

    return whole


def make_room(device: torch.device) -> None:
    """Give back what this process keeps of a GPU's memory for reuse, for a program to run there."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    words: list[str],
    *,
    program: Path,
    images: str,
    reference: Path | None,
    ranks: list[int],
    steps: int,
    repeats: int,
) -> list[dict]:
    """Every layer, interleaved. words: of the training command. images: shards, or what they are
    made of.

    program: launch/train.py. ranks: the trainer is run on each of these numbers of them, by the
    same words, in which --batch_size is a rank's and --global_batch all ranks'. steps: timed of
    each program in a repeat. reference: a checkout of guided-diffusion, run as it is.
    Raises ValueError where the reference cannot be run, or only with other images or another
    classifier.
    """
    settings = training_command(words).settings
    if reference is not None:
        _check_reference(reference, Path(images), settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = shards_for(words, images, folder)
        words = [*words, "--data_dir", str(shards)]
        classes = open_shards(shards).manifest.classes
        bench = Bench.of([*words, "--num_classes", str(len(classes))])
        device, dtype = bench.engine.device, deepspeed_engine.DTYPES[bench.precision]

        def rate(step: Callable[[], int]) -> float:
            began = time.perf_counter()
            return sum(step() for _ in range(steps)) / (time.perf_counter() - began)

        def trainer(count: int) -> float:
            make_room(device)
            row = trainer_row(program, words, folder / "run", ranks=count, steps=steps)
            return row["images_per_sec"]

        here = {
            **{
                f"{GEMM} {side}, {convolution}": waited_for(
                    gemm(side, dtype, device, as_convolution=convolution), device
                )
                for side in GEMM_SIDES[device.type]
                for convolution in (False, True)
            },
            "bare model + AdamW": bench.bare_step(),
            "engine": bench.engine_step(),
            "trainer's step": bench.trainer_step(),
        }
        ways = {name: partial(rate, step) for name, step in here.items()}
        in_turn(ways, 1)  # the first is slower than any other; programs warm up by themselves
        for count in ranks:
            ways[TRAINER + f", {count} ranks" * (count > 1)] = partial(trainer, count)

        def theirs() -> float:
            make_room(device)
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

        if reference is not None:
            ways[REFERENCE] = theirs
        print(described(bench, steps=steps, repeats=repeats), flush=True)
        devices = {f"{TRAINER}, {count} ranks": count for count in ranks}
        if device.type == "cpu":  # unless OMP_NUM_THREADS says so, one rank has all cores
            cores = len(os.sched_getaffinity(0)) // torch.get_num_threads()
            devices = {name: min(count, max(1, cores)) for name, count in devices.items()}
        return rows_of(in_turn(ways, repeats), bench, devices)


def _check_reference(checkout: Path, images: Path, settings: Settings) -> None:
    if not (checkout / REFERENCE_SCRIPT).is_file():
        raise ValueError(f"--reference: got {checkout}; need a checkout with {REFERENCE_SCRIPT}")
    if not images.is_dir() or split_of_shards(images) is not None:
        raise ValueError(
            f"--reference: got the images {images}; need a folder of image files, which is "
            "all that it reads"
        )
    # How many classes there are changes its last layer alone.
    obstacles = reference_obstacles(settings.replace(num_classes=REFERENCE_CLASSES))
    if obstacles:
        raise ValueError(
            f"--reference: got {obstacles[0].reason}; need a classifier that it can build"
        )


def described(bench: Bench, *, steps: int, repeats: int) -> str:
    """What is measured, in a line."""
    settings, device = bench.resolved.settings, bench.engine.device
    flops = training_flops(forward_flops(settings.model_kwargs())) / 1e9
    parameters = sum(p.numel() for p in bench.engine.module.parameters())
    return (
        f"{settings.image_size} px, {parameters:,} parameters, {flops:,.1f} GFLOP an image; "
        f"{bench.precision}, {bench.resolved.batch}, on "
        f"{deepspeed_engine.describe_device(device)}; "
        f"medians of {repeats}, of {steps} steps each"
    )


def rows_of(
    told: dict[str, list[float]], bench: Bench, devices: dict[str, int]
) -> list[dict[str, object]]:
    """A row a layer, of medians; ratios are medians of those of each repeat.

    told: images a second by layer, and operations of the matrix products, a number a repeat.
    devices: that a layer has, where it is not one.
    """
    rates = {name: np.array(values) for name, values in told.items()}
    peak = np.max([rates.pop(name) for name in told if name.startswith(GEMM)], axis=0)
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
        row["spread"] = spread(told[name])
        row["each repeat's images/s"] = told[name]
        rows.append(row)
        above = rate
    return rows


def median(values: np.ndarray) -> float:
    return float(np.median(values))
