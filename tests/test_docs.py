"""README.md and docs/: links and anchors lead somewhere, paths that are named exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from running import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *(ROOT / "docs").glob("*.md"),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
TREE = re.compile(r"^( *)([\w./-]+)(?:  +\S.*)?$")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


def tree() -> list[str]:
    """Return the paths of the tree in README's section "Where things are"."""
    section = (ROOT / "README.md").read_text().split("\n## Where things are\n")[1].split("\n## ")[0]
    paths, folders = [], {}
    for line in section.splitlines():
        if not line.startswith("    "):
            continue
        match = TREE.match(line[4:])
        assert match, f"a line of the tree that cannot be read: {line!r}"
        depth, name = len(match[1]), match[2]
        folders = {d: f for d, f in folders.items() if d < depth}
        paths.append("".join(folders.values()) + name)
        if name.endswith("/"):
            folders[depth] = name
    return paths


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    dead = []
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_programs_and_files_that_a_page_names_exist(page):
    """Paths in the checkout: launch/train.py, docs/data.md, tests/launch/test_nodes.py::test_x."""
    named = re.findall(
        r"(?<![\w./-])((?:launch|docs|tests|ds_configs|ds_classifier)/[\w./-]*\w)",
        page.read_text(),
    )
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_tree_of_the_readme_is_the_tree():
    paths = tree()
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]
    ours = {p.name for p in (ROOT / "ds_classifier").iterdir()} - {"__init__.py", "__pycache__"}
    named = {
        Path(path).parts[1]
        for path in paths
        if path.startswith("ds_classifier/") and len(Path(path).parts) > 1
    }
    assert named >= ours
