"""The house: imports point one way, and only config knows the command line."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "ds_classifier"

# Lower layers know nothing of higher ones; within a layer, earlier names nothing of later ones.
LAYERS = [
    ["files", "processes", "rendezvous", "scaling", "memory", "data.urls"],
    ["launcher"],
    ["distributed"],
    [
        "keyed_random",
        "model",
        "data.samples",
        "data.tars",
        "data.connections",
        "data.images",
        "config",
        "sanity",
        "sample_files",
        "picture_grid",
        "report_charts",
    ],
    ["failures", "events", "peers", "run_lock", "shutdown", "data.pool"],
    ["watchdog"],
    [
        "unet",
        "flops",
        "device_random",
        "data.order",
        "data.bad_files",
        "data.scan",
        "data.shards",
        "data.fetch",
        "data.cache",
        "batch",
    ],
    ["data.imagenet", "data.parquet", "data.store", "data.plan", "data.spool", "ds_config"],
    ["data.layouts"],
    [
        "diffusion",
        "metrics",
        "logger",
        "data.loader",
        "data.sources",
        "data.convert",
        "data.foreign",
        "data.verify",
        "engine",
    ],
    [
        "noised_classifier",
        "fitting",
        "reference_flags",
        "model_card",
        "checkpoint",
        "replicas",
        "skipped_steps",
        "level_metrics",
        "exact_denoiser",
    ],
    [
        "evaluation",
        "checkpoint_writer",
        "run_files",
        "weights",
        "evaluation_table",
        "evaluation_plots",
    ],
    ["run_costs", "training", "preflight", "export", "initial_weights", "guidance", "sampling"],
    ["evaluation_data"],
    ["predictor", "predictions", "job"],
    ["header"],
    ["report_data", "fidelity", "dry_run", "overfit"],
    ["report_training", "report_evaluation"],
    ["report_history"],
    ["report", "benchmarks.measuring"],
    ["benchmarks.programs", "benchmarks.data", "benchmarks.order", "benchmarks.cache"],
    ["benchmarks.step", "benchmarks.compare", "benchmarks.convert"],
    ["benchmarks.memory", "benchmarks.start"],
    ["benchmarks.checkpoint"],
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(p): p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"}


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


def test_every_module_has_a_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for imported in own_imports(MODULES[name]):
        assert RANK[imported] < RANK[name] or imported == name, f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"config"}))
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
