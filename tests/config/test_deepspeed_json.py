"""The DeepSpeed JSON: what is accepted, refused, mapped and said."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from advice import follow
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from running import ROOT
from test_config import changed, command, problems, resolved
from versions import complete_deepspeed

from ds_classifier.config.deepspeed_json import known, meant, read_ds_config, resolve
from ds_classifier.config.deepspeed_json.draft import Draft
from ds_classifier.config.deepspeed_json.features import NOT_HERE
from ds_classifier.config.deepspeed_json.known import nearest

REAL = Path(
    os.environ.get("DEEPSPEED_CONFIGS", Path(__file__).parents[3] / "shared/deepspeed-configs")
)
FILES = sorted(REAL.glob("*.json"))
REMOVED = "onebitadam" not in DEEPSPEED_OPTIMIZERS  # 0.19 has no 1-bit optimizers


def notes(*flags: str, raw=None, world_size=2) -> str:
    return "\n".join(resolved(*flags, raw=raw, world_size=world_size).notes)


# -------------------------------------------------------------------------------- real files


def suiting_world(raw: dict) -> int:
    """Return a number of ranks on which the batch sizes of a JSON are consistent."""
    sizes = [
        raw.get(key) if isinstance(raw.get(key), int) else None
        for key in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        )
    ]
    total, micro, accumulation = sizes
    if all(sizes):
        return max(1, total // (micro * accumulation))
    per_rank = (micro or 1) * (accumulation or 1)
    return next(w for w in (2, 1) if not total or total % (w * per_rank) == 0 or w == 1)


def resolved_as_advised(raw: dict, ranks: int):
    """Return the result; where the JSON is refused, that after doing what the message says."""
    try:
        return resolve(command(), raw, world_size=ranks)
    except ValueError as error:
        raw, ranks = follow(raw, ranks, str(error))
        return resolve(command(), raw, world_size=ranks)


@pytest.mark.skipif(not FILES, reason=f"{REAL} has no files of public projects")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem[:30])
def test_files_of_public_projects_need_one_round_at_most(path, monkeypatch):
    monkeypatch.setattr(Draft, "rename", None)  # no key in them is a slip of the keyboard
    raw = read_ds_config(path)
    result = resolved_as_advised(raw, suiting_world(raw))
    assert result.ds_config["zero_optimization"]["stage"] in (1, 2, 3)
    left = result.with_parameters(1000).ds_config
    assert "auto" not in [value for section in sections_of(left) for value in section.values()]


SPOILED = {
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps": (
        "x", -1, 0, 7, "16", 1e30, [1],
    ),
    "zero_optimization.stage": (0, 1, "3", 4, True),
    "zero_optimization.overlap_com zero_optimization.cpu_offload zero_optimization fp16 bfloat16 "
    "gradient_cliping optimizer.params.weight_decya scheduler.params.warmup_num_step "
    "zero_optimization.offload_optimizer optimizer scheduler optimizer.params scheduler.params "
    "curriculum_lerning torch_autocast.dtype data_types.grad_accum_dtype prescale_gradients "
    "communication_data_type": ("x", -1, 0.5, True, [], {"enabled": "yes"}, {"enabled": True}),
    "zero_optimization.allgather_bucket_size optimizer.params.betas optimizer.params.lr "
    "scheduler.params.warmup_max_lr scheduler.params.total_num_steps fp16.loss_scale "
    "scheduler.params.last_batch_iteration optimizer.params.foreach fp16.hysteresis": (
        "1e-3", -1, 0, 3, [0.1], {}, True,
    ),
    "zero_optimization.offload_optimizer.ratio": (0.3, 2),
    "optimizer.type": ("OneBitAdam", "Lamb", "Lion", "Muon", "SGD", "Adagrad", "AdaWhat", 3),
    "scheduler.type": ("OneCycle", "warmuplr", "CosineLR", "LRRangeTest", None),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_nonsense_needs_one_round_at_most(seed):
    """Up to five keys are spoiled at once; the fixed seeds make the test the same every time."""
    draw = random.Random(seed)
    spoiled = [(k, values) for keys, values in SPOILED.items() for k in keys.split()]
    for _ in range(120):
        chosen = draw.sample(spoiled, draw.randint(1, 5))
        raw = changed(bf16={"enabled": False})
        for name, values in sorted(chosen):
            path, value = name.split("."), copy.deepcopy(draw.choice(values))
            for depth in range(1, len(path)):
                if not isinstance(at(raw, path[:depth]), dict):
                    at(raw, path[: depth - 1])[path[depth - 1]] = {}
            at(raw, path[:-1])[path[-1]] = value
        resolved_as_advised(raw, 2)


def at(values: dict, path: list[str]):
    for name in path:
        values = values.get(name)
    return values


def sections_of(values: dict):
    yield values
    for value in values.values():
        if isinstance(value, dict):
            yield from sections_of(value)


# The 14 of 55 that are refused -> a key for which they are.
REFUSED = {
    # by DeepSpeed 0.19 itself
    "18": "curriculum_learning", "28": "optimizer.type", "29": "progressive_layer_drop",
    "30": "train_batch_size", "45": "zero_optimization.reduce_bucket_size",
    "49": "quantize_training",
    # for what this trainer does not do
    "07": "autotuning", "21": "sequence_parallel_size", "25": "autotuning",
    "31": "data_efficiency", "34": "tensor_parallel",
    # for what checkpoints promise
    "23": "zero_optimization.offload_param.device", "24": "zero_optimization.zenflow",
    "27": "bf16.bf16_master_weights_and_grads",
}  # fmt: skip


@pytest.mark.skipif(len(FILES) < 55, reason=f"{REAL} does not have the 55 files")
def test_most_files_are_accepted_as_they_are():
    refused = {}
    for path in FILES:
        raw = read_ds_config(path)
        try:
            resolve(command(), raw, world_size=suiting_world(raw))
        except ValueError as error:
            refused[path.name[:2]] = str(error)
    assert refused.keys() <= REFUSED.keys()
    assert [n for n, message in refused.items() if f"{REFUSED[n]}: " not in message] == []


# -------------------------------------------------------------------------------- reading


def test_comments_and_trailing_commas_are_read_as_deepspeed_reads_them(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{ // why\n "train_batch_size": 8, # eight\n "bf16": {"enabled": true,},\n}')
    assert read_ds_config(path) == {"train_batch_size": 8, "bf16": {"enabled": True}}


def test_an_empty_file_is_no_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n")
    with pytest.raises(ValueError, match="got an empty file; need a JSON object"):
        read_ds_config(path)


def test_a_huge_batch_is_refused_at_once():
    assert "train_batch_size: got 1000000000000" in problems(raw=changed(train_batch_size=1e30))


def test_a_batch_written_as_a_string_hides_nothing():
    """DeepSpeed would fail on the string; the sizes are compared as they will be."""
    raw = changed(train_batch_size="16", train_micro_batch_size_per_gpu=3)
    message = problems(raw=raw)
    assert 'train_batch_size: got "16"; need a whole number of at least 1; do: write 16' in message
    assert "got 3 micro-batch x 2 ranks for a global batch of 16" in message
    assert 'fp16.enabled: got "True"; need true or false; do: write true' in problems(
        raw=changed(fp16__enabled="True", bf16__enabled=False)
    )


def test_what_the_advice_leads_to_is_checked_too():
    """The micro-batch does not fit on the number of ranks that the first problem advises."""
    raw = changed(train_batch_size=9, train_micro_batch_size_per_gpu=2)
    message = problems(raw=raw)
    assert "do: run on 1 or 3 ranks" in message
    assert "got 2 micro-batch x 1 ranks for a global batch of 9" in message
    resolved_as_advised(raw, 2)


# -------------------------------------------------------------------------------- known keys


def test_deepspeed_says_what_it_knows():
    """Each key of the documentation's table of contents is asked for by the installed version."""
    keys = known.keys_of_top_level()
    documented = (
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer "
        "scheduler communication_data_type prescale_gradients gradient_predivide_factor fp16 bf16 "
        "zero_optimization steps_per_print wall_clock_breakdown dump_state "
        "activation_checkpointing gradient_clipping zero_allow_untested_optimizer flops_profiler "
        "tensorboard wandb csv_monitor comms_logger checkpoint data_types aio compile "
        "autotuning"
    )
    assert not set(documented.split()) - keys.keys()
    assert keys["prescale_gradients"] is False
    assert "train_batchsize" not in keys


