"""Index shards made by other programs: write a manifest and an index, leave the tars in place.

Several processes read every shard once from the first byte to the last, and record its samples, its
size and its sha256. Shards behind a URL are streamed and not stored.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_classifier.common import files
from ds_classifier.common.text import count
from ds_classifier.common.urls import shown
from ds_classifier.data.arrays import Arrays, Survey
from ds_classifier.data.foreign.advice import advice_for
from ds_classifier.data.foreign.contents import shard_bytes
from ds_classifier.data.foreign.layouts import (
    CLASSNAMES,
    Listing,
    Location,
    find_shards,
    stats_name,
    stats_of,
)
from ds_classifier.data.foreign.problems import (
    COPY,
    COUNT,
    GAP,
    METADATA,
    NO_CLASS,
    NO_SAMPLE,
    SHARD,
    Problems,
)
from ds_classifier.data.labels.classes import class_lines
from ds_classifier.data.remote.mirror import Mirror
from ds_classifier.data.scan import Fault, class_numbers, scan_samples
from ds_classifier.data.shards import (
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    Neighbours,
    Shard,
    neighbours,
    parse_manifest,
)
from ds_classifier.data.store import is_url, url_of
from ds_classifier.data.tars import Sequential, printable
from ds_classifier.distributed.pool import in_processes, shared


@dataclass(frozen=True)
class IndexedSplit:
    """A split that was indexed.

    checked_by: the metadata file that its counts agree with; None if there is none.
    neighbours: how often samples next to each other are of one class.
    bad_arrays: the number of arrays that cannot be read like the others, and why the first cannot.
    """

    manifest: Manifest
    checked_by: str | None
    neighbours: Neighbours
    bad_arrays: tuple[int, str] = (0, "")


def index(
    train: str,
    out: Path,
    *,
    val: str | None = None,
    labels: str | None = None,
    classes: Path | None = None,
    scale: Sequence[float] | None = None,
    shift: Sequence[float] | None = None,
    workers: int = 1,
    progress: Callable[[int, int | None, str], None] = lambda done, total, phase: None,
    mirror: Mirror | None = None,
) -> dict[str, IndexedSplit]:
    """Write OUT/train/{manifest.json,index.npy}, and OUT/val/, for shards that stay where they are.

    train, val: a directory; a pattern of paths or URLs as webdataset expands it; a URL of a
    directory; or the path or URL of _info.json, sizes.json or nshards.txt. val: None means the
    validation split that train holds, if there is one.
    labels: "cls", or "json:KEY"; None: what the metadata says, else "cls".
    classes: file with one class name per line; None: classnames.txt next to the shards, else
    numbers.
    scale, shift: of arrays; see `Arrays.with_scaling`.
    progress: called with the number of images found, of all images (None if unknown), the split.
    mirror: object storage that `out` stands for; None if it is the output itself.
    Raises ValueError that lists everything that is wrong; in this case nothing is written.
    """
    listings = {"train": find_shards(train, "train")}
    held_out = find_shards(train, "val", optional=True) if val is None else find_shards(val, "val")
    if held_out is not None:
        listings["val"] = held_out
        _refuse_shared_shards(*listings.values())
    labels = labels or listings["train"].labels or "cls"
    names = _class_names(listings, classes)
    for split in ("train", "val"):
        _refuse_to_overwrite(out / split, listings.get(split), _place(out, split, mirror))
    scans: dict[str, list[_Scan]] = {}
    problems = Problems()
    for split, listing in listings.items():
        shards = _Split(listing, labels, names, scale, shift)
        scans[split] = _scan_all(shards, workers, functools.partial(progress, phase=split))
        problems.update(_problems(shards, scans[split]))
        if split == "train" and names is None and not problems:
            names = _number_classes(shards, scans[split], problems)
    _add_copies(listings, scans, problems)
    if problems:
        raise ValueError(problems.message(advice_for(problems, labels)))
    arrays = _arrays(scans, scaled=scale is not None or shift is not None)
    written = {}
    for split, listing in listings.items():
        place = _place(out, split, mirror)
        indexed = _write(
            out / split, place, split, listing, labels, names, scans[split], arrays.get(split)
        )
        if mirror is not None:
            mirror.finish(out / split)
        written[split] = indexed
    return written


def _arrays(scans: dict[str, list[_Scan]], *, scaled: bool) -> dict[str, tuple[Arrays, int, str]]:
    """Return what `Survey.finish` does of each split; nothing for images.

    scaled: a scale or shift was given.
    Raises ValueError for shards of both kinds or of different arrays, for splits that differ, and
    if most arrays cannot be read alike.
    """
    every = [scan for found in scans.values() for scan in found if len(scan.rows)]
    kinds = {scan.survey is not None for scan in every}
    if len(kinds) > 1:
        both = [next(s.shard.name for s in every if (s.survey is None) == no) for no in (1, 0)]
        raise ValueError(
            f"got images in {both[0]} and arrays in {both[1]}; need one kind; do: index them apart"
        )
    if kinds == {False}:
        if scaled:
            raise ValueError("--scale, --shift: got them with images; need arrays; do: drop them")
        return {}
    arrays, first = {}, {}  # first: kind -> a shard of it
    for split, found in scans.items():
        whole = Survey(None, None)
        for scan in found:
            if scan.survey is not None:
                whole.update(scan.survey)
                if (kind := scan.survey.commonest) is not None:
                    first.setdefault(kind, f"{split}'s {scan.shard.name}")
        if len(first) > 1:
            kinds = " and ".join(f"arrays of {kind} in {name}" for kind, name in first.items())
            raise ValueError(f"got {kinds}; need one shape and type; do: index them apart")
        try:
            arrays[split] = whole.finish()
        except ValueError as error:
            raise ValueError(f"{split}: {error}") from None
    return arrays


def _place(out: Path, split: str, mirror: Mirror | None) -> str:
    """Return the directory, without links, or the URL of a split that is written."""
    return os.path.realpath(out / split) if mirror is None else f"{mirror.url}/{split}"


def _refuse_shared_shards(train: Listing, val: Listing) -> None:
    """Raise ValueError if a shard is in both splits."""
    both = sorted(_places(train) & _places(val))
    if both:
        raise ValueError(
            f"--val: got {count(len(both), 'shard')} in both splits, such as {shown(both[0])}; "
            "need validation shards that are not trained on; do: give each split its own, as "
            "patterns such as 'DIR/name-{0000..0099}.tar'"
        )


def _places(listing: Listing) -> set[str]:
    """Return the URLs of a listing's shards, or their paths without links."""
    if is_url(listing.location):
        return {url_of(listing.location, name) for name in listing.names}
    return {os.path.realpath(f"{listing.location}/{name}") for name in listing.names}


