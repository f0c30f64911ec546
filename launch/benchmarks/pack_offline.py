"""Pack the packages that a node without network lacks, as wheels for its Python.

    node$ python3 -m pip list --format=freeze > node.txt
    here$ python launch/benchmarks/pack_offline.py node.txt offline
    node$ python3 -m pip install --no-index --no-deps --target offline/site offline/wheels/*.whl
    node$ PYTHONPATH=offline/site python3 launch/benchmark.py gpu --json gpu.json

Torch and what else the node has are not packed, unless the list shows that it is too old. Run it
with a Python that has pip, setuptools and torch, such as that of .venv: DeepSpeed comes as source
only and asks for them when its wheel is built, without kernels.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version

TREE = Path(__file__).resolve().parents[2]
GLIBC = (17, 24, 26, 27, 28, 31, 34)  # of the wheels looked for: manylinux_2_N
FROM_SOURCE = "deepspeed"


def main() -> int:
    """Pack, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("node", type=Path, help="the node's packages: NAME or NAME==VERSION a line")
    parser.add_argument("folder", type=Path, help="gets wheels/")
    parser.add_argument("--python", default="3.12", help="of the node [3.12]")
    parser.add_argument("--machine", default="x86_64", help="of the node: its `uname -m` [x86_64]")
    arguments = parser.parse_args()
    wheels = arguments.folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    has = dict(line.partition("==")[::2] for line in arguments.node.read_text("utf-8").split())
    has = {canonical(name): version.partition("+")[0] for name, version in has.items()}
    target = ["--only-binary=:all:", "--python-version", arguments.python, "--find-links", wheels]
    names = [f"manylinux_2_{n}" for n in GLIBC] + ["manylinux2014", "manylinux1"]
    target += [word for name in names for word in ("--platform", f"{name}_{arguments.machine}")]
    try:
        if FROM_SOURCE not in has:
            build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels]
            pip(*build, next(r for r in requirements() if r.startswith(FROM_SOURCE)))
        lacking = lacking_on(has, arguments.python, target)
        wanted = [f"{name}=={version}" for name, version in lacking.items()]
        pip("download", "--no-deps", *target, "--dest", wheels, *wanted)
    except subprocess.CalledProcessError as error:
        print(f"error: pip ended with code {error.returncode}; see above", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in wheels.iterdir()) / 2**20
    print(f"{len(lacking)} packages, {size:.1f} MiB in {wheels}: {', '.join(wanted)}")
    return 0


def canonical(name: str) -> str:
    """Return a package's name as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    """Return what setup.cfg requires."""
    config = configparser.ConfigParser()
    config.read(TREE / "setup.cfg", encoding="utf-8")
    return config["options"]["install_requires"].split("\n")[1:]


def lacking_on(node: dict[str, str], python: str, target: list[object]) -> dict[str, str]:
    """Return what the node needs and lacks, name -> version, and the needs of these in turn.

    node: its packages, with "" for an unknown version. target: flags of pip on what it can use.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: dict[str, str] = {}
    todo = [Requirement(line) for line in requirements()]
    while todo:
        todo = [
            need
            for need in todo
            if (need.marker is None or need.marker.evaluate(environment))
            and canonical(need.name) not in found
            and not fits(need, node.get(canonical(need.name)))
        ]
        if not todo:
            break
        todo = [suited(need, node.get("torch", "")) for need in todo]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.json")
            ask = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
            ask += ["--report", report, *target, "--target", folder]
            pip(*ask, *(f"{need.name}{need.specifier}" for need in todo))
            packages = json.loads(report.read_text(encoding="utf-8"))["install"]
        metadata = [package["metadata"] for package in packages]
        found |= {canonical(one["name"]): one["version"] for one in metadata}
        todo = [Requirement(line) for one in metadata for line in one.get("requires_dist", ())]
    return found


def fits(need: Requirement, version: str | None) -> bool:
    """Return whether the node has the package, in a version that will do if it is known.

    Pre-releases count: torch in NVIDIA's containers is one, such as 2.9.0a0.
    """
    return version is not None and (
        not version or need.specifier.contains(version, prereleases=True)
    )


def suited(need: Requirement, torch: str) -> Requirement:
    """Return the requirement; of torchvision, the version made for the node's torch if it is known.

    Each torchvision needs one torch alone, 0.(N + 15).P needs 2.N.P (its README has the table), so
    that the newest torchvision would bring the newest torch.
    """
    if need.name != "torchvision" or not torch or Version(torch).major != 2:
        return need
    _, minor, patch = Version(torch).release
    return Requirement(f"torchvision=={Version(f'0.{minor + 15}.{patch}')}")


def pip(*words: object) -> None:
    """Run pip. Raises CalledProcessError if it fails."""
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "DS_BUILD_OPS": "0"}
    command = [sys.executable, "-m", "pip", *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | quiet)


if __name__ == "__main__":
    sys.exit(main())
