"""A split at a URL: it gives the same batches as a directory, and its files are not trusted."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import (
    FAST,
    bytes_in,
    serving,
    wait_until,
)

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import DataSource, open_source
from ds_classifier.data.loader import (
    ShardDataset,
    TrainingPositions,
    ValidationPositions,
    create_loader,
)
from ds_classifier.data.order import SampleOrder
from ds_classifier.data.shards import Manifest, Shard, open_shards
from ds_classifier.data.splits import open_named, open_split


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    """Convert the digits to shards of a few dozen images."""
    out = tmp_path_factory.mktemp("many")
    digits = open_source("digits")
    val = DataSource("digits", digits.classes, {"val": digits.splits["val"]})
    convert(val, out, samples_per_shard=50)
    return out / "val"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_data_from_a_url_is_that_of_the_directory(
    many_shards, tmp_path, workers, monkeypatch
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    near = open_shards(many_shards)
    assert len(near.manifest.shards) > 3
    positions = ValidationPositions(near.manifest.samples, batch=50, rank=0, world_size=1)
    with serving(many_shards) as server:
        far = open_split(server.url, cache_dir=tmp_path, **FAST)
        assert far.manifest == near.manifest
        assert np.array_equal(far.index, near.index)
        assert far.key(100) == near.key(100)
        for ours, theirs in zip(
            create_loader(ShardDataset(far, image_size=8), positions, workers=workers),
            create_loader(ShardDataset(near, image_size=8), positions, workers=0),
            strict=True,
        ):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
        open_split(server.url, cache_dir=tmp_path, **FAST)
        assert {server.count(s.name) for s in near.manifest.shards} == {1}
        assert (server.count("index.npy"), server.count("manifest.json")) == (1, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_an_epoch_are_fetched_ahead_once_and_within_the_budget(
    many_shards, tmp_path, workers, monkeypatch
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    near = open_shards(many_shards)
    sizes = [shard.samples for shard in near.manifest.shards]
    largest = max(shard.bytes for shard in near.manifest.shards)
    order = SampleOrder(sizes, seed=0, lanes=2, shuffle_shards=1)
    shape = dict(first_step=0, global_batch=12, micro_batch=12, rank=0, world_size=1)
    batches = TrainingPositions(order, steps=order.num_samples // 12, **shape)
    begins = order.open_shards(np.arange(order.num_samples))  # in the order of their first use
    with serving(many_shards) as server:
        budget = dict(budget_bytes=5 * largest)
        far = open_split(server.url, cache_dir=tmp_path, **budget, **FAST)
        options = dict(image_size=8, order=order)
        loader = create_loader(
            ShardDataset(far, batches=batches, **options), batches, workers=workers, prefetch=1
        )
        local = iter(create_loader(ShardDataset(near, **options), batches, workers=0))
        most, first = 0, {near.manifest.shards[shard].name for shard in begins[:4]}

        def here() -> set[str]:
            return {path.name for path in far.folder.glob("*.tar")}

        for step, batch in enumerate(loader):
            assert torch.equal(batch.images, next(local).images)
            if step == 0:  # the open blocks and the next ones
                wait_until(lambda: first <= here())
            most = max(most, bytes_in(far.folder, "*.tar"))
            time.sleep(0.02)
        assert 3 * largest < most <= budget["budget_bytes"]
        requests = [name for name, _ in server.requests if name.endswith(".tar")]
        assert set(requests) == {shard.name for shard in near.manifest.shards}
        assert len(requests) <= len(sizes) + order.lanes  # lanes may share a shard


def changed(split: Path, copy: Path, change) -> Path:
    """Copy a split with a changed manifest whose fingerprint is correct."""
    shutil.copytree(split, copy)
    manifest = Manifest.from_json((copy / "manifest.json").read_text())
    fields = json.loads(manifest.to_json())
    change(fields)
    for key in ("format", "version", "fingerprint"):
        fields.pop(key)
    fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
    (copy / "manifest.json").write_text(Manifest(**fields).to_json())
    return copy


def test_a_newer_index_is_not_taken_from_the_cache(many_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "far"
    shutil.copytree(many_shards, folder)
    with serving(folder) as server:
        old = open_split(server.url, cache_dir=tmp_path / "cache", **FAST)
        index = np.load(folder / "index.npy")
        index["label"] = 1
        np.save(folder / "index.npy", index)
        sha256 = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
        newer = changed(folder, tmp_path / "newer", lambda f: f.update(index_sha256=sha256))
        shutil.copy(newer / "manifest.json", folder / "manifest.json")
        new = open_split(server.url, cache_dir=tmp_path / "cache", **FAST)
    assert set(new.index["label"]) == {1} != set(old.index["label"])


def _rename(name):
    return lambda fields: fields["shards"][0].update(name=name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_rename("../../x.tar"), "leaves the directory"),
        (_rename("pipe:touch x.tar"), "shard name"),
        (_rename("index.npy"), "shard name"),
        (_rename(5), "not a manifest"),
        (lambda fields: fields["shards"][0].update(bytes=-1), "not a manifest"),
        (
            lambda fields: fields["shards"].append(fields["shards"][0]),
            "two shards with the same name",
        ),
        (lambda fields: fields.update(index_sha256="0" * 64), "got sha256"),
        (lambda fields: fields.update(samples=7), "index.npy: got no whole file"),
    ],
)
def test_hostile_manifests_are_refused(many_shards, tmp_path, monkeypatch, change, reason):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = changed(many_shards, tmp_path / "far", change)
    with (
        serving(folder) as server,
        pytest.raises((ValueError, OSError), match=reason),
    ):
        open_split(server.url, cache_dir=tmp_path / "cache", **FAST)
    assert not [path for path in (tmp_path / "cache").glob("**/*.tar")]


def test_a_split_that_is_not_served_is_a_usage_error(served_store, tmp_path):
    """A wrong address raises ValueError, which ends with exit code 2; a broken server does not."""
    server, _, _ = served_store
    named = dict(cache_dir=str(tmp_path / "cache"), cache_gb=1.0, image_size=8)
    with pytest.raises(ValueError, match="1 try; last error: HTTP 404") as error:
        open_named(f"{server.url}/nowhere", **named)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"1 try; last error: .*/manifest.json: No such file"):
        open_named(f"file:{tmp_path}/nowhere", **named)
