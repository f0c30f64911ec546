"""ds-classifier: every program under one name."""

import configparser
import shlex

import pytest
from running import ROOT, read_log, run_python

from ds_classifier.common.version import __version__
from launch import cli, train

CLI = ROOT / "launch" / "cli.py"
TINY = shlex.split(
    "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1 "
    "--classifier_attention_resolutions 4 --workers 0 --log_interval 1 --batch_size 8 "
    "--iterations 2 --save_interval 2"
)


def ended(capsys, *words) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of a command that ends while it is parsed."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    return end.value.code or 0, *capsys.readouterr()


def test_help_lists_every_command_in_a_line(capsys):
    code, out, _ = ended(capsys, "--help")
    assert code == 0
    for command in cli.COMMANDS:
        assert sum(line.startswith(f"  {command} ") for line in out.splitlines()) == 1
    assert max(map(len, out.splitlines())) < 80


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_speaks_of_itself_by_its_name(capsys, command):
    code, out, _ = ended(capsys, command, "--help")
    assert code == 0
    assert out.startswith(f"usage: ds-classifier {command} ")
    assert ended(capsys, command, "--version") == (0, f"ds_classifier {__version__}\n", "")
    code, out, err = ended(capsys, command, "--nosuchflag")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    if command != "benchmark":
        assert f"ds-classifier {command} --help" in err


def test_version_and_wrong_commands(capsys):
    assert ended(capsys, "--version") == (0, f"ds_classifier {__version__}\n", "")
    code, out, err = ended(capsys, "convrt", "x")
    assert (code, out) == (2, "")
    assert err.endswith("did you mean convert?\n")
    assert ended(capsys)[2] == "error: got no COMMAND; do: look at ds-classifier --help\n"


def test_every_program_for_users_has_a_command():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    homes = dict(line.split(" = ") for line in scripts)
    assert homes.pop("ds-classifier") == "ds_classifier.launch.cli:main"
    programs = {home.split(".")[-1].removesuffix(":main") for home in homes.values()}
    assert programs <= {program for program, _ in cli.COMMANDS.values()}


@pytest.mark.slow
def test_train_without_a_json_and_its_own_record_again(digits, tmp_path):
    """The JSON of the machine and the validation split are found, and the screen says so."""
    words = ["--data_dir", digits / "train", *TINY]
    done = run_python(CLI, "train", *words, "--run_dir", "one", cwd=tmp_path)
    assert done.code == 0, done.output
    assert any(line.startswith("config      zero") for line in done.lines)
    assert f"in {digits}/val, found beside the training split" in done.output
    again = ["train", "--config", "one/config.json", "--val-data-dir", "none", "--run_dir", "two"]
    done = run_python(CLI, *again, "--deepspeed_config", "zero1_fp32", cwd=tmp_path)
    assert done.code == 0, done.output
    assert done.lines[0].startswith("settings    one/config.json, a run's own, but not its run_dir")
    assert "validation  none" in done.lines
    assert not any(line.startswith("config ") for line in done.lines)
    one, two = (
        [row["train_loss"] for row in read_log(tmp_path / name) if "train_loss" in row]
        for name in ("one", "two")
    )
    assert one == pytest.approx(two, rel=0.01)  # of other precision
    done = run_python(ROOT / "launch" / "evaluate.py", "two", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 1)
    assert "--val_data_dir: got none; need it" in done.output


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--epochs", "10", "--recipe", "digits32"], 225),  # 14370 / 64 = 224.5
        (["--num_train_epochs", "1", "--global_batch", "1437"], 1),
        (["--max_epochs", "0.5"], 180),  # 718.5 / 4 = 179.6
    ],
)
def test_epochs_are_answered_with_steps(digits, tmp_path, flags, steps):
    words = [*flags, "--data_dir", digits / "train"]
    done = run_python(CLI, "train", *words, cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert "1,437 images / global batch" in done.output
    assert done.output.endswith(f"do: --iterations {steps}\n")
    assert not list(tmp_path.iterdir())


def test_epochs_without_data_are_answered_with_the_formula(tmp_path):
    done = run_python(CLI, "train", "--epochs", "3", cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert "epochs x images / global batch; do: --iterations STEPS" in done.output


@pytest.mark.parametrize(
    ("gpus", "words", "package", "expected"),
    [
        (1, ["launch/train.py"], "", ""),
        (4, ["launch/train.py", "--lr", "1"], "", "deepspeed launch/train.py --lr 1"),
        (
            4,
            ["bin/ds-classifier", "train", "--data_dir", "http://me:secret@host/x y"],
            "ds_classifier.launch",
            "deepspeed --module ds_classifier.launch.train --data_dir 'http://***@host/x y'",
        ),
        (
            2,
            ["bin/ds-classifier-train", "--recipe", "train"],
            "ds_classifier.launch",
            "deepspeed --module ds_classifier.launch.train --recipe train",
        ),
    ],
)
def test_idle_gpus(monkeypatch, gpus, words, package, expected):
    import torch

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(train, "__package__", package)
    line = train.idle_gpus()
    assert line == (f"gpus        1 of {gpus} is used; all of them: {expected}" if expected else "")
    monkeypatch.setenv("RANK", "0")
    assert train.idle_gpus() == ""
