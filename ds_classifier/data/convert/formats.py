"""Recognise image files by suffix and first bytes; store other formats than the loader's as PNG.

Shards hold JPEG, PNG, WebP, GIF and BMP, whose bytes are copied untouched. Other formats that
Pillow decodes by itself are converted to PNG without loss. All others are named, never passed over.
Signatures: the formats' specifications, and https://www.garykessler.net/library/file_sigs.html.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ds_classifier.data.arrays import Arrays
from ds_classifier.data.convert.samples import ARCHIVES, SIDECARS, PassedOver, files_under
from ds_classifier.data.tars import IMAGE_SUFFIXES, LFS_POINTER

_UNTOUCHED = (*IMAGE_SUFFIXES, ".jpe", ".jfif", ".pjpeg", ".mpo", ".apng")
_AS_PNG = (
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".icb", ".vda", ".vst", ".tif", ".tiff", ".avif"),
    *(".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf", ".pcx", ".dcx", ".sgi", ".rgb"),
    *(".rgba", ".bw", ".ras", ".qoi", ".ico", ".cur", ".icns", ".dib", ".xbm", ".xpm", ".msp"),
)
_REFUSED = (
    *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".hdp", ".jls", ".svg", ".svgz", ".wmf"),
    *(".emf", ".eps", ".ps", ".psd", ".psb", ".xcf", ".gbr", ".exr", ".pfm", ".pam"),
    *(".dds", ".blp", ".ftc", ".ftu", ".dcm", ".nii", ".nii.gz", ".fits", ".fit", ".fts", ".im"),
    *(".iim", ".palm", ".pcd", ".pxr", ".fli", ".flc", ".mng", ".jng", ".bpg", ".flif", ".djvu"),
    *(".pict", ".pct", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".orf"),
    *(".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr", ".erf", ".kdc", ".dcr", ".mrw", ".iiq"),
)
ALL_SUFFIXES = (*_UNTOUCHED, *_AS_PNG, *_REFUSED)
# Not opened to look for an image: there may be one such file per image, and none holds an image.
_NOT_OPENED = {
    *SIDECARS,
    *ARCHIVES,
    *(".npy", ".npz", ".mat", ".pkl", ".pt", ".h5", ".parquet", ".arrow", ".mp4", ".avi", ".wav"),
}
_SIGNATURES = {  # first bytes -> suffix of a format that is copied untouched
    rb"\xff\xd8\xff": "jpg",
    rb"\x89PNG\r\n": "png",
    rb"GIF8": "gif",
    rb"BM": "bmp",
    rb"RIFF....WEBP": "webp",
}
_AS_PNG_SIGNATURES = {  # first bytes -> Pillow's plugin
    rb"P[1-6]\s+(#[^\n]*\s+)*[0-9]+\s": "PPM",
    rb"II\*\0|MM\0\*|II\+\0|MM\0\+": "TIFF",
    rb"....ftyp(avi[fs]|(mif1|msf1).{0,64}avi[fs])": "AVIF",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG2000",
    rb"\x0a[\0-\x05][\0\x01][\x01\x02\x04\x08]": "PCX",
    rb"\xb1\x68\xde\x3a": "DCX",
    rb"\x01\xda[\0\x01][\x01\x02]": "SGI",
    rb"\x59\xa6\x6a\x95": "SUN",
    rb"qoif": "QOI",
    rb"\0\0\x01\0[\x01-\x40]\0": "ICO",
    rb"\0\0\x02\0[\x01-\x40]\0": "CUR",
    rb"icns": "ICNS",
    rb"\s*#define[ \t]+\S*_width[ \t]+[0-9]+\s+#define[ \t]+\S*_height[ \t]": "XBM",
    rb"/\* XPM \*/": "XPM",
    rb"DanM|LinS": "MSP",
}
_BY_SUFFIX = dict.fromkeys((".tga", ".icb", ".vda", ".vst"), "TGA") | {".dib": "DIB"}
_TGA_END = b"TRUEVISION-XFILE.\0"  # of TGA 2.0; earlier files can be told by their suffix only
_REFUSED_SIGNATURES = {  # first bytes -> the format's name
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIF",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"II\xbc\x01": "JPEG XR",
    rb"8BPS": "Photoshop",
    rb"gimp xcf": "GIMP",
    rb"\x76\x2f\x31\x01": "OpenEXR",
    rb"P[fF]\s": "PFM",
    rb"P7\s": "PAM",
    rb"DDS ": "DDS",
    rb"BLP[12]": "BLP",
    rb"#\?RADIANCE": "Radiance HDR",
    rb"%!PS": "PostScript",
    rb"\xd7\xcd\xc6\x9a": "WMF",
    rb"\x01\0\0\0.{36} EMF": "EMF",
    rb"SIMPLE  =": "FITS",
    rb".{128}DICM": "DICOM",
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg\b": "SVG",
}
# Too short to tell an image, unless the suffix agrees or Pillow opens the file.
_WEAK = rb"BM|P[1-7fF]\s|\x0a|\x01\xda|\0\0[\x01\x02]\0|\xff\x0a"
HEAD = 512  # bytes in which the signatures are searched
READ_FORMATS = (
    "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, TGA, AVIF, JPEG 2000, PCX, SGI, Sun, QOI, ICO, ICNS, "
    "DIB, XBM, XPM, MSP"
)


def image_files(root: Path, passed: PassedOver | None = None) -> Iterator[Path]:
    """Yield every file under root that is an image by `is_image_file`.

    See `files_under` for the order, for `passed`, and for errors.
    """
    return files_under(root, is_image_file, passed)


def is_image_file(file: Path) -> bool:
    """Return whether a file has an image's suffix, or begins like an image.

    Files with a suffix of data or text are not opened. Where the first bytes say little, Pillow has
    to find a header in them.
    """
    name = file.name.lower()
    if name.endswith(ALL_SUFFIXES):
        return True
    if (os.path.splitext(name)[1] or name) in _NOT_OPENED:
        return False
    head = head_of(file)
    plugin = _match(_SIGNATURES, head) or _match(_AS_PNG_SIGNATURES, head)
    if re.match(_WEAK, head):
        is_image = plugin is not None and _opens(file, plugin)
    else:
        is_image = bool(plugin or _match(_REFUSED_SIGNATURES, head))
    return is_image or _ends_as_tga(file, head)


def _opens(file: Path, plugin: str) -> bool:
    from PIL import Image

    try:
        with Image.open(file, formats=(plugin,)):
            return True
    except MemoryError:
        raise
    except Exception:  # Pillow's plugins raise errors of struct and others too
        return False


def _ends_as_tga(file: Path, head: bytes) -> bool:
    if not head:  # it may be a FIFO
        return False
    with open(file, "rb") as opened:
        opened.seek(-min(len(_TGA_END), len(head)), os.SEEK_END)
        return opened.read() == _TGA_END


def head_of(file: Path) -> bytes:
    """Return the first HEAD bytes of a file; none if it cannot be read or is no regular file."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a FIFO would never return
            return b""
        with open(file, "rb") as opened:
            return opened.read(HEAD)
    except OSError:
        return b""


