"""The command line, the recipes, and the DeepSpeed JSON completed and checked."""

import json
import re

import pytest
from running import ROOT, run_python

from ds_classifier.config import RECIPES, parse_training_command
from ds_classifier.config import settings as config
from ds_classifier.config.deepspeed_json import read_ds_config, resolve
from ds_classifier.config.shipped import SHIPPED_CONFIGS

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
ZERO2 = json.loads((ROOT / "ds_configs" / "zero2_bf16.json").read_text())


def command(*flags: str, path="ds_configs/zero2_bf16.json"):
    return parse_training_command(["--deepspeed_config", path, *flags])


def changed(**keys):
    """The shipped JSON with some values replaced; a key a.b.c goes into its section."""
    raw = json.loads(json.dumps(ZERO2))
    for name, value in keys.items():
        *sections, key = name.split("__")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return raw


def resolved(*flags: str, raw=None, world_size=2):
    return resolve(command(*flags), raw or changed(), world_size=world_size)


def problems(*flags: str, raw=None, world_size=2) -> str:
    with pytest.raises(ValueError) as error:
        resolved(*flags, raw=raw, world_size=world_size)
    return str(error.value)


# -------------------------------------------------------------------------------- command line


def test_defaults_are_the_references():
    settings = command().settings
    reference = dict(
        noised=True,
        iterations=150000,
        lr=3e-4,
        weight_decay=0.0,
        microbatch=-1,
        schedule_sampler="uniform",
        resume_checkpoint="",
        log_interval=10,
        save_interval=10000,
        image_size=64,
        classifier_width=128,
        classifier_depth=2,
        classifier_attention_resolutions="32,16,8",
        classifier_use_scale_shift_norm=True,
        classifier_resblock_updown=True,
        classifier_pool="attention",
        diffusion_steps=1000,
        noise_schedule="linear",
        timestep_respacing="",
        rescale_timesteps=False,
    )
    assert {name: getattr(settings, name) for name in reference} == reference
    assert resolved(world_size=3).batch.total == 12  # 4 a rank
    assert settings.eval_interval == settings.save_interval


def test_a_command_line_written_for_the_reference_runs():
    """The flags of guided-diffusion's README for the 128 px classifier."""
    flags = [
        "--data_dir",
        "imagenet",
        "--iterations",
        "300000",
        "--anneal_lr",
        "True",
        "--batch_size",
        "256",
        "--lr",
        "3e-4",
        "--save_interval",
        "10000",
        "--weight_decay",
        "0.05",
        "--image_size",
        "128",
        "--classifier_attention_resolutions",
        "32,16,8",
        "--classifier_depth",
        "2",
        "--classifier_width",
        "128",
        "--classifier_pool",
        "attention",
        "--classifier_resblock_updown",
        "True",
        "--classifier_use_scale_shift_norm",
        "True",
        "--classifier_use_fp16",
        "False",
        "--learn_sigma",
        "False",
    ]
    result = resolved(*flags, world_size=8)
    assert result.batch.total == 2048
    assert result.settings.anneal_lr is True
    assert "scheduler" not in result.ds_config
    assert result.ds_config["optimizer"]["params"]["weight_decay"] == 0.05


def test_recipes_then_flags(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command("--recipe", "imagenet64").settings.lr == 6e-4
    assert command("--recipe", "imagenet64", "--lr", "1e-4").settings.lr == 1e-4
    assert command("--recipe", "imagenet64").settings.run_dir == "runs/imagenet64"
    assert resolved("--recipe", "imagenet64", world_size=8).batch.total == 1024
    assert resolved("--recipe", "imagenet64", "--batch_size", "8", world_size=8).batch.total == 64


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds(recipe):
    import torch

    from ds_classifier.diffusion import create_gaussian_diffusion
    from ds_classifier.model import create_classifier

    settings = resolved("--recipe", recipe, world_size=1).settings.replace(num_classes=10)
    with torch.device("meta"):
        create_classifier(**settings.model_kwargs())
    assert create_gaussian_diffusion(**settings.diffusion_kwargs()).num_timesteps == 1000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nosuch", "1"], "--nosuch"),
        (["--noised", "maybe"], "'maybe'"),
        (["--iterations", "1.5"], "1.5"),
        (["--recipe", "imagenet65"], "imagenet65"),
    ],
)
def test_malformed_flags_end_with_code_2(flags, words, capsys):
    with pytest.raises(SystemExit) as exit:
        command(*flags)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_help_is_complete(tmp_path):
    done = run_python(ROOT / "launch" / "train.py", "--help", cwd=tmp_path)
    assert done.code == 0
    assert max(map(len, done.lines)) <= 100
    for word in (
        "--data_dir",
        "--resume_checkpoint",
        "Exit codes",
        "digits32",
        "zero2_fp16",
    ):
        assert word in done.output


