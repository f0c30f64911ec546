"""Measure this machine: `python launch/benchmark.py data PICTURES`, `... order`, `... cache`.

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
        "cache", help="simulate an epoch of ImageNet from afar: what a node's cache must hold"
    )
    command.add_argument("--lanes", type=int, nargs="+", default=[16, Settings().lanes, 256])
    command.add_argument("--shuffle_shards", nargs="+", default=["1", "4"])
    command.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="8 a node")
    command.set_defaults(run=_cache)
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
        [shard.samples for shard in shards.manifest.shards], **Settings().order_kwargs()
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


if __name__ == "__main__":
    sys.exit(main())