def stored_suffix(data: bytes) -> str | None:
    """Return the suffix under which shards hold these bytes untouched; None for other formats."""
    return _match(_SIGNATURES, data)


def _plugin_of(data: bytes, name: str) -> str | None:
    """Return Pillow's plugin for an image to convert; None for other formats, and for no image.

    Formats without a signature are recognised by the suffix of the name, or by the last bytes.
    """
    if plugin := _match(_AS_PNG_SIGNATURES, data):
        return plugin
    if data.endswith(_TGA_END):
        return "TGA"
    return _BY_SUFFIX.get(os.path.splitext(name)[1].lower())


def _match(signatures: dict[bytes, str], data: bytes) -> str | None:
    head = data[:HEAD]
    found = (kind for pattern, kind in signatures.items() if re.match(pattern, head, re.DOTALL))
    return next(found, None)


def as_png(data: bytes, name: str) -> bytes:
    """Return an image that is not stored untouched as PNG, without loss; of several, the first.

    Grey of 16 bits stays so. Colours that PNG lacks, such as CMYK, become RGB as Pillow does it.
    name: for formats without a signature. Raises ValueError for anything that is not such an image.
    """
    if data.startswith(LFS_POINTER):
        raise ValueError("is a pointer of Git LFS, not the image; do: git lfs pull")
    plugin = _plugin_of(data, name)
    if plugin is None:
        if form := _match(_REFUSED_SIGNATURES, data):
            raise ValueError(f"is an image in the format {form}, which is not read")
        if name.lower().endswith(_REFUSED):
            suffix = os.path.splitext(name)[1]
            raise ValueError(f"has the suffix {suffix}, of a format that is not read")
        raise ValueError(f"got {data[:8]!r}..., which is not the start of an image file")
    from PIL import Image

    from ds_classifier.data.images import check_pixels

    try:
        image = Image.open(io.BytesIO(data), formats=(plugin,))
        check_pixels(*image.size)
        image.load()
        return png_of(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of struct, zlib and others too
        raise ValueError(f"cannot be read as {plugin} ({error})") from None


def array_as_member(data: bytes, arrays: Arrays | None) -> tuple[bytes, str]:
    """Return the bytes of a .npy as shards hold it, and the suffix.

    arrays: what the arrays of the set have in common; None: they are pixels, stored as PNG.
    Raises ValueError for an array that is not whole, differs, or has values that are not finite.
    """
    from PIL import Image

    from ds_classifier.data.arrays import channels_first, described, to_npy, values_of

    values = channels_first(values_of(data))
    if arrays is not None:
        data = to_npy(values)
        arrays.decode(data)
        return data, "npy"
    if values.dtype.name != "uint8" or len(values) not in (1, 3):
        raise ValueError(f"holds {described(values)}; need uint8 with 1 or 3 channels among images")
    pixels = values[0] if len(values) == 1 else values.transpose(1, 2, 0).copy()
    return png_of(Image.fromarray(pixels)), "png"


def png_of(image) -> bytes:
    """Encode a loaded image of any mode as PNG. Raises ValueError for floats, and over 16 bits."""
    image = _in_mode_of_png(image)
    image.info.clear()  # profiles and comments: the loader reads none
    png = io.BytesIO()
    image.save(png, format="PNG")
    return png.getvalue()


def _in_mode_of_png(image):
    import numpy as np
    from PIL import Image

    if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        return image
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("values outside 0 to 65535; do: scale them to 8 or 16 bits")
        return Image.fromarray(pixels.astype(np.uint16))
    if image.mode == "F":
        raise ValueError("floating-point values; do: scale them to 8 or 16 bits")
    return image.convert("RGBA" if image.mode in ("PA", "La", "RGBa") else "RGB")
