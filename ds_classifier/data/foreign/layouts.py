"""Find shards made by other programs, and their metadata: timm, open_clip, img2dataset ...

The metadata that is read, with the source files that define it:

    timm            _info.json or info.json: {"splits": {NAME: {"num_samples": n,
                    "filenames": [...], "shard_lengths": [...], "alt_label": KEY}}}; members .jpg
                    .cls .json; the validation split of imagenet-1k-wds is called "validation";
                    alt_label is the field of .json that holds the label
                    (timm/data/readers/reader_wds.py)
    open_clip       sizes.json: {"00000.tar": n, ...} next to the shards
                    (open_clip/src/training/data.py, get_dataset_size)
    img2dataset     NNNNN.tar with .jpg .txt .json, and NNNNN_stats.json, whose "successes" is
                    the number of samples; .json holds the columns that the user kept
                    (img2dataset/writer.py, logger.py)
    CLIP_benchmark  SPLIT/nshards.txt, a number n; SPLIT/0.tar ... SPLIT/(n-1).tar with .webp (or
                    .png, .jpg) and .cls; classnames.txt above, one class per line; splits "train"
                    and "test" (clip_benchmark/webdataset_builder.py)
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds_classifier.common.urls import scheme, shown, without_logins
from ds_classifier.data.labels.classes import class_lines
from ds_classifier.data.remote.fetch import NotServed, Patience, fetch_small
from ds_classifier.data.remote.mirror import names_in
from ds_classifier.data.remote.objects import SCHEMES
from ds_classifier.data.shards import PLAIN_URL
from ds_classifier.data.store import REMOTE_NAME, is_url, url_of
from ds_classifier.data.tars import is_tar_name, printable

STATS = "NAME_stats.json"
INFO = ("_info.json", "info.json")
SIZES, NSHARDS, CLASSNAMES = "sizes.json", "nshards.txt", "classnames.txt"
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
LARGEST_METADATA = 1 << 26  # bytes; sizes.json of 200,000 shards has 6 MB
OPTIONAL = Patience(retries=2, pause_s=0.5)  # for files that may not exist


@dataclass(frozen=True)
class Listing:
    """The shards of a split, and their metadata.

    location: the absolute directory of the tars, or its URL.
    names: the file names of the shards.
    counts: shard -> number of samples, from the metadata file `source`; empty without one.
    stats: whether there are NAME_stats.json files, which hold the counts instead.
    labels: "cls" or "json:KEY", where the metadata says that labels are; None if it does not.
    classes: class names; None if there are none.
    problems: contradictions within the metadata, or between it and the directory.
    """

    location: str
    names: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    source: str | None = None
    stats: bool = False
    labels: str | None = None
    classes: list[str] | None = None
    problems: list[str] = field(default_factory=list)


class Location:
    """A directory on this machine or behind a URL, whose metadata files are read by name.

    url: whether it is a URL. root: the URL, or the absolute path.
    Raises ValueError for a URL with characters that a manifest may not hold.
    """

    def __init__(self, location: str):
        self.url = is_url(location)
        self.root = location.rstrip("/") if self.url else os.path.abspath(location)
        if self.url and not PLAIN_URL.fullmatch(self.root):
            raise ValueError(
                f"got the URL {self.root!r}; need letters, digits and _.,:/@%+=~- in it; do: "
                "write other characters as %XX"
            )

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.root}/{name}")

    def folders_named(self, names: Sequence[str]) -> list[str]:
        """Return the names in the case that directories here have; all of them for a URL."""
        if self.url or not os.path.isdir(self.root):
            return list(names)
        present = sorted(os.listdir(self.root), reverse=True)  # lower case first
        return [entry for name in names for entry in present if entry.lower() == name]

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if it does not exist.

        Raises ValueError for more than LARGEST_METADATA bytes, OSError if a server does not answer.
        """
        where = url_of(self.root, name) if self.url else f"{self.root}/{name}"
        if self.url:
            try:
                return fetch_small(where, limit_bytes=LARGEST_METADATA, patience=OPTIONAL)
            except NotServed:
                return None
            except OSError:
                if scheme(where) in ("http", "https", "hf", *SCHEMES):
                    raise
                return None  # a program that fetches files does not report why it failed
        if not os.path.isfile(where):
            return None
        if os.path.getsize(where) > LARGEST_METADATA:
            raise ValueError(f"{where}: got a file of more than {LARGEST_METADATA} bytes")
        return Path(where).read_bytes()

    def read_json(self, name: str) -> dict | None:
        """Return the object in a JSON file, or None if the file does not exist."""
        text = self.read(name)
        if text is None:
            return None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.root}/{name}: got no JSON ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.root}/{name}: got no JSON object")
        return content

    def tars(self) -> list[str]:
        """Return the names of the tars in a directory, in numerical order; none for a URL.

        Object storage can be listed, other servers cannot.
        """
        if scheme(self.root) in SCHEMES:
            return sorted(filter(is_tar_name, names_in(self.root)), key=_by_number)
        if self.url or not os.path.isdir(self.root):
            return []
        with os.scandir(self.root) as entries:
            names = [e.name for e in entries if is_tar_name(e.name) and not e.is_dir()]
        return sorted(names, key=_by_number)

    def tars_with_stats(self) -> set[str]:
        """Return the names of the tars that have NAME_stats.json from img2dataset."""
        stats = (name for name in os.listdir(self.root) if name.endswith(STATS[4:]))
        names = (name.removesuffix(STATS[4:]) + ".tar" for name in stats)
        return set(filter(is_tar_name, names))


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _parts(name)]


