"""Images in formats that shards do not hold: stored as PNG with equal pixels, or named."""

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from made import make_images
from PIL import Image, features

from ds_classifier.data import images
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.formats import ALL_SUFFIXES, as_png
from ds_classifier.data.convert.sources import image_folder, open_source
from launch.make_shards import main

PIXELS = np.random.RandomState(0).randint(0, 256, (12, 10, 4)).astype(np.uint8)
UNTOUCHED = ["a.jpg", "a.jpe", "a.jfif", "a.png", "a.apng", "a.webp", "a.gif", "a.bmp", "a.mpo"]
AS_PNG = {  # name -> mode
    "a.ppm": "RGB",
    "a.pgm": "L",
    "a.pbm": "1",
    "a.pnm": "RGB",
    "a.tga": "RGBA",
    "a.tif": "CMYK",
    "b.tiff": "RGB",
    "c.tif": "LA",
    "d.TIF": "YCbCr",
    "a.jp2": "RGB",
    "a.pcx": "P",
    "a.sgi": "RGB",
    "a.qoi": "RGB",
    "a.ico": "RGBA",
    "a.avif": "RGB",
    "a.icns": "RGBA",
    "a.cur": "RGBA",
    "a.dib": "RGB",
    "a.dcx": "RGB",
    "a.icb": "RGB",
    "a.bw": "L",
    "a.rgb": "RGB",
    "a.xbm": "1",
    "a.xpm": "RGB",
    "a.msp": "1",
}
NO_IMAGES = {".h5", ".hdf", ".bufr", ".grib", ".mpg", ".mpeg", ".pdf"}  # that Pillow registers
XPM = b"""/* XPM */
static char *a[] = {
"3 2 2 1",
"a c #102030",
"b c #ffee00",
"aba",
"bba"};
"""


def picture(mode: str) -> Image.Image:
    return Image.fromarray(PIXELS if mode == "RGBA" else PIXELS[..., :3]).convert(mode)