def _real(location: str) -> str:
    """Return a URL unchanged, and a directory without links."""
    return location if is_url(location) else os.path.realpath(location)


def _class_names(listings: dict[str, Listing], classes: Path | None) -> list[str] | None:
    """Return the class names in a file, or else in the metadata; None if there are none."""
    if classes is not None:
        return class_lines(classes.read_bytes(), f"--classes: {classes}")
    lists = [listing.classes for listing in listings.values() if listing.classes is not None]
    if any(names != lists[0] for names in lists):
        raise ValueError(
            f"--val: got another {CLASSNAMES} than for TRAIN; need one list; do: give the right "
            "one as --classes FILE"
        )
    return lists[0] if lists else None


# --------------------------------------------------------------------------------------- scanning


@dataclass(frozen=True)
class _Split:
    """A split to scan.

    labels: "cls" or "json:KEY". classes: class names; None if labels are numbers only.
    scale, shift: of arrays.
    """

    listing: Listing
    labels: str
    classes: list[str] | None
    scale: Sequence[float] | None
    shift: Sequence[float] | None

    @functools.cached_property
    def numbers(self) -> dict[str, int] | None:
        """The label of every class name; None if there are no class names."""
        return None if self.classes is None else class_numbers(self.classes)

    def size(self, name: str) -> int | None:
        """Return the size of a shard in bytes, or None behind a URL."""
        if is_url(self.listing.location):
            return None
        return files.size_of_file(Path(self.listing.location, name))


@dataclass(frozen=True)
class _Scan:
    """The samples of a shard, and its problems.

    rows: [n] INDEX_DTYPE. keys: [n] uint64, hashes of the samples' keys.
    survey: of the arrays; None if the samples are images.
    """

    shard: Shard
    rows: np.ndarray
    keys: np.ndarray
    problems: Problems
    survey: Survey | None


