"""--config: what a file may say, what overrides what, and the config.json of a run."""

import json

import pytest

from ds_classifier.config import RECIPES, Settings, parse_training_command
from ds_classifier.config.settings_file import OF_ONE_RUN, read_settings_file

MINE = """\
recipe: digits32            # a comment
deepspeed_config: zero1_fp32
lr: 1e-4                    # which YAML takes for text
weight-decay: 0
classifier_channel_mult: [1, 2]
classifier_attention_resolutions: 8
random_flip: yes
iterations: 700.0
anneal_lr: null
val_data_dir: none
"""


@pytest.fixture
def write(tmp_path):
    """A function that writes a file and returns its path."""

    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return path

    return write


def parsed(path, *flags):
    return parse_training_command(["--config", str(path), *flags])


def problems(path) -> str:
    with pytest.raises(ValueError) as error:
        read_settings_file(path)
    return str(error.value)


def test_yaml(write):
    command = parsed(write(MINE))
    settings = command.settings
    assert (command.recipe, str(command.deepspeed_config)) == ("digits32", "zero1_fp32")
    assert (settings.lr, settings.weight_decay, settings.iterations) == (1e-4, 0.0, 700)
    assert isinstance(settings.iterations, int)
    assert isinstance(settings.weight_decay, float)
    assert settings.classifier_channel_mult == "1,2"
    assert settings.classifier_attention_resolutions == "8"
    assert settings.random_flip is True
    assert settings.anneal_lr is None
    assert settings.val_data_dir == "none"
    assert settings.global_batch == RECIPES["digits32"]["global_batch"]
    assert command.given >= {"lr", "iterations", "global_batch"}
    assert "anneal_lr" not in command.given


def test_json_says_the_same(write):
    import yaml

    same = write(json.dumps(yaml.safe_load(MINE)), "mine.json")
    assert parsed(same).settings == parsed(write(MINE)).settings


def test_a_file_overrides_the_recipe_and_flags_override_it(write):
    path = write(MINE)
    assert RECIPES["digits32"]["lr"] != 1e-4
    assert parsed(path, "--lr", "3").settings.lr == 3
    other = parsed(path, "--recipe", "cifar32", "--deepspeed_config", "x.json")
    assert (other.settings.lr, other.recipe) == (1e-4, "cifar32")
    assert other.settings.classifier_width == RECIPES["cifar32"]["classifier_width"]
    assert str(other.deepspeed_config) == "x.json"


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("batch_size: 8", ["--recipe", "digits32"], (0, 8)),  # the recipe has a global batch
        ("batch_size: 8", ["--global_batch", "32"], (32, 0)),
        ("global_batch: 32", ["--batch_size", "8"], (0, 8)),
        ("global_batch: 32\nbatch_size: 8", [], (32, 8)),  # they may agree
    ],
)
def test_one_batch_size_replaces_the_other_of_a_layer_below(write, text, flags, expected):
    settings = parsed(write(text), *flags).settings
    assert (settings.global_batch, settings.batch_size) == expected


def test_every_problem_is_named_at_once(write):
    text = problems(
        write(
            "itertions: 3\nlearning_rate: 2\niterations: fast\nnoised: 1\nepochs: 3\n"
            "recipe: digit32\nlr: true\nclassifier_pool: {a: 1}\nfp16: true\nworkers: 1.5\n"
            "random_crop: maybe\n"
        )
    ).splitlines()
    assert text[0].startswith("got ")
    for line, words in zip(
        text[1:],
        [
            "itertions: unknown setting; did you mean iterations?",
            "learning_rate: unknown setting; did you mean lr?",
            "iterations: got 'fast'; need a whole number",
            "noised: got 1; need true or false",
            "epochs: unknown setting; do: give iterations",
            "did you mean digits32?",
            "lr: got True; need a number",
            "classifier_pool: got {'a': 1}; need text",
            "fp16: unknown setting; the JSON owns the precision",
            "workers: got '1.5'; need a whole number",
            "random_crop: got 'maybe'; need True or False",
        ],
        strict=True,
    ):
        assert words in line


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("lr: 1\nlr: 2\n", "a.yaml", "lr is given twice"),
        ("data-dir: a\ndata_dir: b\n", "a.yaml", "data_dir is given twice"),
        ('{"lr": 1, "lr": 2}', "a.json", "lr is given twice"),
        ("lr: [1\n", "a.yaml", "not YAML"),
        ('{"lr": 1', "a.json", "not JSON"),
        ("[1, 2]", "a.json", "no mapping"),
        ("just words", "a.yaml", "no mapping"),
        ("", "a.yaml", "no mapping"),
        ("!!python/object/apply:os.system [ls]", "a.yaml", "not YAML"),
    ],
)
def test_files_that_cannot_be_read(write, text, name, words):
    assert words in problems(write(text, name))


def test_another_encoding_is_named_with_what_to_do(tmp_path, capsys):
    (tmp_path / "s.yaml").write_bytes("run_dir: é".encode("utf-16"))
    with pytest.raises(SystemExit):
        parsed(tmp_path / "s.yaml")
    assert "s.yaml, which looks like UTF-16; need text in UTF-8" in capsys.readouterr().err


def test_no_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(tmp_path / "no.yaml")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --config: got {tmp_path}/no.yaml: No such")


def test_the_record_of_a_run(write):
    """The file starts the run again, with another directory, batch per rank and class count."""
    ran = Settings(
        data_dir="d/train", val_data_dir="d/val", num_classes=10, lr=2e-3, global_batch=48,
        batch_size=24, run_dir="runs/a", resume_checkpoint="x", expect_world=2, max_minutes=3,
        init_from="w.pt", iterations=77,
    )  # fmt: skip
    path = write(ran.recorded() | {"of_a_later_version": 1}, "config.json")
    command = parsed(path)
    assert command.recorded
    assert command.unknown == ("of_a_later_version",)
    defaults = {name: getattr(Settings(), name) for name in OF_ONE_RUN}
    expected = ran.replace(**defaults).replace(run_dir="runs/classifier64")
    assert command.settings == expected.replace(eval_interval=expected.save_interval)
    other = parsed(path, "--data_dir", "e/train", "--run_dir", "runs/b", "--lr", "1").settings
    assert (other.run_dir, other.lr, other.iterations) == ("runs/b", 1, 77)
    assert other.val_data_dir == ""  # d/val is of other images


def test_a_file_of_ones_own_may_name_a_run(write):
    command = parsed(write("run_dir: runs/mine\nexpect_world: 8\n"))
    assert not command.recorded
    assert (command.settings.run_dir, command.settings.expect_world) == ("runs/mine", 8)


def test_no_file_chooses_which_code_runs(write, capsys):
    """Refuse it in every file, since the record of a run can be cut to look written by hand."""
    for name in ("classifier", "loss", "augment"):
        path = write({name: "os:system"}, "config.json")
        with pytest.raises(SystemExit):
            parsed(path)
        words = f"--config: got {name} os:system, a function; need its flag too"
        assert words in capsys.readouterr().err
        assert getattr(parsed(path, f"--{name}", "mine:f").settings, name) == "mine:f"
    of_theirs = write("classifier: torchvision:resnet18\naugment: randaugment\n")
    assert parsed(of_theirs).settings.classifier == "torchvision:resnet18"
