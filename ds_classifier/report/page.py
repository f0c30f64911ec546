"""`report.html`: one page that tells how a run goes, from its directory alone; no network needed.

Every word that comes from data is escaped. A part that cannot be made, since a file is damaged,
says so in its place; the others stand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from pathlib import Path

from ds_classifier.common import files
from ds_classifier.report.data import RunData, read_run
from ds_classifier.report.evaluation import confusion, image_grid, noise_levels
from ds_classifier.report.history import settings, time_line
from ds_classifier.report.training import checks, curves, headline

STATES = {
    "finished": "finished",
    "running": "running",
    "stopped": "stopped on request; the same command goes on",
    "failed": "failed; the last checkpoint stands",
    "ended": "ended without a word; the same command goes on",
    "not started": "not started",
}
SECTIONS: list[tuple[str, str, Callable[[RunData], str]]] = [
    ("", "", headline),
    ("working", "Is it working?", checks),
    ("curves", "Training", curves),
    ("noise", "Against noise", noise_levels),
    ("images", "What it sees", image_grid),
    ("confusion", "What it confuses", confusion),
    ("history", "Time line", time_line),
    ("settings", "Settings and environment", settings),
]


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write a run's page, at once; returns its path. out: a file [run_dir/report.html].

    Raises ValueError if run_dir is none, OSError where the page cannot be written.
    """
    path = out or run_dir / "report.html"
    files.replace_text(path, page(read_run(run_dir)))
    return path


def page(run: RunData) -> str:
    """The whole page, as HTML."""
    name = escape(run.path.resolve().name)
    menu = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in SECTIONS if key)
    body = "".join(_section(run, *section) for section in SECTIONS)
    style = Path(__file__).with_name("report.css").read_text()
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{name}</title><link rel="icon" href="data:,"><style>{style}</style></head><body>'
        f'<header><div><h1>{name}</h1><span class="state {run.state.replace(" ", "-")}">'
        f"{escape(STATES[run.state])}</span></div><nav>{menu}</nav></header>"
        f"<main>{body}</main>"
        f"<footer>{escape(str(run.path))} &middot; made {made} by ds_classifier</footer>"
        "</body></html>\n"
    )


def _section(run: RunData, key: str, title: str, make: Callable[[RunData], str]) -> str:
    try:
        body = make(run)
    except Exception as error:  # a file of another version, or damaged
        words = f"cannot be shown: {type(error).__name__}: {error}"
        body = f'<div class="empty">{escape(words)}</div>'
    if not key:
        return body
    return f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>'