def _scan_all(
    split: _Split, workers: int, progress: Callable[[int, int | None], None]
) -> list[_Scan]:
    counts, names = split.listing.counts, split.listing.names
    total = sum(counts[name] for name in names) if counts.keys() >= set(names) else None
    scans, done = [], 0
    progress(0, total)
    for scan in in_processes(workers, _scan_one, names, shared=split):
        scans.append(scan)
        done += len(scan.rows)
        progress(done, total)
    return scans


def _scan_one(name: str) -> _Scan:
    """Scan one shard."""
    split: _Split = shared()
    place = (split.listing.location, name)
    where = "/".join(place)
    problems = Problems()

    def report(fault: Fault) -> None:
        problems.add(fault.kind, place, str(fault), words=fault.words)

    rows, keys = [], []
    survey, surveyed = Survey(split.scale, split.shift), set()

    def look(offset: int, data: bytes) -> None:
        surveyed.add(offset)
        survey.add(data)

    file = Sequential(shard_bytes(*place))
    try:
        for key, entry in _samples(split, file, name, report, look):
            if split.classes is not None and entry[2] >= len(split.classes):
                words = f"has label {entry[2]}; there are {len(split.classes)} classes"
                report(Fault(NO_CLASS, where, key, words))
            rows.append(entry)
            keys.append(_hash(key))
        expected = _expected(split, name)
        if expected not in (None, len(rows)) and not problems:
            message = f"{where}: got {len(rows)} samples; {split.listing.source} says {expected}"
            problems.add(COUNT, place, message, samples=abs(expected - len(rows)))
    except (ValueError, OSError) as error:
        expected = split.listing.counts.get(name)
        said = "" if expected is None else f"; {split.listing.source} says {expected}"
        message = f"{error} (samples found before: {len(rows)}{said})"
        problems.add(SHARD, place, message, samples=max(1, (expected or 0) - len(rows)))
    return _Scan(
        Shard(name, len(rows), file.arrived, file.digest.hexdigest()),
        np.array(rows, dtype=INDEX_DTYPE),
        np.array(keys, dtype=np.uint64),
        problems,
        survey if rows and rows[0][0] in surveyed else None,
    )


