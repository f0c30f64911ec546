"""The file of variables for all nodes, read by a shell as the deepspeed launcher hands it on."""

import subprocess

import pytest

from launch.environment import main

HARMLESS = ["1", "", "a b", "x;y", "x&y", "*", "(a)", "<a", "!x", "~", "x#y", "k=v", "é", "/a:/b"]


def shell_value(line: str) -> str:
    """What a remote shell makes of a line of .deepspeed_env behind DeepSpeed's export."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    runner.add_export(*line.split("=", maxsplit=1))
    (text,) = runner.exports.values()
    script = f'export V={text}; printf %s "$V"'
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout


def write(folder, monkeypatch, text: str) -> int:
    monkeypatch.chdir(folder)
    (folder / "variables").write_text(text)
    return main(["variables"])


def test_values_survive_the_shell_and_comments_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", "of this host")
    lines = ["", "# a comment", *(f"V{i}={value}" for i, value in enumerate(HARMLESS)), "HERE"]
    assert write(tmp_path, monkeypatch, "\n\n".join(lines)) == 0
    written = (tmp_path / ".deepspeed_env").read_text().splitlines()
    assert [shell_value(line) for line in written] == [*HARMLESS, "of this host"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("export A=1", "'export A' is no name"),
        ("NOT_SET_ANYWHERE", "has no value, and is not set here"),
        ("A=$HOME", "do not survive"),
        ('A="1"', "do not survive"),
        ("A=1 # one", "comments stand on lines of their own"),
        ("A=1\nA=2", "line 3: A stands twice"),
    ],
)
def test_what_would_not_survive_is_refused(tmp_path, monkeypatch, capsys, line, said):
    assert write(tmp_path, monkeypatch, f"\n{line}\n") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / ".deepspeed_env").exists()
