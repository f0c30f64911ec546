"""Data sources: folders, tars, lists, Parquet or shards -> samples (name, label, image).

What only some sources need (numpy, scipy, pyarrow ...) is imported when such a source is opened.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ds_classifier.common.text import count
from ds_classifier.data.convert.formats import READ_FORMATS, is_image_file
from ds_classifier.data.convert.other_kinds import refuse_other_kind, refuse_pointer
from ds_classifier.data.convert.readers.arrays import (
    FILES,
    as_arrays,
    is_array_file,
    refuse_whole_set,
    whole_set,
)
from ds_classifier.data.convert.readers.built_in import DIGITS, GAUSSIANS, digits, gaussians
from ds_classifier.data.convert.readers.lists import LISTS, listed_files, refuse_list_beside
from ds_classifier.data.convert.readers.parquet import (
    HiddenLabels,
    files_by_kind,
    is_parquet,
    read_parquet,
    refuse_copies,
)
from ds_classifier.data.convert.readers.torchvision_set import PREFIX, torchvision_set
from ds_classifier.data.convert.samples import (
    DataSource,
    NamedSample,
    PassedOver,
    Sample,
    Slice,
    files_under,
    is_passed_over,
    share_classes,
)
from ds_classifier.data.convert.split_names import (
    are_splits,
    kinds_in,
    own_words,
    refuse_loose_images,
    take,
    take_folders,
)
from ds_classifier.data.tars import printable

BOTH = ("train", "val")
ARRAY_FILE, ARRAY_FOLDER = "arrays in a file", "a folder of arrays"  # kinds of places
FOLDERS = ("folder", ARRAY_FOLDER)
MAX_NAMED = 10  # folders in a message
MIN_ALIKE = 0.8  # share of the inner folders that all folders have, if they are taken for splits


def open_source(
    source: str,
    val: str | None = None,
    val_labels: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    root: Path | None = None,
    download: bool = False,
    labels: str | None = None,
    scale: Sequence[float] | None = None,
    shift: Sequence[float] | None = None,
    targets: str = "class",
) -> DataSource:
    """Open a data source, without reading images. Its kind follows from its suffix and content.

    source, val (for validation):
    - an image folder, classes as directories or as file prefixes, or a folder of such splits
    - ILSVRC2012_img_train.tar; val ILSVRC2012_img_val.tar, or a folder of its images, with
      val_labels: the devkit ILSVRC2012_devkit_t12.tar.gz or its folder, or LOC_val_solution.csv
    - a list of paths and labels: .csv, .tsv, .jsonl or .txt
    - parquet files as Hugging Face writes them, one file or a folder
    - arrays: a folder of .npy, sorted as images are; an .npz, or an .npy with labels or val_labels
    - shards: a split, or the directory above train/ and val/
    - the word digits, or gaussians; see `common.gaussians`
    - torchvision:NAME, a class of torchvision.datasets; see `torchvision_set`

    The first three can be combined; the others need val of the same kind, or bring their own.
    columns: the columns of a list ("path", "label", "weight") or of parquet or .npz ("image" in
        place of "path"), by name.
    root, download: for torchvision: the directory of its data, and whether it may download them.
    labels: a file with the labels of an .npy or .npz. scale, shift: see `arrays.as_arrays`.
    targets: what the labels of a list, parquet or arrays in a file are, one of
        `labels.targets.ASKED`; shards say it themselves. Values are put into bins by `with_bins`.
    Raises ValueError if there is nothing to convert, or if the classes of the splits do not match.
    """
    opened = _open(source, val, val_labels, columns or {}, root, download, labels, targets)
    return as_arrays(opened, scale, shift)


def _open(
    source: str,
    val: str | None,
    val_labels: str | None,
    columns: Mapping[str, str],
    root: Path | None,
    download: bool,
    labels: str | None,
    targets: str,
) -> DataSource:
    """Open a source; the arguments are those of `open_source`."""
    if val_labels is not None and val is None:
        raise ValueError(
            f"--val_labels: got {val_labels!r} without --val; need the images that it labels"
        )
    if labels is not None and not source.lower().endswith(FILES):
        raise ValueError(
            f"--labels: got {labels} with {source}; need an .npy or .npz, whose labels it has; do: "
            "drop it"
        )
    if source.startswith(PREFIX):
        if val is not None:
            raise ValueError(
                f"--val: got {val} with {source}; need a share such as 10%, or the validation "
                "split that the data set has; do: drop it"
            )
        _refuse_columns(source, columns, targets)
        return torchvision_set(source, root, download)
    if root is not None or download:
        flag = "--download" if root is None else "--root"
        raise ValueError(f"{flag}: got it with {source}; need a source {PREFIX}NAME; do: drop it")
    if source == DIGITS and not Path(source).exists():
        if val is not None:
            raise ValueError(
                f"--val: got {val!r} with digits, which has its own validation split; do: drop it"
            )
        _refuse_columns(source, columns, targets)
        return digits()
    if source.partition(":")[0] == GAUSSIANS and not Path(source).exists():
        if val is not None:
            raise ValueError(f"--val: got {val!r} with {source}, which has a split; do: drop it")
        _refuse_columns(source, columns, targets)
        return gaussians(source)
    train = Path(source)
    places = (("--val", val), ("--val_labels", val_labels), ("--labels", labels))
    for flag, place in places:
        if place is not None and not Path(place).exists():
            share = ", or a share such as 10%" if flag == "--val" else ""
            raise ValueError(
                f"{flag}: got {place}, which does not exist; need a file or a folder{share}"
            )
    kind = _kind(train)
    if kind not in ("list", "parquet", ARRAY_FILE):
        _refuse_columns(source, columns, targets)
    val_kind = None if val is None else _kind(Path(val))
    tars = ("tar", "tars")
    if kind in tars or val_kind in tars:
        from ds_classifier.data.foreign.contents import refuse_shards

        alone = val_kind in tars and val_labels is None  # ILSVRC2012_img_val.tar comes with labels
        refuse_shards(train if kind in tars else None, Path(val) if alone else None)
    alone = {"parquet", "shards", ARRAY_FILE, ARRAY_FOLDER}
    if val is not None and (kind != val_kind) and alone & {kind, val_kind}:
        raise ValueError(
            f"--val: got {val} ({val_kind}) with {source} ({kind}); need the same kind; do: give "
            f"the validation split as {kind}"
        )
    if kind in ("parquet", "shards", ARRAY_FOLDER) and val_labels is not None:
        raise ValueError(
            f"--val_labels: got {val_labels} with {kind}, which have their own labels; do: drop it"
        )
    if kind == "shards":
        return shards(train, None if val is None else Path(val))
    if kind == "parquet":
        return parquet(train, None if val is None else Path(val), columns, targets)
    if kind == ARRAY_FILE:
        return array_files(source, val, columns, labels, val_labels, targets)
    if targets != "class" and val_kind not in (None, "list"):
        raise ValueError(
            f"--val: got {val} with --targets {targets}; need a list, whose labels say as much; "
            "do: give a list of its images"
        )
    return _files(source, kind, val, val_kind, val_labels, columns, targets)


def _refuse_columns(source: str, columns: Mapping[str, str], targets: str) -> None:
    if targets != "class":
        raise ValueError(
            f"--targets: got {targets} with {source}, whose images have one class or say it "
            "themselves; need a list (.csv, .jsonl), parquet files or arrays with labels; do: "
            "list its images with their labels, or drop it"
        )
    if columns:
        raise ValueError(
            f"--columns: got {dict(columns)} with {source}; need a list or parquet files, which "
            "have columns, or an .npz, whose arrays have names; do: drop it"
        )


def _files(
    source: str,
    kind: str,
    val: str | None,
    val_kind: str | None,
    val_labels: str | None,
    columns: Mapping[str, str],
    targets: str = "class",
) -> DataSource:
    """Open folders, tars of ImageNet and lists. The arguments are those of `open_source`."""
    wanted = is_array_file if kind == ARRAY_FOLDER else is_image_file
    passed = PassedOver(wanted="arrays" if kind == ARRAY_FOLDER else "images")
    places, remarks = {"train": Path(source)}, []
    if val is not None:
        places["val"] = Path(val)
    for split, place_kind in (("train", kind), ("val", val_kind)):
        if place_kind in FOLDERS:
            given = places[split]
            splits = BOTH if val is None else [split]
            taken, more = take_folders(given, splits, passed, wanted)
            places |= taken
            remarks += more
            if (split == "train" or val_labels is None) and place_kind == "folder":
                for name, folder in taken.items() or [(split, given)]:
                    refuse_list_beside(folder, given, places["train"] if name == "val" else None)
            if split == "train" and taken:
                refuse_loose_images(given, taken, wanted)
    try:
        splits = BOTH if val is None else ("train",)
        images, labels = _images(places["train"], kind, columns, splits, passed, remarks, targets)
        named = labels if len(labels) > 1 else None
        if "val" in places:
            images["val"], own = _val_images(
                places["val"], val_kind or kind, val_labels, columns, passed, remarks, targets
            )
            if named and named != own:
                raise ValueError(
                    f"--val: got the columns {own} for the classes; need {named}, as in {source}; "
                    "do: name them in this order, as in --columns label=A,B,C"
                )
        if kind in FOLDERS:
            remarks += _remark_on_classes(places["train"], images["train"])
            _refuse_one_class(places["train"], images["train"])
        remarks += passed.remarks
        return share_classes(
            source, images["train"], images.get("val"), named, remarks, targets, "".join(labels[:1])
        )
    except ValueError as error:
        if not remarks:
            raise
        if val is None and "val" in places:
            remarks.append(f"to choose: convert {places['train']} OUT, with --val or without")
        raise ValueError(f"{error} ({'; '.join(remarks)})") from None


def _kind(place: Path) -> str:
    """Return the kind of a path: "folder", "tar", "tars", "list", "parquet", "shards" or of arrays.

    "tars" is a folder without images but with tars, "shards" are converted ones.
    """
    if place.is_dir():
        if any((place / split / "manifest.json").is_file() for split in (".", "train", "val")):
            return "shards"
        files = files_under(place, lambda file: is_parquet(file) or is_image_file(file))
        first = next(files, None)
        if first is None:
            if (array := next(files_under(place, is_array_file), None)) is not None:
                refuse_pointer(array)
                refuse_whole_set(place)
                return ARRAY_FOLDER
            if any(files_under(place, lambda file: file.suffix.lower() == ".tar")):
                return "tars"
            refuse_other_kind(files_under(place, lambda _: True))
            return "folder"
        refuse_pointer(first)
        return "parquet" if is_parquet(first) else "folder"
    kinds = {".tar": "tar", ".parquet": "parquet"} | dict.fromkeys(LISTS, "list")
    kinds |= dict.fromkeys(FILES, ARRAY_FILE)
    kind = kinds.get(place.suffix.lower())
    if place.is_file():
        refuse_pointer(place)
    if kind is None and place.is_file():
        refuse_other_kind([place])
    if kind is None or not place.is_file():
        problem = "is no directory" if place.exists() else "does not exist"
        raise ValueError(
            f"source: got {place}, which {problem}; "
            f"need a folder of images, a .tar of ImageNet, a list of paths and labels "
            f"({' '.join(LISTS)}), .parquet, .npz, .npy, shards, or the word {DIGITS!r} for the "
            "built-in handwritten digits"
        )
    return kind


def _images(
    place: Path,
    kind: str,
    columns: Mapping[str, str],
    splits: Sequence[str],
    passed: PassedOver,
    remarks: list[str],
    targets: str,
) -> tuple[dict[str, list[NamedSample]], list[str]]:
    """Return the images of a place by split: of the first one, unless a list has several.

    The columns of a list that hold the labels come second.
    """
    if kind == "list":
        images, named, more = listed_files(place, columns, splits, targets)
        remarks += more
        return images, named
    if kind == "tar":
        from ds_classifier.data.convert.readers import imagenet

        return {splits[0]: imagenet.train_images(place)}, []
    wanted = is_array_file if kind == ARRAY_FOLDER else is_image_file
    return {splits[0]: _labelled_files(place, passed, wanted)}, []


def _val_images(
    place: Path,
    kind: str,
    labels: str | None,
    columns: Mapping[str, str],
    passed: PassedOver,
    remarks: list[str],
    targets: str,
) -> tuple[list[NamedSample], list[str]]:
    if labels is not None:
        if kind == "list":
            raise ValueError(
                f"--val_labels: got {labels} with the list {place}, which has labels; do: drop it"
            )
        from ds_classifier.data.convert.readers import imagenet

        return imagenet.val_images(place, Path(labels), passed), []
    if kind == "tar":
        raise ValueError(
            f"--val: got {place} without labels; do: add --val_labels, with the devkit "
            "ILSVRC2012_devkit_t12.tar.gz or Kaggle's LOC_val_solution.csv"
        )
    images, named = _images(place, kind, columns, ("val",), passed, remarks, targets)
    return images["val"], named


# --------------------------------------------------------------------------------------- folders


def image_folder(train: Path, val: Path | None = None) -> DataSource:
    """Return a source of images in one directory per class, or in files named CLASS_name.jpg.

    Both splits share one class list, the sorted names of the training classes.
    """
    val_kind = None if val is None else "folder"
    return _files(str(train), "folder", None if val is None else str(val), val_kind, None, {})


def _labelled_files(
    root: Path, passed: PassedOver, wanted: Callable[[Path], bool]
) -> list[NamedSample]:
    """Return every wanted file under root with its class name, in the order of `files_under`."""
    if not root.is_dir():
        raise ValueError(
            f"source: got {root}, which is not a directory; need a folder of images, or the word "
            f"{DIGITS!r} for the built-in handwritten digits"
        )

    loose, sorted_by_class = [], []
    inner = defaultdict(set)  # folder -> the folders directly in it, "" for images in it
    for file in files_under(root, wanted, passed):
        parts = file.relative_to(root).parts
        inner[parts[0]].add(parts[1] if len(parts) > 2 else "")
        if len(parts) == 1:
            loose.append((file, file.name.split("_")[0]))
        else:
            sorted_by_class.append((file, parts[0]))
    if loose and sorted_by_class:
        raise ValueError(
            f"source: got images both directly in {root} ({loose[0][0].name}) and in class "
            f"directories ({sorted_by_class[0][1]}/); need one or the other; do: move the "
            "former"
        )
    found = loose or sorted_by_class
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not all(str(file).isascii() for file, _ in found):
        raise ValueError(
            f"source: got names in {root} that are not ASCII, and a locale that takes them for "
            f"{encoding}; need UTF-8; do: put PYTHONUTF8=1 before the command"
        )
    if not found:
        raise ValueError(
            f"source: got {root} without any image ({READ_FORMATS}"
            f"{''.join(f'; {line}' for line in passed.remarks)}); need CLASS/image.jpg, or "
            "CLASS_image.jpg in one folder"
        )
    if loose and any("_" not in file.name for file, _ in loose):
        bare = next(file.name for file, _ in loose if "_" not in file.name)
        raise ValueError(
            f"source: got {bare} directly in {root}; need CLASS_image.jpg there, with the "
            "class before the first underscore, or one directory per class"
        )
    classes = {class_name for _, class_name in found}
    if wrapped := next((name for name in sorted(inner) if are_splits(inner[name])), None):
        raise ValueError(
            f"source: got {root} with folders of splits ({', '.join(sorted(inner[wrapped]))}) "
            f"inside of {wrapped}/; need them above the classes, as in train/CLASS/image.jpg; do: "
            + (
                f"convert {root / wrapped}"
                if len(classes) == 1
                else f"convert {root / wrapped} alone, or list the images in a .csv"
            )
        )
    _refuse_alike(root, inner)
    empty = [] if loose else sorted(_class_folders(root) - classes)
    if empty:
        raise ValueError(
            f"source: got {count(len(empty), 'folder')} in {root} ({_some(empty)}) without any "
            f"image ({READ_FORMATS}), or broken links; need at least one image per class; "
            "do: remove the folder, repair the link, or convert its images to these formats"
        )
    return [
        NamedSample(str(file.relative_to(root)), class_name, file) for file, class_name in found
    ]


def _refuse_alike(root: Path, inner: Mapping[str, set[str]]) -> None:
    """Raise ValueError if all folders hold the same folders, as fold1 and fold2 hold the classes.

    inner: folder -> the folders directly in it, "" for images in it.
    """
    common, union = set.intersection(*inner.values()), set().union(*inner.values())
    if len(inner) < 2 or "" in union or len(common) < max(2, MIN_ALIKE * len(union)):
        return
    train = min(inner, key=lambda name: (kinds_in(name) != {"train"}, own_words(name), name))
    others = sorted(inner.keys() - {train})
    val = next((name for name in others if kinds_in(name) & {"val", "test"}), None)
    if val is None and not kinds_in(train):
        val = others[0]
    raise ValueError(
        f"source: got {root}, whose {len(inner)} folders ({_some([train, *others])}) hold the same "
        f"folders ({_some(sorted(common))}), as splits hold the same classes; need splits or "
        f"classes; do: convert {root / train} OUT --val "
        + (f"{root / val}, or --val 10%" if val else "10%")
        + ", or, if they are classes, list the images in a .csv"
    )


def _some(names: Sequence[str]) -> str:
    """Return the first names for a message."""
    return ", ".join(names[:MAX_NAMED]) + " ..." * (len(names) > MAX_NAMED)


def _refuse_one_class(root: Path, images: list[NamedSample]) -> None:
    """Raise ValueError if a folder has one class; it names the folder below with several of them.

    images: the images of the folder, with names relative to it.
    """
    folders = [Path(image.name).parts[:-1] for image in images]
    if len({image.class_name for image in images}) > 1:
        return
    shared = Path(os.path.commonpath([Path(*parts) for parts in folders]))
    below = {parts[len(shared.parts)] for parts in folders if len(parts) > len(shared.parts)}
    if len(below) > 1:
        advice = f"{root / shared} holds {count(len(below), 'folder')}: convert {root / shared} OUT"
    else:
        advice = (
            f"give the folder above {root}, if that holds the classes, or a list of the images "
            "with their classes (.csv)"
        )
    raise ValueError(
        f"source: got {root} with one class, {images[0].class_name}; need at least two; "
        f"do: {advice}"
    )


def _remark_on_classes(root: Path, images: list[NamedSample]) -> list[str]:
    """Return a remark if classes have names of splits.

    Raises ValueError if the images of those classes lie in further folders, as classes in a split,
    or if there are a training split and another one by their whole names.
    """
    classes = {str(image.class_name) for image in images}
    splits = {name: kinds for name in classes if (kinds := kinds_in(name))}
    alike = "their other words" if any(map(own_words, splits)) else "several for one split"
    other = min(classes - splits.keys(), default=alike)
    exact = {kind: name for kind in ("train", "val", "test") for name in _exact(splits, kind)}
    if "train" not in exact and not ({"train"} < set().union(*splits.values())):
        return []
    names = ", ".join(sorted(splits))
    deep = all(image.name.count(os.sep) > 1 for image in images if image.class_name in splits)
    if deep or {"train"} < exact.keys():
        train, val = exact.get("train", "TRAIN"), exact.get("val", exact.get("test"))
        raise ValueError(
            f"source: got {root} with folders named for splits ({names})"
            f"{', which hold further folders,' * deep} beside {other}; need splits or classes; "
            f"do: convert {root / train} OUT --val {root / val if val else '10%'}, or, if they are "
            "classes, list the images in a .csv"
        )
    return [f"{names}: taken for classes, not for splits, because of {other}"]


def _exact(splits: Mapping[str, set[str]], kind: str) -> list[str]:
    """Return the names that stand for a split and have no words of their own."""
    return sorted(name for name, kinds in splits.items() if kinds == {kind} and not own_words(name))


def _class_folders(root: Path) -> set[str]:
    """Return the folders directly under root, without those that are passed over.

    A broken link without suffix counts as a folder: its target may be on an unmounted disk.
    """
    return {
        entry.name
        for entry in root.iterdir()
        if not is_passed_over(entry.name)
        and (entry.is_dir() or (entry.is_symlink() and not entry.suffix and not entry.exists()))
    }


# --------------------------------------------------------------- sources with their own class lists


def parquet(
    train: Path, val: Path | None, columns: Mapping[str, str], targets: str = "class"
) -> DataSource:
    """Return a source of Hugging Face's parquet files. A folder may hold a validation split too.

    The files of a folder without words for splits in their names are those of one split.
    """
    passed = PassedOver()
    files, remarks = {}, []
    for place, splits in ((train, ["train"]), (val, ["val"])) if val else ((train, BOTH),):
        by_kind = {"": [place]} if place.is_file() else files_by_kind(place, passed)
        if "" in by_kind:
            files[splits[0]] = by_kind[""]
        else:
            taken, remark = take(place, by_kind, splits)
            files |= taken
            remarks.append(remark)
    if "train" not in files:
        raise ValueError(f"source: got {train} without train-*.parquet; do: give the files' folder")
    if val is not None and "val" not in files:
        raise ValueError(
            f"--val: got {val} without validation-*.parquet; do: give the file of that split"
        )
    remarks += passed.remarks
    images, classes, label = read_parquet(files["train"], columns, targets)
    if label:
        remarks.append(f"labels: the column {printable(label)}")
        columns = {**columns, "label": label}  # of both splits
    held_out = None
    if "val" in files:
        try:
            held_out = read_parquet(files["val"], columns, targets)[0]
        except HiddenLabels as error:
            alone = files["train"][0] if len(files["train"]) == 1 else train
            move = f"move it out of {train}, then " * (alone == train and val is None)
            raise ValueError(f"{error}: {move}convert {alone} OUT --val 10%") from None
    column = columns.get("label", "label")  # `label` is that of both by now
    source = share_classes(str(train), images, held_out, classes, remarks, targets, column)
    refuse_copies(files["train"], files.get("val", []))
    return source


def array_files(
    source: str,
    val: str | None,
    columns: Mapping[str, str],
    labels: str | None,
    val_labels: str | None,
    targets: str = "class",
) -> DataSource:
    """Return a source of arrays that lie together in files. The arguments are `open_source`'s."""
    own = None if labels is None else Path(labels)
    splits = BOTH if val is None else ("train",)
    samples, remarks = whole_set(Path(source), columns, own, splits, targets)
    if val is not None:
        own = None if val_labels is None else Path(val_labels)
        held_out, more = whole_set(Path(val), columns, own, ("val",), targets)
        samples |= held_out
        remarks += more
    column = columns.get("label", "label")
    return share_classes(
        source, samples["train"], samples.get("val"), None, remarks, targets, column
    )


