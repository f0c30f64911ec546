"""Advise on the problems of shards, by their kind and by what the tar holds."""

from __future__ import annotations

import os
import shlex
from contextlib import closing

from ds_classifier.data.foreign.contents import Contents, contents_of, shard_bytes
from ds_classifier.data.foreign.problems import (
    COPY,
    COUNT,
    METADATA,
    NO_CLASS,
    NO_SAMPLE,
    Problems,
)
from ds_classifier.data.scan import BAD_LABEL, NO_IMAGE, NO_LABEL, TWICE, TWO_IMAGES
from ds_classifier.data.store import is_url
from ds_classifier.data.tars import IMAGE_SUFFIXES, Sequential, key_of, printable

ADVICE = {
    BAD_LABEL: "give the place of labels with --label json:KEY, or the names of classes with "
    "--classes FILE",
    NO_IMAGE: "pack these samples again, each with its image under the same name beside its label",
    NO_LABEL: "pack these shards again with a label for every image, or without these images",
    TWICE: "pack the shard again, with each key once",
    TWO_IMAGES: "give every image a key and a label of its own",
    NO_CLASS: "give a name for every label with --classes FILE",
    COPY: "remove one of them, or name the others with a pattern",
    METADATA: "complete the download, or correct the metadata file or remove it",
    COUNT: "download these shards again, or correct the metadata file or remove it",
}


def advice_for(problems: Problems, labels: str) -> dict[str, str]:
    """Return kind of problem -> what to do, for the kinds whose messages do not say it.

    Looks at the first members of a shard if images or labels are missing.
    labels: where they were looked for, "cls" or "json:KEY".
    """
    advice = dict(ADVICE)
    for kind in (NO_LABEL, NO_IMAGE, NO_SAMPLE, BAD_LABEL):
        if kind not in problems.kinds:
            continue
        location, name = problems.kinds[kind].first
        try:
            with closing(shard_bytes(location, name)) as chunks:
                contents = contents_of(Sequential(chunks), name, None)
        except (ValueError, OSError):
            continue
        tar = name if is_url(location) else os.path.join(location, name)
        if special := _by_contents(kind, labels, contents, tar):
            advice[kind] = special
    return advice


def _by_contents(kind: str, labels: str, contents: Contents, tar: str) -> str | None:
    """Return what to do about missing images or labels, or None if the tar does not show it."""
    if kind == BAD_LABEL:
        return _by_labels(labels, contents)
    if contents.tars:
        return (
            f"if this is ImageNet's tar of tars, ds-classifier convert {shlex.quote(tar)} data; "
            "else unpack it and convert the folder"
        )
    if contents.class_folders:
        return (
            "these images have no labels, but directories, as archives of class folders do; unpack "
            f"it and convert the folder that holds them: tar xf {shlex.quote(tar)}, then "
            "ds-classifier convert FOLDER data"
        )
    if contents.apart and kind != NO_SAMPLE:
        image, label = map(printable, contents.apart)
        return (
            f"pack the shards again with {image} and {label} in one directory of the tar: the "
            "members of a sample are those whose names agree up to the first dot, with directories"
        )
    if contents.dotted and not (contents.images and contents.cls):
        key, suffix = key_of(contents.dotted)
        own = f"{key}_{suffix.replace('.', '_', suffix.count('.') - 1)}"
        return (
            f"name the members without further dots, such as {printable(own)}, each image and its "
            f"label alike: a key ends at the first dot, so {printable(contents.dotted)} has the "
            f"key {printable(key)} and the suffix .{printable(suffix)}, which is not read"
        )
    if kind == NO_LABEL:
        if labels != "cls" and contents.cls:
            return "read the labels from .cls with --label cls"
        if labels == "cls" and contents.fields is not None and not contents.cls:
            return (
                "read the labels from .json with --label json:KEY, where KEY is its field of the "
                f"class; the first one has {', '.join(contents.fields_shown)}"
            )
        if contents.unread_label and not contents.labelled:
            return contents.renaming(tar)
        if not contents.labelled:
            return (
                "these shards hold no labels; unpack them, sort the images into one directory per "
                "class, and ds-classifier convert FOLDER data"
            )
    if not contents.labelled and not contents.images:
        return (
            f"this is no shard of WebDataset: it holds {contents.others or 'nothing'}; unpack it, "
            "and convert a folder or a list of its images"
        )
    if kind != NO_LABEL and contents.others and not contents.images:
        return (
            f"images are read from {' '.join(IMAGE_SUFFIXES)}; this tar has {contents.others}; "
            "store the images in one of these formats under its suffix"
        )
    return None


def _by_labels(labels: str, contents: Contents) -> str | None:
    """Return what to do about labels that are texts in .cls; None for those in .json."""
    if labels != "cls":
        return None
    fields = ", ".join(contents.fields_shown)
    return (
        "if these are the names of classes, give all names with --classes FILE, one per line, in "
        "the order of their numbers"
        + f"; or read other labels with --label json:KEY, where KEY is one of {fields}"
        * bool(fields)
    )
