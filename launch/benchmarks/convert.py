"""Images a second written to shards of every store, beside `cp` of the same files."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source

from .data import stores
from .measuring import interleaved


def measure(images: str, *, image_sizes: list[int], repeats: int) -> list[dict]:
    """Every store on one worker and on all cores; `cp -r` of the same files beside them."""
    source = open_source(images)
    samples = source.splits["train"]
    megabytes = sum(sample.size() for sample in samples) / 1e6
    cores = len(os.sched_getaffinity(0))
    per_shard = max(1, min(1000, len(samples) // (4 * cores)))
    written = {"original": stores(0)["original"]}
    for size in image_sizes:
        halved = {name: store for name, store in stores(size).items() if store.image_size}
        written |= {f"{name}, {size} px": store for name, store in halved.items()}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")

        def write(encoding, workers: int) -> int:
            convert(source, out, encoding=encoding, samples_per_shard=per_shard, workers=workers)
            return len(samples)

        def copy() -> int:
            subprocess.run(["cp", "-r", images, out], check=True)
            return len(samples)

        runs = {("cp -r", 1): copy} if Path(images).is_dir() else {}
        for name, store in written.items():
            for workers in sorted({1, cores}):
                runs[name, workers] = lambda s=store, w=workers: write(s, w)
        rates = interleaved(runs, repeats, before=lambda: shutil.rmtree(out, ignore_errors=True))
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