def test_all_kinds_of_problems_come_in_one_message():
    """Names, types, values, optimizer, schedule, batch sizes, flags and features at once."""
    raw = changed(
        gradient_cliping=1.0,
        steps_per_print="often",
        prescale_gradients=1,
        train_batch_size=7,
        zero_optimization__reduce_buckt_size=1000,
        zero_optimization__reduce_bucket_size=-1,
        optimizer__params__betas=[0.9, 2],
        optimizer__params__momentum=0.9,
        scheduler__params__warmup_type="cubic",
        curriculum_learning={"enabled": True},
        data_types__grad_accum_dtype="fp8",
    )
    message = problems("--lr", "-1", raw=raw)
    for word in (
        "gradient_cliping: unknown key; 'gradient_clipping' is there already; do: remove it",
        'steps_per_print: got "often"; need a whole number',
        "prescale_gradients: got 1; need true or false",
        "global batch: got 7 on 2 ranks",
        "zero_optimization.reduce_buckt_size: unknown key; did you mean 'reduce_bucket_size'?",
        "zero_optimization.reduce_bucket_size: got -1",
        "optimizer.params.betas: got [0.9, 2]",
        "optimizer.params.momentum: unknown to this optimizer",
        "scheduler.params.warmup_type",
        "curriculum_learning: not supported here",
        "data_types.grad_accum_dtype",
        "--lr: got -1",
    ):
        assert word in message, word
    assert message.startswith("12 problems")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("gradient-clipping", "gradient_clipping"),
        ("warmup_min_lr", None),  # its two neighbours are other things
        ("stage2_prefetch_bucket_size", None),
        ("dynamic_loss_scale", None),
        ("bp16", None),
        ("all_contiguous_gradients", None),
    ],
)
def test_only_slips_of_the_keyboard_get_a_suggestion(key, near):
    names = (
        "gradient_clipping warmup_max_lr stage3_prefetch_bucket_size min_loss_scale fp16 bf16 "
        "contiguous_gradients"
    )
    assert nearest(key, names.split()) == near


