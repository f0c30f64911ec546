"""Every program looks at its outputs first, and names the flag.

What each program would read next does not exist: another message would say that it got so far.
"""

import importlib
from pathlib import Path

import pytest
from made import write_run
from running import ROOT, run_python

NEED = "need a place where files can be written (No such file or directory)"


@pytest.mark.parametrize(
    ("program", "words", "named"),
    [
        ("make_shards", ["convert", "nowhere", "/proc/x"], "OUT: got /proc/x"),
        ("make_shards", ["index", "nowhere", "/proc/x"], "OUT: got /proc/x"),
        ("export", ["nowhere", "--out", "/proc/x"], "--out: got /proc/x"),
        ("report", ["nowhere", "--out", "/proc/x/r.html"], "--out: got /proc/x"),
        ("benchmark", ["data", "nowhere", "--json", "/proc/x/r.json"], "--json: got /proc/x"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_first(program, words, named, capsys):
    assert importlib.import_module(f"launch.{program}").main(words) == 2
    assert f"error: {named}; {NEED}" in capsys.readouterr().err


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("program", "flags", "flag", "default"),
    [
        ("evaluate", ["RUN", "--val_data_dir", "nowhere"], "--out", "eval"),
        (
            "sample",
            ["--classifier_path", "RUN", "--data_dir", "nowhere"],
            "--out_dir",
            "samples",
        ),
    ],
)
def test_ranks_learn_it_before_they_read(tmp_path, program, flags, flag, default, given):
    run = write_run(tmp_path / "run")
    place: Path | str = "/proc/x"
    if not given:  # the default is in the run, where something is in the way
        place = run / default
        place.write_text("")
        flags, need = [*flags], f"need a place where files can be written ({place} is not a dir"
    else:
        flags, need = [*flags, flag, place], NEED
    words = [run if word == "RUN" else word for word in flags]
    done = run_python(ROOT / "launch" / f"{program}.py", *words, cwd=tmp_path)
    assert done.code == 2, done.output
    assert f"error: {flag}: got {place}; {need}" in done.output
