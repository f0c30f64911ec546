"""The live line: on a terminal it is replaced by the next line; elsewhere there is none."""

import io
import os
import pty
import select
import sys
from types import SimpleNamespace

import pytest
from running import ROOT, run_python

from ds_classifier.distributed import console

ERASE = "\r\x1b[K"


class Screen:
    """A pseudo-terminal; `written` returns what was written since the last call."""

    def __init__(self):
        self._reader, writer = pty.openpty()
        self.stdout = open(writer, "w")

    def written(self) -> str:
        text = b""
        while select.select([self._reader], [], [], 0.3)[0]:  # it arrives a little later
            text += os.read(self._reader, 1 << 16)
        return text.decode().replace("\r\n", "\n")


@pytest.fixture
def screen(monkeypatch):
    made = Screen()
    streams = SimpleNamespace(stdout=made.stdout, stderr=made.stdout)
    monkeypatch.setattr(console, "sys", streams)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(console, "_drawn", float("-inf"))
    yield made
    made.stdout.close()


def test_the_next_line_takes_the_live_lines_place(screen):
    console.live("step 1")
    console.say("a row")
    console.live("step 2", at_once=True)
    console.live("")
    assert screen.written() == f"{ERASE}step 1{ERASE}a row\n{ERASE}step 2{ERASE}"


def test_the_live_line_is_drawn_now_and_then_and_fits(screen, monkeypatch):
    clock = iter([10.0, 10.1, 10.15, 10.3, 10.31])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    for text in ("a" * 40, "b", "c", "d"):
        console.live(text)
    console.live("e", at_once=True)
    assert screen.written() == f"{ERASE}{'a' * 29}{ERASE}d{ERASE}e"


def test_other_ranks_have_no_live_line_but_remove_it(screen, monkeypatch):
    console.live("step 1")
    monkeypatch.setenv("RANK", "1")
    console.live("step 2", at_once=True)
    console.warn("lost a worker")
    assert screen.written() == f"{ERASE}step 1{ERASE}rank 1: lost a worker\n"


@pytest.mark.parametrize("why", ["a log", "a job in the background", "a dumb terminal"])
def test_where_there_is_no_live_line(screen, monkeypatch, why):
    if why == "a log":
        log = io.StringIO()
        monkeypatch.setattr(console.sys, "stdout", log)
    elif why == "a job in the background":
        monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp() + 1)
    else:
        monkeypatch.setenv("TERM", "dumb")
    console.live("step 1", at_once=True)
    console.say("a row")
    written = log.getvalue() if why == "a log" else screen.written()
    assert written.replace(ERASE, "") == "a row\n"
    assert (console.columns() is None) == (why != "a job in the background")


def test_a_long_line_breaks_between_words_on_a_terminal_only(screen, capsys, monkeypatch):
    console.say_labelled("config      of /a/very/long/path/for/a/terminal here")
    assert screen.written().replace(ERASE, "") == (
        "config      of\n            /a/very/long/path/for/a/terminal\n            here\n"
    )
    monkeypatch.setattr(console, "sys", sys)
    console.say_labelled("config      of /a/very/long/path/for/a/terminal here")
    assert capsys.readouterr().out.count("\n") == 1


UNBUILT = """
import sys
sys.path.insert(0, sys.argv[1])
from ds_classifier import distributed
distributed.quiet_libraries()
import torch.utils.data.dataloader as loaders

class Ours:
    def __del__(self):
        raise RuntimeError("ours")

iterator = loaders._MultiProcessingDataLoaderIter
iterator.__new__(iterator)  # its destructor finds nothing, as after a failure in __init__
Ours()
"""


def test_destructors_of_libraries_say_nothing(tmp_path):
    done = run_python("-c", UNBUILT, ROOT, cwd=tmp_path)
    assert "DataLoaderIter" not in done.output
    assert "RuntimeError: ours" in done.output