def test_keys_that_deepspeed_ignores_are_noted_and_pass():
    raw = changed(cuda_visible_devices=0, fp16__dynamic_loss_scale=True)
    assert "has no cuda_visible_devices, fp16.dynamic_loss_scale: ignored" in notes(raw=raw)
    assert "optimizer.params" not in notes(raw=raw)
    assert "reads lr, betas in optimizer.params alone" in notes(raw=changed(lr=1e-3, betas=[0, 0]))
    assert "dynamic_loss_scale" not in resolved(raw=raw).ds_config["fp16"]


def test_a_slip_in_a_section_that_deepspeed_iterates_over_is_refused():
    """Versions that have no model of fp16 look through its keys, which is no question for each."""
    raw = changed(bf16__enabled=False, fp16__enabled=True, fp16__min_loss_scael=1)
    raw["fp16"]["hysteresis"] = 2  # with it, DeepSpeed asks for all of them
    assert "fp16.min_loss_scael: unknown key; did you mean 'min_loss_scale'?" in problems(raw=raw)


@pytest.mark.parametrize("name", NOT_HERE)
def test_features_are_refused_where_they_are_on_alone(name):
    *sections, key = name.split(".")
    on = {"enabled": True} if not sections else True
    on = 4 if key.endswith("_size") else on
    path = "__".join([*sections, key])
    assert f"{name}: not supported here: " in problems(raw=changed(**{path: on}))
    for off in (None, False, {"enabled": False}, {}) if not sections else (None, False):
        result = resolved(raw=changed(**{path: off}))
        assert key not in result.ds_config.get(sections[0] if sections else "", result.ds_config)
        assert not result.notes


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "csv_monitor", "comet"])
def test_monitors_are_switched_off_and_that_is_said_where_they_are_on(name):
    result = resolved(raw=changed(**{name: {"enabled": True, "output_path": "x"}}))
    assert name not in result.ds_config
    assert f"{name}: switched off" in "\n".join(result.notes)
    for off in (False, "false", "no", 0, "0"):
        assert not resolved(raw=changed(**{name: {"enabled": off}})).notes


def test_the_table_of_the_profiler_is_in_the_run_directory():
    for given, path in (
        ({}, "runs/x/flops_profiler.txt"),
        ({"output_file": None}, "runs/x/flops_profiler.txt"),
        ({"output_file": "tables/flops.txt"}, "runs/x/tables/flops.txt"),
        ({"output_file": "/tables/flops.txt"}, "/tables/flops.txt"),
    ):
        raw = changed(flops_profiler={"enabled": True, **given})
        ds = resolved("--run_dir", "runs/x", raw=raw).ds_config
        assert ds["flops_profiler"]["output_file"] == path
    raw = changed(flops_profiler={"enabled": True, "output_file": 5})
    assert "flops_profiler.output_file: got 5; need a string" in problems(raw=raw)


def test_a_number_against_a_recipe_may_stay_either_way():
    """The advice for the JSON and the one for the command both lead to a run."""
    raw = changed(optimizer__params__lr=1e-4, train_batch_size=128)
    message = problems("--recipe", "digits32", raw=raw)
    assert "got 0.0001, but --lr (flag, file or recipe) is 0.001; need one number" in message
    assert 'do: write "auto" for 0.001, or give --lr 0.0001' in message
    assert 'do: write "auto" for 64, or give --global_batch 128' in message
    advised, _ = follow(raw, 2, message)
    settings = resolved("--recipe", "digits32", raw=advised).settings
    assert (settings.lr, settings.global_batch) == (1e-3, 64)
    flags = ("--recipe", "digits32", "--lr", "0.0001", "--global_batch", "128")
    assert resolved(*flags, raw=raw).settings.lr == 1e-4
    message = problems("--batch_size", "8", raw=changed(train_batch_size=128))
    assert 'write "auto" for 16, or drop --batch_size' in message


# -------------------------------------------------------------------------------- ZeRO, precision


def test_stage_0_is_run_as_1():
    for keys in (dict(zero_optimization__stage=0), dict(zero_optimization=False)):
        result = resolved(raw=changed(**keys))
        assert result.ds_config["zero_optimization"]["stage"] == 1
        assert "ZeRO stage 0: run as stage 1" in "\n".join(result.notes)


