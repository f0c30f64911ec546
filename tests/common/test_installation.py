"""Programs outside their environment: a package is missing, or Python is too old."""

import ast
import subprocess
import sys

import pytest
from running import ROOT

from ds_classifier.common import installation

PROGRAMS = sorted(path for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__")
BEFORE_THE_CHECK = ("__init__.py", "common/__init__.py", "common/installation.py")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_missing_package_is_one_line(program, tmp_path):
    """-S and -E leave Python without the environment's packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "has no module 'psutil'" in line
    assert f"cd {ROOT}; make install; . .venv/bin/activate" in line


def test_a_package_that_is_missing_later_is_one_line_too(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from ds_classifier.common import installation; installation.check()\n"
        "def run(): import no_such_package.part\n"
        "try: run()\n"
        "finally: print('left in order')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "left in order\n")
    assert "has no module 'no_such_package'" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_a_program_begins_is_one_line():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from ds_classifier.common import installation; installation.check()\n"
        "raise KeyboardInterrupt"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("error", ["import ds_classifier.no_such", "1 / 0"])
def test_other_errors_keep_their_traceback(error):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from ds_classifier.common import installation; installation.check(); {error}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


def test_an_old_python_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 8, 19, "final", 0))
    with pytest.raises(SystemExit) as end:
        installation.check()
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "got Python 3.8.19" in line
    assert "need 3.10 or newer" in line


@pytest.mark.parametrize(
    "path",
    [*PROGRAMS, *(ROOT / "ds_classifier" / name for name in BEFORE_THE_CHECK)],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_an_old_python_can_read_the_files_up_to_the_check(path):
    ast.parse(path.read_text(), feature_version=(3, 8))


def test_the_oldest_python_is_that_of_the_package():
    oldest = ".".join(map(str, installation.OLDEST_PYTHON))
    assert f"python_requires = >={oldest}\n" in (ROOT / "setup.cfg").read_text()
