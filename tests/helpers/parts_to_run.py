"""Parts for launch.benchmarks.parts.rows_of: one that ends, one that hangs, one that fails."""

import atexit
import gc
import os
import subprocess
import time
from contextlib import suppress


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


def engines_held(plan):
    """Yield how many engines there are after a step, and after one that does not fit."""
    from deepspeed import DeepSpeedEngine

    from launch.benchmarks import gpu

    def does_not_fit(*_):
        raise MemoryError

    for measured in (gpu.seconds_of, does_not_fit):
        gpu.seconds_of = measured
        with suppress(MemoryError):
            gpu.step_row(plan, 8, 2)
        gc.collect()
        yield {"engines": sum(isinstance(o, DeepSpeedEngine) for o in gc.get_objects())}


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