def test_numbers_that_are_strings_are_numbers_as_in_deepspeed():
    raw = changed(zero_optimization__stage="3", zero_optimization__reduce_bucket_size="5000")
    zero = resolved(raw=raw).ds_config["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (3, 5000)
    raw["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "ratio": "0.3"}
    raw["optimizer"]["params"]["torch_adam"] = True
    assert "ratio: got 0.3; need 1.0" in problems(raw=raw)
    raw["zero_optimization"] = {"stage": 2, "reduce_scatter": "false"}
    raw["prescale_gradients"] = True  # which asserts against reduce_scatter
    assert resolved(raw=raw).ds_config["zero_optimization"]["reduce_scatter"] is False


def test_keys_of_another_stage_pass_in_silence():
    raw = changed(
        zero_optimization__offload_param={"device": "cpu"},
        zero_optimization__stage3_max_live_parameters=1e9,
        zero_optimization__offload_optimizer={"device": "none"},
    )
    assert not resolved(raw=raw).notes
    raw["zero_optimization"]["stage"] = 3
    assert resolved(raw=raw).ds_config["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_old_names_become_the_new_ones():
    raw = changed(zero_optimization__cpu_offload=True, bfloat16={"enabled": True})
    del raw["bf16"]
    ds = resolved(raw=raw).ds_config
    assert ds["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "cpu_offload" not in ds["zero_optimization"]
    assert ds["bf16"] == {"enabled": True}
    assert "bfloat16" not in ds


def test_auto_of_hugging_face_gets_a_value_that_is_said(monkeypatch):
    from ds_classifier.config.deepspeed_json import precision

    raw = changed(
        gradient_clipping="auto",
        bf16__enabled="auto",
        fp16__enabled="auto",
        optimizer__params__betas="auto",
        optimizer__params__eps="auto",
        scheduler__params__warmup_min_lr="auto",
        zero_optimization__stage3_prefetch_bucket_size="auto",
    )
    for fast, on in ((["bf16", "fp16"], "bf16"), (["fp16"], "fp16"), ([], "")):
        monkeypatch.setattr(precision, "fast_precisions", lambda fast=fast: fast)
        result = resolved(raw=raw)
        ds, said = result.ds_config, "\n".join(result.notes)
        for name in ("bf16", "fp16"):
            assert ds[name]["enabled"] is (name == on)
            assert f"{name}.enabled {name == on}" in said
        assert ds["gradient_clipping"] == 1.0
        assert ds["optimizer"]["params"]["betas"] == [0.9, 0.999]
        assert ds["optimizer"]["params"]["eps"] == 1e-8
        assert ds["scheduler"]["params"]["warmup_min_lr"] == 0.0
        assert "stage3_prefetch_bucket_size 50,000,000" in said


def test_clipping_that_is_missing_is_deepspeeds_default():
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    raw = changed()
    del raw["gradient_clipping"]
    result = resolved(raw=raw)
    assert result.ds_config["gradient_clipping"] == GRADIENT_CLIPPING_DEFAULT
    assert result.shaping["gradient_clipping"] == GRADIENT_CLIPPING_DEFAULT
    if GRADIENT_CLIPPING_DEFAULT:  # 0, no clipping, in older versions
        assert f"gradient_clipping: {GRADIENT_CLIPPING_DEFAULT}" in notes(raw=raw)
        assert "gradient_clipping: got 1.0; need 0" in problems("--recipe", "reference", raw=raw)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(prescale_gradients=True), "prescale_gradients: got true; need false"),
        (dict(gradient_predivide_factor=8), "gradient_predivide_factor: got 8; need 1"),
        (dict(optimizer__type="SGD", optimizer__params={}), "zero_allow_untested_optimizer"),
        pytest.param(
            dict(torch_autocast={"enabled": True, "dtype": "fp16"}),
            "need bfloat16",
            marks=complete_deepspeed,
        ),
        pytest.param(
            dict(data_types__param_dtype="fp16"),
            "data_types.param_dtype",
            marks=complete_deepspeed,
        ),
        (dict(gradient_allreduce_op="sum"), "gradient_allreduce_op"),
        (dict(zero_optimization__allgather_bucket_size=1001), "need an even number"),
        (dict(zero_optimization__stage=4), "zero_optimization.stage: got 4"),
        (dict(zero_optimization__stage="auto"), "zero_optimization.stage"),
        (dict(scheduler={"type": "OneCycle", "params": {}}), "cycle_min_lr: missing; need"),
    ],
)
def test_no_crash_that_the_check_could_see(keys, words):
    assert words in problems(raw=changed(**keys))


@complete_deepspeed
def test_muon_in_stage_1_with_bf16_needs_sums_in_bf16():
    """DeepSpeed's own optimizer for bf16 in stage 1 takes matrices only."""
    muon = dict(optimizer={"type": "Muon"}, zero_optimization__stage=1)
    bf16 = dict(fp16={"enabled": False}, bf16={"enabled": True})
    words = "zero_optimization.stage: got 1; need 2 or 3 with Muon"
    two = changed(**muon, **bf16, train_micro_batch_size_per_gpu=2, train_batch_size=8)
    assert words in problems(raw=two)
    assert words in problems(raw=changed(**muon, **bf16, data_types={"grad_accum_dtype": "fp32"}))
    for fine in (bf16, dict(zero_optimization__stage=2, **bf16), {}):
        assert resolved(raw=changed(**(muon | fine))).kernel == ""  # its Adam is torch's
    words = "the norm in the log is large, and gradient_clipping"
    assert words in notes(raw=changed(**muon, gradient_clipping=1.0))
    assert words not in notes(raw=changed(**muon, gradient_clipping=0.0))


@complete_deepspeed
def test_a_flag_puts_muon_in_the_place_of_adamw():
    """Adam keeps the JSON's numbers; the rate of the matrices is set by the engine."""
    own = changed(optimizer__params={"lr": "auto", "betas": [0.8, 0.9], "weight_decay": 0.1})
    found = resolved("--muon_lr_scale", "20", "--lr", "0.001", raw=own)
    assert found.ds_config["optimizer"]["type"] == "Muon"
    kept = {"lr": 1e-3, "betas": [0.8, 0.9], "weight_decay": 0.1}
    params = found.ds_config["optimizer"]["params"]
    assert {key: params[key] for key in kept} == kept
    assert found.peak_lr == 1e-3
    for raw in (changed(optimizer={}), changed(optimizer={"type": "auto"})):
        assert resolved("--muon_lr_scale", "20", raw=raw).ds_config["optimizer"]["type"] == "Muon"
    assert resolved("--muon_lr_scale", "0").ds_config["optimizer"]["type"] == "AdamW"


@complete_deepspeed
def test_muon_by_a_flag_sets_both_rates():
    raw = changed(optimizer__params={"lr": 1e-3, "muon_lr": 0.02, "adam_lr": 5e-4})
    message = problems("--muon_lr_scale", "20", raw=raw)
    for key, rate in (("muon_lr", 0.02), ("adam_lr", 0.0005)):
        assert f"optimizer.params.{key}: got {rate}; need none with --muon_lr_scale" in message


@complete_deepspeed
def test_what_only_adam_takes_is_said_to_be_ignored_with_muon():
    """DeepSpeed hands none of it to the Adam inside Muon, so that no kernel is compiled for it."""
    raw = changed(optimizer__params={"amsgrad": True, "bias_correction": False})
    found = resolved("--muon_lr_scale", "20", raw=raw)
    assert found.kernel == ""
    words = "ignores optimizer.params.amsgrad, optimizer.params.bias_correction"
    assert words in "\n".join(found.notes)


@complete_deepspeed
def test_muon_by_a_flag_in_bf16_is_run_in_stage_2_where_gradients_are_summed():
    bf16 = dict(fp16={"enabled": False}, bf16={"enabled": True}, zero_optimization__stage=1)
    accumulated = changed(**bf16, train_micro_batch_size_per_gpu=2, train_batch_size=8)
    found = resolved("--muon_lr_scale", "20", raw=accumulated)
    assert found.ds_config["zero_optimization"]["stage"] == 2
    assert any(note.startswith("ZeRO stage 1: run as stage 2") for note in found.notes)
    for other in (accumulated | {"bf16": {"enabled": False}}, changed(**bf16)):
        found = resolved("--muon_lr_scale", "20", raw=other)
        assert found.ds_config["zero_optimization"]["stage"] == 1


@complete_deepspeed
def test_muon_by_a_flag_does_not_scatter_gradients_in_stage_3():
    """A JSON that was written for AdamW then needs no change; one that asks for Muon does."""
    for zero in ({}, {"zero_optimization__reduce_scatter": True}):
        raw = changed(zero_optimization__stage=3, **zero)
        found = resolved("--muon_lr_scale", "20", raw=raw)
        assert found.ds_config["zero_optimization"]["reduce_scatter"] is False
        assert "reduce_scatter: run as false, since Muon" in " ".join(found.notes)
        own = raw | {"optimizer": {"type": "Muon"}}
        assert "reduce_scatter: got true; need false with Muon in ZeRO stage 3" in problems(raw=own)
        both = problems("--muon_lr_scale", "20", raw=own)  # as if the flag were given up
        assert "need AdamW in the JSON" in both
        assert "reduce_scatter: got true; need false with Muon in ZeRO stage 3" in both
        assert "reduce_scatter" not in " ".join(resolved(raw=raw).notes)


@pytest.mark.parametrize("kind", ["Lion", "SGD", "Muon"])
@complete_deepspeed
def test_muon_by_a_flag_replaces_adamw_alone(kind):
    raw = changed(optimizer={"type": kind}, zero_optimization__offload_optimizer={"device": "cpu"})
    message = problems("--muon_lr_scale", "20", raw=raw)
    assert "--muon_lr_scale (flag, file or recipe): got 20" in message
    assert f'got 20; need AdamW in the JSON, which Muon replaces, and not "{kind}"; do' in message
    assert "do: give --muon_lr_scale 0" in message
    assert "--muon_lr_scale: got -1.0; need 0" in problems("--muon_lr_scale", "-1")


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_state_on_a_disk_is_refused_where_deepspeed_puts_it_there(part):
    nvme = {f"zero_optimization__{part}": {"device": "nvme", "nvme_path": "/tmp"}}
    assert f"{part}.device: got" in problems(raw=changed(zero_optimization__stage=3, **nvme))
    assert resolved(raw=changed(zero_optimization__stage=2, **nvme))


def test_dividing_before_the_reduction_is_stage_1s():
    raw = changed(prescale_gradients=True, gradient_predivide_factor=8, zero_optimization__stage=1)
    assert resolved(raw=raw).ds_config["gradient_predivide_factor"] == 8


# -------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", ["Adam", "AdamW", "adamw", "ADAM"])
def test_adam_in_any_case_is_torchs_unless_the_json_says_otherwise(name):
    params = resolved(raw=changed(optimizer__type=name, optimizer__params={})).ds_config
    assert params["optimizer"]["params"]["torch_adam"] is True
    raw = changed(optimizer__type=name, optimizer__params={"bias_correction": False})
    assert resolved(raw=raw).ds_config["optimizer"]["params"]["torch_adam"] is False
    raw = changed(optimizer__type=name, optimizer__params={"torch_adam": False})
    assert "fused" not in resolved(raw=raw).ds_config["optimizer"]["params"]


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("OneBitAdam", {}, "need one that DeepSpeed" if REMOVED else "cannot run under ZeRO"),
        ("Lamb", {}, "depend on the number of ranks"),
        ("LBFGS", {}, "several times per step"),
        ("AdaWhat", {}, "need one that DeepSpeed"),
        ("Adam", {"max_grad_norm": 1.0}, "need gradient_clipping instead"),
        ("Adam", {"momentum_x": 1}, "unknown to this optimizer"),
        ("Adam", {"eps": "small"}, 'eps: got "small"'),
        ("Adagrad", {"lr_decay": -1.0}, "Invalid lr_decay"),
    ],
)
def test_optimizers_that_are_refused(kind, params, words):
    raw = changed(optimizer__type=kind, optimizer__params=params)
    assert words in problems(raw=raw)


