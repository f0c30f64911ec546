"""Files next to shards that are no shards: checksums, indexes of other tools, hidden files."""

import json

import pytest
from layouts_of_others import by_ours, by_stock, clip_benchmark, img2dataset, open_clip, problems

from ds_classifier.data.foreign.index import index
from ds_classifier.data.shards import open_shards

SIDECARS = [
    "00000.tar.idx",
    "00000.tar.md5",
    "00000.tar.sha256",
    "00000.tar.json",
    "00000.tar.part",
    "00000.tar~",
    "00000.idx",
    "index.sqlite",
    "SHA256SUMS",
    "._00000.tar",
    ".00000.tar.swp",
    ".info.yaml",
]


def add_sidecars(folder):
    for name in SIDECARS:
        (folder / name).write_bytes(b"no tar")
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / "00000.tar").write_bytes(b"no tar")
    (folder / "00000.unpacked.tar").mkdir()


@pytest.mark.parametrize(
    "place", ["", "00000.tar", "{00000..00001}.tar", "0000{0,1}.{tar,tar.idx}"]
)
def test_files_that_are_no_tars_are_no_shards(tmp_path, place):
    folder = open_clip(tmp_path / "a")
    tars = sorted(folder.glob("*.tar"))[: 1 if place == "00000.tar" else 2]
    stock = by_stock(tars)
    add_sidecars(folder)
    sizes = json.loads((folder / "sizes.json").read_text())
    (folder / "sizes.json").write_text(json.dumps(sizes | dict.fromkeys(SIDECARS, 0)))
    index(str(folder / place), tmp_path / "out")
    shards = open_shards(tmp_path / "out/train")
    assert [shard.name for shard in shards.manifest.shards] == [tar.name for tar in tars]
    assert by_ours(shards) == stock


def test_a_listing_behind_a_url_may_name_them_too(served_folder, tmp_path):
    server, far = served_folder
    open_clip(far)
    sizes = json.loads((far / "sizes.json").read_text())
    (far / "sizes.json").write_text(json.dumps(dict.fromkeys(SIDECARS, 0) | sizes))
    index(server.url, tmp_path / "out")
    assert [asked for asked, _ in server.requests if asked in SIDECARS] == []
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert [shard["name"] for shard in manifest["shards"]] == ["00000.tar", "00001.tar"]


def test_the_metadata_of_img2dataset_and_clip_benchmark(tmp_path):
    add_sidecars(img2dataset(tmp_path / "i2d"))
    (tmp_path / "i2d/._00000_stats.json").write_bytes(b"left by macOS")
    found = index(str(tmp_path / "i2d"), tmp_path / "o1", labels="json:class")
    assert found["train"].manifest.samples == 7
    clip_benchmark(tmp_path / "clip")
    add_sidecars(tmp_path / "clip/train")
    found = index(str(tmp_path / "clip"), tmp_path / "o2")
    assert found["train"].checked_by == "nshards.txt"
    assert found["train"].manifest.samples == 23


def test_a_pattern_without_any_tar_and_compressed_tars_are_refused(tmp_path):
    folder = open_clip(tmp_path / "a")
    add_sidecars(folder)
    message = problems(folder / "0000{0,1}.tar.idx", tmp_path / "out")
    assert "need names that end in .tar" in message
    (folder / "00000.tar").rename(folder / "00000.tar.zst")
    (folder / "00001.tar").rename(folder / "00001.tar.zst")
    (folder / "sizes.json").unlink()
    assert "00000.tar.zst; need plain .tar" in problems(folder, tmp_path / "out")
