"""Parts for launch.benchmarks.parts.rows_of: one that ends, one that hangs, one that fails."""

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


def fails():
    yield {"number": 0}
    raise RuntimeError("two lines:\nno memory")


def dies():
    yield {"number": 0}
    time.sleep(0.5)  # so that the row is read
    os._exit(3)
