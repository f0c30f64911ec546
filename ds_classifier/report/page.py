"""`report.html`: one page that shows how a run goes, made from its directory; it needs no network.

The functions of the sections compute values; page.html lays them out and escapes all text. If a
section cannot be computed, because a file is damaged, it shows the error in its place.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_classifier.common import files
from ds_classifier.report.data import RunData, read_run
from ds_classifier.report.evaluation import confusion, image_grid, noise_levels
from ds_classifier.report.guidance import guides
from ds_classifier.report.history import settings, timeline
from ds_classifier.report.training import curves, headline
from ds_classifier.report.working import checks

STATES = {
    "finished": "finished",
    "running": "running",
    "stopped": "stopped on request; the same command continues it",
    "failed": "failed; the last checkpoint is kept",
    "ended": "ended without a message; the same command continues it",
    "not started": "not started",
}
SECTIONS: dict[str, tuple[str, Callable[[RunData], Any]]] = {
    "working": ("Is it working?", checks),
    "guides": ("Does it guide?", guides),
    "curves": ("Training", curves),
    "noise": ("Noise levels", noise_levels),
    "images": ("Images", image_grid),
    "confusion": ("Confused classes", confusion),
    "history": ("Timeline", timeline),
    "settings": ("Settings and environment", settings),
}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write a run's page, all at once, and return its path.

    out: the file to write; None: run_dir/report.html.
    Raises ValueError if run_dir is not a run directory, and OSError if the page cannot be written.
    """
    path = out or run_dir / "report.html"
    text = page(read_run(run_dir))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(path, text)
    return path


def page(run: RunData) -> str:
    """Return the whole page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken_flags"] = unbroken_flags
    return environment.get_template("page.html").render(
        name=run.path.resolve().name,
        path=run.path,
        made=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        state=run.state,
        state_text=STATES[run.state],
        style=(folder / "report.css").read_text(encoding="utf-8"),
        titles=_titles(run),
        headline=_computed(headline, run),
        parts={key: _computed(compute, run) for key, (_, compute) in SECTIONS.items()},
    )


def unbroken_flags(text: str) -> str:
    """Return a text as HTML in which no line ends within the name of a flag, such as --lr."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"--\w+", r'<span class="flag">\g<0></span>', str(escape(text))))


def _titles(run: RunData) -> dict[str, str]:
    """Return the titles of the sections; classes are confused only where each image has one."""
    titles = {key: title for key, (title, _) in SECTIONS.items()}
    confused = {"classes": "Classes", "values": "Confused bins"}
    return titles | {"confusion": confused.get(run.targets.kind, titles["confusion"])}


def _computed(compute: Callable[[RunData], Any], run: RunData) -> Any:
    """Return a section's values, or a text that says why there are none."""
    try:
        return compute(run)
    except Exception as error:  # a file is damaged, or of another version
        return f"cannot be shown: {type(error).__name__}: {error}"
