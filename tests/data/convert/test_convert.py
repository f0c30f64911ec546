"""Conversion: reproducible bytes, complete or absent splits, and the pixels of each encoding."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from made import make_images
from PIL import Image
from running import ROOT, environment, run_python

from ds_classifier.common.progress import Progress
from ds_classifier.data import images
from ds_classifier.data.convert import convert as conversion
from ds_classifier.data.convert.convert import Encoding, convert, merge
from ds_classifier.data.convert.sources import DataSource, Sample, image_folder, open_source
from ds_classifier.data.foreign.verify import verify
from ds_classifier.data.loader import ShardDataset
from ds_classifier.data.shards import open_shards

MAKE_SHARDS = ROOT / "launch" / "make_shards.py"


def tree_digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_conversion_is_deterministic(folder, tmp_path):
    for out in ("one", "two"):
        convert(image_folder(folder), tmp_path / out, samples_per_shard=4)
    assert tree_digest(tmp_path / "one" / "train") == tree_digest(tmp_path / "two" / "train")
    convert(image_folder(folder), tmp_path / "other", samples_per_shard=4, shuffle_seed=1)
    assert tree_digest(tmp_path / "one" / "train") != tree_digest(tmp_path / "other" / "train")


def test_converting_again_writes_nothing_and_another_source_is_refused(folder, tmp_path):
    convert(image_folder(folder), tmp_path / "data")
    before = os.stat(tmp_path / "data" / "train" / "index.npy").st_mtime_ns
    convert(image_folder(folder), tmp_path / "data")
    assert os.stat(tmp_path / "data" / "train" / "index.npy").st_mtime_ns == before
    make_images(folder, ["cat/new.png"])
    with pytest.raises(ValueError, match="already holds something else"):
        convert(image_folder(folder), tmp_path / "data")


@pytest.mark.parametrize("lost", ["train-000001.tar", "index.npy", "manifest.json"])
def test_the_advice_for_a_damaged_split_restores_it(many, tmp_path, lost):
    """Opening and converting again give the same advice, and following it once is enough."""
    source, out = image_folder(many), tmp_path / "data"
    convert(source, out, samples_per_shard=50)
    before = tree_digest(out / "train")
    if lost == "manifest.json":
        (out / "train" / lost).write_text("{}")
    else:
        (out / "train" / lost).unlink()
    for attempt in (
        lambda: open_shards(out / "train"),
        lambda: convert(source, out, samples_per_shard=50),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        advice = f"remove {out / 'train'} and give the command that made it again"
        assert str(error.value).endswith(advice)
    shutil.rmtree(out / "train")
    convert(source, out, samples_per_shard=50)
    assert tree_digest(out / "train") == before


def test_a_killed_conversion_leaves_nothing_under_a_final_name(folder, tmp_path):
    convert_some(image_folder(folder), tmp_path / "data", 1)
    assert not (tmp_path / "data" / "train").exists()
    convert(image_folder(folder), tmp_path / "data", samples_per_shard=4)
    convert(image_folder(folder), tmp_path / "undisturbed", samples_per_shard=4)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["train"]
    assert tree_digest(tmp_path / "data" / "train") == tree_digest(tmp_path / "undisturbed/train")


def test_format_by_content_not_by_name(tmp_path):
    mixed = make_images(tmp_path / "mixed", ["a/1.png", "b/1.jpg"])
    (mixed / "a/1.png").rename(mixed / "a/1.JPEG")
    convert(image_folder(mixed), tmp_path / "data")
    with tarfile.open(tmp_path / "data/train/train-000000.tar") as tar:
        suffixes = {name.partition(".")[2] for name in tar.getnames()}
        assert all(member.mtime == 0 for member in tar)
    assert suffixes == {"png", "jpg", "cls"}


def test_keys_have_no_dots_and_stay_unique():
    assert conversion._key(3, "dir/some.pic.v2.JPEG") == "000000003_some_pic_v2"
    assert "." not in conversion._key(4, "ünïcode..png")


def test_same_bytes_for_any_number_of_processes_and_machines(many, tmp_path):
    source = image_folder(many)
    convert(source, tmp_path / "one", samples_per_shard=9)
    convert(source, tmp_path / "three", samples_per_shard=9, workers=3)
    for i in (2, 0, 1):
        convert(source, tmp_path / "parts", samples_per_shard=9, workers=2, part=(i, 3))
        assert not (tmp_path / "parts" / "train").exists()
    assert merge(tmp_path / "parts") == ["train"]
    expected = tree_digest(tmp_path / "one" / "train")
    assert len(expected) == 14 + 2
    for other in ("three", "parts"):
        assert tree_digest(tmp_path / other / "train") == expected


def test_merging_names_the_shards_that_are_missing(many, tmp_path):
    convert(image_folder(many), tmp_path / "out", samples_per_shard=30, part=(0, 2))
    with pytest.raises(ValueError, match="2 of 4 shards are missing, such as train-000001"):
        merge(tmp_path / "out")


def test_a_killed_conversion_continues(many, tmp_path):
    """Kill a conversion. The second call writes the missing shards only; the bytes are the same."""
    arguments = [MAKE_SHARDS, "convert", many, tmp_path / "out", "--samples_per_shard", "2"]
    command = [sys.executable, *map(str, arguments), "--workers", "2"]
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    partial, deadline = tmp_path / "out" / "train.partial", time.monotonic() + 30
    while len(list(partial.glob("*.tar"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "train").exists()
    written = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.tar")}
    assert 5 <= len(written) < 60
    assert run_python(*arguments, cwd=tmp_path).code == 0
    for name, when in written.items():
        assert (tmp_path / "out" / "train" / name).stat().st_mtime_ns == when
    convert(image_folder(many), tmp_path / "undisturbed", samples_per_shard=2)
    assert tree_digest(tmp_path / "out/train") == tree_digest(tmp_path / "undisturbed/train")
    assert verify(tmp_path / "out" / "train", check_hash=True, check_decode=True) == []


class Stopped(BaseException):
    """A stand-in for a kill."""


def convert_some(source: DataSource, out: Path, shards: int, **keywords) -> None:
    """Convert, but stop after a number of shards with 4 samples each."""

    def stop(done, total, split):
        if split == "train" and done >= 4 * shards:
            raise Stopped

    with pytest.raises(Stopped):
        convert(source, out, samples_per_shard=4, progress=stop, **keywords)


def test_continuing_rewrites_shards_whose_images_have_changed(tmp_path):
    """Replace an image by one of the same size with an older date before the second call."""
    many = tmp_path / "bmp"
    make_images(many, [f"c{i % 3}/{i:02d}.bmp" for i in range(20)])  # all of the same size
    source = image_folder(many)
    convert_some(source, tmp_path / "out", 3)
    partial = tmp_path / "out" / "train.partial"
    before = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.tar")}
    keys = {tar: tarfile.open(partial / tar).getnames()[0] for tar in before}
    tar, first = min(keys.items())
    old = next(p for p in many.rglob("*.bmp") if p.stem == first.split("_")[1].split(".")[0])
    new = next(p for p in many.rglob("*.bmp") if p.read_bytes() != old.read_bytes())
    data, stat = new.read_bytes(), old.stat()
    assert len(data) == stat.st_size
    old.write_bytes(data)
    os.utime(old, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**12))
    convert(image_folder(many), tmp_path / "out", samples_per_shard=4)
    convert(image_folder(many), tmp_path / "undisturbed", samples_per_shard=4)
    assert tree_digest(tmp_path / "out/train") == tree_digest(tmp_path / "undisturbed/train")
    kept = {t for t in before if (tmp_path / "out/train" / t).stat().st_mtime_ns == before[t]}
    assert kept == set(before) - {tar}


def test_a_shuffled_parquet_is_read_once(tmp_path, monkeypatch):
    """Check that row groups are read once for any number of processes, parts and kills."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    from ds_classifier.data.convert.readers import parquet

    reads = tmp_path / "reads"
    untouched = parquet._cells

    def counted(path, column, first=0, last=None):
        if last is not None:
            with open(reads, "a") as file:
                file.write(f"{first}\n")
        return untouched(path, column, first, last)

    monkeypatch.setattr(parquet, "_cells", counted)
    cells = [b"GIF8" + np.random.RandomState(i).bytes(50 + i) for i in range(60)]
    table = pa.table({"image": cells, "label": [i % 3 for i in range(60)]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=6)

    def bytes_of(out: Path, **keywords) -> dict[str, str]:
        reads.write_text("")
        parquet._row_group.cache_clear()
        convert(open_source(str(tmp_path / "t.parquet")), out, samples_per_shard=4, **keywords)
        partial = out / "train.partial"
        assert not list(partial.glob("spool-*"))
        return {} if partial.exists() else tree_digest(out / "train")

    def groups_read() -> int:
        return len(reads.read_text().split())

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "spool_groups", lambda samples, *_: samples)
        expected = bytes_of(tmp_path / "one_by_one")
        assert groups_read() > 40
    assert bytes_of(tmp_path / "one") == expected
    assert groups_read() == 10
    assert bytes_of(tmp_path / "three", workers=3) == expected
    assert groups_read() <= 10 + 2
    for i in (1, 0):
        bytes_of(tmp_path / "parts", part=(i, 2))
        assert groups_read() <= 10
    leftover = tmp_path / "parts/train.partial/spool-1-2"
    leftover.mkdir()
    (leftover / "0.bytes").write_bytes(b"of a kill")
    assert merge(tmp_path / "parts") == ["train"]
    assert tree_digest(tmp_path / "parts" / "train") == expected
    convert_some(open_source(str(tmp_path / "t.parquet")), tmp_path / "killed", 9)
    assert bytes_of(tmp_path / "killed") == expected