# -------------------------------------------------------------------------------- the JSON


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_complete(path):
    assert {p.stem for p in CONFIGS} == set(SHIPPED_CONFIGS)
    result = resolve(command("--recipe", "digits32"), read_ds_config(path), world_size=2)
    assert result.ds_config["zero_optimization"]["stage"] == int(path.stem[4])
    precision = path.stem.split("_")[1]
    enabled = {p for p in ("fp16", "bf16") if result.ds_config.get(p, {}).get("enabled")}
    assert enabled == ({precision} - {"fp32"})
    final = result.with_parameters(40_000_000).ds_config
    assert final["zero_optimization"]["reduce_bucket_size"] == 10_000_000
    assert "auto" not in json.dumps(final)
    if precision == "fp16":
        assert result.ds_config["fp16"]["initial_scale_power"] == 16


@pytest.mark.parametrize("parameters", [1, 40_000_000, *range(40_000_004, 40_000_012)])
def test_bucket_sizes_are_even(parameters):
    """DeepSpeed refuses an odd size, and the number of parameters may be odd."""
    raw = changed(
        zero_optimization__reduce_bucket_size="auto",
        zero_optimization__allgather_bucket_size="auto",
    )
    zero = resolved(raw=raw).with_parameters(parameters).ds_config["zero_optimization"]
    assert zero["reduce_bucket_size"] >= parameters // 4 - 1
    assert zero["allgather_bucket_size"] % 2 == 0


def test_auto_is_filled_from_the_settings():
    ds = resolved("--lr", "2e-4", "--iterations", "5000", "--batch_size", "16").ds_config
    assert ds["optimizer"]["params"]["lr"] == 2e-4
    assert ds["scheduler"]["params"] == {
        "total_num_steps": 5000,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 2e-4,
        "warmup_num_steps": 100,
        "warmup_type": "linear",
    }
    assert ds["train_batch_size"] == 32


def test_a_number_in_the_json_counts_if_no_flag_sets_it():
    result = resolved(raw=changed(optimizer__params__lr=0.01, train_micro_batch_size_per_gpu=6))
    assert (result.settings.lr, result.batch.total) == (0.01, 12)


@pytest.mark.parametrize(
    ("flags", "json_keys", "world_size", "expected"),
    [
        (["--global_batch", "64"], {}, 2, (32, 1, 2)),
        (["--global_batch", "64"], {}, 4, (16, 1, 4)),
        (["--global_batch", "256"], {}, 2, (32, 4, 2)),
        (["--global_batch", "256", "--microbatch", "8"], {}, 2, (8, 16, 2)),
        (["--global_batch", "74"], {}, 2, (37, 1, 2)),
        (["--batch_size", "4", "--microbatch", "8"], {}, 2, (4, 1, 2)),
        (["--global_batch", "256"], {"gradient_accumulation_steps": 2}, 2, (64, 2, 2)),
        (["--global_batch", "256"], {"train_micro_batch_size_per_gpu": 128}, 2, (128, 1, 2)),
        ([], {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3}, 2, (8, 3, 2)),
        ([], {"train_batch_size": 10}, 2, (5, 1, 2)),
        (["--batch_size", "7"], {}, 3, (7, 1, 3)),
    ],
)
def test_batch_sizes(flags, json_keys, world_size, expected):
    batch = resolved(*flags, raw=changed(**json_keys), world_size=world_size).batch
    assert (batch.micro, batch.accumulation, batch.world_size) == expected
    micro, accumulation, _ = expected
    assert f"= {micro} micro-batch x {accumulation} accumulation x {world_size} ranks" in str(batch)


def test_whole_numbers_may_be_written_as_floats():
    result = resolved(raw=changed(scheduler__params__total_num_steps=1e3))
    assert isinstance(result.settings.iterations, int)
    assert isinstance(result.ds_config["scheduler"]["params"]["total_num_steps"], int)


def test_the_reference_recipe_needs_hysteresis_1():
    raw = changed(bf16__enabled=False, fp16__enabled=True)
    assert "fp16.hysteresis: got 2; need 1" in problems("--recipe", "reference", raw=raw)