def save(path: Path, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mpo":
        picture(mode).save(path, save_all=True, append_images=[Image.new("RGB", (10, 12))])
    elif path.suffix == ".apng":
        picture(mode).save(path, "PNG", save_all=True, append_images=[Image.new("RGB", (10, 12))])
    elif path.suffix in (".ico", ".cur"):
        picture(mode).save(path, "ICO", sizes=[(10, 12)], bitmap_format="bmp")
        data = path.read_bytes()
        path.write_bytes(data[:2] + (b"\2" if path.suffix == ".cur" else b"\1") + data[3:])
    elif path.suffix == ".dcx":  # a list of offsets, then files in the format PCX
        picture(mode).save(path, "PCX")
        head = b"\xb1\x68\xde\x3a" + (12).to_bytes(4, "little") + bytes(4)
        path.write_bytes(head + path.read_bytes())
    elif path.suffix == ".xpm":
        path.write_bytes(XPM)
    elif path.suffix == ".icns":
        png = io.BytesIO()
        picture(mode).resize((16, 16)).save(png, "PNG")
        block = b"icp4" + (8 + len(png.getvalue())).to_bytes(4, "big") + png.getvalue()
        path.write_bytes(b"icns" + (8 + len(block)).to_bytes(4, "big") + block)
    else:
        picture(mode).save(path)


def stored(folder: Path) -> dict[str, bytes]:
    """Return the images in shards by the stem of their file, read by stock WebDataset."""
    tars = sorted(map(str, folder.glob("*.tar")))
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        (suffix,) = set(sample) - {"cls"} - {key for key in sample if key.startswith("__")}
        found[sample["__key__"].split("_", 1)[1]] = (suffix, sample[suffix])
    return found


def test_every_image_of_a_folder_is_stored_with_its_pixels(tmp_path):
    """Give each file a class of its own, so that no stem appears twice."""
    names = UNTOUCHED + [n for n in AS_PNG if n != "a.avif" or features.check("avif")]
    for i, name in enumerate(names):
        save(tmp_path / f"in/{i}" / f"{i}{Path(name).suffix}", AS_PNG.get(name, "RGB"))
    nameless = tmp_path / "in/0/nameless"  # a hash as a name, as many collections have it
    nameless.write_bytes((tmp_path / "in/3/3.png").read_bytes())
    (tmp_path / "in/0/notes.txt").write_text("P5 is not an image here")
    (tmp_path / "in/0/readme").write_text("BM is a brand")
    convert(open_source(str(tmp_path / "in")), tmp_path / "out")
    found = stored(tmp_path / "out/train")
    assert set(found) == {*map(str, range(len(names))), "nameless"}
    for i, name in enumerate(names):
        suffix, data = found[str(i)]
        file = tmp_path / f"in/{i}" / f"{i}{Path(name).suffix}"
        if name in UNTOUCHED:
            assert data == file.read_bytes(), name
        else:
            assert suffix == "png"
        with Image.open(file) as original:  # Pillow's own choice of plugin and mode
            expected = np.asarray(original.convert("RGB"))
        assert np.array_equal(np.asarray(images.decode(data)), expected), name


@pytest.mark.parametrize("name", ["16.tif", "16.pgm", "big-endian.tif"])
def test_grey_of_16_bits_keeps_them(tmp_path, name):
    pixels = np.random.RandomState(1).randint(0, 65536, (12, 10)).astype(np.uint16)
    path = tmp_path / name
    if name == "big-endian.tif":
        Image.frombytes("I;16B", (10, 12), pixels.astype(">u2").tobytes()).save(path)
    elif name == "16.pgm":
        path.write_bytes(b"P5 10 12 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(path)
    with Image.open(io.BytesIO(as_png(path.read_bytes(), name))) as stored_image:
        assert np.array_equal(np.asarray(stored_image), pixels)


def test_every_suffix_of_pillow_is_read_or_named():
    Image.init()
    assert not set(Image.registered_extensions()) - set(ALL_SUFFIXES) - NO_IMAGES


def test_what_is_left_out_is_counted_by_suffix(tmp_path, capsys):
    """Take what begins or ends like an image, count the rest; sidecars and hidden files are not."""
    folder = make_images(tmp_path / "in", ["cat/a.png", "dog/b.png"])
    save(folder / "cat/tga.tga", "RGB")
    save(folder / "cat/pcx.pcx", "RGB")
    (folder / "cat/tga.tga").rename(folder / "cat/tga.dat")
    (folder / "cat/pcx.pcx").rename(folder / "cat/pcx.dat")
    left = {
        "cat/d.bin": b"\xff\x0a" + bytes(40),  # the first bytes of JPEG XL
        "cat/e.bin": b"\x0a\x05\x01\x08" + bytes(200),  # and of PCX
        "dog/f.foo": b"P5 is not it",
        "dog/scores": b"P1 10 of 20",
        "dog/g.npz": b"PK",
        "h.zip": b"PK",
        "cat/inner/i.tar": b"",
        "cat/a.txt": b"a caption",
        "LICENSE": b"free",
        "dog/.hidden.foo": b"",
    }
    for name, data in left.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    line = (
        "left out, since they are not images: 2 .bin (such as cat/d.bin), 1 without suffix "
        "(dog/scores), 1 .foo (dog/f.foo), 1 .npz (dog/g.npz), 1 .tar (cat/inner/i.tar), 1 .zip "
        "(h.zip); do: unpack the archives, if they hold images"
    )
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert line in capsys.readouterr().out.splitlines()
    assert set(stored(tmp_path / "out/train")) == {"a", "b", "tga", "pcx"}


def tiff(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, "TIFF")
    return data.getvalue()


def test_images_that_cannot_be_stored_are_all_named(tmp_path):
    whole = tiff(PIXELS[..., :3])
    bad = {
        "float.tif": (tiff(np.zeros((4, 4), np.float32)), "floating-point values"),
        "wide.tif": (tiff(np.full((4, 4), 70000, np.int32)), "values outside 0 to 65535"),
        "cut.tif": (whole[:-100], "cannot be read as TIFF"),
        "huge.pgm": (b"P5 12000 12000 255\n", "12000 x 12000 pixels are more"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(20), "is an image in the format HEIF"),
        "drawing.svg": (b"<?xml version='1.0'?>\n<svg>", "is an image in the format SVG"),
        "drawing.wmf": (b"\1\0\x09\0" + bytes(20), "has the suffix .wmf, of a format that is not"),
        "photo.wdp": (b"II\xbc\1" + bytes(20), "is an image in the format JPEG XR"),
        "no-suffix": (b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(9), "in the format EMF"),
        "map.pam": (b"P7\nWIDTH 1\n", "is an image in the format PAM"),
        "bare.jxl": (b"\xff\x0a" + bytes(20), "is an image in the format JPEG XL"),
        "nameless": (b"8BPS" + bytes(20), "is an image in the format Photoshop"),
        "noise.tga": (b"\xff" * 50, "cannot be read as TGA"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid", "do: git lfs pull"),
    }
    save(tmp_path / "in/a/good.png", "RGB")
    save(tmp_path / "in/b/good.png", "RGB")
    for name, (data, _) in bad.items():
        (tmp_path / "in/a" / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"got {len(bad)} files that cannot be stored") as error:
        convert(image_folder(tmp_path / "in"), tmp_path / "out")
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == sorted(f"a/{name}" for name in bad)
    for line, name in zip(lines, sorted(bad), strict=True):
        assert bad[name][1] in line
