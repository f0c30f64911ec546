"""No shard in both splits: neither the same file or URL, nor one with the same bytes."""

import shutil

import pytest
from layouts_of_others import clip_benchmark, image, index, problems, write_tar


@pytest.fixture
def shards(tmp_path):
    """Return a folder with four shards of three samples."""
    for shard in range(4):
        samples = [
            {"__key__": f"{shard}_{i}", "jpg": image(3 * shard + i), "cls": i} for i in range(3)
        ]
        write_tar(tmp_path / "set" / f"s-{shard:04d}.tar", samples)
    return tmp_path / "set"


def test_a_shard_in_both_splits_is_refused(shards, tmp_path, served_folder):
    out = tmp_path / "out"
    assert "--val: got 4 shards in both splits, such as " in problems(shards, out, val=str(shards))
    first, last = f"{shards}/s-{{0000..0002}}.tar", f"{shards}/s-{{0002..0003}}.tar"
    message = problems(first, out, val=last)
    assert f"got 1 shard in both splits, such as {shards}/s-0002.tar; need" in message
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "v.tar").symlink_to(shards / "s-0001.tar")
    message = problems(shards, out, val=str(tmp_path / "linked"))
    assert f"got 1 shard in both splits, such as {shards}/s-0001.tar" in message
    server, far = served_folder
    shutil.copytree(shards, far, dirs_exist_ok=True)
    url = f"{server.url}/s-{{0000..0003}}.tar"
    assert f"got 4 shards in both splits, such as {server.url}/s-0000" in problems(
        url, out, val=url
    )
    assert not out.exists()


def test_a_split_folder_that_is_a_link_to_the_other_is_refused(tmp_path):
    folder = clip_benchmark(tmp_path / "set")
    index(str(folder), tmp_path / "out")
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to("train")
    assert "in both splits" in problems(folder, tmp_path / "again")


def test_a_copy_of_a_training_shard_is_refused_as_validation(shards, tmp_path):
    (tmp_path / "copy").mkdir()
    copy = str(shutil.copy(shards / "s-0001.tar", tmp_path / "copy" / "v.tar"))
    message = problems(shards, tmp_path / "out", val=copy)
    assert f"{tmp_path}/copy: {shards}/s-0001.tar and v.tar have the same bytes" in message
    assert not (tmp_path / "out").exists()
    apart = f"{shards}/s-{{0002..0003}}.tar"
    assert set(index(apart, tmp_path / "out", val=copy)) == {"train", "val"}
