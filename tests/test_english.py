"""The form of docstrings: a function's begins with an imperative verb, a class's with an article.

    python tests/test_english.py     prints one line per docstring that breaks a rule

To use a verb that is not in VERBS yet, add it there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def words(text: str) -> set[str]:
    """Return the words of a text."""
    return set(re.findall(r"\w+", text))


VERBS = words(
    """
    Accumulate Acquire Add Adopt Advance Agree Align Allow Answer Append Apply Ask Assert Assign
    Attach Average Begin Bind Block Break Bring Broadcast Build Cache Calculate Call Cancel Cast
    Change Check Choose Claim Classify Clean Clear Close Collect Combine Commit Compare Compile
    Complete Compute Concatenate Connect Construct Continue Convert Copy Correct Count Create
    Crop Cut Deal Decide Declare Decode Delete Denoise Describe Detect Determine Disable Display
    Divide Do Download Draw Drop Emit Enable Encode End Ensure Enter Escape Estimate Evaluate
    Evict Exchange Exit Expand Export Extend Extract Fail Fetch Fill Find Finish Fit Flush Fold
    Follow Force
    Forget Fork Format Forward Free Freeze Gather Generate Get Give Group Guess Guide Halve Hand
    Handle Hash Hide Ignore Import Increase Infer Initialize Insert Inspect Install Interpolate
    Interrupt Join Keep Kill Launch Lay Learn Leave Let Limit List Listen Load Locate Lock
    Log Look Lower Make Map Mark Match Measure Meet Merge Mirror Move Multiply Name Normalize
    Note Notify Observe Open Order Override Overwrite Pack Pad Parse Pass Patch Pause Perform
    Permute Pick Plan Plot Poll Post Predict Prepare Preserve Print Probe Process Produce
    Protect Prune Put Raise Read Rebuild Receive Reclaim Record Recover Reduce
    Refer Refuse Register Rehearse Release Reload Remember Remove Rename Render Reorder Repeat
    Replace Report Request Require Reserve Reset Resize Resolve Respace Restart Restore Resume
    Retry Return Reverse Rewrite Roll Round Run Sample Save Say Scale Scan Schedule Search Seek
    Select Send Separate Serve Set Settle Show Shuffle Shut Sign Signal Simulate Skip Sleep
    Slice Snapshot Sort Split Spool Start Stop Store Stream Strip Subtract Suggest
    Sum Summarize Suppress Switch Sync Synchronize Take Talk Time Touch Trace Track Train
    Transform Translate Try Turn Undo Unlock Unpack Update Upload Use Validate Verify Visit Vote
    Wait Wake Walk Warn Watch Weigh Wrap Write Yield
    """
)
ARTICLES = {"A", "An", "The", "One", "Each", "Every", "All", "Raised"}
BANNED = words(
    """
    Also As At Be Because Before Beside By Does Either Else For From Has Have Having He How If
    In Instead Into Is It Its More None Not Of Off On Once Or Otherwise Out So Such That Their
    Them Then There These They This Those Till To Told Under Until Upon Were What Whatever When
    Where Wherever Whether Which While Who Whom Whose Why With Within Without
    """
)


def third_person(verb: str) -> str:
    """Return the verb as in "Watches a run"."""
    if re.search(r"(s|sh|ch|x|z|o)$", verb):
        return verb + "es"
    return re.sub(r"([^aeiou])y$", r"\1ie", verb) + "s"


ARTICLES_OR_VERBS = ARTICLES | {third_person(verb) for verb in VERBS}


def is_property(node: ast.AST) -> bool:
    """Return whether the function is read like an attribute."""
    names = {ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])}
    return bool({"property", "cached_property", "functools.cached_property"} & names)


def fault(node: ast.AST, docstring: str) -> str:
    """Return which rule the docstring breaks, or an empty string."""
    first = re.match(r"\W*([\w'-]*)", docstring).group(1)
    if first in BANNED:
        return f"begins with {first!r}"
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef) or is_property(node):
        return "" if first in ARTICLES_OR_VERBS else "no article or third-person verb"
    return "" if first in VERBS else "no imperative verb"


def docstrings(path: Path) -> Iterator[tuple[ast.AST, int, str]]:
    """Yield each docstring of a file, with what it describes and its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node, node.body[0].lineno, text


def findings(path: Path) -> list[str]:
    """Return one line per docstring that breaks a rule, as file:line: rule: docstring.

    Test functions state what holds, so theirs need no verb in the imperative.
    """
    found = []
    for node, line, text in docstrings(path):
        rule = fault(node, text)
        if rule.startswith("no ") and not path.is_relative_to(ROOT / "ds_classifier"):
            rule = "" if not path.is_relative_to(ROOT / "launch") else rule
        if rule:
            found.append(f"{path.relative_to(ROOT)}:{line}: {rule}: {text.splitlines()[0]}")
    return found


PLACES = ["launch", "tests"]
PLACES += [f"ds_classifier/{p.name}" for p in sorted((ROOT / "ds_classifier").iterdir())]
PLACES = [p for p in PLACES if list((ROOT / p).rglob("*.py")) or p.endswith(".py")]


def files_in(place: str) -> list[Path]:
    """Return the Python files of a folder, or the file itself."""
    path = ROOT / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("place", PLACES)
def test_docstrings_begin_plainly(place):
    found = [line for path in files_in(place) for line in findings(path)]
    assert not found, f"{len(found)} docstrings\n" + "\n".join(found)


@pytest.mark.parametrize("place", PLACES)
def test_every_file_has_a_docstring(place):
    without = [p for p in files_in(place) if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not without


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ('def f():\n    """Return the mean."""', ""),
        ('def f():\n    """The mean."""', "no imperative verb"),
        ('def f():\n    """Of an epoch; what was lost."""', "begins with 'Of'"),
        ('class C:\n    """A row of the log."""', ""),
        ('class C:\n    """Watches a run."""', ""),
        ('class C:\n    """Rows of the log."""', "no article or third-person verb"),
        ('class C:\n    @property\n    def p(self):\n        """The last step."""', ""),
        (
            'class C:\n    @property\n    def p(self):\n        """Return the last step."""',
            "no art",
        ),
        ('"""What holds."""', "begins with 'What'"),
        ('"""Runs, as they go."""', ""),
    ],
)
def test_the_rules(source, rule, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(source)
    [(node, _, text)] = docstrings(path)
    assert fault(node, text).startswith(rule)
    assert bool(fault(node, text)) == bool(rule)


if __name__ == "__main__":
    for place in PLACES:
        for path in files_in(place):
            print("\n".join(findings(path)), end="\n" * bool(findings(path)))