def test_a_missing_kernel_is_the_reason(monkeypatch):
    raw = changed(optimizer__type="Lion", optimizer__params={})
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "no kernel of it for cpu" in problems(raw=raw)
    offload = {"offload_optimizer": {"device": "cpu"}}
    advised = "offload_optimizer" in problems(raw=raw)
    raw["zero_optimization"] |= offload
    if advised:
        assert resolved(raw=raw).ds_config["optimizer"]["type"] == "Lion"
    else:  # older versions have no kernel of it for CPUs at all
        assert "no kernel of it for cpu; do: use AdamW" in problems(raw=raw)


def test_a_rate_for_each_group_of_parameters_is_one_rate_where_they_are_equal():
    section = {"type": "WarmupLR", "params": {"warmup_min_lr": [0], "warmup_max_lr": [2e-3, 2e-3]}}
    result = resolved(raw=changed(scheduler=copy.deepcopy(section)))
    params = result.ds_config["scheduler"]["params"]
    assert (params["warmup_min_lr"], params["warmup_max_lr"], result.settings.lr) == (0, 2e-3, 2e-3)
    section["params"]["warmup_max_lr"] = [2e-3, 1e-3]
    assert "warmup_max_lr: got [0.002, 0.001]; need a number" in problems(
        raw=changed(scheduler=section)
    )


