"""The package as it is given away: a source distribution, and the wheel that is built from it.

The wheel is installed in a virtual environment and used away from the checkout.

A package or data file that setup.cfg does not name works in a checkout and is missing here.
"""

from __future__ import annotations

import configparser
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from running import ROOT, Finished, environment

from ds_classifier.common.version import __version__

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PROGRAMS = [
    line.split(" = ")[0]
    for line in SETUP["options.entry_points"]["console_scripts"].strip().splitlines()
]
IN_THE_CHECKOUT = ["ds_classifier", "ds_configs", "launch"]  # what is installed of it
FLAGS = shlex.split(
    "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1 "
    "--classifier_attention_resolutions 4 --noise_schedule cosine --workers 0 --log_interval 1 "
    "--batch_size 8 --iterations 2 --save_interval 2"
)


def run(*command: object, cwd: Path) -> Finished:
    """Run a program outside the checkout; fail if its exit code is not 0."""
    variables = environment()
    variables.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return Finished(done.returncode, done.stdout)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, built from a copy, so that nothing is left in the checkout."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools, which builds without fetching anything")
    place = tmp_path_factory.mktemp("sdist")
    for name in files_of_the_checkout():
        (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / "source" / name)
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, place, cwd=place / "source")
    [built] = place.glob("*.tar.gz")
    return built


def files_of_the_checkout() -> set[str]:
    """Return the paths of all files that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: git lists the files that a distribution must hold")
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel, built from the source distribution."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, sdist, cwd=place)
    [built] = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs' folder of a virtual environment that has this wheel.

    Everything else comes from the environment of the tests by a .pth file. Python does not follow
    .pth files in a folder that was added by one, so an editable install there has no effect.
    """
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "--python", home / "bin" / "python", "install", "--no-deps", wheel, cwd=home)
    return home / "bin"


def test_the_source_distribution_holds_every_file(sdist):
    """Every file of the checkout, but for the settings of git and Docker."""
    with tarfile.open(sdist) as file:
        held = {
            name.partition("/")[2] for name in file.getnames() if not file.getmember(name).isdir()
        }
    made = {"PKG-INFO"} | {name for name in held if ".egg-info/" in name}
    assert held - made == files_of_the_checkout() - {".gitignore", ".dockerignore"}


def test_the_citation_is_of_this_version():
    """Check the fields that the format 1.2.0 requires, and what must agree with the package."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"authors", "cff-version", "message", "title"} <= set(citation)
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["version"] == __version__
    assert citation["license"] == SETUP["metadata"]["license"]
    [author] = citation["authors"]
    assert author["name"].removeprefix("The ") in (ROOT / "LICENSE").read_text()


def test_the_wheel_holds_every_file(wheel):
    """Every file of the three folders but launch/cluster, which is for those with a checkout."""
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = set()
    for name in IN_THE_CHECKOUT:
        inside = "" if name == "ds_classifier" else "ds_classifier/"
        for path in (ROOT / name).rglob("*"):
            relative = path.relative_to(ROOT)
            skipped = {"__pycache__", "cluster"} & set(relative.parts)
            if path.is_file() and not skipped:
                expected.add(f"{inside}{relative.as_posix()}")
    assert held == expected


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(installed, tmp_path, program):
    done = run(installed / program, "--help", cwd=tmp_path)
    assert done.output.startswith("usage: ")


def test_every_module_imports(installed, tmp_path):
    code = (
        "import pkgutil, importlib, ds_classifier\n"
        "for module in pkgutil.walk_packages(ds_classifier.__path__, 'ds_classifier.'):\n"
        "    if 'run_reference' not in module.name: importlib.import_module(module.name)\n"
        "print(ds_classifier.__file__)"
    )
    done = run(installed / "python", "-c", code, cwd=tmp_path)
    assert done.lines[-1].startswith(str(installed.parent))


@pytest.mark.slow
def test_a_run_away_from_the_checkout(installed, tmp_path):
    """Convert, train with a config of the wheel, evaluate, report and export."""
    run(installed / "ds-classifier", "convert", "digits", "data", cwd=tmp_path)
    done = run(
        *(installed / "ds-classifier", "train", "--deepspeed_config", "zero1_fp32"),
        *("--run_dir", "run", *FLAGS),
        cwd=tmp_path,
    )
    assert (tmp_path / "run" / "DONE").exists(), done.output
    run(installed / "ds-classifier-evaluate", "run", "--levels", "2", cwd=tmp_path)
    (tmp_path / "run" / "report.html").unlink()
    run(installed / "ds-classifier-report", "run", cwd=tmp_path)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<style>" in page
    assert "step-00000002" in page
    run(installed / "ds-classifier-export", "run", cwd=tmp_path)
    assert os.listdir(tmp_path / "run" / "export")
