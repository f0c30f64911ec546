"""Requests to stop while the run directory's disk is away. test_stopping.py stops whole jobs."""

import subprocess
import sys

from running import ROOT

LISTENING = """
import errno, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ds_classifier.distributed.stopping import StopRequests

def fails(path, *arguments, **keywords):
    if str(path).endswith("STOP"):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))
    return untouched(path, *arguments, **keywords)

with StopRequests() as requests:
    requests.watch_also(max_minutes=0, run_dir=Path(sys.argv[2]))
    if "deferred" in sys.argv:
        requests.defer()
    untouched, os.stat = os.stat, fails
    os.unlink = os.remove = fails
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.5)
    requests.clear_stop_file()
    print("asked by", requests.reason, flush=True)
"""


def listening(folder, *words):
    command = [sys.executable, "-c", LISTENING, ROOT, folder, *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def test_signals_are_received_while_the_stop_file_cannot_be_read(tmp_path):
    """NFS can fail for a while. A thread that ended then would miss the launcher's death too."""
    done = listening(tmp_path, "deferred")
    said = "SIGTERM: this step is finished and saved; a second one ends at once"
    assert done.stdout.splitlines() == [said, "asked by SIGTERM"], done.stderr
    assert "Traceback" not in done.stderr


def test_a_stop_file_that_cannot_be_removed_does_not_keep_a_rank(tmp_path):
    done = listening(tmp_path)
    assert done.returncode == 75, done
    assert "STOP: Stale file handle: the stop file cannot be removed" in done.stderr