# -------------------------------------------------------------------------------- checkpoints


def test_a_scheduler_of_version_0_1_means_what_it_meant():
    old = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto"}}
    raw = changed(scheduler=copy.deepcopy(old))
    assert meant("scheduler", resolved(raw=raw).shaping["scheduler"]) != meant("scheduler", old)
    raw["scheduler"]["params"] |= {"warmup_type": "linear", "warmup_num_steps": "auto"}
    assert meant("scheduler", resolved(raw=raw).shaping["scheduler"]) == meant("scheduler", old)


# -------------------------------------------------------------------------------- one round


@pytest.mark.parametrize("kind", ["OneBitAdam", "Lamb", "NoSuch"])
def test_parameters_of_a_refused_optimizer_are_no_problems_of_their_own(kind):
    params = {"lr": 1e-3, "freeze_step": 4, "max_coeff": 10}
    message = problems(raw=changed(optimizer={"type": kind, "params": params}))
    assert message.startswith("optimizer.type: got ")
    assert "\n" not in message


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantized_communication_is_refused_where_it_is_on(key):
    raw = changed(**{f"zero_optimization__{key}": True})
    assert f"zero_optimization.{key}: not supported here" in problems(raw=raw)
    raw["zero_optimization"] |= {key: False, "mics_hierarchical_params_gather": False}
    assert not {key, "mics_hierarchical_params_gather"} & set(
        resolved(raw=raw).ds_config["zero_optimization"]
    )


def test_an_assertion_of_deepspeeds_model_is_quoted_alone():
    raw = changed(zero_optimization__offload_optimizer={"device": "cpu", "ratio": 0.3})
    raw["zero_optimization"]["stage"] = 2
    message = problems(raw=raw)
    assert "Partial offloading only supported for ZeRO Stage 3." in message
    assert "errors.pydantic.dev" not in message


def test_a_run_directory_in_a_bucket_is_refused():
    for url in ("s3://b/run", "s3:/b/run"):
        assert f"--run_dir: got {url}; need a directory" in problems("--run_dir", url)


