"""Read the bytes of a shard, from a local file or from a URL through a cache of the node.

A remote shard is fetched completely into the cache, once for all processes of the node, and read
there: the positions of an epoch jump between samples, and a request for each sample would cost a
round trip.
"""

from __future__ import annotations

import errno
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
from ds_classifier.data.remote.fetch import Patience, fetch_file

OPEN_SHARDS = 256  # file descriptors that a process keeps open
POLL_S = 0.25  # seconds between checks of what other processes of the node are fetching

# Shard names become part of paths, URLs and, with some of gopen's schemes, command lines.
REMOTE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}\.tar")


@dataclass(frozen=True)
class Shard:
    """A tar, as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class ShardStore:
    """Reads ranges of bytes from shards.

    Files are opened by the first use in each process, so a store may be pickled and forked.

    location: a directory; or a URL, to which /NAME is appended, or whose {name} is replaced.
    shards: as the manifest lists them.
    cache_dir: directory on the node for remote shards, which may begin with ~; None if the shards
        are local.
    budget_bytes: limit for all data sets in it; None for no limit. A shard that is needed at once
        is fetched even beyond the limit, one that is fetched ahead is not.
    stall_timeout_s, retries, pause_s: see `fetch.Patience`.
    allow_pipe: accept a pipe: URL, which runs a program; only for URLs from the command line.
    Raises ValueError for a location, names or a budget that cannot work.
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
        """Raise ValueError if remote shards cannot be used safely with these arguments."""
        refuse_pipe(self.location, allow_pipe)
        refuse_hidden_login(self.location)
        where = shown(self.location)
        if self._cache_dir is None:
            raise ValueError(f"got {where} without a cache; need a directory for its shards")
        try:
            self._cache_dir = self._cache_dir.expanduser()
        except RuntimeError:
            raise ValueError(
                f"--cache_dir: got {self._cache_dir}, but this user has no home directory; do: "
                "name another directory, or set HOME"
            ) from None
        names = [shard.name for shard in self.shards]
        for name in names:
            if not REMOTE_NAME.fullmatch(name):
                raise ValueError(
                    f"{where}: got the shard name {name!r}; need letters, digits and _.+=@-, "
                    "ending in .tar; do: rename it"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"{where}: got two shards with the same name; do: rename one")
        largest = max((shard.bytes for shard in self.shards), default=0)
        if self._budget_bytes is not None and self._budget_bytes < largest:
            raise ValueError(
                f"got a cache budget of {self._budget_bytes / 1e9:g} GB; need at least "
                f"{largest / 1e9:g}, the largest shard of {where}; do: raise --cache_gb, or make "
                "smaller shards"
            )

    def _forget(self) -> None:
        """Set the state of a process that has not used the store."""
        self._pid: int | None = None
        self._handles: dict[int, int] = {}  # shard -> file descriptor, least recently opened first
        self._cache: FileCache | None = None
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict:
        return vars(self) | dict(_pid=None, _handles={}, _cache=None, _ahead=None)

    @property
    def folder(self) -> Path:
        """The directory of the shards on this node: the location, or their part of the cache.

        Its name in the cache is a hash of the URL and of the shards' names and hashes. So another
        data set with the same names, or an older version of this one, has another directory.
        """
        if not self.remote:
            return Path(self.location)
        facts = [shown(self.location), *(f"{shard.name} {shard.sha256}" for shard in self.shards)]
        return self._cache_dir / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return bytes of a shard; fetch it first if it is remote and not in the cache.

        Raises ValueError for a range outside the shard; OSError if the shard is shorter than the
        manifest says, or cannot be fetched.
        """
        self._enter()
        name, size = self.shards[shard].name, self.shards[shard].bytes
        if offset + length > size:
            raise ValueError(
                f"{self.folder / name}: got an index that points to bytes {offset} to "
                f"{offset + length}; need at most {size}; do: look at all of them with "
                "ds-classifier verify"
            )
        if shard not in self._handles:
            if len(self._handles) >= OPEN_SHARDS:
                self._close_oldest()
            try:
                self._handles[shard] = self._open(shard, self._cache)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._handles:
                    raise
                while self._handles:  # `ulimit -n` is less than OPEN_SHARDS
                    self._close_oldest()
                self._handles[shard] = self._open(shard, self._cache)
        data = os.pread(self._handles[shard], length, offset)
        if len(data) != length:
            raise OSError(
                f"{self.folder / name}: got {len(data)} of {length} bytes at {offset}; the "
                "shard was cut while training; do: restore it and run the same command again"
            )
        return data

    def _close_oldest(self) -> None:
        os.close(self._handles.pop(next(iter(self._handles))))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Set the window: the shards needed from now on, in the order of their first use.

        They are fetched in the background, as far as the budget allows together with the windows
        of other processes. No process removes them until the next call, or until this process
        ends. Returns at once; does nothing for local shards.
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
        """Close the files and give up the window; the next use opens the files again."""
        if self._pid == os.getpid():
            if self._ahead is not None:
                self._ahead.stop()  # the running download is still completed
            for handle in self._handles.values():
                os.close(handle)
            if self._cache is not None:
                self._cache.close()
        self._forget()

    def fetch_beside(
        self, name: str, *, location: str, sizes: tuple[int, int], sha256: str
    ) -> Path:
        """Fetch a file that belongs to the shards, such as the index; return its path in the cache.

        It is never removed from the cache.
        location: the URL of its directory. sizes: the smallest and largest number of bytes allowed.
        sha256: in hex.
        """
        self._enter()
        stored = f"{sha256[:16]}-{name}"  # another version at the same URL gets another name
        url = url_of(location, name)
        os.close(self._fetched(self._cache, url, stored, sizes, sha256))
        return self.folder / stored

    def _enter(self) -> None:
        """Prepare this process, if it has not used the store before."""
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
        url = url_of(self.location, facts.name)
        return self._fetched(cache, url, facts.name, sizes, facts.sha256, wait=wait)

    def _fetched(self, cache, url, stored, sizes, sha256, *, wait=True) -> int | None:
        def fetch(part: Path) -> None:
            fetch_file(url, part, sizes=sizes, sha256=sha256, patience=self._patience)

        size = sizes[0] if sizes[0] == sizes[1] else None
        return cache.open(self._cached_name(stored), size=size, fetch=fetch, wait=wait)

    def _cached_name(self, name: str) -> str:
        return f"{self.folder.name}/{name}"

    def _fetch_ahead(self, cache: FileCache, shard: int) -> bool:
        """Fetch a shard ahead of its use; return False if it has to be tried again later."""
        try:
            handle = self._open(shard, cache, wait=False)
        except (OSError, ValueError):
            return True  # the read will try again and raise the error
        if handle is not None:
            os.close(handle)
        return handle is not None


class _Ahead:
    """A thread that fetches shards in the order in which they will be read.

    fetch: fetch(shard) returns False if it has to be called again later.
    """

    def __init__(self, fetch: Callable[[int], bool]):
        self._fetch = fetch
        self._changed = threading.Condition()
        self._wanted: list[int] = []
        self._stopped = False
        threading.Thread(target=self._run, name="shards ahead", daemon=True).start()

    def want(self, shards: Sequence[int]) -> None:
        """Set the shards to fetch, in their order."""
        with self._changed:
            self._wanted = list(shards)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the running download."""
        with self._changed:
            self._wanted, self._stopped = [], True
            self._changed.notify()

    def _run(self) -> None:
        """Fetch the wanted shards until stopped."""
        while not self._stopped:
            progress = False
            for shard in self._wanted:
                if shard in self._wanted and self._fetch(shard):
                    progress = True
                    with self._changed:
                        self._wanted = [other for other in self._wanted if other != shard]
                    break  # begin again with the first wanted shard
            with self._changed:
                if not self._stopped and not progress:
                    self._changed.wait(POLL_S if self._wanted else None)


def is_url(location: str) -> bool:
    """Return whether a location is a URL, not a directory."""
    return scheme(location) != ""


def url_of(location: str, name: str) -> str:
    """Return the URL of a file: replace {name} in the location, or append /name.

    Raises ValueError for a URL with a query but without {name}.
    """
    if "{name}" in location:
        return location.replace("{name}", name)
    if scheme(location) in ("http", "https") and "?" in location:
        raise ValueError(
            f"got {shown(location)}?...; need {{name}} in it, in place of a file's name; do: write "
            f"{shown(location)}/{{name}}?..."
        )
    return f"{location.rstrip('/')}/{name}"
