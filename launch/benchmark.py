"""Measure this machine: `python launch/benchmark.py data PICTURES`, `... order`, `... checkpoint`.

Every figure is the median of several repeats; what is compared is interleaved, so that a machine
whose speed drifts still gives ratios. Prints a table; --json FILE keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from ds_classifier.config import Settings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "data", help="pictures a second and core, from shards and from a folder"
    )
    command.add_argument("pictures", type=Path, help="an image folder, as make_shards.py takes it")
    command.add_argument("--image_size", type=int, nargs="+", default=[64, 256])
    command.add_argument("--count", type=int, default=600, help="pictures a repeat [600]")
    command.set_defaults(run=_data)
    command = commands.add_parser("order", help="time and memory of the sample order")
    command.set_defaults(run=_order)
    command = commands.add_parser(
        "checkpoint", help="how long a save holds up training, written behind it or waited for"
    )
    command.add_argument("--classifier_width", type=int, default=Settings().classifier_width)
    command.add_argument("--batch_size", type=int, default=4, help="pictures a step [4]")
    command.add_argument("--deepspeed_config", type=Path, default="ds_configs/zero1_fp32.json")
    command.add_argument("--folder", type=Path, help="on the disk to measure [a temporary one]")
    command.set_defaults(run=_checkpoint)
    for command in commands.choices.values():
        command.add_argument("--repeats", type=int, default=5, help="of each figure [5]")
        command.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args(argv)
    try:
        rows = arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def interleaved(runs: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Median of things done a second by each run, in turn: A B A B ..., after one warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            done = run()
            if repeat:
                rates[name].append(done / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


# ----------------------------------------------------------------------------------------- data


def _data(arguments: argparse.Namespace) -> list[dict]:
    """One core each: the plain way (folder, Pillow, float32), and shards of every store."""
    from ds_classifier.data.convert import Store, convert
    from ds_classifier.data.sources import open_source

    source = open_source(str(arguments.pictures))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.image_size:
            stores = {
                "original": Store(),
                "halved jpg": Store(size, "jpg"),
                "halved png": Store(size, "png"),
            }
            runs = {"plain": _plain(source, size, arguments.count)}
            kilobytes = {"plain": _mean_kilobytes(source)}
            for name, store in stores.items():
                out = Path(folder, f"{size} {name}")
                manifest = convert(source, out, store=store)["train"]
                kilobytes[name] = sum(s.bytes for s in manifest.shards) / manifest.samples / 1e3
                runs[name] = _from_shards(out / "train", size, arguments.count)
            rates = interleaved(runs, arguments.repeats)
            rows += [
                {
                    "px": size,
                    "way": name,
                    "images/s a core": rate,
                    "against plain": rate / rates["plain"],
                    "KB a picture": kilobytes[name],
                }
                for name, rate in rates.items()
            ]
    return rows


def _mean_kilobytes(source) -> float:
    samples = source.splits["train"]
    return sum(sample.size() for sample in samples) / len(samples) / 1e3


def _plain(source, size: int, count: int) -> Callable[[], int]:
    """As the reference reads: a file a picture, its crop, flip, float32, collated 16 at a time."""
    import io
    import random

    import torch
    from PIL import Image

    from ds_classifier.data import images

    samples = source.splits["train"]

    def one(i: int) -> tuple[np.ndarray, int]:
        sample = samples[i % len(samples)]
        image = Image.open(io.BytesIO(sample.read())).convert("RGB")
        pixels = images.random_crop(image, size, random.randrange)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.transpose(pixels.astype(np.float32) / 127.5 - 1, [2, 0, 1]), sample.label

    def run() -> int:
        torch.set_num_threads(1)
        for first in range(0, count, 16):
            batch = [one(i) for i in range(first, min(first + 16, count))]
            torch.utils.data.default_collate(batch)
        return count

    return run


def _from_shards(folder: Path, size: int, count: int) -> Callable[[], int]:
    from ds_classifier.data.loader import ShardDataset
    from ds_classifier.data.order import SampleOrder
    from ds_classifier.data.shards import open_shards

    shards = open_shards(folder)
    order = SampleOrder(
        [shard.samples for shard in shards.manifest.shards],
        seed=0,
        lanes=Settings().lanes,
        block=Settings().block,
    )
    dataset = ShardDataset(shards, image_size=size, order=order, random_crop=True, random_flip=True)

    def run() -> int:
        for first in range(0, count, 16):
            dataset[np.arange(first, min(first + 16, count))]
        return count

    return run


# ---------------------------------------------------------------------------------------- order


def _order(arguments: argparse.Namespace) -> list[dict]:
    """ImageNet in 1,024 shards, and a billion samples in 200,000."""
    import resource

    from ds_classifier.data.order import SampleOrder

    rows = []
    for samples, count in ((1_281_167, 1024), (1_000_000_000, 200_000)):
        sizes = np.diff(np.arange(count + 1) * samples // count)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        open_s, seek_s, batch_s = [], [], []
        for repeat in range(arguments.repeats):
            began = time.perf_counter()
            order = SampleOrder(sizes, seed=repeat, lanes=Settings().lanes, block=Settings().block)
            opened = time.perf_counter()
            order.samples(samples // 2 + np.arange(256))
            sought = time.perf_counter()
            for batch in range(1, 51):
                order.samples(samples // 2 + 256 * batch + np.arange(256))
            open_s.append(opened - began)
            seek_s.append(sought - opened)
            batch_s.append((time.perf_counter() - sought) / 50)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows.append(
            {
                "samples": f"{samples:,}",
                "shards": f"{count:,}",
                "open ms": 1e3 * statistics.median(open_s),
                "seek to mid-epoch ms": 1e3 * statistics.median(seek_s),
                "batch of 256 ms": 1e3 * statistics.median(batch_s),
                "memory MB": (after - before) / 1e3,
            }
        )
    return rows


# ----------------------------------------------------------------------------------- checkpoint


def _checkpoint(arguments: argparse.Namespace) -> list[dict]:
    """One rank, random pictures of 64 px: saves that are waited for and saves behind, in turn."""
    import torch

    from ds_classifier.checkpoint_writer import CheckpointWriter
    from ds_classifier.diffusion import UniformSampler

    step, engine = _training_steps(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        writer = CheckpointWriter(
            Path(folder),
            engine=engine,
            sampler=UniformSampler(1000),
            keep_last=1,
            keep_every=0,
            max_failed=0,
        )
        seconds: dict[str, dict[str, list[float]]] = {"waited for": {}, "behind": {}}

        def note(way: str, **figures: float) -> None:
            for name, value in figures.items():
                seconds[way].setdefault(name, []).append(value)

        step()  # the first is slower than any other
        plain = [step()]
        for repeat in range(arguments.repeats + 1):
            began = time.perf_counter()
            writer.save({})
            saved = time.perf_counter()
            writer.finish()
            ended = time.perf_counter()
            if repeat:  # the first save makes the buffers
                note("waited for", snapshot=saved - began, write=ended - saved, slower=0.0)
            plain.append(step())
            began = time.perf_counter()
            writer.save({})
            saved = time.perf_counter()
            behind = []
            while writer.under_way is not None:
                behind.append(step())
                writer.check()
            if repeat:
                usual = statistics.median(plain)
                written = time.perf_counter() - saved
                slower = sum(behind) - len(behind) * usual
                note("behind", snapshot=saved - began, write=written, slower=slower)
    parameters = sum(p.numel() for p in engine.module.parameters())
    usual = statistics.median(plain)
    rows = []
    for way, figures in seconds.items():
        medians = {name: statistics.median(values) for name, values in figures.items()}
        stall = medians["snapshot"] + (medians["write"] if way == "waited for" else 0.0)
        rows.append(
            {
                "checkpoint": way,
                "parameters": f"{parameters:,}",
                "step s": usual,
                "snapshot s": medians["snapshot"],
                "written after s": medians["write"],
                "training stands still s": stall,
                "steps behind it lose s": medians["slower"],
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def _training_steps(arguments: argparse.Namespace):
    """A function that does one training step and returns its seconds, and its engine."""
    import torch

    from ds_classifier import distributed
    from ds_classifier.config import parse_training_command
    from ds_classifier.data.loader import Batch
    from ds_classifier.diffusion import UniformSampler, create_gaussian_diffusion
    from ds_classifier.ds_config import fill_bucket_sizes, read_ds_config, resolve
    from ds_classifier.engine import create_engine
    from ds_classifier.metrics import Meter
    from ds_classifier.model import create_classifier
    from ds_classifier.noised_classifier import NoisedClassifier
    from ds_classifier.training import train_step

    words = ["--deepspeed_config", str(arguments.deepspeed_config), "--num_classes", "1000"]
    words += ["--classifier_width", str(arguments.classifier_width)]
    words += ["--batch_size", str(arguments.batch_size)]
    command = parse_training_command(words)
    resolved = resolve(command, read_ds_config(command.deepspeed_config), world_size=1)
    settings = resolved.settings
    device = distributed.init()
    classifier = create_classifier(**settings.model_kwargs())
    parameters = sum(p.numel() for p in classifier.parameters())
    diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
    module = NoisedClassifier(classifier, diffusion)
    engine = create_engine(module, fill_bucket_sizes(resolved.ds_config, parameters), None)
    count, size = arguments.batch_size, settings.image_size
    batch = Batch(
        images=torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8),
        labels=torch.randint(0, 1000, (count,)),
        positions=torch.arange(count),
        weights=torch.ones(count),
        bad=[],
    )
    meter, sampler = Meter(diffusion.num_timesteps, device), UniformSampler(1000)

    def step() -> float:
        began = time.perf_counter()
        train_step(
            engine,
            iter([batch] * engine.gradient_accumulation_steps()),
            accumulation=engine.gradient_accumulation_steps(),
            sampler=sampler,
            meter=meter,
            seed=0,
            noised=True,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return step, engine


if __name__ == "__main__":
    sys.exit(main())
