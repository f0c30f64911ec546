"""Shards made by other programs that are damaged, cut or hostile."""

import re
import tarfile

import pytest
from layouts_of_others import JPG, problems, tar_of

from ds_classifier.data.scan import scan_shard
from ds_classifier.data.tars import Sequential, tar_members


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def damage() -> dict:
    """Return name -> (bytes between two samples and the end of a tar, words of the error)."""
    pax = header("x", 20, b"x") + b"20 comment=aaaaaaaa\n".ljust(512, b"\0")
    link = tarfile.TarInfo("l.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("d.jpg")
    device.type = tarfile.CHRTYPE
    flipped = bytearray(header("c.jpg", 3))
    flipped[3] ^= 1
    return {
        "parent": (header("../c.jpg", 0), "leads outside"),
        "absolute": (header("/c.jpg", 0), "leads outside"),
        "link": (link.tobuf(), "is not a file"),
        "device": (device.tobuf(), "is not a file"),
        "10 GB": (header("c.jpg", 10 << 30), "c.jpg"),
        "10 GB of header": (header("x", 10 << 30, b"x"), "a header of 10737418240 bytes"),
        "endless pax": (pax * 2000, "damaged"),
        "pax for nothing": (header("x", 600_000, b"x") + bytes(600_064) + pax, "damaged"),
        "flipped": (bytes(flipped) + b"abc".ljust(512, b"\0"), "no end-of-archive mark"),
        "negative": (header("c.jpg", 3)[:124] + b"\xff" * 12 + header("c.jpg", 3)[136:], "damaged"),
        "name twice": (header("a.jpg", 0), "appears twice"),
    }


@pytest.mark.parametrize("way", damage())
def test_damaged_and_hostile_tars(tmp_path, served_folder, way):
    """Check that the error for a file and for a URL names the shard and both counts."""
    server, far = served_folder
    blocks, words = damage()[way]
    whole = tar_of(
        far / "x.tar", [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("b.cls", b"0")]
    )
    with tarfile.open(whole) as tar:
        end = max(m.offset_data for m in tar.getmembers()) + 512
    whole.write_bytes(whole.read_bytes()[:end] + blocks + bytes(1024))
    (far / "sizes.json").write_text('{"x.tar": 3}')
    for place in (far, server.url):
        message = problems(place, tmp_path / "out")
        assert "x.tar" in message
        assert words in message
        assert re.search("samples found before: [12]; sizes.json says 3", message)
    if way != "name twice":
        with pytest.raises(ValueError, match=r"x\.tar"):
            list(scan_shard(whole))


@pytest.mark.parametrize("cut", [700, 1400, 5120, 6656 - 512])
def test_cut_tars(tmp_path, served_folder, cut):
    server, far = served_folder
    whole = tar_of(far / "x.tar", [(f"{i}.{s}", b"0") for i in range(3) for s in ("cls", "jpg")])
    whole.write_bytes(whole.read_bytes()[:cut])
    for place in (far, f"{server.url}/x.tar"):
        message = problems(place, tmp_path / "out")
        assert "x.tar" in message
        assert "samples found before: " in message


def test_compressed_shards_are_refused(tmp_path):
    tar_of(tmp_path / "x.tar.gz", [("a.jpg", JPG)], format=tarfile.GNU_FORMAT)
    for place in (tmp_path, tmp_path / "x.tar.gz"):
        assert "decompress" in problems(place, tmp_path / "out")
    with tarfile.open(tmp_path / "y.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert "compressed tar (gzip)" in problems(tmp_path / "y.tar", tmp_path / "out")


def test_memory_stays_small_for_large_headers_and_trailers(tmp_path):
    """Read headers of 30 MB and a trailer of 100 MB in pieces."""
    import tracemalloc

    class Zeros:
        def __iter__(self):
            yield header("a.jpg", 0) + header("a.cls", 0)
            for i in range(300):
                note = b"100000 comment=" + bytes([97 + i % 26]) * 99984 + b"\n"
                yield header("x", len(note), b"x") + note.ljust(196 * 512, b"\0")
                yield header(f"{i}.txt", 0)
            for _ in range(100):
                yield bytes(1 << 20)

    tracemalloc.start()
    file = Sequential(iter(Zeros()))
    assert sum(1 for _ in tar_members(file, "x", 0, None)) == 302
    assert file.arrived == 1024 + 300 * 198 * 512 + (100 << 20)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
