"""Classification sets that torchvision reads: `convert torchvision:CIFAR10 OUT --root DIR`.

Any class of torchvision.datasets works whose samples are an image and a class number. Images that
lie in files are copied untouched; those in arrays, pickles or databases become PNG, without loss.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import os
import re
import zlib
from ast import literal_eval
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_classifier.data.convert.formats import png_of
from ds_classifier.data.convert.samples import DataSource, Sample

PREFIX = "torchvision:"
FOLDERS = ("ImageFolder", "DatasetFolder")  # classes that take any folder, splits for classes too
NO_CLASSES = (  # classes whose labels are boxes, masks or captions
    *("CocoDetection", "CocoCaptions", "VOCDetection", "VOCSegmentation", "Cityscapes"),
    *("SBDataset", "SBU", "Kitti", "WIDERFace", "Flickr8k", "Flickr30k"),
)
VAL_NAMES = ("val", "valid", "test")  # values of `split`; the first that a class has is validation

Options = tuple[tuple[str, Any], ...]  # keyword arguments of a class, hashable


@dataclass(frozen=True, slots=True)
class TorchvisionImage:
    """An image that a class of torchvision decodes. Each process opens the data set once.

    It becomes PNG when it is read, so that the processes of a conversion share that work.
    length: bytes of its pixels. check: CRC-32 of its pixels.
    """

    name: str
    options: Options
    index: int
    length: int
    check: int

    def read(self) -> bytes:
        return png_of(_opened(self.name, self.options)[self.index][0])

    def size(self) -> int:
        return self.length

    @property
    def mark(self) -> str:
        return f"{self.check:08x}"

    def changed_ns(self) -> int:
        return 0  # torchvision does not say which files it reads

    @property
    def origin(self) -> tuple[str, str, Options, int]:
        return dict(self.options).get("root", ""), self.name, self.options, self.index


def torchvision_set(source: str, root: Path | None, download: bool) -> DataSource:
    """Return a data set of torchvision with its training split, and validation if it has one.

    source: "torchvision:" and a class of torchvision.datasets, with arguments for it, if any:
        "torchvision:EMNIST,split=letters". The validation split is train=False, or the first that
        the class accepts as split of VAL_NAMES; an argument train or split gives one split alone.
    root: the directory that torchvision calls root. download: let torchvision download the data.
    Raises ValueError for a class that is not in torchvision, does not classify images, takes any
    folder (FOLDERS), or whose data are not at root.
    """
    name, _, arguments = source.removeprefix(PREFIX).partition(",")
    constructor = _class_named(name)
    if name in FOLDERS:
        raise ValueError(
            f"source: got {PREFIX}{name}; need the folder itself, which is read with its splits "
            f"and without hidden folders; do: convert {root or 'DIR'} OUT"
        )
    parameters = _parameters(constructor)
    if name in NO_CLASSES:
        raise ValueError(
            f"source: got {PREFIX}{name}, whose labels are boxes, masks or captions; need a data "
            "set for classification, such as CIFAR10, or a list of images and their classes (.csv)"
        )
    given = dict(map(_argument, re.split(r",(?=\w+=)", arguments) if arguments else ()))
    if unknown := set(given) - set(parameters):
        raise ValueError(
            f"source: got the argument {min(unknown)} for {name}, which has "
            f"{', '.join(parameters)}; do: correct it"
        )
    needed = [
        n for n, p in parameters.items() if p.default is p.empty and n not in (*given, "root")
    ]
    if needed:
        raise ValueError(
            f"source: got {source}; need a value for {needed[0]}, as torchvision's "
            f"documentation of the class lists them; do: convert {source},{needed[0]}=VALUE"
        )
    if "root" in parameters:
        if root is None:
            raise ValueError(
                f"source: got {source} without --root; need the directory that torchvision calls "
                "root, in which it keeps its data sets; do: add --root DIR, and --download if the "
                "data are not there yet"
            )
        given["root"] = str(root)
    if download and "download" not in parameters:
        raise ValueError(
            f"--download: got {name}, which torchvision does not download; do: drop it, and put "
            "the data at --root, as torchvision's documentation of the class says"
        )
    splits = {}
    for split, choices in _split_options(parameters, given).items():
        for choice in choices:
            options = tuple(sorted((given | choice).items()))
            try:
                if download:
                    _opened(name, (*options, ("download", True)))
                splits[split] = options, _opened(name, options)
                break
            except Exception as error:
                if isinstance(error, ValueError) and "Unknown value" in str(error):
                    continue  # the class has no split of this name
                raise _unread(name, choice, root, error) from None
    classes, labels = _class_names(splits["train"][1]), {}
    samples = {}
    for split, (options, data) in splits.items():
        samples[split] = _samples(name, split, options, data)
        labels[split] = {sample.label for sample in samples[split]}
    largest = max(map(max, labels.values()))
    if min(map(min, labels.values())) < 0:
        raise ValueError(f"source: got {source} with images that have no class (label below 0)")
    if len(classes) <= largest:
        classes = [str(i) for i in range(largest + 1)]
    return DataSource(source, classes, samples)


def _class_named(name: str) -> type:
    from torchvision import datasets

    found = getattr(datasets, name, None)
    if not isinstance(found, type) or not issubclass(found, datasets.VisionDataset):
        by_lower = {known.lower(): known for known in datasets.__all__}
        near = difflib.get_close_matches(name.lower(), by_lower, n=1)
        raise ValueError(
            f"source: got {PREFIX}{name}; need a class of torchvision.datasets"
            + (f"; did you mean {PREFIX}{by_lower[near[0]]}?" if near else ", such as CIFAR10")
        )
    return found


def _parameters(constructor: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class, with those that it hands on to its bases as **kwargs."""
    found: dict[str, inspect.Parameter] = {}
    for base in constructor.__mro__:
        own = dict(inspect.signature(base.__init__).parameters)
        found = own | found
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
            break
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in found.items() if p.kind in named and name != "self"}


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"source: got the argument {text!r}; need NAME=VALUE, as split=letters")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _split_options(parameters: dict, given: dict) -> dict[str, list[dict[str, Any]]]:
    """Return the arguments that choose each split, in the order in which they are tried."""
    if "train" in parameters and "train" not in given:
        return {"train": [{"train": True}], "val": [{"train": False}]}
    if "split" in parameters and "split" not in given:
        default = parameters["split"].default
        if default is not inspect.Parameter.empty:
            return {
                "train": [{"split": "train"}, {"split": default}],
                "val": [{"split": value} for value in VAL_NAMES],
            }
    return {"train": [{}]}


