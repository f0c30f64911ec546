"""Memory of loader workers, for large data sets."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from ds_classifier.config import Settings
from ds_classifier.data.images import encode
from ds_classifier.data.loader import ShardDataset, create_loader
from ds_classifier.data.order import SampleOrder
from ds_classifier.data.shards import INDEX, INDEX_DTYPE, Manifest, Shard, ShardSet


def measure(*, repeats: int) -> list[dict]:
    """8 workers on an index of ImageNet's size and on one of a billion; its rows name one image.

    own: what a worker shares with nobody, the index's cached pages not counted; the largest of 8.
    """
    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")
    workers, batch = 8, 64
    rows = []
    for samples, count in ((1_281_167, 1024), (1_000_000_000, 200_000)):
        positions = np.arange(repeats * 50 * workers * batch).reshape(-1, batch)
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
                "samples": samples,
                "shards": count,
                "index MB": samples * shards.index.itemsize / 1e6,
                f"own MB a worker after {early * batch:,} images": largest[early][0],
                f"after {late * batch:,}": largest[late][0],
                "index copied, MB": largest[late][1],
            }
        )
    return rows


def made_up_shards(folder: Path, sizes: list[int], touched: np.ndarray):
    """A split of `sizes` samples a shard, of which only rows `touched` may be read: one image.

    Its index is as long as a real one and takes no space on disk but for those rows.
    """
    noise = np.random.RandomState(0).randint(0, 256, (80, 100, 3)).astype(np.uint8)
    image = encode(Image.fromarray(noise), "jpg")
    shards = [Shard(f"train-{n:06d}.tar", k, len(image), "0" * 64) for n, k in enumerate(sizes)]
    (folder / shards[0].name).write_bytes(image)
    samples = sum(sizes)
    rows = np.lib.format.open_memmap(folder / INDEX, "w+", dtype=INDEX_DTYPE, shape=(samples,))
    rows["length"][touched] = len(image)
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