def test_shards_of_halved_shards_stay_halved(tmp_path):
    """Check that converted shards are marked, can be halved further, but not undo the halving."""
    convert(large_images(), tmp_path / "a", encoding=Encoding(64, "png"))
    convert(open_source(str(tmp_path / "a")), tmp_path / "b")
    for split in ("train", "val"):
        first, again = (open_shards(tmp_path / name / split) for name in "ab")
        for key in ("stored", "image_size", "form"):
            assert getattr(again.manifest, key) == getattr(first.manifest, key)
    assert np.array_equal(crops(tmp_path / "b/val", 64), crops(tmp_path / "a/val", 64))
    convert(open_source(str(tmp_path / "b")), tmp_path / "c", encoding=Encoding(32, "png"))
    convert(large_images(), tmp_path / "direct", encoding=Encoding(32, "png"))
    assert open_shards(tmp_path / "c/val").manifest.image_size == 32
    assert np.array_equal(crops(tmp_path / "c/val", 32), crops(tmp_path / "direct/val", 32))
    with pytest.raises(ValueError, match=r"got halved for 65 px.*are halved for 64 px, png"):
        convert(open_source(str(tmp_path / "b")), tmp_path / "d", encoding=Encoding(65, "png"))
    convert(large_images(), tmp_path / "jpg", encoding=Encoding(32))
    with pytest.raises(ValueError, match="are halved for 32 px, jpg"):
        convert(open_source(str(tmp_path / "jpg")), tmp_path / "d", encoding=Encoding(32, "png"))
    with pytest.raises(ValueError, match="splits with different halving"):
        open_source(str(tmp_path / "a/train"), str(tmp_path / "c/val"))


