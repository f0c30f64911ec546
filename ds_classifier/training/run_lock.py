"""One job per run directory: a lock file that names its owner, and is taken over from a dead one.

The file RUN/LOCK is created by O_EXCL, which only one job can do, on network file systems too
(flock is not reliable there, and some have no hard links). Its owner touches it every few seconds.
An owner on this host is dead when its process is; one on another host when it has not touched the
file for some minutes, measured by the file system's clock alone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ds_classifier.common import files
from ds_classifier.common.text import duration
from ds_classifier.distributed import processes

LOCK = "LOCK"
BEAT_SECONDS = 10.0
STALE_SECONDS = 180.0  # network file systems may show a file's time a minute late
_TRIES, _PAUSE_SECONDS = 10, 0.1  # to read a lock that is being written


class RunLock:
    """A lock that rank 0 holds from `acquire` to `release`, and nobody once its process is gone."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / LOCK
        self._mine = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "start": processes.started(os.getpid()),
                "space": processes.pid_space(),
                "since": time.time(),
            }
        )
        self._made: list[Path] = []  # directories that did not exist before, the deepest first
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the lock; this may wait STALE_SECONDS for a sign of life of another host's job.

        say: prints a line. Raises ValueError if another job holds the lock, or if nothing can be
        written.
        """
        folder = self._path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not files.create(self._path, self._mine):
                self._take_over(say)
        except OSError as error:
            self._remove_empty()
            raise ValueError(
                f"--run_dir: got {folder}, where nothing can be written "
                f"({files.problem(error)}); do: choose another"
            ) from None
        self._thread.start()

    def refuse_if_held(self) -> None:
        """Raise ValueError if a living job holds the lock, as far as can be seen without writing.

        An owner on another host lives if it touched the lock within STALE_SECONDS.
        """
        text = self._read(self._path)
        if text is None:
            return
        who, here, alive, since = self._owner(text)
        touched = self._touched(self._path)
        if not here and touched is not None:
            alive = time.time() - touched < STALE_SECONDS
        if alive:
            raise self._in_use(who, since)

    def _take_over(self, say: Callable[[str], None]) -> None:
        """Remove the lock of a dead owner; raise ValueError if the owner lives."""
        text = self._read(self._path)
        if text is None:
            return
        who, here, alive, since = self._owner(text)
        if alive or (not here and self._beats(who, say)):
            raise self._in_use(who, since)
        aside = self._beside("stale")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        moved = self._read(aside)
        if moved == text:
            say(f"took over the run directory from {who}, which is gone")
        elif moved:  # another job was faster, and this is its lock
            files.create(self._path, moved)
        aside.unlink(missing_ok=True)

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(f".{LOCK}.{socket.gethostname()}.{os.getpid()}.{suffix}")

    @staticmethod
    def _owner(text: str) -> tuple[str, bool, bool, str]:
        """Return, from a lock's text: its owner, whether that is on this host, whether it lives
        here, and when it started."""
        try:
            owner = json.loads(text)
            who = f"process {owner['pid']} on {owner['host']}"
            here = owner["space"] == processes.pid_space() != "unknown"
            alive = here and processes.started(owner["pid"]) == owner["start"]
            return who, here, alive, f", {duration(time.time() - owner['since'])} ago"
        except (ValueError, KeyError, TypeError):
            return "a damaged lock", False, False, ""

    def _in_use(self, who: str, since: str) -> ValueError:
        return ValueError(
            f"{self._path.parent} is in use: got {who}, which started there{since}; need one "
            "job per run directory; do: wait for it, or choose another --run_dir"
        )

    def _beats(self, who: str, say: Callable[[str], None]) -> bool:
        """Return whether the owner touches the lock before it counts as stale."""
        first, began, waiting = self._touched(self._path), time.monotonic(), False
        clock = self._beside("clock")
        try:
            while first is not None:
                clock.write_text("now", encoding="utf-8")  # its time, by the file system's clock
                if self._touched(clock) - first > STALE_SECONDS:
                    return False
                if time.monotonic() - began > STALE_SECONDS:  # touched by a clock that ran ahead
                    return False
                if not waiting:
                    say(f"waiting for a sign of life of {who}, {STALE_SECONDS:.0f} s at most")
                waiting = True
                time.sleep(BEAT_SECONDS / 4)
                if self._touched(self._path) != first:
                    return True
            return False
        finally:
            clock.unlink(missing_ok=True)

    @staticmethod
    def _touched(path: Path) -> float | None:
        try:
            with open(path, encoding="utf-8") as file:  # opening makes NFS ask its server
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    @staticmethod
    def _read(path: Path) -> str | None:
        """Return a lock's text; wait a moment for one that has been created but not yet written."""
        try:
            for _ in range(_TRIES):
                if text := path.read_text(encoding="utf-8", errors="replace"):
                    return text
                time.sleep(_PAUSE_SECONDS)
        except FileNotFoundError:
            return None
        return ""

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError:  # the disk is away for a while
                continue

    def release(self) -> None:
        """Release the lock, if it is still ours, and leave no empty directory of a refused run."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_SECONDS)
        if self._read(self._path) == self._mine:
            self._path.unlink(missing_ok=True)
        self._remove_empty()

    def _remove_empty(self) -> None:
        """Remove the directories that `acquire` made, if no file was written to them."""
        if not self._made:
            return
        inside = [folder for folder, *_ in os.walk(self._path.parent, topdown=False)]
        for folder in (*inside, *self._made):
            with suppress(OSError):  # not empty, or gone
                os.rmdir(folder)
