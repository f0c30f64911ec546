"""One job a run directory: refusing while the owner lives, taking over when it is gone."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
from running import ROOT

from ds_classifier.training import run_lock
from ds_classifier.training.run_lock import RunLock

OWNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ds_classifier.training.run_lock import RunLock
RunLock(Path(sys.argv[2])).acquire(print)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", OWNER, str(ROOT), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_living_owner_is_named_and_a_dead_one_replaced(owner, tmp_path):
    with pytest.raises(ValueError, match=rf"got process {owner.pid} on .*, 0:00:\d+ ago"):
        RunLock(tmp_path).acquire(print)
    owner.kill()
    owner.wait()
    said = []
    lock = RunLock(tmp_path)
    lock.acquire(said.append)
    assert said[0].startswith(f"took over the run directory from process {owner.pid} on ")
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["", "runs", "runs/a"])
def test_a_refused_run_leaves_no_empty_directory(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    lock = RunLock(tmp_path / "runs" / "a")
    lock.acquire(print)
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(exist_ok=True)
    lock.release()
    assert [p for p in sorted(tmp_path.rglob("*")) if p.name != "checkpoints"] == before


def test_a_run_that_began_keeps_all_its_directories(tmp_path):
    lock = RunLock(tmp_path / "runs" / "a")
    lock.acquire(print)
    (tmp_path / "runs" / "a" / "config.json").write_text("{}")
    lock.release()
    assert (tmp_path / "runs" / "a" / "config.json").exists()


def elsewhere(folder, seconds_ago: float) -> None:
    """A lock of a process on another host, last touched so long ago."""
    owner = dict(host="node7", pid=1, start=5, space="another", since=time.time() - 7300)
    (folder / "LOCK").write_text(json.dumps(owner))
    os.utime(folder / "LOCK", (time.time() - seconds_ago,) * 2)


def test_an_owner_on_another_host_is_gone_when_it_is_silent(tmp_path):
    elsewhere(tmp_path, 200)
    lock = RunLock(tmp_path)
    lock.acquire(print)
    lock.release()


def test_an_owner_on_another_host_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.4)
    elsewhere(tmp_path, 20)
    beat = threading.Timer(0.5, os.utime, [tmp_path / "LOCK"])
    beat.start()
    with pytest.raises(ValueError, match=r"process 1 on node7, which started there, 2:01:\d+ ago"):
        RunLock(tmp_path).acquire(print)
    beat.join()
    assert [p.name for p in tmp_path.iterdir()] == ["LOCK"]


def test_an_owner_on_another_host_that_fell_silent_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.4)
    elsewhere(tmp_path, run_lock.STALE_SECONDS - 1)
    said = []
    RunLock(tmp_path).acquire(said.append)
    assert "waiting for a sign of life" in said[0]
    assert "took over" in said[1]


def test_a_lock_touched_by_a_clock_that_ran_ahead_is_not_waited_for_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.4)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    elsewhere(tmp_path, -3600)
    began = time.monotonic()
    lock = RunLock(tmp_path)
    taking = threading.Thread(target=lock.acquire, args=[print], daemon=True)
    taking.start()
    taking.join(10)
    assert not taking.is_alive()
    assert time.monotonic() - began > 1.0
    lock.release()


def test_a_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    lock = RunLock(tmp_path)
    lock.acquire(print)
    os.utime(tmp_path / "LOCK", (0, 0))
    time.sleep(0.5)
    assert (tmp_path / "LOCK").stat().st_mtime > 1
    lock.release()


def test_a_lock_that_was_taken_over_is_not_removed(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire(print)
    elsewhere(tmp_path, 0)
    lock.release()
    assert (tmp_path / "LOCK").exists()


def test_looking_refuses_as_taking_would_and_writes_nothing(owner, tmp_path):
    def look() -> set[str]:
        RunLock(tmp_path).refuse_if_held()
        return {path.name for path in tmp_path.iterdir()}

    with pytest.raises(ValueError, match=rf"in use: got process {owner.pid} on "):
        look()
    owner.kill()
    owner.wait()
    assert look() == {"LOCK"}
    elsewhere(tmp_path, 200)
    assert look() == {"LOCK"}
    elsewhere(tmp_path, 20)
    with pytest.raises(ValueError, match="got process 1 on node7"):
        look()
    (tmp_path / "LOCK").unlink()
    assert look() == set()


def test_without_hard_links_one_job_locks(owner, tmp_path, poor_disk):
    lock = RunLock(tmp_path / "other")
    lock.acquire(print)
    with pytest.raises(ValueError, match=rf"in use: got process {os.getpid()} on "):
        RunLock(tmp_path / "other").acquire(print)
    lock.release()
    owner.kill()
    owner.wait()
    said = []
    RunLock(tmp_path).acquire(said.append)
    assert said[0].startswith("took over the run directory")


def test_a_lock_that_is_being_written_is_waited_for(tmp_path):
    (tmp_path / "LOCK").write_text("")
    living = RunLock(tmp_path)._mine
    writing = threading.Timer(0.3, (tmp_path / "LOCK").write_text, [living])
    writing.start()
    with pytest.raises(ValueError, match=rf"in use: got process {os.getpid()} on "):
        RunLock(tmp_path).acquire(print)
    writing.join()


def test_a_disk_that_refuses_the_lock_is_named_and_left_as_it_was(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(run_lock.files, "naming", mock.Mock(side_effect=full))
    with pytest.raises(ValueError, match=rf"--run_dir: got {tmp_path}, where.*No space left"):
        RunLock(tmp_path).acquire(print)
    assert list(tmp_path.iterdir()) == []
