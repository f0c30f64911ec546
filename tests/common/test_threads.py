"""The setting by which torch's threads wait: as its OpenMP reports it, and in every program."""

import subprocess
import sys

import pytest
from running import ROOT, environment

from ds_classifier.common import threads

VARIABLES = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def child(code: str, **variables: str) -> subprocess.CompletedProcess:
    """Run code from the checkout, without what this process has set."""
    kept = {k: v for k, v in environment().items() if k not in VARIABLES}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=90)


def test_the_library_is_told_to_let_threads_sleep():
    """GNU's OpenMP displays how often a thread looks before it sleeps."""
    done = child("import ds_classifier, torch", OMP_DISPLAY_ENV="verbose")
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch uses another OpenMP")
    assert "GOMP_SPINCOUNT = '0'" in done.stderr


def test_every_program_sets_it_before_torch_is_imported():
    names = sorted(path.stem for path in (ROOT / "launch").glob("[a-z]*.py"))
    assert "quickstart" in names
    code = "import os, importlib\n" + "\n".join(
        f"importlib.import_module('launch.{name}')\n"
        f"print('{name}', os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
        for name in names
    )
    done = child(code)
    policy = (
        "None" if any(map(threads.Path.exists, map(threads.Path, threads._GPUS))) else "passive"
    )
    assert done.stdout.splitlines() == [f"{name} {policy} False" for name in names], done.stderr


@pytest.mark.parametrize(
    ("given", "gpu", "expected"),
    [
        ({}, False, {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}),
        ({}, True, {}),
        ({"OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "9"}, False, "as given"),
    ],
)
def test_the_environment_and_a_gpu_come_first(monkeypatch, tmp_path, given, gpu, expected):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "_GPUS", (str(tmp_path if gpu else tmp_path / "none"),))
    threads.wait_asleep()
    found = {name: threads.os.environ[name] for name in VARIABLES if name in threads.os.environ}
    assert found == (given if expected == "as given" else expected)
    for name in found.keys() - given.keys():
        monkeypatch.delenv(name)
