"""The house: imports point one way without circles, and only config knows the command line."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest
from running import ROOT

PACKAGE = ROOT / "ds_classifier"

# A package imports only from the rows above its own.
LAYERS = [
    ["common"],
    ["model", "diffusion", "distributed"],
    ["config"],
    ["loss", "data", "checkpoint"],
    ["guidance", "weights"],
    ["evaluation"],
    ["export"],
    ["training"],
    ["report"],
]
ROW = {package: row for row, packages in enumerate(LAYERS) for package in packages}
MOST_ENTRIES = 14  # in the package, and in each package inside it, __init__.py not counted


def module_name(path: Path) -> str:
    """`data.order`; of a package's __init__.py, the name of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"
}


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ds_classifier"):
            base = node.module.removeprefix("ds_classifier").strip(".")
            for alias in node.names:
                both = f"{base}.{alias.name}".strip(".")
                found.add(both if both in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("ds_classifier.")
                for alias in node.names
                if alias.name.startswith("ds_classifier.")
            }
    return found - {""}


def package_of(module: str) -> str:
    return module.split(".")[0]


@functools.cache
def arrows() -> dict[str, set[str]]:
    """For each module, the modules of ours that it imports, itself left out."""
    return {name: own_imports(path) - {name} for name, path in MODULES.items()}


def test_every_package_has_a_layer():
    assert {package_of(name) for name in MODULES} == set(ROW)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for imported in arrows()[name]:
        inside = package_of(imported) == package_of(name)
        assert inside or ROW[package_of(imported)] < ROW[package_of(name)], imported


def test_no_circles():
    """A module never imports itself by way of others."""
    graphlib.TopologicalSorter(arrows()).prepare()


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"config.settings"}))
def test_only_config_parses_a_command_line(name):
    tree = ast.parse(MODULES[name].read_text())
    imported = {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    assert "argparse" not in imported
    assert "sys.argv" not in MODULES[name].read_text()


@pytest.mark.parametrize("program", ["train", "evaluate", "report"])
def test_help_imports_nothing_heavy(program):
    """--help answers at once: what a program imports before parsing is light."""
    import subprocess
    import sys

    code = (
        f"import sys; sys.argv = ['{program}.py', '--help']\n"
        "import runpy\n"
        f"try: runpy.run_path('launch/{program}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'webdataset', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