def test_deepspeed_is_asked_in_silence():
    """The check imports DeepSpeed first, which would warn that it chose the CPU."""
    code = (
        "from pathlib import Path\n"
        "from ds_classifier.config.command_line import parse_training_command\n"
        "from ds_classifier.config.deepspeed_json import read_ds_config, resolve\n"
        "command = parse_training_command(['--deepspeed_config', 'zero1_fp32'])\n"
        "resolve(command, read_ds_config(Path('zero1_fp32')), world_size=1)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_offload_that_is_off_is_none():
    """Hugging Face's templates have the section with "none"; it must not count as an offload."""
    off = {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}
    raw = changed(fp16={"enabled": False}, bf16={"enabled": True})
    raw["zero_optimization"] = {"stage": 1} | off
    assert not off.keys() & resolved(raw=raw).ds_config["zero_optimization"].keys()


@complete_deepspeed
def test_an_offload_that_is_off_leaves_stage_1_its_optimizer():
    off = {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}
    raw = changed(fp16={"enabled": False}, bf16={"enabled": True})
    raw["zero_optimization"] = {"stage": 1} | off
    # DeepSpeed's optimizer for bf16 in stage 1, which Muon cannot use, is not taken with offload.
    raw["optimizer"] = {"type": "Muon", "params": {"lr": 1e-3}}
    raw["data_types"] = {"grad_accum_dtype": "fp32"}
    assert "zero_optimization.stage: got 1; need 2 or 3" in problems(raw=raw)


# ------------------------------------------------------------------- nothing ends in a traceback


@pytest.mark.parametrize("name", ["zero_optimization", "bf16", "fp16", "flops_profiler", "aio"])
def test_a_whole_section_is_not_auto(name):
    wanted = {"enabled": "auto"} if name in ("bf16", "fp16") else None
    advice = f"do: write {json.dumps(wanted)}" if wanted else "do: correct or remove it"
    message = problems(raw=changed(**{name: "auto"}))
    assert f'{name}: got "auto"; need a section {{...}}; {advice}' in message
    both = problems(raw=changed(zero_optimization="auto", fp16="auto"))
    assert 'zero_optimization: got "auto"' in both
    assert 'fp16: got "auto"' in both


FP16 = dict(bf16={"enabled": False}, fp16__enabled=True)


def test_a_loss_scale_that_no_tensor_holds_is_refused():
    assert resolved(raw=changed(**FP16, fp16__initial_scale_power=32))
    for power in (64, 200):
        message = problems(raw=changed(**FP16, fp16__initial_scale_power=power))
        assert f"fp16.initial_scale_power: got {power}; need at most 62" in message


@complete_deepspeed
def test_super_offload_needs_cuda(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    offload = {"device": "cpu", "super_offload": True}
    raw = changed(zero_optimization={"stage": 3, "offload_optimizer": offload})
    assert "zero_optimization.offload_optimizer.super_offload: got true; need" in problems(raw=raw)
    raw["zero_optimization"]["stage"] = 2  # which does not look at it
    assert resolved(raw=raw)


@complete_deepspeed
def test_modules_of_autocast_that_do_not_exist_are_refused():
    def of(names):
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": names}
        return changed(bf16={"enabled": False}, torch_autocast=autocast)

    assert resolved(raw=of(["torch.nn.Linear", "torch.nn.Conv2d"]))
    for wrong in ("torch.nn.NoSuch", "no_such_module.Linear", "Linear"):
        message = problems(raw=of(["torch.nn.Linear", wrong]))
        assert "torch_autocast.lower_precision_safe_modules: got " in message
        assert f"{json.dumps(wrong)}; need" in message


# ------------------------------------------------------------------- the right key is named


def test_a_section_is_not_switched_off_to_mend_it():
    raw = changed(**FP16, fp16__loss_scale=0, fp16__loss_scale_window=0)
    message = problems(raw=raw)
    assert "fp16.loss_scale_window: got 0" in message
    assert "fp16.enabled" not in message
    message = problems(raw=changed(**FP16, fp16__loss_scale_window=0, fp16__hysteresis=0))
    assert "fp16.loss_scale_window: got 0; need a whole number of at least 1" in message
    assert "fp16.hysteresis: got 0; need a whole number of at least 1" in message
    raw = changed(**FP16, fp16__loss_scale_window=[1], fp16__hysteresis="x")
    assert "fp16.enabled" not in problems(raw=raw)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(FP16={"enabled": True}), "FP16: unknown key; 'fp16' is there already"),
        (dict(BF16={"enabled": True}), "BF16: unknown key"),
        (dict(zero_optimization={"stages": 3}), "stages: unknown key; did you mean 'stage'?"),
        (dict(zero={"stage": 3}), "zero: unknown key; 'zero_optimization' is there already"),
        (dict(max_grad_norm=1), "max_grad_norm: unknown key; 'gradient_clipping' is there already"),
        (dict(optimizer__lr=1e-3), "optimizer.lr: unknown key; DeepSpeed reads type and params"),
        (dict(scheduler__warmup_num_steps=3), "scheduler.warmup_num_steps: unknown key; DeepSpeed"),
        (
            dict(optimizer__params={"learning_rate": 1e-3}),
            "optimizer.params.learning_rate: unknown to this optimizer in DeepSpeed "
            f"{known.version()}; did you mean 'lr'?",
        ),
    ],
)
def test_slips_that_would_change_the_training_are_refused(keys, words):
    raw = changed(**({"fp16": {"enabled": False}} | keys))
    assert words in problems(raw=raw)
    resolved_as_advised(raw, 2)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("True", "true"),
        ("False", "false"),
        ("None", "null"),
        ("NaN", "a number"),
        ("Infinity", "a number"),
    ],
)
def test_words_of_python_are_named(written, meant, tmp_path):
    """hjson reads a word without quotes as a string, with all that follows on its line."""
    path = tmp_path / "a.json"
    for line in (
        f'"a": {written}, "c": 1}}',
        f'"a": {written} # no\n}}',
        f'"a": {{"b": {written}}}}}',
        f'"a": [1, {written}]}}',
    ):
        path.write_text("{ // why\n" + line)
        words = f"line 2: got {written}, which JSON does not have; do: write {meant}"
        with pytest.raises(ValueError, match=words):
            read_ds_config(path)
    path.write_text(f'{{ // a: {written}\n"wandb": {{"project": "a: \\", {written}, b"}}}}')
    assert read_ds_config(path)["wandb"]["project"] == f'a: ", {written}, b'


