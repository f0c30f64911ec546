"""Verification of shards behind a URL, compared with that of the same files."""

import shutil
import subprocess
import sys
import time

import pytest
from flaky_server import FlakyServer
from running import ROOT, environment, run_python

from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import image_folder
from ds_classifier.data.foreign.index import index
from ds_classifier.data.foreign.verify import verify
from ds_classifier.data.remote import fetch
from ds_classifier.data.shards import open_shards


@pytest.fixture
def far(folder, tmp_path, monkeypatch):
    """Serve a split of three shards at a URL, and yield (server, directory)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    convert(image_folder(folder), tmp_path / "far", samples_per_shard=5)
    server = FlakyServer(tmp_path / "far/train")
    yield server, tmp_path / "far/train"
    server.close()
    assert not list((tmp_path / "tmp").iterdir()), "a download was not removed"


def cut(tar):
    tar.write_bytes(tar.read_bytes()[:5120])


def lengthen(tar):
    tar.write_bytes(tar.read_bytes() + bytes(512))


def damage_a_header(tar):
    data = tar.read_bytes()
    at = data.index(b".cls\0") // 512 * 512
    tar.write_bytes(data[:at] + bytes(512) + data[at + 512 :])


def damage_an_image(tar):
    data = bytearray(tar.read_bytes())
    data[data.index(b"IDAT") + 9] ^= 0xFF
    tar.write_bytes(data)


def swap(tar):
    shutil.copy(tar.with_name("train-000000.tar"), tar)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("damage", [cut, lengthen, damage_a_header, damage_an_image, swap])
def test_problems_at_a_url_are_those_of_the_files(far, damage, decode):
    server, folder = far
    assert verify(server.url, check_decode=decode, workers=2) == []
    damage(folder / "train-000001.tar")
    here = verify(folder, check_hash=True, check_decode=decode)
    assert here, "the damage has no effect"
    there = verify(server.url, check_decode=decode)
    assert there == [problem.replace(str(folder), server.url) for problem in here]


def test_a_local_manifest_of_shards_at_a_url(far, tmp_path):
    server, folder = far
    for number in range(3):
        (folder / f"{number}.tar").write_bytes((folder / f"train-{number:06d}.tar").read_bytes())
    index(f"{server.url}/{{0..2}}.tar", tmp_path / "out")
    split = tmp_path / "out/train"
    with pytest.raises(ValueError, match="need them on this machine"):
        open_shards(split)
    server.requests.clear()
    seen = []
    assert verify(split, progress=lambda *counts: seen.append(counts)) == []
    assert seen == [(5, 15), (10, 15), (15, 15)]
    assert server.requests == [(f"{number}.tar", None) for number in range(3)]
    damage_an_image(folder / "1.tar")
    (problem,) = verify(split)
    assert problem == f"{server.url}/1.tar: its sha256 is not the manifest's"


def test_a_broken_connection_is_no_problem_but_a_missing_shard_is(far):
    server, folder = far
    server.faults["train-000000.tar"] = ["reset", 500]
    assert verify(server.url) == []
    (folder / "train-000002.tar").unlink()
    (problem,) = verify(server.url)
    assert problem.startswith(f"{server.url}/train-000002.tar: got no whole file in 1 try")
    assert problem.endswith(": got 0 whole samples; need 5")


def test_the_command_takes_urls(far, tmp_path):
    server, folder = far
    script = ROOT / "launch" / "make_shards.py"
    done = run_python(script, "verify", server.url, "--hash", "--decode", cwd=tmp_path)
    assert (done.code, done.output) == (0, f"{server.url}: no problems\n")
    damage_an_image(folder / "train-000001.tar")
    done = run_python(script, "verify", f"pipe:cat {folder}/{{name}}", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (1, 2), done.output
    assert "its sha256 is not the manifest's" in done.lines[0]
    done = run_python(script, "verify", f"{server.url}/nowhere", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert "HTTP 404" in done.output


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("no_ranges", [False, True])
def test_a_server_that_sends_no_length_and_disconnects(far, no_ranges, decode):
    """Ask for the rest, as the end of the connection looks like the end of the file."""
    server, _ = far
    server.no_length, server.no_ranges = True, no_ranges
    for damaged in ("train-000000.tar", "train-000002.tar"):
        server.faults[damaged] = ["close"]
    assert verify(server.url, check_decode=decode, workers=2) == []
    assert server.count("train-000000.tar") == server.count("train-000002.tar") == 2
    assert server.count("train-000001.tar") == 1


def test_a_download_that_never_completes_is_a_problem(far, monkeypatch):
    server, folder = far
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_S", 0.02)
    server.no_length = True
    server.faults["train-000001.tar"] = ["close"] * 20
    size = (folder / "train-000001.tar").stat().st_size
    (problem,) = verify(server.url)
    assert problem.startswith(f"{server.url}/train-000001.tar: got no whole file in 6 tries")
    assert f" of {size} bytes" in problem


def test_all_readable_splits_are_checked(far, tmp_path):
    server, folder = far
    damage_an_image(folder / "train-000001.tar")
    script = ROOT / "launch" / "make_shards.py"
    places = [tmp_path / "nothing", f"{server.url}/nowhere", server.url]
    done = run_python(script, "verify", *places, cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 4), done.output
    lines = "\n".join(sorted(done.lines))
    assert f"error: got {tmp_path}/nothing, which does not exist" in lines
    assert "nowhere/manifest.json: got no whole file in 1 try; last error: HTTP 404" in lines
    assert f"{server.url}/train-000001.tar: its sha256 is not the manifest's" in lines
    assert f"{server.url}: 1 problem" in lines


@pytest.mark.parametrize("workers", [1, 3])
def test_sigterm_leaves_no_files(far, tmp_path, workers):
    server, _ = far
    for number in range(3):
        server.faults[f"train-{number:06d}.tar"] = ["stall"]
    command = [sys.executable, ROOT / "launch" / "make_shards.py", "verify", server.url, "--decode"]
    process = subprocess.Popen(
        [*map(str, command), "--workers", str(workers)],
        env=environment(TMPDIR=str(tmp_path / "tmp")),
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 30
    while server.count("train-000000.tar") == 0:
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)
    assert list((tmp_path / "tmp").glob("*/tmp*")), "no download has started"
    process.terminate()
    _, output = process.communicate(timeout=20)
    assert (process.returncode, output) == (
        143,
        "stopped; run the same command again to continue\n",
    )
    assert not list((tmp_path / "tmp").iterdir())
