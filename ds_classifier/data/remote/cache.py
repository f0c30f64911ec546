"""Whole files that the processes of a node share, fetched once, within a budget.

    FOLDER/GROUP/NAME         whole and checked: it is renamed to this name when it is
    FOLDER/GROUP/.NAME.part   a download under way, or one that was cut; the next one resumes it
    FOLDER/GROUP/.NAME.lock   locked by the one downloader; holds its error where it failed
    FOLDER/.users/*.json      what a process needs; locked as long as that process lives
    FOLDER/.lock              locked while the above is counted, removed or changed

All locks are flock(2)'s: the kernel drops them with their process, however it ends, so that
nothing here has to ask whether a process still lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_classifier.common import files

_locks: set[int] = set()  # handles of this process


def _close_locks() -> None:
    for handle in _locks:
        os.close(handle)
    _locks.clear()


# A forked child shares its parent's locks; it would keep them after the parent's death.
os.register_at_fork(after_in_child=_close_locks)


def _lock(path: Path, *, wait: bool) -> int | None:
    """A handle that holds the lock, or None where another does and we shall not wait."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        _unlock(handle)
        return None
    return handle


def _unlock(handle: int) -> None:
    if handle in _locks:  # else it was our parent's
        _locks.remove(handle)
        os.close(handle)


class FileCache:
    """The files of `folder`, for one process.

    budget_bytes: of all the *.tar in it; the least recently used ones that no process needs make
    room for others. None: no limit. Other files, such as an index, are not counted and stay.
    """

    def __init__(self, folder: Path, *, budget_bytes: int | None):
        self.folder, self.budget_bytes = folder, budget_bytes
        (folder / ".users").mkdir(parents=True, exist_ok=True)
        self._window: dict[str, int] = {}  # name -> bytes
        self._fetching: dict[str, int] = {}  # name -> bytes that it will have
        with self._alone():
            # Made and locked while nobody counts: an unlocked one would pass for a dead process's.
            self._user_file = folder / ".users" / f"{uuid.uuid4().hex}.json"
            self._user = _lock(self._user_file, wait=True)
            self._publish()
            self._needs()  # sweeps away what dead processes left

    def close(self) -> None:
        """This process needs nothing any more."""
        with self._alone():
            self._user_file.unlink(missing_ok=True)
            _unlock(self._user)
            self._user = None

    def protect(self, sizes: dict[str, int]) -> list[str]:
        """Keep these files, once they are here, until the next call or the end of the process.

        sizes: name -> bytes, the most needed first. Only as many as the budget has room for, beside
        what other processes keep; returns their names.
        """
        with self._alone():
            self._window = {}
            kept, _ = self._needs()
            total = sum(kept.values())
            for name, size in sizes.items():
                total += 0 if name in kept else size
                if self.budget_bytes is not None and total > self.budget_bytes:
                    break
                self._window[name] = size
            self._publish()
            return list(self._window)

    def open(
        self, name: str, *, size: int | None, fetch: Callable[[Path], None], wait: bool = True
    ) -> int | None:
        """A handle to read a file by, good even after the file is removed; the caller closes it.

        name: GROUP/NAME. size: bytes; None: unknown. fetch(part): completes the file `part`.
        wait: False returns None where another process fetches it, or where there is no room; True
        waits for the other, and goes over the budget where all is needed. Raises fetch's errors,
        also to those who waited for another's fetch.
        """
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        handle = _open_whole(path, size)
        if handle is not None:
            return handle
        lock_path = path.with_name(f".{path.name}.lock")
        lock = _lock(lock_path, wait=False)
        waited = lock is None
        if waited and not wait:
            return None
        if waited:
            lock = _lock(lock_path, wait=True)
        try:
            handle = _open_whole(path, size)
            if handle is not None:
                return handle
            if not waited:
                os.ftruncate(lock, 0)  # an older attempt's error
            if waited and (error := os.pread(lock, 4096, 0)):
                raise OSError(error.decode("utf-8", "replace"))
            return self._fetch(name, size or 0, fetch, lock, over_budget=wait)
        finally:
            _unlock(lock)

    def _fetch(self, name, size, fetch, lock, *, over_budget) -> int | None:
        if not self._make_room(name, size, over_budget=over_budget):
            return None
        path = self.folder / name
        part = path.with_name(f".{path.name}.part")
        try:
            fetch(part)
            files.fsync(part)
            handle = os.open(part, os.O_RDONLY)
            os.replace(part, path)
            return handle
        except (OSError, ValueError) as error:
            os.pwrite(lock, str(error).encode()[:4096], 0)
            raise
        finally:
            with self._alone():
                del self._fetching[name]
                self._publish()

    def _make_room(self, name: str, size: int, *, over_budget: bool) -> bool:
        """Note that a file of so many bytes comes; remove others for it. False: no room."""
        with self._alone():
            if self.budget_bytes is not None:
                needed, coming = self._needs()
                used, idle = size + sum(coming.values()), []
                for path, stat in self._counted():
                    target = _target(path)
                    if target in coming or target == name:
                        continue  # counted at its full size
                    used += stat.st_size
                    if target not in needed:
                        idle.append((stat.st_mtime_ns, stat.st_size, path))
                excess = used - self.budget_bytes
                if excess > sum(size for _, size, _ in idle) and not over_budget:
                    return False
                for _, size_of_it, path in sorted(idle):
                    if excess <= 0:
                        break
                    path.unlink(missing_ok=True)
                    excess -= size_of_it
            self._fetching[name] = size
            self._publish()
        return True

    def _counted(self) -> Iterator[tuple[Path, os.stat_result]]:
        for pattern in ("*/*.tar", "*/.*.tar.part"):
            for path in self.folder.glob(pattern):
                try:
                    yield path, path.stat()
                except FileNotFoundError:  # a part that was renamed just now
                    continue

    def _needs(self) -> tuple[dict[str, int], dict[str, int]]:
        """Of all live processes: what they need, and the downloads under way; name -> bytes."""
        needed, coming = dict(self._window), dict(self._fetching)
        for path in (self.folder / ".users").iterdir():
            if path == self._user_file:
                continue
            lock = _lock(path, wait=False)
            if lock is not None:  # its process has ended
                path.unlink()
                _unlock(lock)
                continue
            user = json.loads(path.read_text())
            needed.update(user["window"])
            coming.update(user["fetching"])
        return needed, coming

    def _publish(self) -> None:
        if self._user is None:  # closed while a thread was fetching
            return
        text = json.dumps({"window": self._window, "fetching": self._fetching}).encode()
        os.ftruncate(self._user, 0)
        os.pwrite(self._user, text, 0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = _lock(self.folder / ".lock", wait=True)
        try:
            yield
        finally:
            _unlock(lock)


def _target(path: Path) -> str:
    """GROUP/NAME of a file or of its part."""
    name = path.name
    return f"{path.parent.name}/{name[1:-5] if name.endswith('.part') else name}"


def _open_whole(path: Path, size: int | None) -> int | None:
    """A handle of a file that is there and as long as it should be; it is the newest in use."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if size is not None and os.fstat(handle).st_size != size:
        os.close(handle)
        return None
    os.utime(handle)
    return handle
