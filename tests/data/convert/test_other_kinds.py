"""Data sets in forms that are not read: each is named, with the step that helps."""

import gzip
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from made import make_images

from ds_classifier.data.arrays import values_of
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.foreign.index import index

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CONVERT = "do: ds-classifier convert torchvision:"


def refused(*arguments) -> str:
    with pytest.raises(ValueError) as error:
        open_source(*map(str, arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cat/0.jpg", b"")


def pickled(path):
    path.write_bytes(pickle.dumps({"data": 1}))


def idx(path):
    path.write_bytes(struct.pack(">4i", 2051, 0, 28, 28))


def plain(path):
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))


KINDS = [  # name, how to write it, words of the message; ROOT is the folder of the test
    ("images.zip", archive, "a zip archive, which is not read; need images in files, a list of"),
    ("images", archive, "do: unpack it, and convert the folder"),
    ("cifar-10-batches-py/data_batch_1", pickled, CONVERT + "CIFAR10 OUT --root ROOT"),
    (
        "cifar-10-batches-py/test_batch",
        pickled,
        "; or make an .npz, and convert that: import numpy as np, pickle; d = pickle.load(open(",
    ),
    ("cifar-100-python/train", pickled, CONVERT + "CIFAR100 OUT --root ROOT"),
    (
        "some/data_batch_1",
        pickled,
        "do: move the files to DIR/cifar-10-batches-py, then ds-classifier",
    ),
    ("cifar-10-python.tar.gz", plain, CONVERT + "CIFAR10 OUT --root ROOT"),
    ("things.pkl", pickled, "a pickle, which can run code when it is read"),
    ("MNIST/raw/train-images-idx3-ubyte", idx, CONVERT + "MNIST OUT --root ROOT"),
    ("FashionMNIST/raw/t10k-images-idx3-ubyte.gz", idx, CONVERT + "FashionMNIST OUT --root ROOT"),
    (
        "mine/train-images-idx3-ubyte",
        idx,
        "do: move the files to DIR/MNIST/raw, then ds-classifier",
    ),
    ("train/data-00000-of-00001.arrow", plain, "do: write it as parquet, python -c"),
    ("cifar-train.tfrecord-00000-of-00002", plain, "records of TensorFlow"),
    ("data.h5", plain, "an HDF5 file"),
    (
        "camelyonpatch_level_2_split_train_x.h5",
        plain,
        "move the files to DIR/pcam, then ds-classifier",
    ),
    ("train_32x32.mat", plain, CONVERT + "SVHN OUT --root ROOT"),
    ("lsun/data.mdb", plain, "a database of LMDB"),
    ("train.beton", plain, "records of another data loader"),
    ("set.tgz", plain, "a compressed tar"),
    ("a.rar", plain, "an archive"),
]


@pytest.mark.parametrize(("name", "write", "words"), KINDS, ids=[name for name, *_ in KINDS])
def test_each_kind_has_its_own_message(tmp_path, name, write, words):
    """Give the file itself, and its folder."""
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    write(file)
    words = words.replace("ROOT", str(tmp_path / "data"))
    for place in (file, tmp_path / "data"):
        message = refused(place)
        assert message.startswith(f"source: got {file}, ")
        assert words in message


def test_pointers_of_git_lfs_are_named(tmp_path):
    for name in ("0.jpg", "train-00000.parquet", "shard.tar", "data.arrow", "x.csv"):
        folder = tmp_path / name.replace(".", "_") / "cat"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(POINTER)
        for place in (folder / name, folder.parent):
            if (place.suffix, place.is_file()) not in ((".csv", False), (".jpg", True)):
                message = refused(place)
                assert "a pointer of Git LFS" in message, place
                assert "git lfs pull in its repository" in message
    make_images(tmp_path / "good", ["cat/0.png", "dog/1.png"])
    assert "a pointer of Git LFS" in refused(tmp_path / "good", tmp_path / "0_jpg")
    with pytest.raises(ValueError, match="a pointer of Git LFS"):
        index(str(tmp_path / "shard_tar/cat"), tmp_path / "out")


def run_lines(message: str, folder) -> None:
    """Run the lines of Python in a message, in a folder."""
    lines = message.partition("convert that: ")[2]
    done = subprocess.run([sys.executable, "-c", lines], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_lines_make_an_npz_of_a_pickle(tmp_path):
    x = np.arange(4 * 3072).reshape(4, 3072).astype(np.uint8)
    labels = [0, 1, 1, 0]
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": x, b"labels": labels}))
    run_lines(refused(tmp_path / "data_batch_1"), tmp_path)
    source = open_source(str(tmp_path / "data_batch_1.npz"))
    assert [sample.label for sample in source.splits["train"]] == labels
    rows = [values_of(sample.read()) for sample in source.splits["train"]]
    assert np.array_equal(np.stack(rows), x.reshape(4, 3, 32, 32))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_lines_make_an_npz_of_idx(tmp_path, suffix):
    x = np.arange(4 * 784).reshape(4, 28, 28).astype(np.uint8)
    labels = np.array([0, 1, 1, 0], np.uint8)
    opened = gzip.open if suffix else open
    for name, head, values in (
        ("train-images-idx3-ubyte", struct.pack(">4i", 2051, 4, 28, 28), x),
        ("train-labels-idx1-ubyte", struct.pack(">2i", 2049, 4), labels),
    ):
        with opened(tmp_path / (name + suffix), "wb") as file:
            file.write(head + values.tobytes())
    run_lines(refused(tmp_path / f"train-labels-idx1-ubyte{suffix}"), tmp_path)
    source = open_source(str(tmp_path / "train-labels.npz"))
    assert [sample.label for sample in source.splits["train"]] == labels.tolist()
    rows = [values_of(sample.read()) for sample in source.splits["train"]]
    assert np.array_equal(np.stack(rows), x)