def test_accumulation_sums_in_fp32():
    assert "data_types" not in resolved("--global_batch", "8").ds_config
    ds = resolved("--global_batch", "8", "--microbatch", "2").ds_config
    assert ds["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(train_batchsize=4), ["train_batchsize: unknown key", "'train_batch_size'"]),
        (dict(fp16__enable=True), ["fp16.enable: unknown key", "'enabled'"]),
        (dict(train_micro_batch_size_per_gpu=4.5), ["4.5", "a whole number"]),
        (dict(train_micro_batch_size_per_gpu=True), ["true", "a whole number"]),
        (dict(train_batch_size=0), ["train_batch_size: got 0"]),
        (dict(zero_optimization__stage="auto"), ["stage", '"auto"']),
        (dict(optimizer__params__betas=[0.9]), ["betas"]),
        (dict(scheduler__type="CyclicLR"), ["scheduler: got the type", "WarmupDecayLR"]),
        (dict(scheduler__params__warmup_type="cubic"), ["warmup_type", "linear or log"]),
        (dict(fp16__enabled=True), ["fp16.enabled: got true, and bf16.enabled"]),
        (dict(bf16__check_grad_overflow=False), ["bf16.check_grad_overflow: got false; need true"]),
        (dict(bf16__enabled="yes"), ["bf16.enabled", '"yes"', "true or false"]),
        (dict(optimizer="AdamW"), ["optimizer", "section"]),
        (dict(amp={"enabled": True}), ["amp", "not supported"]),
        (dict(flops_profiler=5), ["flops_profiler: got 5", "a section"]),
        (dict(communication_data_type="foo"), ["communication_data_type", "foo"]),
        (dict(gradient_clipping=-1.0), ["gradient_clipping: got -1"]),
        (dict(gradient_clipping=float("nan")), ["gradient_clipping: got NaN"]),
        (dict(zero_optimization__reduce_bucket_size=-1), ["reduce_bucket_size: got -1"]),
        (dict(optimizer__params__lr=-1), ["optimizer.params.lr: got -1; need a positive"]),
        (dict(scheduler__params__total_num_steps=0), ["total_num_steps: got 0; need at least 1"]),
        (dict(data_types__grad_accum_dtype="fp8"), ["grad_accum_dtype", "fp8"]),
    ],
)
def test_bad_keys_and_values(keys, words):
    message = problems(raw=changed(**keys))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("flags", "keys", "world_size", "words"),
    [
        (["--global_batch", "10"], {}, 4, ["got 10 on 4 ranks", "2 or 5 ranks"]),
        (["--lr", "1e-3"], dict(optimizer__params__lr=1e-4), 2, ["0.0001", "--lr", "0.001"]),
        (["--batch_size", "8"], dict(train_batch_size=8), 2, ["got 8", "is 16"]),
        (["--microbatch", "8"], dict(train_micro_batch_size_per_gpu=4), 2, ["got 4", "is 8"]),
        (["--batch_size", "8"], dict(train_micro_batch_size_per_gpu=3), 2, ["got 3", "= 8"]),
        (["--batch_size", "8", "--global_batch", "8"], {}, 2, ["--global_batch 8", "disagree"]),
        (["--classifier_use_fp16", "True"], {}, 2, ["classifier_use_fp16", "JSON owns"]),
        (
            ["--recipe", "reference"],
            dict(gradient_clipping=1.0),
            2,
            ["gradient_clipping", "need 0"],
        ),
        (["--iterations", "0"], {}, 2, ["--iterations: got 0"]),
        (["--lr", "-1"], {}, 2, ["--lr: got -1"]),
        (["--resize", "faster"], {}, 2, ["--resize: got 'faster'", "exact or fast"]),
    ],
)
def test_disagreements(flags, keys, world_size, words):
    message = problems(*flags, raw=changed(**keys), world_size=world_size)
    for word in words:
        assert word in message


def test_all_problems_come_in_one_message():
    raw = changed(train_batchsize=4, optimizer__params__lr="fast", zero_optimization__stage="auto")
    message = problems(raw=raw)
    assert message.startswith("3 problems")
    for word in ("train_batchsize", "optimizer.params.lr", "zero_optimization.stage"):
        assert word in message


def test_files_that_are_not_json(tmp_path):
    bad = tmp_path / "bad.json"
    for text, words in (
        ("{", "line 1"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("[]", "got list"),
    ):
        bad.write_text(text)
        with pytest.raises(ValueError, match=re.escape(words)):
            read_ds_config(bad)
    with pytest.raises(ValueError, match=r"zero2_fp16, "):
        read_ds_config(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("encoding", "guess"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("latin-1", "LATIN1"),
    ],
)
def test_a_json_that_is_not_utf_8_is_named_with_what_to_do(tmp_path, encoding, guess):
    path = tmp_path / "é.json"
    path.write_bytes('{"comment": "é"}'.encode(encoding))
    with pytest.raises(ValueError, match=rf"got .*é\.json, .*UTF-8; do: iconv -f {guess}"):
        read_ds_config(path)
    path.write_bytes('{"comment": "é"}'.encode("utf-8-sig"))  # as Notepad saves it
    assert read_ds_config(path) == {"comment": "é"}


def test_what_a_resumed_run_may_change():
    before = config.dataclasses.asdict(resolved("--lr", "1e-3").settings)
    same = resolved("--lr", "1e-3", "--log_interval", "1", "--keep_last", "9").settings
    assert config.changed_settings(before, same) == []
    other = resolved("--lr", "2e-3", "--image_size", "128").settings
    changes = config.changed_settings(before, other)
    assert len(changes) == 2
    assert "lr: 0.001 in the checkpoint, 0.002 now" in changes


@pytest.mark.parametrize(
    ("flag", "value", "need"),
    [
        ("lr", "0", "a positive learning rate"),
        ("weight_decay", "nan", "0 or more"),
        ("muon_lr_scale", "inf", "0, or a factor above"),
        ("high_noise_weight", "0.5", "1, or a factor above"),
        ("high_noise_weight", "nan", "1, or a factor above"),
    ],
)
def test_rates_and_weights_out_of_their_ranges_are_refused(flag, value, need):
    assert f"--{flag}: got {float(value)}; need {need}" in problems(f"--{flag}", value)