def test_a_full_disk_is_an_error_that_names_the_file(many, tmp_path):
    """Limit files to 8 KB in place of a full disk. The same call continues without the limit."""
    arguments = [MAKE_SHARDS, "convert", many, tmp_path / "out", "--samples_per_shard", "30"]
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
    limit += (
        f"sys.argv = {[str(a) for a in arguments]}; runpy.run_path(sys.argv[0], None, '__main__')"
    )
    done = run_python("-c", limit, cwd=tmp_path)
    assert done.code == 2
    assert done.lines[-1].startswith("error: ")
    assert "train.partial/train-00000" in done.lines[-1]
    assert len(done.lines) == 1
    assert not (tmp_path / "out" / "train").exists()
    convert(image_folder(many), tmp_path / "out", samples_per_shard=30)
    convert(image_folder(many), tmp_path / "undisturbed", samples_per_shard=30)
    assert tree_digest(tmp_path / "out/train") == tree_digest(tmp_path / "undisturbed/train")


BOMBS = """
import resource, struct, sys, zlib
from ds_classifier.common.progress import Progress
from ds_classifier.data import images
from PIL import Image
Image.init()

def png(width, height, *chunks):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
             for t, d in parts]
    return b"\\x89PNG\\r\\n\\x1a\\n" + b"".join(parts)

zeros = zlib.compressobj(1)
bomb = b"".join(zeros.compress(bytes(1 << 24)) for _ in range(16)) + zeros.flush()  # 256 MB
line = zlib.compress(bytes(31 * 10))
bombs = {
    "pixels": png(20000, 20000, (b"IDAT", bomb)),  # 400 megapixels
    "data": png(10, 10, (b"IDAT", bomb)),  # more than its pixels
    "text": png(10, 10, (b"zTXt", b"k\\0\\0" + bomb), (b"IDAT", line)),
    "profile": png(10, 10, (b"iCCP", b"k\\0\\0" + bomb), (b"IDAT", line)),
}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in bombs.items():
    try:
        print(name, images.decode(data).size)
    except ValueError as error:
        print(name, "refused")
print("grown by MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_compressed_bombs_are_refused_in_little_memory(tmp_path):
    (tmp_path / "bombs.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})" + BOMBS)
    done = run_python(tmp_path / "bombs.py", cwd=tmp_path)
    *lines, grown = done.lines
    assert lines == ["pixels refused", "data (10, 10)", "text refused", "profile refused"]
    assert int(grown.split()[-1]) < 100


def large_images() -> DataSource:
    """Return colour images of several sizes with structure, as JPEG and PNG."""
    samples = []
    for i, (width, height) in enumerate([(500, 375), (320, 480), (161, 170), (90, 70), (640, 200)]):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / (3 + i)) * np.cos(y / 7), np.sin((x + y) / 11), np.cos(x / 5 - y / 3)]
        pixels = (127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, format="JPEG" if i % 2 else "PNG")
        samples.append(Sample(f"p{i}", i, data.getvalue()))
    return DataSource("made", [str(i) for i in range(5)], {"train": samples, "val": samples})


def crops(folder: Path, size: int) -> np.ndarray:
    """Return the pixels of random crops, then of centre crops."""
    dataset = ShardDataset(open_shards(folder), image_size=size, random_crop=True, seed=3)
    centre = ShardDataset(open_shards(folder), image_size=size)
    parts = [dataset[np.arange(5)], centre[np.arange(5)]]
    return np.concatenate([part.images.numpy() for part in parts])


def test_halved_png_gives_the_same_pixels(tmp_path):
    convert(large_images(), tmp_path / "original")
    convert(large_images(), tmp_path / "halved", encoding=Encoding(32, "png"))
    original, halved = (tmp_path / name / "val" for name in ("original", "halved"))
    for size in (32, 24):  # and any smaller size
        assert np.array_equal(crops(halved, size), crops(original, size))
    sizes = [row["length"] for row in open_shards(halved).index]
    assert sizes[3] == len(large_images().splits["val"][3].content)  # too small to be halved
    assert sum(sizes) < sum(len(s.content) for s in large_images().splits["val"]) / 2


def test_halved_jpeg_gives_similar_pixels(tmp_path):
    convert(large_images(), tmp_path / "original")
    convert(large_images(), tmp_path / "halved", encoding=Encoding(32, "jpg"))
    difference = crops(tmp_path / "halved/val", 32).astype(float) - crops(
        tmp_path / "original/val", 32
    )
    decibels = 10 * np.log10(255**2 / np.mean(difference**2))
    assert decibels > 35
    manifest = open_shards(tmp_path / "halved" / "val").manifest
    assert (manifest.stored, manifest.image_size, manifest.form) == ("halved", 32, "jpg")


def test_an_image_that_cannot_be_halved_is_kept_and_listed(tmp_path):
    source = large_images()
    cut = Sample("cut", 0, source.splits["train"][0].content[:3000])
    convert(
        DataSource("made", source.classes, {"val": [cut]}), tmp_path / "out", encoding=Encoding(32)
    )
    manifest = open_shards(tmp_path / "out" / "val").manifest
    assert manifest.undecodable == ["cut"]
    batch = ShardDataset(open_shards(tmp_path / "out" / "val"), image_size=32)[np.arange(1)]
    assert batch.weights.tolist() == [0.0]


def test_halving_stops_where_the_largest_crop_would():
    for size in (16, 64, 100):
        largest = -(-size * 10 // 8)
        for side in (largest, 2 * largest - 1, 2 * largest, 3 * largest, 4 * largest, 9 * largest):
            halved = images.halve(Image.new("RGB", (side + 7, side)), size)
            left = min(halved.size) if halved else side
            assert (halved is None) == (side < 2 * largest)
            assert largest <= left < 2 * largest


def test_the_command_line_of_parts(many, tmp_path):
    for i in range(2):
        flags = ["--part", f"{i}/2", "--samples_per_shard", "50", "--image_size", "8"]
        done = run_python(MAKE_SHARDS, "convert", many, "out", *flags, cwd=tmp_path)
        assert (done.code, done.lines) == (
            0,
            [f"part {i} of 2 is written; after all parts: ds-classifier merge out"],
        )
    done = run_python(MAKE_SHARDS, "merge", "out", cwd=tmp_path)
    assert done.code == 0
    assert "120 images of 6 classes in 3 shards" in done.output
    assert "halved for 8 px, jpg" in done.output
    assert run_python(MAKE_SHARDS, "merge", "out", cwd=tmp_path).code == 2
    done = run_python(MAKE_SHARDS, "convert", many, "o", "--form", "png", cwd=tmp_path)
    assert (done.code, "without --image_size" in done.output) == (2, True)
    done = run_python(MAKE_SHARDS, "convert", many, "o", "--part", "2/2", cwd=tmp_path)
    assert done.code == 2
    assert "'2/2'" in done.output
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["samples"] == 120


def test_ctrl_c_is_one_line_and_leaves_no_process(tmp_path):
    """Interrupt the program and its workers, as a terminal does.

    Then refuse to continue with another source, which would lose the finished shards.
    """
    noise = np.random.RandomState(0).randint(0, 256, (600, 600, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "one.png", compress_level=0)
    for i in range(1500):  # ten seconds of work in one file
        path = tmp_path / "images" / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "one.png", path)
    command = [sys.executable, ROOT / "launch" / "make_shards.py", "convert", "images", "data"]
    command += ["--image_size", "32", "--samples_per_shard", "3", "--workers", "2"]
    job = subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Background jobs of a shell ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("data/train.partial/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, output) == (130, "stopped; run the same command again to continue\n")
    with pytest.raises(ProcessLookupError):  # the group is empty
        os.killpg(job.pid, 0)
    for path in (tmp_path / "images").glob("*/1*.png"):
        path.unlink()
    again = run_python(*command[1:], cwd=tmp_path)
    assert (again.code, "unfinished conversion" in again.output) == (2, True), again.output


def one_part(folder: Path, out: Path, part: tuple[int, int]) -> None:
    convert(image_folder(folder), out, samples_per_shard=5, part=part)


def test_parts_that_start_at_the_same_time(many, tmp_path):
    fork = multiprocessing.get_context("fork")
    for attempt in range(3):
        out = tmp_path / str(attempt)
        parts = [fork.Process(target=one_part, args=(many, out, (i, 4))) for i in range(4)]
        for process in parts:
            process.start()
        for process in parts:
            process.join()
        assert [process.exitcode for process in parts] == [0] * 4
        merge(out)
    one_part(many, tmp_path / "alone", (0, 1))
    assert tree_digest(tmp_path / "0/train") == tree_digest(tmp_path / "alone/train")


def test_a_merge_that_was_killed_at_its_end_continues(many, tmp_path, monkeypatch):
    one_part(many, tmp_path / "out", (0, 2))
    one_part(many, tmp_path / "out", (1, 2))

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "out")
    assert merge(tmp_path / "out") == ["train"]
    one_part(many, tmp_path / "alone", (0, 1))
    assert tree_digest(tmp_path / "out/train") == tree_digest(tmp_path / "alone/train")


def test_an_image_that_changed_after_a_killed_merge_is_in_manifest_and_index(tmp_path, monkeypatch):
    """Replace the index that the killed merge wrote from the shard before the change."""
    many = tmp_path / "bmp"
    make_images(many, [f"c{i % 3}/{i:02d}.bmp" for i in range(8)])  # all of the same size

    def killed(source, target):
        if Path(target).name == "train":
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(image_folder(many), tmp_path / "out", samples_per_shard=4)
    assert (tmp_path / "out/train.partial/manifest.json").is_file()
    old, new = sorted(many.rglob("*.bmp"))[:2]
    old.write_bytes(new.read_bytes())
    convert(image_folder(many), tmp_path / "out", samples_per_shard=4)
    convert(image_folder(many), tmp_path / "undisturbed", samples_per_shard=4)
    assert tree_digest(tmp_path / "out/train") == tree_digest(tmp_path / "undisturbed/train")
    assert verify(str(tmp_path / "out/train"), check_hash=True) == []


def test_the_rate_of_a_continued_conversion_counts_new_images_only(monkeypatch):
    """Start the bar at 90 if 90 of 100 images exist, so that they do not count for the rate."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress() as progress:
        progress(90, 100, "train")
        bar = progress._bar.format_dict
    assert (bar["n"], bar["initial"]) == (90, 90)


def test_splits_with_other_classes_are_refused(folder, many, tmp_path):
    source, other = image_folder(folder), image_folder(many)
    convert(DataSource("s", source.classes, {"val": source.splits["train"]}), tmp_path / "a")
    with pytest.raises(ValueError, match=r"a/val, with other classes.*one class list"):
        convert(other, tmp_path / "a")
    assert not (tmp_path / "a/train").exists()
    convert(source, tmp_path / "b", samples_per_shard=5, part=(0, 2))
    with pytest.raises(ValueError, match=r"train\.partial, the unfinished conversion of another"):
        convert(other, tmp_path / "b")