def _parts(name: str) -> list[str]:
    return [part for part in re.split("([0-9]+)", name) if part]


def find_shards(address: str, split: str, *, optional: bool = False) -> Listing | None:
    """Return the shards of a split at an address.

    address: a directory, pattern or URL: see `index`.
    split: "train" or "val", the split to look for if the address holds both.
    optional: return None if the address has no split of that name. If False, shards that lie
    directly in a directory are used for any split.
    Raises ValueError if there are no shards, or none that can be read in place.
    """
    _refuse_secrets(address)
    address = address if is_url(address) else os.path.expanduser(address)
    folder, _, base = address.rstrip("/").rpartition("/")
    if base in (*INFO, SIZES, NSHARDS):
        address = folder or ("/" if address.startswith("/") else ".")
    elif "{" in address or "::" in address or is_tar_name(base):
        return None if optional else _check_names(_from_pattern(address))
    location = Location(address)
    found = _from_info(location, split, optional) or _from_split_folder(location, split)
    if found is None and not optional:
        found = _from_folder(location)
    if found is not None:
        return _check_names(found)
    if optional:
        return None
    flag = "TRAIN" if split == "train" else "--val"
    if location.url:
        raise ValueError(
            f"{flag}: got {address}, where there is no {INFO[0]}, {SIZES}, {NSHARDS} nor "
            f"{SPLITS[split][0]}/{NSHARDS}; files behind a URL cannot be "
            "listed; do: name the shards, like "
            f"{address}/name-{{0000..1023}}.tar"
        )
    missing, advice = "which does not exist", ""
    if os.path.exists(address):
        missing = "without any .tar"
        advice = f"; if it holds images: ds-classifier convert {address} OUT"
    raise ValueError(
        f"{flag}: got {address}, {missing}; need a directory with shards, a pattern like "
        f"'/data/name-{{0000..1023}}.tar', or a URL{advice}"
    )


def _refuse_secrets(location: str) -> None:
    """Raise ValueError for programs and secrets in URLs, which a manifest must not hold."""
    for part in location.split("::"):
        if scheme(part) == "pipe":
            raise ValueError(
                f"got {part!r}, which runs a program; a manifest must not name one; do: give a URL "
                "or download the shards"
            )
        http = scheme(part) in ("http", "https")
        user_alone = not http and re.match("[^/]*//[^/@:]*@[^@]*$", part)
        if (http and "?" in part) or (without_logins(part) != part and not user_alone):
            raise ValueError(
                f"got {shown(part)} with a query or a password, which anyone could read in the "
                "manifest; do: give a plain URL, or download the shards"
            )