def shards(train: Path, val: Path | None = None) -> DataSource:
    """Return a source of converted shards, with their class list, labels and `halved`."""
    from ds_classifier.data.shards import open_shards, refuse_shared_shards

    def split_of(place: Path, split: str) -> Path:
        return place if (place / "manifest.json").is_file() else place / split

    folders = {"train": split_of(train, "train")}
    if val is not None:
        folders["val"] = split_of(val, "val")
    elif (train / "val" / "manifest.json").is_file():
        folders["val"] = train / "val"
    opened = {split: open_shards(folder) for split, folder in folders.items()}
    classes = opened["train"].manifest.classes
    stored = {(m.image_size, m.form) for m in (s.manifest for s in opened.values()) if m.image_size}
    if len(stored) > 1:
        raise ValueError(
            f"--val: got splits with different halving, {sorted(stored)}; need the same; do: "
            "convert both from their source in one call"
        )
    arrays = opened["train"].manifest.arrays
    if len({str(s.manifest.arrays and s.manifest.arrays.facts) for s in opened.values()}) > 1:
        raise ValueError(
            "--val: got splits of different arrays, or with another scale; need the same; do: "
            "convert both from their source in one call"
        )
    targets = opened["train"].manifest.targets
    if any(part.manifest.targets != targets for part in opened.values()):
        raise ValueError(
            "--val: got splits with other targets, or other bins; need the same; do: convert both "
            "from their source in one call"
        )
    splits = {}
    for split, part in opened.items():
        if part.manifest.classes != classes:
            raise ValueError(
                f"--val: got {part.folder} with another class list than {opened['train'].folder}; "
                "need the same; do: convert both splits from their source in one call"
            )
        splits[split] = samples = []
        for i, row in enumerate(part.index.tolist()):
            offset, length, label, shard = row
            name = f"{part.path(shard)}/{part.key(i)}"
            if not 0 <= label < len(classes):
                raise ValueError(f"{name}: got label {label}; need one of {len(classes)} classes")
            sample = Sample(name, label, Slice(part.path(shard), offset, length))
            if part.targets is not None:
                sample = replace(sample, target=part.targets[i])
            if part.sample_weights is not None:
                sample = replace(sample, weight=float(part.sample_weights[i]))
            samples.append(sample)
    held_out = opened["train"].manifest.held_out
    halved = next(iter(stored), None)
    source = DataSource(
        str(train), classes, splits, halved, held_out, arrays=arrays, targets=targets
    )
    if "val" in opened:
        train_part, val_part = (part.manifest for part in opened.values())
        refuse_shared_shards(train_part, val_part, "--val", "name the shards of another split")
    return source
