"""Files that hold data sets but are not read: what each is, and the step that helps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from ds_classifier.data.convert.formats import head_of
from ds_classifier.data.tars import LFS_POINTER

MAX_OPENED = 1000  # files of a folder that are looked at
_EACH = "save each image as a file in a directory named after its class, and convert their folder"
_AS_NPZ = (
    "save it by np.savez('set.npz', images=x, labels=y), x of [N, C, S, S] or [N, S, S, C], and "
    "convert set.npz; or " + _EACH
)
_TORCHVISION = [  # name of a file -> class of torchvision, and the folder below its root
    (r"data_batch_[1-5]|test_batch", "CIFAR10", "cifar-10-batches-py"),
    (r"cifar-10-python\.tar\.gz", "CIFAR10", ""),
    (r"train|test|meta", "CIFAR100", "cifar-100-python"),
    (r"cifar-100-python\.tar\.gz", "CIFAR100", ""),
    (r"emnist-.*-idx\d-ubyte(\.gz)?", "EMNIST,split=balanced", "EMNIST/raw"),
    (r"(train|t10k)-(images|labels)-idx\d-ubyte(\.gz)?", "FashionMNIST", "FashionMNIST/raw"),
    (r"(train|t10k)-(images|labels)-idx\d-ubyte(\.gz)?", "KMNIST", "KMNIST/raw"),
    (r"(train|t10k)-(images|labels)-idx\d-ubyte(\.gz)?", "MNIST", "MNIST/raw"),
    (r"(train|test|extra)_32x32\.mat", "SVHN", ""),
    (r"(train|test)_X\.bin", "STL10", "stl10_binary"),
    (r"camelyonpatch_level_2_.*\.h5", "PCAM", "pcam"),
]
_KINDS = [  # pattern of the name, pattern of the first bytes, kind, what to do
    (r".*\.(pt|pth|safetensors)", None, "tensors of PyTorch", _AS_NPZ),
    (r".*", rb"PK\x03\x04", "a zip archive", "unpack it, and convert the folder"),
    (r".*\.(rar|7z)", None, "an archive", "unpack it, and convert the folder"),
    (
        r".*\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|lz|z|br)|tgz|tbz2?|txz|tzst)",
        None,
        "a compressed tar",
        "unpack it (tar xf FILE), and convert the folder; shards: decompress them, then use index",
    ),
    (r".*idx\d-ubyte(\.gz)?", None, "an idx file, as MNIST has it", _AS_NPZ),
    (
        r".*\.arrow",
        None,
        "a table of Hugging Face's datasets (save_to_disk, or its cache)",
        "write it as parquet, python -c \"import datasets; d = datasets.load_from_disk('DIR'); "
        "d['train'].to_parquet('data/train.parquet')\", each split, and convert that folder",
    ),
    (
        r".*\.tfrecords?([-.].*)?",
        None,
        "records of TensorFlow",
        _EACH + ", or take the data set as parquet from the Hugging Face hub",
    ),
    (r".*\.(h5|hdf5)", rb"\x89HDF", "an HDF5 file", _AS_NPZ),
    (r".*\.mat", None, "a MATLAB file", _AS_NPZ),
    (r"data\.mdb|.*\.lmdb", None, "a database of LMDB", _EACH),
    (r".*\.(rec|beton|mds|ffcv)", None, "records of another data loader", _EACH),
    (r".*\.(pkl|pickle)", None, "a pickle, which can run code when it is read", _AS_NPZ),
    (r"[^.]*", rb"\x80[\x02-\x05]", "a pickle, which can run code when it is read", _AS_NPZ),
    (r"(train|test|data_batch)\w*\.bin", None, "arrays without a header", _AS_NPZ),
]


def refuse_pointer(file: Path) -> None:
    """Raise ValueError if a file is a pointer of Git LFS, which stands for one not downloaded."""
    if head_of(file).startswith(LFS_POINTER):
        raise ValueError(
            f"source: got {file}, a pointer of Git LFS, not the file itself; need its content; do: "
            "git lfs install && git lfs pull in its repository"
        )


def refuse_other_kind(files: Iterable[Path]) -> None:
    """Raise ValueError for the first file that holds a data set in a form that is not read."""
    for _, file in zip(range(MAX_OPENED), files, strict=False):
        refuse_pointer(file)
        if file.suffix.lower() == ".npz":
            raise ValueError(
                f"source: got a folder with {file}, a set of arrays; need the file itself; do: "
                f"convert {shlex.quote(str(file))} OUT, with --val for another one"
            )
        head = head_of(file)
        for name, start, kind, advice in _KINDS:
            if not re.fullmatch(name, file.name, re.IGNORECASE):
                continue
            if start is not None and not re.match(start, head, re.DOTALL):
                continue
            raise ValueError(
                f"source: got {file}, {kind}, which is not read; need images in files, a list of "
                f"them, arrays (.npy, .npz), or parquet; do: {_by_torchvision(file) or advice}"
            )


def _by_torchvision(file: Path) -> str | None:
    """Return the command for a file that torchvision reads; None for others."""
    advice = None
    for name, set_name, folder in _TORCHVISION:
        if not re.fullmatch(name, file.name):
            continue
        line = f"ds-classifier convert torchvision:{set_name} OUT --root"
        root = file.absolute().parents[len(Path(folder).parts)]
        if file.absolute().parent == root / folder:
            return f"{line} {shlex.quote(str(root))}{_lines(file, set_name)}"
        advice = f"move the files to DIR/{folder}, then {line} DIR{_lines(file, set_name)}"
    return advice


def _lines(file: Path, set_name: str) -> str:
    """Return lines of Python that turn a pickle of CIFAR or an idx file into .npz, or nothing."""
    if file.name.endswith(".tar.gz"):
        return ""
    if set_name.startswith("CIFAR"):
        labels = "labels" if set_name == "CIFAR10" else "fine_labels"
        lines = (
            "import numpy as np, pickle",
            f"d = pickle.load(open({str(file)!r}, 'rb'), encoding='bytes')",
            f"np.savez({file.name + '.npz'!r}, images=d[b'data'].reshape(-1, 3, 32, 32), "
            f"labels=d[b'{labels}'])",
        )
    elif "ubyte" in file.name:
        images = re.sub(r"(images|labels)-idx\d", "images-idx3", str(file))
        others = images.replace("images-idx3", "labels-idx1")
        lines = (
            "import gzip, numpy as np",
            f"read = lambda name, start: np.frombuffer({_opening(file)}, np.uint8, offset=start)",
            f"np.savez({file.name.split('-idx')[0] + '.npz'!r}, images=read({images!r}, 16)"
            f".reshape(-1, 28, 28), labels=read({others!r}, 8))",
        )
    else:
        return ""
    return f"; or make an .npz, and convert that: {'; '.join(lines)}"


def _opening(file: Path) -> str:
    return f"{'gzip.' * (file.suffix == '.gz')}open(name, 'rb').read()"
