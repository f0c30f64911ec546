"""Data sets of torchvision: made up in their own formats, and compared with what was written."""

import hashlib
import io
import pickle
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made import make_images
from PIL import Image
from torchvision import datasets

from ds_classifier.data import images
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.readers import torchvision_set
from ds_classifier.data.convert.readers.torchvision_set import TorchvisionImage
from ds_classifier.data.convert.samples import DataSource
from ds_classifier.data.convert.sources import image_folder, open_source
from launch.make_shards import main

CLASSES = ["plane", "car", "bird"]


def made(count: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(count).randint(0, 256, (count, *shape)).astype(np.uint8)


def cifar10(root: Path, monkeypatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Write CIFAR-10's pickles as its authors describe them, and return pixels and labels.

    https://www.cs.toronto.edu/~kriz/cifar.html: rows of 3072 bytes, all red values first.
    """
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    written = {}
    for split, name, count in (("train", "data_batch_1", 9), ("val", "test_batch", 6)):
        pixels, labels = made(count, 32, 32, 3), [i % 3 for i in range(count)]
        rows = pixels.transpose(0, 3, 1, 2).reshape(count, 3072)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
        written[split] = pixels, labels
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = datasets.CIFAR10.meta | {"md5": md5["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return written


def content(source, split: str) -> Counter:
    """Return (pixels, class name) of every sample, after pickling it and checking its size."""
    found = Counter()
    for sample in pickle.loads(pickle.dumps(source.splits[split])):
        data = sample.read()
        if not isinstance(sample.content, TorchvisionImage):
            assert len(data) == sample.size()
        found[np.asarray(images.decode(data)).tobytes(), source.classes[sample.label]] += 1
    return found


def expected(pixels: np.ndarray, labels: list[int], classes: list[str]) -> Counter:
    return Counter((p.tobytes(), classes[i]) for p, i in zip(pixels, labels, strict=True))


def test_cifar10_has_its_pixels_splits_and_class_names(tmp_path, monkeypatch):
    written = cifar10(tmp_path, monkeypatch)
    out = tmp_path / "out"
    arguments = ["convert", "torchvision:CIFAR10", str(out), "--root", str(tmp_path)]
    assert main([*arguments, "--workers", "2"]) == 0
    for source in (open_source("torchvision:CIFAR10", root=tmp_path), open_source(str(out))):
        assert source.classes == CLASSES
        assert set(source.splits) == {"train", "val"}
        for split, (pixels, labels) in written.items():
            assert content(source, split) == expected(pixels, labels, CLASSES)
    alone = open_source("torchvision:CIFAR10,train=False", root=tmp_path)
    assert content(alone, "train") == expected(*written["val"], CLASSES)
    assert set(alone.splits) == {"train"}


def test_mnist_in_idx_files(tmp_path):
    """Write the format of http://yann.lecun.com/exdb/mnist: big-endian sizes, then bytes."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    written = {}
    for split, prefix, count in (("train", "train", 20), ("val", "t10k", 10)):
        pixels, labels = made(count, 28, 28), [i % 10 for i in range(count)]
        head = struct.pack(">4i", 2051, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">2i", 2049, count)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(head + bytes(labels))
        written[split] = np.repeat(pixels[..., None], 3, axis=3), labels
    source = open_source("torchvision:MNIST", root=tmp_path)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert source.classes == [f"{i} - {name}" for i, name in enumerate(names)]
    for split, (pixels, labels) in written.items():
        assert content(source, split) == expected(pixels, labels, source.classes)
    with Image.open(io.BytesIO(source.splits["train"][0].read())) as image:
        assert image.mode == "L"


def test_images_that_lie_in_files_are_copied_untouched(tmp_path, monkeypatch):
    names = [f"{c}/{i}.{suffix}" for c in ("cat", "dog") for i, suffix in enumerate(("jpg", "png"))]
    folder = make_images(tmp_path / "in", names)
    monkeypatch.setattr(
        datasets, "Files", type("Files", (datasets.ImageFolder,), {}), raising=False
    )
    source = open_source("torchvision:Files", root=folder)
    plain = image_folder(folder)
    assert source.classes == plain.classes
    assert source.splits == plain.splits


def test_a_split_by_name_and_class_numbers_without_names(tmp_path):
    """Write GTSRB's training folders and its test split, whose classes are in a table."""
    train = tmp_path / "gtsrb/GTSRB/Training"
    names = [f"{c:05d}/{i}.ppm" for c in range(3) for i in range(2)]
    make_images(train, names)
    test = make_images(tmp_path / "gtsrb/GTSRB/Final_Test/Images", ["00000.ppm", "00001.ppm"])
    table = "Filename;Width;ClassId\n00000.ppm;10;2\n00001.ppm;10;0\n"
    (tmp_path / "gtsrb/GT-final_test.csv").write_text(table)
    source = open_source("torchvision:GTSRB", root=tmp_path)
    assert source.classes == ["0", "1", "2"]
    labels = {sample.content: sample.label for sample in source.splits["train"]}
    assert labels == {train / name: int(name[:5]) for name in names}
    labels = {sample.content: sample.label for sample in source.splits["val"]}
    assert labels == {test / "00000.ppm": 2, test / "00001.ppm": 0}


def test_a_share_is_held_out_of_a_set_without_test_split(tmp_path):
    name = "torchvision:FakeData,size=30,image_size=(3,8,8),num_classes=4"
    assert main(["convert", name, str(tmp_path / "out"), "--val", "40%"]) == 0
    data = datasets.FakeData(30, (3, 8, 8), 4)
    source = open_source(str(tmp_path / "out"))
    found = content(source, "train") + content(source, "val")
    assert found == Counter((image.tobytes(), str(int(label))) for image, label in data)
    assert len(source.splits["val"]) > 3


@pytest.mark.parametrize("in_files", [True, False])
def test_a_set_whose_splits_share_images_is_refused(tmp_path, monkeypatch, in_files):
    """Make a class with the same images in both splits, as files or as samples it decodes."""
    folder = make_images(tmp_path / "in", ["cat/0.png", "dog/0.png"])

    class Same(datasets.ImageFolder):
        def __init__(self, root, train=True):
            super().__init__(root)

    monkeypatch.setattr(datasets, "Same", Same, raising=False)
    if in_files:
        message = refused("torchvision:Same", root=folder)
        assert "got 2 images in both splits of torchvision:Same" in message
        return
    monkeypatch.setattr(torchvision_set, "_files", lambda *_: [])
    source = open_source("torchvision:Same", root=folder)  # told apart by their arguments
    train = source.splits["train"]
    with pytest.raises(ValueError, match="got 2 images in both splits"):
        DataSource("same", source.classes, {"train": train, "val": train})


def test_attributes_that_do_not_hold_the_images_are_not_trusted(tmp_path, monkeypatch):
    folder = make_images(tmp_path / "in", ["cat/0.png", "cat/1.png", "dog/0.png"])

    class Turned(datasets.ImageFolder):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image.transpose(Image.Transpose.ROTATE_180), label

    monkeypatch.setattr(datasets, "Turned", Turned, raising=False)
    source = open_source("torchvision:Turned", root=folder)
    assert all(isinstance(s.content, TorchvisionImage) for s in source.splits["train"])
    convert(source, tmp_path / "out")
    with Image.open(folder / "cat/0.png") as image:
        turned = np.asarray(image.convert("RGB"))[::-1, ::-1].tobytes()
    assert (turned, "cat") in content(open_source(str(tmp_path / "out")), "train")


def test_arrays_are_encoded_once(tmp_path, monkeypatch):
    encoded = []
    png_of = torchvision_set.png_of

    def counted(image):
        encoded.append(image.tobytes())
        return png_of(image)

    monkeypatch.setattr(torchvision_set, "png_of", counted)
    written = cifar10(tmp_path, monkeypatch)
    convert(open_source("torchvision:CIFAR10", root=tmp_path), tmp_path / "out")
    pixels = [image.tobytes() for pixels, _ in written.values() for image in pixels]
    assert sorted(encoded) == sorted(pixels)


def test_other_pixels_of_the_same_sizes_are_another_source(tmp_path):
    class Noise(datasets.FakeData):
        def __init__(self, random_offset=0):
            super().__init__(4, (3, 8, 8), 1, random_offset=random_offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "Noise", Noise, raising=False)
        convert(open_source("torchvision:Noise"), tmp_path)
        convert(open_source("torchvision:Noise"), tmp_path)
        with pytest.raises(ValueError, match="already holds something else"):
            convert(open_source("torchvision:Noise,random_offset=1"), tmp_path)


def refused(*arguments, **keywords) -> str:
    with pytest.raises(ValueError) as error:
        open_source(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused(tmp_path, monkeypatch):
    assert "did you mean torchvision:CIFAR10?" in refused("torchvision:cifar10", root=tmp_path)
    assert "need a class of torchvision.datasets" in refused("torchvision:os")
    assert "do: add --root DIR, and --download" in refused("torchvision:CIFAR10")
    message = refused("torchvision:CIFAR10", root=tmp_path)
    assert "--root, or let torchvision fetch them with --download" in message
    assert "which torchvision does not download" in refused("torchvision:FakeData", download=True)
    for name in ("ImageFolder", "DatasetFolder"):
        message = refused(f"torchvision:{name}", root=tmp_path)
        assert message.endswith(f"without hidden folders; do: convert {tmp_path} OUT")
    assert "whose labels are boxes, masks or cap" in refused("torchvision:CocoDetection")
    assert "got the argument splt for EMNIST" in refused("torchvision:EMNIST,splt=a", root=tmp_path)
    assert "do: convert torchvision:EMNIST,split=VALUE" in refused("torchvision:EMNIST")
    assert "need NAME=VALUE" in refused("torchvision:FakeData,3")
    assert "need a share such as 10%" in refused("torchvision:FakeData", "digits")
    assert "--root: got it with digits" in refused("digits", root=tmp_path)

    class Boxes(datasets.FakeData):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], [1, 2]

    monkeypatch.setattr(datasets, "Boxes", Boxes, raising=False)
    assert "not an image and a class number" in refused("torchvision:Boxes")
