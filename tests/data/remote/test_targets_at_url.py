"""Targets and weights of a split in object storage, and behind a URL."""

import json

import numpy as np
from made import make_images
from stores import FAST, serving

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.loader import ShardDataset, ValidationPositions, create_loader
from ds_classifier.data.remote.mirror import mirrored
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import open_split


def test_a_bucket_and_a_url_hold_them(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    make_images(tmp_path / "images", [f"{i:02d}.png" for i in range(11)])
    paths = sorted(str(path) for path in (tmp_path / "images").rglob("*.*"))
    rows = [
        {"path": path, "label": [["a"], ["b", "a"], []][i % 3], "w": i / 4}
        for i, path in enumerate(paths)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(
        str(tmp_path / "a.jsonl"), targets="classes", columns={"label": "label", "weight": "w"}
    )
    convert(source, tmp_path / "out", samples_per_shard=4)
    with mirrored("s3://bkt/data") as mirror:
        convert(source, mirror.folder, samples_per_shard=4, mirror=mirror)
    here = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    expected = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in here}
    assert {k.removeprefix("data/"): s3.get(k) for k in s3.names()} == expected
    near = open_shards(tmp_path / "out/train")
    positions = ValidationPositions(11, batch=4, rank=0, world_size=1)
    with serving(tmp_path / "out/train") as server:
        far = open_split(server.url, cache_dir=tmp_path / "cache", **FAST)
        assert np.array_equal(far.targets, near.targets)
        assert np.array_equal(far.sample_weights, near.sample_weights)
        for ours, theirs in zip(
            create_loader(ShardDataset(far, image_size=8), positions, workers=1),
            create_loader(ShardDataset(near, image_size=8), positions, workers=0),
            strict=True,
        ):
            assert ours.labels.tolist() == theirs.labels.tolist()
            assert ours.importance.tolist() == theirs.importance.tolist()