def _from_info(location: Location, split: str, optional: bool) -> Listing | None:
    """Return a split listed in timm's _info.json, or None if there is no such file.

    optional: also return None if the file does not list the split.
    """
    infos = ((name, location.read_json(name)) for name in INFO)
    name, info = next(((name, info) for name, info in infos if info is not None), (None, None))
    if info is None:
        return None
    where, splits = f"{location.root}/{name}", info.get("splits")
    if not isinstance(splits, dict):
        raise ValueError(f'{where}: got no "splits"; need the format that timm writes')
    chosen = next((s for s in SPLITS[split] if s in splits), None)
    if chosen is None:
        if optional:
            return None
        raise ValueError(
            f"{where}: got the splits {', '.join(map(str, splits))}; need one called "
            f"{' or '.join(SPLITS[split])}; do: give its shards as a pattern"
        )
    counts, total, labels = _info_counts(splits[chosen], f"{where}: split {chosen}")
    problems = []
    if total != sum(counts.values()):
        problems.append(
            f"{where}: num_samples of {chosen} is {total}; its shard_lengths sum to "
            f"{sum(counts.values())}"
        )
    return Listing(
        location.root,
        list(counts),
        counts,
        name,
        labels=labels,
        classes=_find_classes(location),
        problems=problems,
    )


def _info_counts(info: object, where: str) -> tuple[dict[str, int], int, str | None]:
    """Return shard -> number of samples, num_samples, and where labels are, for a split of a file.

    The last one is "json:KEY", or None if the file does not say.
    """
    try:
        names, lengths, total = info["filenames"], info["shard_lengths"], info["num_samples"]
        if any(type(n) is not int or n < 0 for n in (*lengths, total)) or len(names) != len(
            lengths
        ):
            raise ValueError(f"{len(names)} filenames, {len(lengths)} shard_lengths")
        if len(set(names)) != len(names):
            raise ValueError("a filename twice")
        labels = info.get("alt_label") or None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where}: got no consistent filenames, shard_lengths and num_samples "
            f"({type(error).__name__}: {error})"
        ) from None
    counts = _counts_of_tars(dict(zip(names, lengths, strict=True)))
    return counts, total, f"json:{labels}" if labels else None


def _read_sizes(location: Location) -> dict | None:
    """Return the content of sizes.json, or None if there is no such file."""
    sizes = location.read_json(SIZES)
    return None if sizes is None else _counts_of_tars(sizes)


def _counts_of_tars(counts: dict) -> dict:
    """Return the counts of tars among those of a metadata file.

    Names of other types than str, and names with directories, are kept, to be refused.
    """
    return {
        name: number
        for name, number in counts.items()
        if not isinstance(name, str) or is_tar_name(os.path.basename(name))
    }


def _from_split_folder(location: Location, split: str) -> Listing | None:
    """Return a split in a directory of its name (as CLIP_benchmark writes it), or None.

    The name may be in any case, unless it is behind a URL.
    """
    for name in location.folders_named(SPLITS[split]):
        found = _from_folder(location / name)
        if found is not None:
            return found
    return None


def _from_folder(location: Location) -> Listing | None:
    """Return the shards of a directory or URL that holds one split, or None if there are none."""
    tars = location.tars()
    sizes, nshards = _read_sizes(location), location.read(NSHARDS)
    if nshards is not None:
        if not re.fullmatch(rb"[0-9]{1,6}", nshards.strip()):
            raise ValueError(
                f"{location.root}/{NSHARDS}: got {nshards[:20]!r}; need a number of shards"
            )
        names, source = [f"{i}.tar" for i in range(int(nshards))], NSHARDS
    elif sizes is not None and location.url:
        names, source = sorted(sizes, key=_by_number), SIZES
    else:
        names, source = tars, None
    if not names and source is None:
        return None
    problems = []
    if not location.url:
        kinds = {re.sub("[0-9]+", "#", name) for name in names}
        if len(kinds) > 1:
            raise ValueError(
                f"got {location.root} with tars of {len(kinds)} kinds "
                f"({', '.join(sorted(kinds)[:4])}); need those of one split; do: give them as a "
                "pattern, such as 'DIR/name-train-{0000..1023}.tar', and the others as --val"
            )
        listed, said_by = set(names), source
        if sizes is not None:
            listed, said_by = listed | set(sizes), SIZES
        elif source is None and not listed.isdisjoint(with_stats := location.tars_with_stats()):
            listed, said_by = listed | with_stats, STATS
        problems = [
            f"{location.root}/{printable(name)} "
            + (f"does not exist, but is in {said_by}" if name in listed else f"is not in {said_by}")
            for name in sorted(listed ^ set(tars), key=_by_number)
        ]
        names = sorted(set(names) & set(tars), key=_by_number)
    listing = _with_metadata(location, names, problems)
    return listing if listing.source else dataclasses.replace(listing, source=source)


