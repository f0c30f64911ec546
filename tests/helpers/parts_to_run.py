"""Parts for launch.benchmarks.parts.rows_of: one that ends, one that hangs, one that fails."""

import atexit
import os
import subprocess
import time


def ends(count):
    for number in range(count):
        yield {"number": number}


def hangs(path):
    sleeper = subprocess.Popen(["sleep", "600"])
    path.write_text(str(sleeper.pid))
    yield {"number": 0}
    sleeper.wait()


def hangs_at_its_end():
    atexit.register(time.sleep, 600)
    yield {"number": 0}


class SlowToImport:
    """An argument whose arrival takes a minute, as if the part's module imported much."""

    def __reduce__(self):
        return time.sleep, (60,)


def fails():
    yield {"number": 0}
    raise RuntimeError("two lines:\nno memory")


def dies():
    yield {"number": 0}
    time.sleep(0.5)  # so that the row is read
    os._exit(3)
