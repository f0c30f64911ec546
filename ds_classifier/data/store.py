"""Bytes of a shard: a local file, or a URL through a node cache.

Local shards are read where they lie. A remote one is fetched whole into the cache, once for all
processes of the node, and read there: positions of an epoch jump between samples, and a request
per sample would cost a round trip each.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ds_classifier.common.urls import refuse_hidden_login, refuse_pipe, scheme, shown
from ds_classifier.data.remote.cache import FileCache
from ds_classifier.data.remote.fetch import NotServed, Patience, fetch_file, fetch_small
from ds_classifier.data.shards import (
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    Shard,
    ShardSet,
    open_shards,
    parse_manifest,
    read_index,
)

OPEN_SHARDS = 256  # file handles a process keeps
MANIFEST_LIMIT = 1 << 28  # bytes; 200,000 shards and 20,000 classes need 50 MB
POLL_S = 0.25  # between looks at what other processes of the node are fetching

# Names go into paths, URLs and, with some of gopen's schemes, command lines.
REMOTE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}\.tar")


class ShardStore:
    """Reads ranges of shards. Made anywhere, opened by the first use in the process that reads:
    it may be pickled, and forked before that.

    location: a directory; or a URL to which /NAME is appended, or that holds {name} where the
        shard's name goes. shards: as the manifest lists them.
    cache_dir: directory of the node for remote shards. budget_bytes: of all data sets in it; None:
        no limit. A shard needed at once is fetched even beyond it, one fetched ahead never.
    stall_timeout_s: seconds without bytes until a download is tried again. retries: failures in a
        row, after the first, until it is given up. pause_s: seconds before the second try; grows.
    allow_pipe: take a pipe: URL, which runs a program; for the command line alone.
    """

    def __init__(
        self,
        location: str | Path,
        shards: Sequence[Shard],
        *,
        cache_dir: Path | None = None,
        budget_bytes: int | None = None,
        stall_timeout_s: float = 30.0,
        retries: int = 5,
        pause_s: float = 1.0,
        allow_pipe: bool = False,
    ):
        self.location, self.shards = str(location), list(shards)
        self.remote = is_url(self.location)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._budget_bytes = budget_bytes
        self._patience = Patience(stall_timeout_s, retries, pause_s)
        if self.remote:
            self._check_remote(allow_pipe)
        self._forget()

    def _check_remote(self, allow_pipe: bool) -> None:
        refuse_pipe(self.location, allow_pipe)
        refuse_hidden_login(self.location)
        where = shown(self.location)
        if self._cache_dir is None:
            raise ValueError(f"got {where} without a cache; need a directory for its shards")
        names = [shard.name for shard in self.shards]
        for name in names:
            if not REMOTE_NAME.fullmatch(name):
                raise ValueError(
                    f"{where}: got the shard name {name!r}; need letters, digits and _.+=@-, "
                    "ending in .tar; do: rename it"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"{where}: got two shards of one name; do: rename one")
        largest = max((shard.bytes for shard in self.shards), default=0)
        if self._budget_bytes is not None and self._budget_bytes < largest:
            raise ValueError(
                f"got a cache budget of {self._budget_bytes / 1e9:g} GB; need at least "
                f"{largest / 1e9:g}, the largest shard of {where}; do: raise --cache_gb, or make "
                "smaller shards"
            )

    def _forget(self) -> None:
        """The state of a process that has not used the store."""
        self._pid: int | None = None
        self._handles: dict[int, int] = {}  # shard -> file descriptor, least recently opened first
        self._cache: FileCache | None = None
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict:
        return vars(self) | dict(_pid=None, _handles={}, _cache=None, _ahead=None)

    @property
    def folder(self) -> Path:
        """Where the shards lie on this node: the directory, or their part of the cache.

        Named by the location and by what is to lie there, so that neither another data set of
        equal names nor an older version of this one is taken for it.
        """
        if not self.remote:
            return Path(self.location)
        facts = [shown(self.location), *(f"{shard.name} {shard.sha256}" for shard in self.shards)]
        return self._cache_dir / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Bytes of a shard, fetched first where it is remote and not in the cache.

        Raises ValueError for what lies outside the shard, OSError where it was cut or cannot be
        fetched.
        """
        self._enter()
        name, size = self.shards[shard].name, self.shards[shard].bytes
        if offset + length > size:
            raise ValueError(
                f"{self.folder / name}: got an index that points to bytes {offset} to "
                f"{offset + length}; need at most {size}; do: convert again"
            )
        if shard not in self._handles:
            if len(self._handles) >= OPEN_SHARDS:
                os.close(self._handles.pop(next(iter(self._handles))))
            self._handles[shard] = self._open(shard, self._cache)
        data = os.pread(self._handles[shard], length, offset)
        if len(data) != length:
            raise OSError(
                f"{self.folder / name}: got {len(data)} of {length} bytes at {offset}; the "
                "shard was cut while training; do: restore it and run the same command again"
            )
        return data

    def prefetch(self, shards: Sequence[int]) -> None:
        """Name the open window: the shards needed from now on, in the order they will be.

        They are fetched in the background as far as the budget goes, beside the windows of other
        processes, and nobody removes them until the next call here or the end of this process.
        Returns at once; does nothing for local shards.
        """
        if not self.remote:
            return
        self._enter()
        window = list(dict.fromkeys(shards))
        for shard in set(self._handles) - set(window):  # a removed file is freed when closed
            os.close(self._handles.pop(shard))
        names = {self._cached_name(self.shards[s].name): s for s in window}
        kept = self._cache.protect({name: self.shards[s].bytes for name, s in names.items()})
        if self._ahead is None:
            self._ahead = _Ahead(partial(self._fetch_ahead, self._cache))
        self._ahead.want([names[name] for name in kept])

    def close(self) -> None:
        """Close the files and let go of the window; the next use opens them again."""
        if self._pid == os.getpid():
            if self._ahead is not None:
                self._ahead.stop()  # what it is fetching now it still completes
            for handle in self._handles.values():
                os.close(handle)
            if self._cache is not None:
                self._cache.close()
        self._forget()

    def fetch_beside(self, name: str, *, sizes: tuple[int, int], sha256: str) -> Path:
        """A file beside the remote shards, like the index, in the cache; it is never removed.

        sizes: the least and the most bytes that it may have. sha256: in hex.
        """
        self._enter()
        stored = f"{sha256[:16]}-{name}"  # another version at the same address is another file
        os.close(self._fetched(self._cache, name, stored, sizes, sha256))
        return self.folder / stored

    def _enter(self) -> None:
        if self._pid == os.getpid():
            return
        for handle in self._handles.values():  # a forked child's copies of its parent's
            os.close(handle)
        self._forget()
        self._pid = os.getpid()
        if self.remote:
            self._cache = FileCache(self._cache_dir, budget_bytes=self._budget_bytes)

    def _open(self, shard: int, cache: FileCache | None, *, wait: bool = True) -> int | None:
        facts = self.shards[shard]
        if not self.remote:
            return os.open(self.folder / facts.name, os.O_RDONLY)
        sizes = (facts.bytes, facts.bytes)
        return self._fetched(cache, facts.name, facts.name, sizes, facts.sha256, wait=wait)

    def _fetched(self, cache, name, stored, sizes, sha256, *, wait=True) -> int | None:
        def fetch(part: Path) -> None:
            url = url_of(self.location, name)
            fetch_file(url, part, sizes=sizes, sha256=sha256, patience=self._patience)

        size = sizes[0] if sizes[0] == sizes[1] else None
        return cache.open(self._cached_name(stored), size=size, fetch=fetch, wait=wait)

    def _cached_name(self, name: str) -> str:
        return f"{self.folder.name}/{name}"

    def _fetch_ahead(self, cache: FileCache, shard: int) -> bool:
        """Whether nothing is left to do about this shard ahead of its use."""
        try:
            handle = self._open(shard, cache, wait=False)
        except (OSError, ValueError):
            return True  # reading it will try again, and tell
        if handle is not None:
            os.close(handle)
        return handle is not None


