"""The screen of the quickstart, and the line that a Ctrl-C leaves there. No test trains here."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from running import ROOT, environment

from launch import quickstart


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The directory of a run, which the quickstart takes for its own."""
    monkeypatch.setattr(quickstart, "RUN", tmp_path)
    monkeypatch.setattr(quickstart, "LOG", tmp_path / "quickstart.log")
    return tmp_path


def test_a_programs_output_is_in_the_log_and_its_error_on_the_screen(run, capsys):
    code = "print('[time] [INFO] noise'); print('a table'); print('error: a, b'); exit(3)"
    assert quickstart.call([sys.executable, "-c", code]) == 3
    screen = capsys.readouterr()
    assert screen.out == ""
    assert screen.err == f"error: a, b\nfailed with exit code 3; all output: {quickstart.LOG}\n"
    assert quickstart.LOG.read_text() == "[time] [INFO] noise\na table\nerror: a, b\n"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("a file")
    monkeypatch.setattr(quickstart, "DATA", tmp_path / "data")
    monkeypatch.setattr(quickstart, "RUN", tmp_path / "runs/quickstart")
    assert quickstart.do_all() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: results: got {tmp_path}/runs/quickstart; need a place")
    assert line.endswith("do: start in another folder")


def test_each_validation_is_shown_once(run):
    def row(step):
        return json.dumps({"step": step, "val_acc@1": 0.836, "val_acc@1_t0": 0.925}) + "\n"

    log = run / "log.jsonl"
    log.write_text(row(250))
    news = quickstart.new_rows()
    assert news() == []  # of an earlier start
    log.write_text(row(250) + '{"step": 300, "train_loss": 1}\n' + row(500)[:-9])
    assert news() == []
    log.write_text(row(250) + row(500))
    shown = "93 % of the held-out digits are named right, 84 % under noise of all levels"
    assert news() == [f"step 500 of 500: {shown}".replace("93", f"{92.5:.0f}")]
    assert news() == []


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        ({}, "no step is saved yet"),
        ({"checkpoints/latest": "step-00000061\n"}, "step 61 is saved"),
        ({"checkpoints/latest": "step-00000500\n", "DONE": ""}, "the trained classifier is saved"),
    ],
)
def test_ctrl_c_leaves_one_line_that_says_what_is_saved(tmp_path, files, kept):
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for name, content in files.items():
        path = tmp_path / "runs/quickstart" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    make = ["make", "-f", ROOT / "Makefile", "-o", "install", f"VENV={sys.prefix}", "quickstart"]
    with open(tmp_path / "screen", "w") as screen:
        process = subprocess.Popen(
            list(map(str, make)),
            cwd=tmp_path,
            env={k: v for k, v in environment().items() if not k.startswith("MAKE")},
            stdout=screen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 60
    while "1. " not in (tmp_path / "screen").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT  # as a shell expects it of make
    *_, before, last = (tmp_path / "screen").read_text().splitlines()
    assert before.startswith("1. ")
    assert last == f"stopped: {kept}; run the same command again"
