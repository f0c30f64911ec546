"""A cache of whole files that the processes of a node share: fetched once, within a budget.

    FOLDER/GROUP/NAME         complete and checked; a part is renamed to this when it is
    FOLDER/GROUP/.NAME.part   a running download, or an interrupted one that the next one resumes
    FOLDER/GROUP/.NAME.lock   locked by the process that downloads; holds the error if that failed
    FOLDER/.users/*.json      the files that a process needs; locked while that process lives
    FOLDER/.lock              locked while the files above are counted, removed or changed

All locks are flock(2) locks. The kernel drops them when their process ends, in whatever way, so no
code here has to find out whether a process is alive.
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

_locks: set[int] = set()  # file descriptors of this process


def _close_locks() -> None:
    """Close the locks that a forked child has from its parent."""
    for handle in _locks:
        os.close(handle)
    _locks.clear()


# A forked child shares its parent's locks; it would keep them after the parent's death.
os.register_at_fork(after_in_child=_close_locks)


def _lock(path: Path, *, wait: bool) -> int | None:
    """Lock a file and return its descriptor; None if it is locked already and wait is False.

    Raises ValueError if the file system has no such locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        _unlock(handle)
        return None
    except OSError as error:
        _unlock(handle)
        raise ValueError(
            f"--cache_dir: got {path.parent}, whose file system refuses to lock {path.name} "
            f"({error.strerror}); need one with flock, such as a local disk; do: choose another"
        ) from None
    return handle


def _unlock(handle: int) -> None:
    """Release a lock, unless it is the parent's, from before a fork."""
    if handle in _locks:
        _locks.remove(handle)
        os.close(handle)


class FileCache:
    """The files of `folder`, as one process uses them.

    budget_bytes: limit for all the *.tar files together; the least recently used ones that no
        process needs are removed to make room. None for no limit. Other files, such as an index,
        are not counted and are never removed.
    """

    def __init__(self, folder: Path, *, budget_bytes: int | None):
        self.folder, self.budget_bytes = folder, budget_bytes
        (folder / ".users").mkdir(parents=True, exist_ok=True)
        self._window: dict[str, int] = {}  # name -> bytes
        self._fetching: dict[str, int] = {}  # name -> bytes when complete
        with self._alone():
            # Created under the lock: other processes take an unlocked file for a dead process's.
            self._user_file = folder / ".users" / f"{uuid.uuid4().hex}.json"
            self._user = _lock(self._user_file, wait=True)
            self._publish()
            self._needs()  # removes the files of dead processes

    def close(self) -> None:
        """Give up all files that this process needs."""
        with self._alone():
            self._user_file.unlink(missing_ok=True)
            _unlock(self._user)
            self._user = None

    def protect(self, sizes: dict[str, int]) -> list[str]:
        """Protect files from removal until the next call, or until the process ends.

        sizes: name -> bytes, the most urgent first; the files need not be there yet.
        Returns the names of the files that are protected: those that fit in the budget together
        with the files that other processes protect.
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
        """Return a file descriptor for reading, after fetching the file if it is not there.

        The descriptor stays valid after the file is removed; the caller closes it.
        name: GROUP/NAME.
        size: bytes; None if unknown.
        fetch: called with the path `part`, completes that file.
        wait: if False, return None when another process is fetching the file, or when there is no
            room. If True, wait for it, and exceed the budget if every other file is needed.
        Raises the errors of fetch, also if another process called it while this one waited.
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
                os.ftruncate(lock, 0)  # the error of an earlier attempt
            if waited and (error := os.pread(lock, 4096, 0)):
                raise OSError(error.decode("utf-8", "replace"))
            return self._fetch(name, size or 0, fetch, lock, over_budget=wait)
        finally:
            _unlock(lock)

    def _fetch(self, name, size, fetch, lock, *, over_budget) -> int | None:
        """Make room, fetch the file and return its descriptor; None if there is no room."""
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
        """Reserve `size` bytes for a file, and remove others for it; False if there is no room."""
        with self._alone():
            if self.budget_bytes is not None:
                needed, coming = self._needs()
                used, idle = size + sum(coming.values()), []
                for path, stat in self._counted():
                    target = _target(path)
                    if target in coming or target == name:
                        continue  # already counted, with its full size
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
        """Yield the files that count towards the budget."""
        for pattern in ("*/*.tar", "*/.*.tar.part"):
            for path in self.folder.glob(pattern):
                try:
                    yield path, path.stat()
                except FileNotFoundError:  # a part that has just been renamed
                    continue

    def _needs(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the files that live processes need, and those being fetched, as name -> bytes."""
        needed, coming = dict(self._window), dict(self._fetching)
        for path in (self.folder / ".users").iterdir():
            if path == self._user_file:
                continue
            lock = _lock(path, wait=False)
            if lock is not None:  # its process has ended
                path.unlink()
                _unlock(lock)
                continue
            user = json.loads(path.read_text(encoding="utf-8"))
            needed.update(user["window"])
            coming.update(user["fetching"])
        return needed, coming

    def _publish(self) -> None:
        """Write the files that this process needs, for the other processes to read."""
        if self._user is None:  # closed while a thread was fetching
            return
        text = json.dumps({"window": self._window, "fetching": self._fetching}).encode()
        os.ftruncate(self._user, 0)
        os.pwrite(self._user, text, 0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the cache against all other processes."""
        lock = _lock(self.folder / ".lock", wait=True)
        try:
            yield
        finally:
            _unlock(lock)


def _target(path: Path) -> str:
    """Return GROUP/NAME of a file or of its part."""
    name = path.name
    return f"{path.parent.name}/{name[1:-5] if name.endswith('.part') else name}"


def _open_whole(path: Path, size: int | None) -> int | None:
    """Open a file and mark it as just used; None if it is missing or has another size."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if size is not None and os.fstat(handle).st_size != size:
        os.close(handle)
        return None
    os.utime(handle)
    return handle
