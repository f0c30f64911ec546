"""Mistyped flags, names of other trainers, and errors of one line."""

import dataclasses

import pytest

from ds_classifier.config import parse_training_command
from ds_classifier.config.other_names import EPOCHS, MEANT, TRAINING_ADVICE
from ds_classifier.config.parser import Parser
from ds_classifier.config.settings import Settings


def refused(capsys, parse, *words: str) -> list[str]:
    """Return the lines of the error with which a command line ends."""
    with pytest.raises(SystemExit) as end:
        parse(list(words))
    captured = capsys.readouterr()
    assert (end.value.code, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    return captured.err.removeprefix("error: ").splitlines()


@pytest.mark.parametrize(
    ("flag", "meant"),
    {
        "--itertions": "--iterations",
        "--iterration": "--iterations",
        "--Iterations": "--iterations",
        "--iter": "--iterations",
        "--imagesize": "--image_size",
        "--valid": "--val_data_dir",
        "--learning_rate": "--lr",
        "--learning-rate": "--lr",
        "--output_dir": "--run_dir",
        "--max_steps": "--iterations",
        "--num-workers": "--workers",
        "--wd": "--weight_decay",
        "-b": "--batch_size",
        "--attention_resolutions": "--classifier_attention_resolutions",
        "--deepspeed_confg": "--deepspeed_config",
        "--dryrun": "--dry_run",
        "--recipes": "--recipe",
    }.items(),
)
def test_what_was_meant(capsys, flag, meant):
    for words in ([flag, "3"], [f"{flag}=3"]):
        lines = refused(capsys, parse_training_command, *words)
        assert lines == [f"{flag}: unknown flag; did you mean {meant}?"]


def test_a_beginning_of_several_flags_is_never_taken_for_one(capsys):
    [line] = refused(capsys, parse_training_command, "--keep", "3")
    assert line.endswith("did you mean --keep_last or --keep_every?")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--fp16", "--deepspeed_config zero1_fp16"),
        ("--max_grad_norm", "gradient_clipping"),
        ("--train_batch_size", "--global_batch"),
        ("--num_gpus", "before the script, as in deepspeed --num_gpus ... launch/train.py"),
        ("--resume", "the same command again"),
        ("--nosuch", "look at train.py --help"),
    ],
)
def test_what_to_do_instead(capsys, flag, words):
    [line] = refused(capsys, parse_training_command, flag)
    assert words in line


def test_all_unknown_flags_are_named_at_once(capsys):
    lines = refused(capsys, parse_training_command, "--wd", "-1", "--lr", "x", "--itertions", "5")
    assert [line.partition(":")[0] for line in lines] == ["--wd", "--itertions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "fast"], "--lr: got 'fast'; need a number"),
        (["--iterations", "1.5"], "--iterations: got '1.5'; need a whole number"),
        (["--lr"], "--lr: got no value; need X: peak learning rate [0.0003]"),
        (["--profile", "--seed", "1"], "--profile: got no value; need N: record this step and"),
        (["--local_rank"], "--local_rank: got no value; need one"),
        (["data/train"], "got 'data/train', which belongs to no flag; do: look at train.py --help"),
        (["--epochs", "0"], "--epochs: got '0'; need a number of epochs, more than 0"),
    ],
)
def test_errors_are_one_line(capsys, words, message):
    [line] = refused(capsys, parse_training_command, *words)
    assert message in line


def test_a_wrong_choice_names_the_nearest(capsys):
    [line] = refused(capsys, parse_training_command, "--recipe", "digts32")
    assert line.startswith("--recipe: got 'digts32'; need one of reference, imagenet64, ")
    assert line.endswith("did you mean digits32?")


def test_dashes_stand_for_underscores():
    words = ["--image-size", "32", "--data-dir=a-b", "--classifier-pool", "spatial", "--lr", "-1"]
    settings = parse_training_command(words).settings
    assert (settings.image_size, settings.data_dir) == (32, "a-b")
    assert (settings.classifier_pool, settings.lr) == ("spatial", -1)


@pytest.mark.parametrize("text", ["-1e38", "-1e-3", "-.5", "-2.5E+3", "-1"])
def test_a_negative_number_is_no_flag(text):
    assert parse_training_command(["--lr", text]).settings.lr == float(text)


@pytest.mark.parametrize("switch", ["--deepspeed", "--deepspeed=true"])
def test_deepspeeds_own_switch_has_no_effect(switch):
    """DeepSpeed's helper for command lines writes --deepspeed --deepspeed_config X."""
    with_switch = parse_training_command([switch, "--deepspeed_config", "x.json"])
    assert with_switch == parse_training_command(["--deepspeed_config", "x.json"])


@pytest.mark.parametrize("flag", ["--deepspeed_mpi", "--deepscale", "--deepscale_config"])
def test_the_other_flags_of_deepspeeds_helper_are_answered(capsys, flag):
    [line] = refused(capsys, parse_training_command, flag)
    assert line.startswith(f"{flag}: unknown flag; ")
    assert "--help" not in line


@pytest.mark.parametrize("value", ["ds.json", "false"])
def test_deepspeeds_switch_takes_no_value(capsys, value):
    """Hugging Face's Trainer has the JSON there."""
    [line] = refused(capsys, parse_training_command, "--deepspeed", value)
    assert line.startswith(f"--deepspeed: got '{value}'; need no value")
    assert line.endswith("do: --deepspeed_config JSON to say how")


@pytest.mark.parametrize(("flag", "a", "b"), [
    ("--config", "a.yaml", "b.yaml"), ("--recipe", "digits32", "imagenet64"),
])  # fmt: skip
def test_what_holds_many_settings_is_given_once(capsys, flag, a, b):
    """The settings of the first would be lost in silence."""
    [line] = refused(capsys, parse_training_command, flag, a, flag, b)
    assert line == f"{flag}: got {a} and {b}; need one; do: drop one"


@pytest.mark.parametrize("flag", [f"--{name}" for name in EPOCHS])
def test_epochs_are_kept_for_an_answer(flag):
    assert parse_training_command([flag, "2.5"]).epochs == 2.5


def test_only_the_first_rank_of_a_node_reports(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        parse_training_command(["--nosuch"])
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


def test_no_flag_of_ours_counts_as_unknown():
    """A name of other trainers that became a flag here would never be looked up."""
    ours = {field.name for field in dataclasses.fields(Settings)}
    assert not ours & {*TRAINING_ADVICE, *EPOCHS}
    assert not set(MEANT) & set(TRAINING_ADVICE)


def commands() -> Parser:
    """A program with two commands, one of which passes unknown flags on."""
    parser = Parser(prog="tool", passes_on=True)
    added = parser.add_subparsers(required=True, metavar="COMMAND")
    strict = added.add_parser("strict")
    strict.add_argument("--val")
    strict.add_argument("--val_labels")
    strict.add_argument("source")
    added.add_parser("open", passes_on=True).add_argument("source")
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strct"], "COMMAND: got 'strct'; need one of strict, open; did you mean strict?"),
        (["strict"], "got no source; do: look at tool strict --help"),
        (["strict", "--vall", "x"], "--vall: unknown flag; did you mean --val?"),  # comes first
        (["strict", "a", "b"], "got 'b', which belongs to no flag; do: look at tool strict --help"),
    ],
)
def test_commands(capsys, words, message):
    assert refused(capsys, commands().parse_known_args, *words) == [message]


def test_unknown_words_are_passed_on_where_asked():
    found, rest = commands().parse_known_args(["open", "x", "--lr", "3", "--a-b"])
    assert (found.source, rest) == ("x", ["--lr", "3", "--a-b"])
