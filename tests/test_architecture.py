"""The layout of the code: import layers, sizes of folders and functions, installed packages."""

import ast
import configparser
import functools
import graphlib
import subprocess
import sys
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
PROGRAMS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__")
MOST_ENTRIES = 14  # in ds_classifier/ and in each package inside it; __init__.py is not counted
MOST_LINES = 90  # in a function of the library
MOST_LINES_IN_TRAINING = 60


def module_name(path: Path) -> str:
    """Return a dotted name below ds_classifier, such as `data.order`, or a package's own name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"
}
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})


def own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        relative = isinstance(node, ast.ImportFrom) and node.level
        assert not relative, f"{path}:{node.lineno}: a relative import, which nothing here reads"
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
    """Return the part of the name before the first dot."""
    return module.split(".")[0]


@functools.cache
def arrows() -> dict[str, set[str]]:
    """Return the modules of the package that each module imports, without the module itself."""
    return {name: own_imports(path) - {name} for name, path in MODULES.items()}


def test_every_package_has_a_layer():
    assert {package_of(name) for name in MODULES} == set(ROW)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for imported in arrows()[name]:
        inside = package_of(imported) == package_of(name)
        assert inside or ROW[package_of(imported)] < ROW[package_of(name)], imported


def test_no_circles():
    """No module imports itself by way of others."""
    graphlib.TopologicalSorter(arrows()).prepare()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    ours = sorted(p.name for p in folder.iterdir() if p.name not in ("__init__.py", "__pycache__"))
    assert len(ours) <= MOST_ENTRIES, ours


def test_no_function_is_too_long():
    """One line per function over the limit: file:line, name, length."""
    long = []
    for path in MODULES.values():
        limit = MOST_LINES_IN_TRAINING if path.is_relative_to(PACKAGE / "training") else MOST_LINES
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > limit:
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    long.append(f"{place} {node.name}: {length} lines, at most {limit}")
    assert not long, "\n" + "\n".join(long)


def test_every_package_is_installed():
    """setup.cfg lists the packages by hand, because two of them lie outside ds_classifier/.

    A package that is missing from the list works in a checkout and fails when installed.
    """
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    homes = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().split("\n"))
    assert homes == {
        "ds_classifier.launch": "launch",
        "ds_classifier.ds_configs": "ds_configs",
    }
    on_disk = {".".join(folder.relative_to(ROOT).parts) for folder in FOLDERS}
    launch = {path.parent for path in (ROOT / "launch").rglob("*.py")}
    on_disk |= {".".join(("ds_classifier", *p.relative_to(ROOT).parts)) for p in launch}
    on_disk.add("ds_classifier.ds_configs")
    assert sorted(listed) == sorted(on_disk)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"config.command_line", "config.parser"}))
def test_only_config_parses_a_command_line(name):
    tree = ast.parse(MODULES[name].read_text())
    imported = {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    assert "argparse" not in imported
    assert "sys.argv" not in MODULES[name].read_text()


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing_heavy(program):
    """--help answers at once, because the program imports nothing heavy before it parses."""
    code = (
        f"import sys; sys.argv = ['{program}.py', '--help']\n"
        "import runpy\n"
        f"try: runpy.run_path('launch/{program}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'webdataset', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def text_without_encoding(tree: ast.AST) -> list[int]:
    """Return the lines that open a file as text in whatever encoding the locale has."""
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        named = {keyword.arg for keyword in call.keywords}
        place = {"read_text": 0, "write_text": 1}.get(name)
        if isinstance(call.func, ast.Name) and name == "open":
            mode = ast.unparse(call.args[1]) if len(call.args) > 1 else "r"
            wrong = "b" not in mode and "encoding" not in named
        elif place is not None:
            wrong = len(call.args) <= place and "encoding" not in named
        else:
            wrong = False
        if wrong:
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("folder", ["ds_classifier", "launch"])
def test_text_is_utf_8_in_every_locale(folder):
    wrong = {
        path: lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := text_without_encoding(ast.parse(path.read_text("utf-8"))))
    }
    assert wrong == {}


def test_text_in_the_locales_encoding_is_found():
    calls = ["open(p)", "p.read_text()", "p.write_text('é')"]
    assert text_without_encoding(ast.parse("\n".join(calls))) == [1, 2, 3]