def _from_pattern(pattern: str) -> Listing:
    """Return the shards of a pattern of paths or URLs, as webdataset expands it."""
    from webdataset.shardlists import expand_urls  # imports torch

    try:
        paths = list(expand_urls(pattern))
    except (ValueError, AssertionError) as error:
        raise ValueError(f"got {pattern!r}, which is not a valid pattern ({error})") from None
    paths = paths if is_url(paths[0]) else [os.path.abspath(path) for path in paths]
    folders = {path.rpartition("/")[0] for path in paths}
    if len(folders) > 1:
        raise ValueError(
            f"got shards in {len(folders)} directories, {' and '.join(sorted(folders)[:2])}; need "
            "all of a split in one; do: link them into one directory"
        )
    names = [name for path in paths if is_tar_name(name := path.rpartition("/")[2])]
    if not names:
        raise ValueError(f"got {pattern!r}, such as {paths[0]}; need names that end in .tar")
    if len(set(names)) != len(names):
        raise ValueError(f"got {pattern!r}, which names a shard twice; need each once")
    location = Location(folders.pop())
    if location.url or not set(names).isdisjoint(location.tars()):
        return _with_metadata(location, names, [])
    raise ValueError(f"got {pattern!r}; none of its {len(names)} shards exists, such as {paths[0]}")


def _with_metadata(location: Location, names: list[str], problems: list[str]) -> Listing:
    """Return the named shards with the metadata at their location.

    problems: what is already known to be wrong with them.
    """
    counts: dict[str, int] = {}
    source = labels = None
    for name in INFO:
        splits = (location.read_json(name) or {}).get("splits")
        for split, info in (splits if isinstance(splits, dict) else {}).items():
            of_split, _, of_labels = _info_counts(info, f"{location.root}/{name}: split {split}")
            if not of_split.keys().isdisjoint(names):
                counts |= of_split
                source, labels = name, of_labels
    sizes = _read_sizes(location) if source is None else None
    if sizes and not sizes.keys().isdisjoint(names):
        if any(type(n) is not int or n < 0 for n in sizes.values()):
            raise ValueError(f"{location.root}/{SIZES}: got a count that is not a natural number")
        counts, source = sizes, SIZES
    missing = [] if source is None else [name for name in names if name not in counts]
    problems = problems + [f"{location.root}/{n} is not in {source}" for n in missing]
    stats = False
    if source is None and location.url and names:
        stats = stats_of(location, names[0]) is not None
    elif source is None:
        stats = not location.tars_with_stats().isdisjoint(names)
    return Listing(
        location.root,
        names,
        counts,
        STATS if stats else source,
        stats=stats,
        labels=labels,
        classes=_find_classes(location),
        problems=problems,
    )


def _check_names(listing: Listing) -> Listing:
    """Raise ValueError for names that a manifest may not hold, and for compressed tars."""
    for name in listing.names:
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(
                f"{listing.location}: got the shard name {name!r}; need names without directories"
            )
        if not name.lower().endswith(".tar"):
            raise ValueError(
                f"{listing.location}: got {name}; need plain .tar, because members "
                "of a compressed one cannot be read by offset; do: decompress it"
            )
        if is_url(listing.location) and not REMOTE_NAME.fullmatch(name):
            raise ValueError(
                f"{listing.location}: got the shard name {name!r}; need letters, digits and "
                "_.+=@-, ending in .tar; do: rename it"
            )
    return listing


def stats_name(name: str) -> str:
    """Return the name of img2dataset's statistics for a shard."""
    return f"{name.removesuffix('.tar')}_stats.json"


def stats_of(location: Location, name: str) -> dict | None:
    """Return img2dataset's statistics for a shard, or None if there are none."""
    return location.read_json(stats_name(name))


def _find_classes(location: Location) -> list[str] | None:
    """Return the class names next to the shards, or above a directory named like a split."""
    folder, _, base = location.root.rpartition("/")
    above = [Location(folder)] if base.lower() in (*SPLITS["train"], *SPLITS["val"]) else []
    for where in (location, *above):
        text = where.read(CLASSNAMES)
        if text is not None:
            return class_lines(text, f"{where.root}/{CLASSNAMES}")
    return None
