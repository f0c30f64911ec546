"""Samples whose members are not next to each other, and keys that begin anew in each shard."""

import random
import tarfile
import tracemalloc

import pytest
import webdataset
from layouts_of_others import by_ours, by_stock, image, problems, tar_of, write_tar

from ds_classifier.data.foreign.index import index
from ds_classifier.data.foreign.verify import verify
from ds_classifier.data.scan import scan_samples, scan_shard
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import open_split
from ds_classifier.data.tars import Sequential

KEYS = [f"{i:03d}" for i in range(30)]
FILES = {
    "png": {k: image(int(k), "PNG") for k in KEYS},
    "cls": {k: b"%d" % (int(k) % 3) for k in KEYS},
}
FILES["txt"] = dict.fromkeys(KEYS, b"a caption")


def members(order: str) -> list[tuple[str, bytes]]:
    """Return the members of KEYS in an order, as `tar cf x.tar` has them for some arguments."""
    if order == "shuffled":
        suffixes, keys = list(FILES), KEYS
        names = [(s, k) for s in suffixes for k in keys]
        random.Random(0).shuffle(names)
    elif order == "*":
        names = [(s, k) for k in KEYS for s in ("cls", "png", "txt")]
    else:
        names = [(s, k) for s in order.split() for k in KEYS]
    return [(f"{k}.{s}", FILES[s][k]) for s, k in names]


def by_tarfile(tars) -> dict:
    """Return key -> (image, label), joined from all members that tarfile lists."""
    found = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return {key: (sample["png"], int(sample["cls"])) for key, sample in found.items()}


@pytest.mark.parametrize("order", ["*", "cls png", "png txt cls", "shuffled"])
def test_samples_are_joined_by_their_keys(tmp_path, served_folder, order):
    server, far = served_folder
    tar = tar_of(far / "x.tar", members(order))
    for place in (tar, f"{server.url}/x.tar"):
        out = tmp_path / ("far" if place != tar else "near")
        index(str(place), out)
        shards = open_split(str(out / "train"), cache_dir=tmp_path / "cache")
        assert by_ours(shards) == by_tarfile([tar])
        assert verify(out / "train", check_hash=True, check_decode=True) == []
    if order == "*":  # stock WebDataset joins neighbours only
        assert by_ours(shards) == by_stock([tar])
        assert [shards.key(i) for i in range(30)] == KEYS


def test_incomplete_and_repeated_samples_are_found_behind_the_joined_ones(tmp_path):
    rest = [m for m in members("cls png") if m[0] not in ("003.png", "007.cls")]
    tar = tar_of(tmp_path / "x.tar", [*rest, ("009.jpg", image(1))])
    message = problems(tar, tmp_path / "out")
    assert "x.tar: 003 has a label but no image" in message
    assert "x.tar: 007 has an image but no .cls" in message
    assert "x.tar: 009 appears twice" in message
    assert len([line for line in message.splitlines() if "x.tar: " in line]) == 3


def test_a_cut_tar_is_named_alone(tmp_path):
    """Report the cut, not the samples that wait for the members behind it."""
    tar = tar_of(tmp_path / "x.tar", members("cls png"))
    tar.write_bytes(tar.read_bytes()[: 40 * 1024])
    message = problems(tar, tmp_path / "out")
    assert "cut short" in message
    assert "no image" not in message
    assert len(message.splitlines()) == 2


def test_memory_for_samples_that_wait():
    """Check that a sample that waits takes less than 1 KB: 100 MB for 100,000 of them."""

    class Members:
        def __iter__(self):
            for suffix in ("cls", "jpg"):
                for i in range(5000):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = 1
                    yield member.tobuf(tarfile.USTAR_FORMAT) + b"1" + bytes(511)
            yield bytes(1024)

    tracemalloc.start()
    found = scan_samples(Sequential(iter(Members())), "x", None, report=pytest.fail)
    assert sum(1 for _ in found) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5000 * 1000


def anew(folder, shards=3, start=0):
    """Write shards whose keys begin anew, with webdataset's own writer."""
    for shard in range(shards):
        samples = [
            {"__key__": f"{i:06d}", "png": image(10 * shard + i, "PNG"), "cls": (shard + i) % 2}
            for i in range(4)
        ]
        write_tar(folder / f"s-{shard + start}.tar", samples)
    return folder


def test_the_shard_is_part_of_keys_that_begin_anew(tmp_path):
    folder = anew(tmp_path / "a")
    found = index(str(folder), tmp_path / "out")
    assert found["train"].manifest.shard_keys
    shards = open_shards(tmp_path / "out/train")
    stock = {
        f"s-{n}/{sample['__key__']}": (sample["png"], int(sample["cls"]))
        for n in range(3)
        for sample in webdataset.WebDataset([str(folder / f"s-{n}.tar")], shardshuffle=False)
    }
    assert by_ours(shards) == stock
    assert len(stock) == 12
    assert verify(tmp_path / "out/train", check_hash=True, check_decode=True) == []
    (folder / "s-1.tar").write_bytes((folder / "s-0.tar").read_bytes())
    assert any("are not the 4 of the index" in p for p in verify(tmp_path / "out/train"))


def test_keys_that_are_in_one_shard_only_stay_as_they_are(tmp_path):
    folder = anew(tmp_path / "a", shards=1)
    index(str(folder), tmp_path / "out")
    path = tmp_path / "out/train/manifest.json"
    assert open_shards(path.parent).key(2) == "000002"
    text = path.read_text()
    assert '"shard_keys": false' in text
    path.write_text(text.replace(' "shard_keys": false,\n', ""))  # as version 0.1 writes it
    assert open_shards(path.parent).key(2) == "000002"
    assert verify(path.parent) == []
    path.write_text(text.replace('"shard_keys": false', '"shard_keys": 1'))
    with pytest.raises(ValueError, match="shard_keys that are neither true nor false"):
        open_shards(path.parent)


def test_the_order_of_samples_in_shards_of_version_0_1_is_kept(tmp_path):
    """Keep the rows of an index: samples in the order of the tar, with members that are skipped."""
    order = random.Random(1).sample(KEYS, len(KEYS))
    names = [(k, s) for k in order for s in random.Random(k).sample(["png", "cls", "txt"], 3)]
    tar = tar_of(tmp_path / "x.tar", [(f"{k}.{s}", FILES[s][k]) for k, s in names])
    assert [sample.key for sample in scan_shard(tar)] == order
