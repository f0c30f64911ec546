"""Shards with an index of any length, and the memory of a loader worker that reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ds_classifier.data.images import encode
from ds_classifier.data.shards import INDEX, INDEX_DTYPE, Manifest, Shard, ShardSet


def made_up_shards(folder: Path, sizes: list[int], touched: np.ndarray) -> ShardSet:
    """Return a split whose index is as long as a real one, but sparse on disk.

    sizes: samples per shard. touched: the rows that may be read; each names the same image.
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
    """Return two numbers of bytes: the process's private memory, and its copied index pages.

    The first leaves out the mapping of the index file; the second counts pages of that mapping that
    are no longer the file's but copies.
    """
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
