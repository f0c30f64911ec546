"""Measure this machine: `python launch/benchmark.py data PICTURES` and its other commands.

Every figure is the median of several repeats; what is compared is interleaved, so that a machine
whose speed drifts still gives ratios. Prints a table; --json FILE keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from ds_classifier import files
from ds_classifier.config import Settings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "data", help="pictures a second and core, from shards and from a folder"
    )
    _add_pictures(command)
    command.add_argument("--count", type=int, default=600, help="pictures a repeat [600]")
    command.set_defaults(run=_data)
    command = commands.add_parser("convert", help="pictures a second and core written to shards")
    _add_pictures(command)
    command.set_defaults(run=_convert)
    command = commands.add_parser("order", help="time and memory of the sample order")
    command.set_defaults(run=_order)
    command = commands.add_parser(
        "cache", help="simulate an epoch of ImageNet from afar: what a node's cache must hold"
    )
    command.add_argument("--lanes", type=int, nargs="+", default=[16, Settings().lanes, 256])
    command.add_argument("--shuffle_shards", nargs="+", default=["1", "4"])
    command.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="8 a node")
    command.set_defaults(run=_cache)
    command = commands.add_parser("memory", help="memory of 8 loader workers, for large data sets")
    command.set_defaults(run=_memory)
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
        print(f"error: {files.problem(error)}", file=sys.stderr)
        return 2
    _print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _add_pictures(command: argparse.ArgumentParser) -> None:
    command.add_argument("pictures", type=Path, help="an image folder, as make_shards.py takes it")
    command.add_argument("--image_size", type=int, nargs="+", default=[64, 256])


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


def interleaved(
    runs: dict[str, Callable[[], int]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median of things done a second by each run, in turn: A B A B ..., after one warm-up.

    clock: its seconds. before: called ahead of every run, not timed.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            before()
            began = clock()
            done = run()
            if repeat:
                rates[name].append(done / (clock() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


# ----------------------------------------------------------------------------------------- data


def _data(arguments: argparse.Namespace) -> list[dict]:
    """The plain way (folder, Pillow, float32), and shards of every store, by a core's own seconds.

    exact, fast: what `--resize` says. decode: the bytes to pixels of the stored size, no more.
    """
    import torch

    from ds_classifier.data.convert import convert
    from ds_classifier.data.sources import open_source

    torch.set_num_threads(1)
    source = open_source(str(arguments.pictures))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.image_size:
            runs = {("plain", "exact"): _plain(source, size, arguments.count)}
            kilobytes = {"plain": _mean_kilobytes(source)}
            for name, store in _stores(size).items():
                out = Path(folder, f"{size} {name}")
                manifest = convert(source, out, store=store)["train"]
                kilobytes[name] = sum(s.bytes for s in manifest.shards) / manifest.samples / 1e3
                for fast in (False, True):
                    run = _from_shards(out / "train", size, arguments.count, fast=fast)
                    runs[name, "fast" if fast else "exact"] = run
                runs[name, "decode"] = _decode_alone(out / "train", arguments.count)
            rates = interleaved(runs, arguments.repeats, clock=time.process_time)
            plain = rates["plain", "exact"]
            for name in kilobytes:
                rate = {way: rates.get((name, way), "") for way in ("exact", "fast", "decode")}
                row = {"px": size, "images/s a core": name, "KB each": kilobytes[name], **rate}
                for way in ("exact", "fast"):
                    row[f"{way} / plain"] = rate[way] / plain if rate[way] else ""
                rows.append(row)
    return rows


def _stores(size: int) -> dict:
    from ds_classifier.data.convert import Store

    return {
        "original": Store(),
        "halved jpg": Store(size, "jpg"),
        "halved png": Store(size, "png"),
    }


def _mean_kilobytes(source) -> float:
    samples = source.splits["train"]
    return sum(sample.size() for sample in samples) / len(samples) / 1e3


def _decode_alone(folder: Path, count: int) -> Callable[[], int]:
    from ds_classifier.data import images
    from ds_classifier.data.shards import open_shards
    from ds_classifier.data.store import store_of

    shards = open_shards(folder)
    store = store_of(shards)
    data = [store.read(int(r["shard"]), int(r["offset"]), int(r["length"])) for r in shards.index]

    def run() -> int:
        for i in range(count):
            images.decode(data[i % len(data)])
        return count

    return run


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
        for first in range(0, count, 16):
            batch = [one(i) for i in range(first, min(first + 16, count))]
            torch.utils.data.default_collate(batch)
        return count

    return run


def _from_shards(folder: Path, size: int, count: int, *, fast: bool) -> Callable[[], int]:
    from ds_classifier.data.loader import ShardDataset
    from ds_classifier.data.order import SampleOrder
    from ds_classifier.data.shards import open_shards

    shards = open_shards(folder)
    order = SampleOrder(
        [shard.samples for shard in shards.manifest.shards], **Settings().order_kwargs()
    )
    dataset = ShardDataset(
        shards, image_size=size, order=order, random_crop=True, random_flip=True, fast=fast
    )

    def run() -> int:
        for first in range(0, count, 16):
            dataset[np.arange(first, min(first + 16, count))]
        return count

    return run


# -------------------------------------------------------------------------------------- convert


def _convert(arguments: argparse.Namespace) -> list[dict]:
    """Every store on one worker and on all cores; `cp -r` of the same files beside them."""
    from ds_classifier.data.convert import convert
    from ds_classifier.data.sources import open_source

    source = open_source(str(arguments.pictures))
    samples = source.splits["train"]
    megabytes = sum(sample.size() for sample in samples) / 1e6
    cores = len(os.sched_getaffinity(0))
    per_shard = max(1, min(1000, len(samples) // (4 * cores)))
    stores = {"original": _stores(0)["original"]}
    for size in arguments.image_size:
        halved = {name: store for name, store in _stores(size).items() if store.image_size}
        stores |= {f"{name}, {size} px": store for name, store in halved.items()}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")

        def write(store, workers: int) -> int:
            convert(source, out, store=store, samples_per_shard=per_shard, workers=workers)
            return len(samples)

        def copy() -> int:
            subprocess.run(["cp", "-r", arguments.pictures, out], check=True)
            return len(samples)

        runs = {("cp -r", 1): copy} if arguments.pictures.is_dir() else {}
        for name, store in stores.items():
            for workers in sorted({1, cores}):
                runs[name, workers] = lambda s=store, w=workers: write(s, w)
        rates = interleaved(
            runs, arguments.repeats, before=lambda: shutil.rmtree(out, ignore_errors=True)
        )
    return [
        {
            "store": name,
            "workers": workers,
            "images/s": rate,
            "images/s a core": rate / workers,
            "MB/s read": rate / len(samples) * megabytes,
        }
        for (name, workers), rate in rates.items()
    ]


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
            order = SampleOrder(sizes, **Settings(seed=repeat).order_kwargs())
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


# ---------------------------------------------------------------------------------------- cache

IMAGENET = dict(samples=1_281_167, shards=1024, gigabytes=138.0, global_batch=1024)


def _cache(arguments: argparse.Namespace) -> list[dict]:
    """A node's shards over an epoch: most read side by side, and how many it downloads.

    Nothing is downloaded: the positions of a node's 8 ranks are followed through the order. Where
    there are several nodes, four of them stand for all.
    """
    from ds_classifier.data.order import SampleOrder

    samples, count = IMAGENET["samples"], IMAGENET["shards"]
    sizes = np.diff(np.arange(count + 1) * samples // count)
    gigabytes = IMAGENET["gigabytes"] / count
    rows = []
    for lanes in arguments.lanes:
        for blocks in arguments.shuffle_shards:
            settings = Settings(lanes=lanes, shuffle_shards=blocks)
            order = SampleOrder(sizes, **settings.order_kwargs())
            for ranks in arguments.ranks:
                nodes = ranks // 8
                some = sorted({node * nodes // 4 for node in range(4)})
                followed = [_follow(order, np.cumsum(sizes), node, nodes) for node in some]
                peak = max(most for most, _ in followed)
                fetched = statistics.mean(visits for _, visits in followed)
                rows.append(
                    {
                        "lanes": lanes,
                        "shuffle_shards": blocks,
                        "ranks": ranks,
                        "shards side by side": peak,
                        "GB": peak * gigabytes,
                        "GB downloaded a node": fetched * gigabytes,
                        "of the data over nodes": fetched * nodes / count,
                    }
                )
    return rows


def _follow(order, ends: np.ndarray, node: int, nodes: int) -> tuple[int, int]:
    """The most shards a node reads side by side in an epoch, and how often it begins with one.

    ends: [shards] one past each one's last sample. The node has ended with a shard when a tenth of
    an epoch passes without it.
    """
    from ds_classifier.data.order import share_of_rank

    batch, samples = IMAGENET["global_batch"], IMAGENET["samples"]
    began, last, visits = {}, {}, []
    steps = samples // batch
    for step in range(steps):
        # A node's ranks lie side by side, and so do their shares.
        positions = share_of_rank(order, step, global_batch=batch, rank=node, world_size=nodes)
        read = np.searchsorted(ends, order.samples(positions), side="right")
        for shard in np.unique(read).tolist():
            if shard in last and step - last[shard] > steps // 10:
                visits.append((began.pop(shard), last[shard]))
            began.setdefault(shard, step)
            last[shard] = step
    visits += [(first, last[shard]) for shard, first in began.items()]
    change = np.zeros(steps + 1, dtype=int)
    for first, end in visits:
        change[first] += 1
        change[end + 1] -= 1
    return int(np.cumsum(change).max()), len(visits)


# --------------------------------------------------------------------------------------- memory


def _memory(arguments: argparse.Namespace) -> list[dict]:
    """8 workers on an index of ImageNet's size and on one of a billion; its rows name one picture.

    own: what a worker shares with nobody, the index's cached pages not counted; the largest of 8.
    """
    from ds_classifier.data.loader import ShardDataset, create_loader
    from ds_classifier.data.order import SampleOrder

    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")
    workers, batch = 8, 64
    rows = []
    for samples, count in ((1_281_167, 1024), (1_000_000_000, 200_000)):
        positions = np.arange(arguments.repeats * 50 * workers * batch).reshape(-1, batch)
        early, late = len(positions) // 10, len(positions) - 5 * workers  # all 8 are still alive
        with tempfile.TemporaryDirectory() as folder:
            sizes = np.diff(np.arange(count + 1) * samples // count).tolist()
            order = SampleOrder(sizes, **Settings().order_kwargs())
            touched = np.concatenate([order.samples(some) for some in positions])
            shards = made_up_shards(Path(folder), sizes, touched)
            dataset = ShardDataset(shards, image_size=64, order=order, random_crop=True)
            batches = iter(create_loader(dataset, positions, workers=workers))
            largest = {}
            for number, _ in enumerate(batches):
                if number in (early, late):
                    index = shards.index.filename
                    facts = [
                        memory_of(worker.pid, index) for worker in multiprocessing.active_children()
                    ]
                    largest[number] = [max(column) / 1e6 for column in zip(*facts, strict=True)]
        rows.append(
            {
                "samples": f"{samples:,}",
                "shards": f"{count:,}",
                "index MB": samples * shards.index.itemsize / 1e6,
                f"own MB a worker after {early * batch:,} pictures": largest[early][0],
                f"after {late * batch:,}": largest[late][0],
                "index copied, MB": largest[late][1],
            }
        )
    return rows


def made_up_shards(folder: Path, sizes: list[int], touched: np.ndarray):
    """A split of `sizes` samples a shard, of which only rows `touched` may be read: one picture.

    Its index is as long as a real one and takes no space on disk but for those rows.
    """
    from PIL import Image

    from ds_classifier.data.images import encode
    from ds_classifier.data.shards import INDEX, INDEX_DTYPE, Manifest, Shard, ShardSet

    noise = np.random.RandomState(0).randint(0, 256, (80, 100, 3)).astype(np.uint8)
    picture = encode(Image.fromarray(noise), "jpg")
    shards = [Shard(f"train-{n:06d}.tar", k, len(picture), "0" * 64) for n, k in enumerate(sizes)]
    (folder / shards[0].name).write_bytes(picture)
    samples = sum(sizes)
    rows = np.lib.format.open_memmap(folder / INDEX, "w+", dtype=INDEX_DTYPE, shape=(samples,))
    rows["length"][touched] = len(picture)
    rows.flush()
    manifest = Manifest(
        split="train",
        source="made up",
        plan="",
        classes=["one"],
        samples=samples,
        stored="original",
        image_size=None,
        form="",
        undecodable=[],
        shards=shards,
        index_sha256="",
    )
    return ShardSet(folder, manifest, np.load(folder / INDEX, mmap_mode="r"))


def memory_of(pid: int, index: str | Path) -> tuple[int, int]:
    """Bytes that a process shares with no other, without the index file's mapping; and bytes of
    that mapping that are no longer the file's pages but copies."""
    own = copied = 0
    in_index = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if not name[0].isupper():  # a mapping begins: addresses, rights, ..., path
            in_index = line.endswith(str(index))
        elif name in ("Private_Clean", "Private_Dirty") and not in_index:
            own += 1024 * int(rest.split()[0])
        elif name == "Anonymous" and in_index:
            copied += 1024 * int(rest.split()[0])
    return own, copied


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