@complete_deepspeed
def test_muon_in_stage_0_is_not_said_to_be_in_stage_1():
    raw = changed(optimizer={"type": "Muon"}, data_types={"grad_accum_dtype": "fp32"})
    raw |= dict(fp16={"enabled": False}, bf16={"enabled": True}, zero_optimization={"stage": 0})
    assert "zero_optimization.stage: got 0, which is run as 1; need 2 or 3" in problems(raw=raw)


# ------------------------------------------------------------------- "auto" and what is off


@pytest.mark.parametrize(
    "keys",
    [
        dict(gradient_predivide_factor="auto"),
        dict(prescale_gradients="auto"),
        dict(sequence_parallel_size="auto"),
        dict(tensor_parallel={"autotp_size": "auto"}),
        dict(zero_optimization__zero_quantized_weights="auto"),
        dict(zero_optimization__mics_shard_size="auto"),
        dict(sparse_gradients="auto"),
        dict(pipeline={"stages": "auto", "partition": "best"}),
        dict(pipeline={"stages": 1}),
        dict(curriculum_learning={"curriculum_type": "seqlen", "min_difficulty": 8}),
        dict(elasticity={"max_train_batch_size": 2000}),
    ],
)
def test_auto_and_sections_that_deepspeed_leaves_off_are_off(keys):
    assert resolved(raw=changed(**keys))


def test_pipeline_stages_are_refused():
    message = problems(raw=changed(pipeline={"stages": 2, "partition": "best"}))
    assert message.startswith("pipeline.stages: not supported here: ")


@pytest.mark.parametrize(
    ("section", "compiles", "words"),
    [
        (True, False, "compile: true has no effect; --compile True"),
        ("auto", False, 'compile: "auto" has no effect; --compile True'),
        ({"enabled": True}, True, "compile: the classifier is compiled"),
        ({"enabled": True, "backend": "eager"}, True, "compile.backend: no effect; --compile"),
        ({"disable": False, "backend": "inductor"}, True, "compile: the classifier is compiled"),
        ({"disable": False, "kwargs": {"dynamic": True}}, True, "compile.kwargs: no effect"),
        ({"backend": "eager"}, False, "compile.backend: no effect"),
        ({"disable": True, "backend": "eager"}, False, ""),
        (False, False, ""),
    ],
)
def test_what_becomes_of_compile_is_said(section, compiles, words):
    result = resolved(raw=changed(compile=section))
    said = "\n".join(result.notes)
    assert "compile" not in result.ds_config
    assert result.settings.compile is compiles
    assert words in said
    assert bool(words) == ("compile" in said)
    if "inductor" in str(section):
        assert len(result.notes) == 1


# ------------------------------------------------------------------- rates that have no effect


def test_what_a_scheduler_replaces_is_said():
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}
    raw = changed(scheduler=copy.deepcopy(cycle), optimizer__params={"betas": [0.5, 0.9]})
    assert "optimizer.params.betas: [0.5, 0.9] have no effect, since OneCycle" in notes(raw=raw)
    raw["scheduler"]["params"]["cycle_momentum"] = False
    assert "betas" not in notes(raw=raw)


@complete_deepspeed
def test_onecycle_moves_no_momenta_of_muon():
    """DeepSpeed looks for betas among the optimizer's defaults, where Muon has none."""
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}
    raw = changed(scheduler=cycle, optimizer__params={"betas": [0.5, 0.9]})
    said = notes("--muon_lr_scale", "20", raw=raw)
    assert "betas" not in said
    assert "OneCycle: it moves no momenta of Muon" in said


@complete_deepspeed
def test_the_rates_of_muon_are_said():
    params = {"lr": 1e-3, "muon_lr": 2e-2, "adam_lr": 5e-4}
    raw = changed(optimizer={"type": "Muon", "params": params})
    raw["scheduler"] = {"type": "WarmupLR", "params": {}}
    said = notes(raw=raw)
    for key, rate in (("muon_lr", 0.02), ("adam_lr", 0.0005)):
        assert f"optimizer.params.{key}: {rate} has no effect, since WarmupLR sets the rate" in said
    assert resolved(raw=raw).peak_lr == 1e-3
    del raw["scheduler"]
    assert resolved("--lr_schedule", "cosine", raw=raw).peak_lr == 2e-2
    said = notes("--lr_schedule", "cosine", raw=raw)
    assert "Muon: the highest rate is muon_lr 0.02 for matrices, which the log shows, and " in said
    assert "adam_lr 0.0005 for the rest; lr has no effect" in said
