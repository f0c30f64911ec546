"""What this program keeps of DeepSpeed's loss scaling, and what a step in its engine waits for."""

import json
from types import SimpleNamespace

import pytest
from running import ROOT, run_python

from ds_classifier.distributed import deepspeed_engine

LEARNT = {"cur_scale": 64.0, "cur_iter": 30, "last_overflow_iter": 12, "cur_hysteresis": 1}


def fresh(*, dynamic):
    """A new fp16 engine, its loss scale fixed at 128 or to be found from 65536."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    scaler = DynamicLossScaler(65536, 1000, 1, 2, False) if dynamic else LossScaler(128)
    return SimpleNamespace(
        optimizer=SimpleNamespace(loss_scaler=scaler),
        fp16_enabled=lambda: True,
        dynamic_loss_scale=lambda: dynamic,
    )


def test_a_dynamic_loss_scale_goes_on_where_it_stood():
    before, after = fresh(dynamic=True), fresh(dynamic=True)
    deepspeed_engine.set_loss_scaler_state(before, LEARNT)
    deepspeed_engine.set_loss_scaler_state(after, deepspeed_engine.loss_scaler_state(before))
    assert deepspeed_engine.loss_scaler_state(after) == LEARNT


@pytest.mark.parametrize(("dynamic", "scale"), [(False, 128), (True, 65536)])
@pytest.mark.parametrize("state", [{}, {"cur_scale": 4.0}, {"cur_scale": 1.0}])
def test_a_fixed_scale_of_before_is_not_taken_over(dynamic, scale, state):
    """The JSON says which, of now; a checkpoint of a fixed scale has no count of steps."""
    engine = fresh(dynamic=dynamic)
    deepspeed_engine.set_loss_scaler_state(engine, state)
    assert engine.optimizer.loss_scaler.cur_scale == scale


def test_a_fixed_scale_of_now_is_the_jsons():
    engine = fresh(dynamic=False)
    deepspeed_engine.set_loss_scaler_state(engine, LEARNT)
    assert engine.optimizer.loss_scaler.cur_scale == 128
    assert deepspeed_engine.loss_scaler_state(engine) == {}


def test_only_a_loss_scalers_own_fields_are_set():
    engine = fresh(dynamic=True)
    deepspeed_engine.set_loss_scaler_state(engine, LEARNT | {"update_scale": 3})
    assert callable(engine.optimizer.loss_scaler.update_scale)


@pytest.mark.parametrize("config", ["zero1_fp32", "zero1_bf16", "zero2_bf16"])
def test_only_deepspeed_waits_for_the_device_in_a_step(config, tmp_path):
    """For numbers and masks, as a CPU can show; it asks whether the gradient is finite, and its
    norm."""
    flags = "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --batch_size 4"
    flags += " --classifier_depth 1 --classifier_attention_resolutions 4 --microbatch 2"
    done = run_python(
        *(ROOT / "tests" / "helpers" / "watched_step.py", *flags.split()),
        *("--deepspeed_config", ROOT / "ds_configs" / f"{config}.json"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    assert told["waits"], "DeepSpeed's own are seen, so others would be"
    assert [w for w in told["waits"] if not w[0].startswith("deepspeed/")] == []
