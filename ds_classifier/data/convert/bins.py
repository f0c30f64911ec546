"""Put the values of a source into ordered bins with about equal numbers of training images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ds_classifier.common.text import count
from ds_classifier.data.convert.samples import DataSource, Sample
from ds_classifier.data.labels.targets import Targets

BINS = 20


def with_bins(source: DataSource, bins: int = BINS) -> tuple[DataSource, list[str]]:
    """Return the source with a bin of its value as the class of each image, and remarks.

    bins: at most so many. The edges are quantiles of the training values, and so values of images;
    equal edges are one, so no bin is empty, and there are fewer bins if many values are equal.
    Validation values outside of the training values are in the first or the last bin.
    Raises ValueError if all training values are equal.
    """
    values = {
        split: np.array([sample.value for sample in samples])
        for split, samples in source.splits.items()
    }
    train = np.sort(values["train"])
    least, most = train[0], train[-1]
    if least == most:
        raise ValueError(
            f"--targets: got values, and {source.values_of} is {least:g} in all training images; "
            "need several values; do: name another column, as in --columns label=NAME"
        )
    places = [i * len(train) // bins for i in range(1, bins)]
    edges = np.unique(train[places])
    edges = edges[edges > least]
    if not len(edges):  # almost all values are the least one
        edges = train[train > least][:1]
    bin_of = {split: np.searchsorted(edges, v, side="right") for split, v in values.items()}
    numbers = np.bincount(bin_of["train"])
    means = np.bincount(bin_of["train"], weights=values["train"]) / numbers
    remarks = []
    if len(numbers) < bins:
        remarks.append(
            f"{len(numbers)} bins of {source.values_of}, not {bins}: many of its values are equal"
        )
    outside = int(((values.get("val", train) < least) | (values.get("val", train) > most)).sum())
    if outside:
        remarks.append(
            f"{count(outside, 'validation value')} outside of {least:g} to {most:g}, the training "
            "values: in the first or last bin"
        )
    targets = Targets("values", tuple(means.tolist()), tuple(edges.tolist()), source.values_of)
    splits = {
        split: _labelled(samples, bin_of[split].tolist())
        for split, samples in source.splits.items()
    }
    names = range_names([least, *edges, most])
    done = replace(source, classes=names, splits=splits, targets=targets, values_of="")
    return done, remarks


def _labelled(samples: Sequence[Sample], labels: Sequence[int]) -> list[Sample]:
    pairs = zip(samples, labels, strict=True)
    return [replace(sample, label=label, value=None) for sample, label in pairs]


def range_names(edges: Sequence[float]) -> list[str]:
    """Return a name such as "12.5 to 14" for the range between each edge and the next.

    Edges have as few digits as tell them apart, six at least.
    """
    texts: list[str] = []
    for digits in range(6, 18):
        texts = [f"{edge:.{digits}g}" for edge in edges]
        if len(set(texts[:-1])) == len(texts) - 1:  # the last bin may hold one value alone
            break
    return [f"{low} to {high}" for low, high in itertools.pairwise(texts)]
