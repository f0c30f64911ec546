"""Shards in the layouts of timm, open_clip, img2dataset and CLIP_benchmark, for tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from ds_classifier.data.foreign.index import index

FAST = dict(stall_timeout_s=0.5, retries=3, pause_s=0.02)


def image(number: int, form: str = "JPEG") -> bytes:
    pixels = np.random.RandomState(number).randint(0, 256, (10, 12, 3)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, form, **({"lossless": True} if form == "WEBP" else {}))
    return data.getvalue()


def label_of(number: int, classes: int = 3) -> int:
    return number * 7 % classes


def write_tar(path: Path, samples: list[dict]) -> None:
    """Write a tar as all of these programs do: webdataset's TarWriter, members sorted by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)


def timm(folder: Path, lengths=(4, 5), val_lengths=(3,)) -> Path:
    splits, number = {}, 0
    for split, counts in (("train", lengths), ("validation", val_lengths)):
        names = [f"imagenet1k-{split}-{i:04d}.tar" for i in range(len(counts))]
        for name, count in zip(names, counts, strict=True):
            samples = []
            for _ in range(count):
                key = f"n{number:08d}_{split}"
                facts = {"label": label_of(number), "filename": f"{key}.JPEG", "width": 12}
                samples.append(
                    {
                        "__key__": key,
                        "jpg": image(number),
                        "cls": label_of(number),
                        "json": facts,
                    }
                )
                number += 1
            write_tar(folder / name, samples)
        splits[split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": list(counts),
            "num_samples": sum(counts),
        }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def clip_benchmark(folder: Path) -> Path:
    for split, numbers in (("train", range(23)), ("test", range(100, 105))):
        (folder / split).mkdir(parents=True)
        sink = webdataset.ShardWriter(str(folder / split / "%d.tar"), maxcount=2, verbose=0)
        for i, number in enumerate(numbers):
            sample = {"__key__": f"s{i:07d}", "webp": image(number, "WEBP")}
            sink.write(sample | {"cls": label_of(number)})
        shards = sink.shard
        sink.close()
        (folder / split / "nshards.txt").write_text(f"{shards}\n")
    (folder / "classnames.txt").write_text("tench\ncrane\ncrane\nnever seen\n")
    return folder


def img2dataset(folder: Path, counts=(3, 0, 4), label=label_of) -> Path:
    for shard, count in enumerate(counts):
        samples = []
        for i in range(count):
            number, key = shard * 100 + i, f"{shard:05d}{i:04d}"
            facts = {"caption": "an image", "key": key, "status": "success", "class": 0}
            facts["class"] = label(number)
            samples.append(
                {"__key__": key, "jpg": image(number), "txt": "an image"}
                | {"json": json.dumps(facts, indent=4)}
            )
        write_tar(folder / f"{shard:05d}.tar", samples)
        stats = {"count": count + 2, "successes": count, "failed_to_download": 2}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


def open_clip(folder: Path, counts=(2, 3)) -> Path:
    for shard, count in enumerate(counts):
        write_tar(
            folder / f"{shard:05d}.tar",
            [
                {
                    "__key__": f"{shard}/{i}",
                    "png": image(shard * 10 + i, "PNG"),
                    "cls": i % 2,
                    "txt": "a",
                }
                for i in range(count)
            ],
        )
    sizes = {f"{shard:05d}.tar": count for shard, count in enumerate(counts)}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def by_stock(tars: list[Path], label=lambda sample: int(sample["cls"])) -> dict:
    """Return key -> (image, label) as webdataset reads them."""
    found = {}
    for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False):
        data = next(sample[suffix] for suffix in ("jpg", "png", "webp") if suffix in sample)
        found[sample["__key__"]] = (data, label(sample))
    return found


def by_ours(shards) -> dict:
    """Return the same through our manifest, index and store."""
    found = {}
    for i, row in enumerate(shards.index):
        data = shards.store.read(int(row["shard"]), int(row["offset"]), int(row["length"]))
        found[shards.key(i)] = (data, int(row["label"]))
    assert len(found) == shards.manifest.samples == len(shards.index)
    return found


def problems(*arguments, **keywords) -> str:
    """Return the message of the error with which shards are refused."""
    with pytest.raises(ValueError) as error:
        index(*map(str, arguments[:1]), *arguments[1:], **keywords)
    return str(error.value)


JPG = image(0)


def tar_of(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