class _Ahead:
    """A thread that fetches shards before they are read, the first ones first.

    fetch(shard) returns whether it is done with it; others are tried again.
    """

    def __init__(self, fetch: Callable[[int], bool]):
        self._fetch = fetch
        self._changed = threading.Condition()
        self._wanted: list[int] = []
        self._stopped = False
        threading.Thread(target=self._run, name="shards ahead", daemon=True).start()

    def want(self, shards: Sequence[int]) -> None:
        with self._changed:
            self._wanted = list(shards)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._wanted, self._stopped = [], True
            self._changed.notify()

    def _run(self) -> None:
        while not self._stopped:
            progress = False
            for shard in self._wanted:
                if shard in self._wanted and self._fetch(shard):
                    progress = True
                    with self._changed:
                        self._wanted = [other for other in self._wanted if other != shard]
                    break  # the first ones first, again
            with self._changed:
                if not self._stopped and not progress:
                    self._changed.wait(POLL_S if self._wanted else None)


def is_url(location: str) -> bool:
    """Whether a location is to be fetched, not a directory of this node."""
    return scheme(location) != ""


def url_of(location: str, name: str) -> str:
    """The URL of a file: {name} in the location replaced, or /name appended."""
    if "{name}" in location:
        return location.replace("{name}", name)
    if scheme(location) in ("http", "https") and "?" in location:
        raise ValueError(
            f"got {shown(location)}?..., which does not say where a file's name goes; need "
            f"{{name}} in it; do: write {shown(location)}/{{name}}?..."
        )
    return f"{location.rstrip('/')}/{name}"