@functools.cache
def _opened(name: str, options: Options):
    return _class_named(name)(**dict(options))


def _unread(name: str, choice: dict, root: Path | None, error: Exception) -> ValueError:
    which = "".join(f" with {key}={value!r}" for key, value in choice.items())
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        return ValueError(f"source: torchvision's {name} needs a package ({text}); do: install it")
    return ValueError(
        f"source: torchvision's {name}{which} got {type(error).__name__} from {root}: "
        f"{text[:300]}; need the data as torchvision lays them out; do: give the directory "
        "above them as --root, or let torchvision fetch them with --download"
    )


def _samples(name: str, split: str, options: Options, data: Any) -> list[Sample]:
    """Return the samples of a split: files where the data set has them, else images as PNG."""
    if files := _files(name, data):
        root = dict(options).get("root", "")
        return [Sample(os.path.relpath(file, root), label, file) for file, label in files]
    samples = []
    for i in range(len(data)):
        image, label = _item(name, data, i)
        pixels = image.tobytes()
        content = TorchvisionImage(name, options, i, len(pixels), zlib.crc32(pixels))
        samples.append(Sample(f"{name}_{split}_{i:06d}", label, content))
    if not samples:
        raise ValueError(f"source: got {PREFIX}{name} without images in its {split} split")
    return samples


def _item(name: str, data: Any, i: int) -> tuple[Any, int]:
    """Return an image and its class. Raises ValueError if the sample is anything else."""
    from PIL import Image

    try:
        image, label = data[i]
        label = operator.index(label)
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"source: got sample {i} of torchvision's {name}, which is not an image and a class "
            f"number ({error}); need a data set for classification"
        ) from None
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"source: got a {type(image).__name__} in sample {i} of torchvision's {name}; need an "
            "image and a class number"
        )
    return image, label


def _files(name: str, data: Any) -> list[tuple[Path, int]]:
    """Return the file and class of every image; empty if the images do not lie in files.

    torchvision keeps them in attributes without documentation, so the first, middle and last image
    are compared with what it returns.
    """
    import numpy as np
    from PIL import Image

    attributes = (getattr(data, key, None) for key in ("samples", "_samples", "imgs"))
    pairs = next((pairs for pairs in attributes if isinstance(pairs, list)), None)
    if pairs is None:
        files = getattr(data, "_image_files", None) or getattr(data, "_images", None)
        labels = getattr(data, "_labels", None)
        if not isinstance(files, list) or not isinstance(labels, list) or len(files) != len(labels):
            return []
        pairs = list(zip(files, labels, strict=True))
    if len(pairs) != len(data) or not all(isinstance(pair[0], str | Path) for pair in pairs):
        return []
    for i in {0, len(pairs) // 2, len(pairs) - 1}:
        image, label = _item(name, data, i)
        with Image.open(pairs[i][0]) as original:
            equal = np.array_equal(np.asarray(original.convert("RGB")), image.convert("RGB"))
        if not equal or label != pairs[i][1]:
            return []
    return [(Path(file), operator.index(label)) for file, label in pairs]


def _class_names(data: Any) -> list[str]:
    """Return the class names in the order of their numbers; empty if the data set has none.

    A name that two classes have, such as ImageNet's crane, gets their numbers.
    """
    names = getattr(data, "classes", None) or getattr(data, "categories", None)
    if names is None:
        numbers = getattr(data, "class_to_idx", None) or {}
        names = sorted(numbers, key=numbers.get)
    names = [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} {i}" for i, name in enumerate(names)]
