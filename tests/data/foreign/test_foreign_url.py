"""Shards made by other programs behind a URL, and the location in a manifest."""

import numpy as np
import pytest
from flaky_server import FlakyServer
from layouts_of_others import (
    FAST,
    by_ours,
    by_stock,
    clip_benchmark,
    img2dataset,
    open_clip,
    problems,
    rewrite,
    timm,
)

from ds_classifier.data.foreign.index import index
from ds_classifier.data.remote import fetch
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import open_split


@pytest.mark.parametrize(
    ("layout", "suffix", "checked"),
    [
        (timm, "", "_info.json"),
        (timm, "/_info.json", "_info.json"),
        (timm, "/imagenet1k-train-{0000..0001}.tar", "_info.json"),
        (clip_benchmark, "", "nshards.txt"),
        (open_clip, "/sizes.json", "sizes.json"),
        (open_clip, "/{00000..00001}.tar", "sizes.json"),
    ],
)
def test_shards_at_a_url_are_streamed_once_and_read_through_the_cache(
    served_folder, tmp_path, layout, suffix, checked
):
    server, far = served_folder
    layout(far)
    first = sorted(tar.relative_to(far).as_posix() for tar in far.rglob("*0*.tar"))[0]
    server.faults[first] = ["reset", 500]  # the download is resumed after each fault
    found = index(f"{server.url}{suffix}", tmp_path / "out", workers=2)
    assert found["train"].checked_by == checked
    assert ("val" in found) == (layout is not open_clip and not suffix.endswith(".tar"))
    ranges = [asked for name, asked in server.requests if name == first]
    assert ranges[0] is None
    assert len(ranges) == 3
    assert all(asked.startswith("bytes=") for asked in ranges[1:])
    assert not (tmp_path / "cache").exists()
    for split in found:
        shards = open_split(str(tmp_path / "out" / split), cache_dir=tmp_path / "cache", **FAST)
        theirs = far if layout is not clip_benchmark else far / {"val": "test"}.get(split, split)
        names = [theirs / shard.name for shard in shards.manifest.shards]
        assert by_ours(shards) == by_stock(names)
        assert sorted(p.name for p in shards.folder.glob("*.tar")) == sorted(p.name for p in names)
        with pytest.raises(ValueError, match="need them on this machine"):
            open_shards(tmp_path / "out" / split)


@pytest.mark.parametrize("no_ranges", [False, True])
def test_an_interrupted_stream_is_resumed(served_folder, no_ranges):
    server, far = served_folder
    content = np.random.RandomState(0).bytes(3_000_000)
    (far / "x.tar").write_bytes(content)
    server.no_ranges = no_ranges
    server.faults["x.tar"] = ["close", "reset", 500]
    patience = fetch.Patience(**FAST)
    assert b"".join(fetch.stream(f"{server.url}/x.tar", patience=patience)) == content
    assert server.count("x.tar") == 4
    if no_ranges:
        server.faults["x.tar"] = ["close", "long"]  # another length means another file
        with pytest.raises(OSError, match="was 3000000 bytes, is 3001000 now"):
            list(fetch.stream(f"{server.url}/x.tar", patience=patience))


def test_img2dataset_at_a_url(served_folder, tmp_path):
    server, far = served_folder
    img2dataset(far)
    pattern = f"{server.url}/{{00000..00002}}.tar"
    found = index(pattern, tmp_path / "out", labels="json:class")
    assert found["train"].checked_by == "NAME_stats.json"
    (far / "00002_stats.json").write_text('{"successes": 5}')
    message = problems(pattern, tmp_path / "x", labels="json:class")
    assert "00002.tar: got 4 samples; NAME_stats.json says 5" in message
    (far / "00001.tar").unlink()
    message = problems(pattern, tmp_path / "x", labels="json:class")
    assert "00001.tar: got no whole file in 1 try; last error: HTTP 404" in message


def test_urls_that_a_manifest_must_not_hold(tmp_path, served_folder):
    for url, words in (
        ("pipe:cat /tmp/{0..3}.tar", "runs a program"),
        ("x.tar::pipe:cat y.tar", "runs a program"),
        ("http://h/{0..3}.tar?token=secret", "query"),
        ("https://me:secret@h/{0..3}.tar", "password"),
        ("sftp://me:secret@h/{0..3}.tar", "password"),
        ("http://127.0.0.1:9/it's/{0..3}.tar", "as %XX"),
    ):
        message = problems(url, tmp_path / "out")
        assert words in message
        assert "secret" not in message
    with pytest.raises(OSError, match="refused"):
        index("http://127.0.0.1:9/nobody", tmp_path / "out")


def test_the_location_of_a_manifest(tmp_path, served_folder):
    server, far = served_folder
    open_clip(far)
    index(str(far), tmp_path / "near")
    index(f"{server.url}/sizes.json", tmp_path / "out")
    near, split = open_shards(tmp_path / "near/train").manifest, tmp_path / "out/train"
    cache = dict(cache_dir=tmp_path / "cache", **FAST)
    manifest = open_split(str(split), **cache).manifest
    assert manifest.location == server.url
    assert manifest.fingerprint == near.fingerprint
    for location in (
        "pipe:cat {name}",
        "PIPE:cat {name}",
        "relative/place",
        "gs://bucket/'; touch /tmp/x; '",
        "http://h/a b",
        "sftp://-oProxyCommand=x/",
        "",
        7,
    ):
        rewrite(split / "manifest.json", lambda m, location=location: m.update(location=location))
        for opener in (lambda: open_shards(split), lambda: open_split(str(split), **cache)):
            with pytest.raises(ValueError, match="not a manifest"):
                opener()
    rewrite(split / "manifest.json", lambda m: m.update(location=str(tmp_path)))
    far_split = FlakyServer(split)
    with pytest.raises(ValueError, match="need a manifest next to its shards"):
        open_split(far_split.url, **cache)
    far_split.close()
    rewrite(split / "manifest.json", lambda m: m.update(location=str(far)))
    assert by_ours(open_split(str(split), **cache)) == by_stock(sorted(far.glob("*.tar")))