def _samples(
    split: _Split,
    file: Sequential,
    name: str,
    report: Callable[[Fault], None],
    look: Callable[[int, bytes], None] | None = None,
) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Yield (key, index row) of the samples in a shard."""
    for sample in scan_samples(
        file,
        f"{split.listing.location}/{name}",
        split.size(name),
        labels=split.labels,
        numbers=split.numbers,
        report=report,
        look=look,
    ):
        yield sample.key, sample.entry


def _expected(split: _Split, name: str) -> int | None:
    """Return the number of samples of a shard in the metadata, or None if it is not there."""
    if not split.listing.stats:
        return split.listing.counts.get(name)
    stats = stats_of(Location(split.listing.location), name)
    if stats is None or type(stats.get("successes")) is not int:
        raise ValueError(
            f"{split.listing.location}/{name}: got no {stats_name(name)} with successes, which "
            "other shards have; do: let img2dataset finish the shard, or remove it"
        )
    return stats["successes"]


def _hash(key: str) -> int:
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _problems(split: _Split, scans: list[_Scan]) -> Problems:
    """Return the problems of the shards and of their metadata."""
    location, names = split.listing.location, split.listing.names
    problems = Problems()
    for message in split.listing.problems:
        problems.add(METADATA, (location, ""), message)
    for scan in scans:
        problems.update(scan.problems)
    if not problems and not any(len(scan.rows) for scan in scans):
        message = f"{location}: got no samples in {count(len(scans), 'shard')}"
        problems.add(NO_SAMPLE, (location, names[0] if names else ""), message)
    return problems


def _add_copies(
    listings: dict[str, Listing], scans: dict[str, list[_Scan]], problems: Problems
) -> None:
    """Add a problem for every shard with the bytes of an earlier one, of the same split or not."""
    first: dict[str, tuple[str, str]] = {}  # sha256 -> location and name
    for split, listing in listings.items():
        for scan in scans[split]:
            place = listing.location, scan.shard.name
            if len(scan.rows) and (other := first.setdefault(scan.shard.sha256, place)) != place:
                names = f"{other[1] if other[0] == place[0] else '/'.join(other)} and {place[1]}"
                message = f"{place[0]}: {names} have the same bytes; need each shard once"
                problems.add(COPY, place, message, samples=len(scan.rows))


def _keys_begin_anew(scans: list[_Scan]) -> bool:
    """Return whether a key is in several shards, by the hashes of all keys."""
    hashes = np.concatenate([scan.keys for scan in scans])
    hashes.sort()
    return bool((hashes[1:] == hashes[:-1]).any())


def _keys(split: _Split, scan: _Scan, wanted: np.ndarray) -> list[str]:
    """Read a shard again for the keys of some of its samples. wanted: [n] bool."""
    file = Sequential(shard_bytes(split.listing.location, scan.shard.name))
    samples = _samples(split, file, scan.shard.name, lambda fault: None)
    return [key for (key, _), yes in zip(samples, wanted, strict=True) if yes]


def _number_classes(split: _Split, scans: list[_Scan], problems: Problems) -> list[str] | None:
    """Return the class names "0", "1" ... for the training labels.

    Returns None, and adds to the problems, if a number below the largest label has no image.
    """
    present = functools.reduce(np.union1d, (np.unique(scan.rows["label"]) for scan in scans))
    if present[-1] == len(present) - 1:
        return [str(i) for i in range(len(present))]
    gap = int(np.flatnonzero(present != np.arange(len(present)))[0])
    scan = next(scan for scan in scans if (scan.rows["label"] > gap).any())
    wanted = np.zeros(len(scan.rows), dtype=bool)
    wanted[np.argmax(scan.rows["label"])] = True
    key = printable(_keys(split, scan, wanted)[0])
    label = scan.rows["label"].max()
    problems.add(
        GAP,
        (split.listing.location, scan.shard.name),
        f"{split.listing.location}: no image has label {gap}, but {key} in {scan.shard.name} has "
        f"{label}; need 0, 1, 2, ... without a gap, or --classes FILE with a name for every label",
    )
    return None


# ---------------------------------------------------------------------------------------- writing


def _refuse_to_overwrite(folder: Path, listing: Listing | None, place: str) -> None:
    """Raise ValueError if a folder holds anything but an index of the same shards.

    place: see `_place`.
    """
    if not (folder / MANIFEST).exists():
        return
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), folder / MANIFEST)
    if manifest.plan:
        raise ValueError(
            f"OUT: got {folder}, which holds converted shards; need another directory; do: "
            "choose another OUT, or train on these shards directly"
        )
    location = manifest.location or place
    if listing is None or _real(listing.location) != _real(location):
        raise ValueError(
            f"OUT: got {folder}, the index of other shards ({shown(location)}); need one data set "
            "in OUT; do: choose another OUT, or remove that index"
        )


def _write(
    folder: Path,
    place: str,
    split: str,
    listing: Listing,
    labels: str,
    classes: list[str],
    scans: list[_Scan],
    found: tuple[Arrays, int, str] | None,
) -> IndexedSplit:
    """Write the index of a split, then its manifest, which marks it as complete.

    place: see `_place`. found: of arrays, see `_arrays`; None for images.
    """
    arrays, *bad = found or (None, 0, "")
    scans = [scan for scan in scans if len(scan.rows)]  # img2dataset writes empty shards
    samples = sum(len(scan.rows) for scan in scans)
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".{INDEX}.staging"
    rows = np.empty(samples, INDEX_DTYPE)
    at = 0
    for number, scan in enumerate(scans):
        part = rows[at : at + len(scan.rows)]
        part[:] = scan.rows
        part["shard"] = number
        at += len(scan.rows)
    pairs = neighbours(rows)
    with open(staging, "wb") as file:
        np.save(file, rows)
    files.fsync(staging)
    (folder / MANIFEST).unlink(missing_ok=True)  # it describes the index that is replaced
    os.replace(staging, folder / INDEX)
    in_place = _real(listing.location) == place
    manifest = Manifest(
        split=split,
        source=os.path.basename(listing.location),
        plan="",
        classes=classes,
        samples=samples,
        stored="original",
        image_size=None,
        form="",
        undecodable=[],
        shards=[scan.shard for scan in scans],
        index_sha256=files.sha256(folder / INDEX),
        location=None if in_place else listing.location,
        labels=labels,
        shard_keys=_keys_begin_anew(scans),
        arrays=arrays,
    )
    files.replace_text(folder / MANIFEST, manifest.to_json())
    files.fsync(folder)
    return IndexedSplit(manifest, listing.source, pairs, tuple(bad))