@dataclass(frozen=True)
class RemoteShardSet(ShardSet):
    """A split behind a URL. folder: its part of the cache, where shards come and go."""

    store: ShardStore

    def _bytes(self, shard: int, offset: int, length: int) -> bytes:
        return self.store.read(shard, offset, length)


def store_of(shards: ShardSet) -> ShardStore:
    """What reads the shards of an opened split."""
    if isinstance(shards, RemoteShardSet):
        return shards.store
    return ShardStore(shards.folder, shards.manifest.shards)


def open_split(
    location: str,
    *,
    cache_dir: Path,
    budget_bytes: int | None = None,
    stall_timeout_s: float = 30.0,
    retries: int = 5,
    pause_s: float = 1.0,
    allow_pipe: bool = False,
    to_verify: bool = False,
) -> ShardSet:
    """Open a split by its directory or URL, wherever its manifest says that its tars lie.

    Of a URL, manifest and index are fetched, no shard yet; tars at a URL are read through the
    cache. The other arguments are those of ShardStore. allow_pipe holds for `location` alone: a
    manifest may not name a program. to_verify: see `open_shards`.
    Raises ValueError for a location or a manifest that cannot be trusted, OSError where something
    cannot be fetched.
    """
    options = dict(
        cache_dir=cache_dir,
        budget_bytes=budget_bytes,
        stall_timeout_s=stall_timeout_s,
        retries=retries,
        pause_s=pause_s,
    )
    if not is_url(location):
        folder = Path(location)
        manifest = None
        if (folder / MANIFEST).is_file():
            manifest = parse_manifest((folder / MANIFEST).read_bytes(), folder / MANIFEST)
        if manifest is None or manifest.location is None or not is_url(manifest.location):
            return open_shards(folder, to_verify=to_verify)
        store = ShardStore(manifest.location, manifest.shards, **options)
        index = read_index(folder / INDEX, manifest, thorough=to_verify)
        return RemoteShardSet(store.folder, manifest, index, store)
    patience = Patience(stall_timeout_s, retries, pause_s)
    refuse_pipe(location, allow_pipe)
    refuse_hidden_login(location)
    url = url_of(location, MANIFEST)
    text = fetch_small(url, limit_bytes=MANIFEST_LIMIT, patience=patience, allow_pipe=allow_pipe)
    manifest = parse_manifest(text, shown(url))
    if manifest.location is not None:
        raise ValueError(
            f"{shown(url)}: got a manifest that points to {shown(manifest.location)}; need one "
            "beside its shards, or on this machine; do: copy it and its index into a directory here"
        )
    store = ShardStore(location, manifest.shards, allow_pipe=allow_pipe, **options)
    rows = manifest.samples * INDEX_DTYPE.itemsize
    path = store.fetch_beside(INDEX, sizes=(rows, rows + 4096), sha256=manifest.index_sha256)
    index = read_index(path, manifest, thorough=to_verify)
    return RemoteShardSet(store.folder, manifest, index, store)


def open_named(location: str, *, cache_dir: str, cache_gb: float, image_size: int) -> ShardSet:
    """Open a split that the command line names, by a path or a URL, for images of image_size.

    cache_dir, cache_gb: of the node, for shards behind a URL; 0 gigabytes: no limit.
    Raises ValueError where there is none, or the server says so, or where its images are stored
    smaller than that.
    """
    try:
        split = open_split(
            location,
            cache_dir=Path(cache_dir).expanduser(),
            budget_bytes=int(cache_gb * 1e9) or None,
            allow_pipe=True,  # the command line itself names it
        )
    except NotServed as error:  # nothing is there: the address is wrong, not the connection
        raise ValueError(str(error)) from None
    stored = split.manifest.image_size
    if stored is not None and image_size > stored:
        raise ValueError(
            f"the images in {split.folder} are stored halved for {stored} px, got --image_size "
            f"{image_size}; need that size or less; do: convert the originals with --image_size "
            f"{image_size}"
        )
    return split
