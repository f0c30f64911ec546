"""Functions of the user's that a flag names, from modules written here."""

import sys

import pytest

from ds_classifier.common.user_code import load_function


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return an empty current directory; modules imported from it are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_function_is_imported_from_the_current_directory(here):
    (here / "mine_a.py").write_text("def double(x):\n    return 2 * x\n")
    package = here / "mine_b" / "deep"
    package.mkdir(parents=True)
    (package / "module.py").write_text("class Net:\n    size = 3\n")
    assert load_function("--loss", "mine_a:double")(4) == 8
    assert load_function("--classifier", "mine_b.deep.module:Net").size == 3


@pytest.mark.parametrize("name", ["mine", "mine/x:f", "mine:f()", ":f", "mine:", "a b:f"])
def test_another_form_is_refused(here, name):
    with pytest.raises(ValueError, match=r"--loss: got .*need package.module:function"):
        load_function("--loss", name)


def test_errors_name_the_true_reason(here):
    (here / "mine_c.py").write_text("import no_such_package_xyz\n")
    (here / "mine_d.py").write_text("raise RuntimeError('no licence')\n")
    (here / "mine_e.py").write_text("number = 3\n")
    for name, reason in {
        "mine_c:f": "No module named 'no_such_package_xyz'",
        "mine_d:f": "RuntimeError: no licence",
        "mine_none:f": "No module named 'mine_none'.*start the program in the directory",
        "mine_e:number": "mine_e has 3 there",
        "mine_e:f": "mine_e has no such name",
    }.items():
        with pytest.raises(ValueError, match=f"--augment: got '{name}'.*{reason}"):
            load_function("--augment", name)
