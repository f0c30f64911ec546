"""A run killed and continued on other ranks, ZeRO stages and precisions: the same training."""

import json
import os
import shutil

import pytest
from running import launch, read_log
from safetensors.torch import load_file
from tiny_run import CONFIGS, TINY, TRACED, traced

pytestmark = pytest.mark.slow

FLAGS = ["--global_batch", "16", "--microbatch", "4", "--iterations", "20"]
FLAGS += ["--save_interval", "10"]


def run(ranks, config, digits, folder, *flags, **environment):
    """Train 20 steps of 16 images, or what is left of them; returns the command's end."""
    environment = {"TRACE": str(folder / "trace"), **environment}
    os.environ.update(environment)
    try:
        return launch(
            ranks,
            *["--deepspeed_config", CONFIGS / f"{config}.json", "--data_dir", digits / "train"],
            *["--run_dir", folder / "run", *TINY, *FLAGS, *flags],
            script=TRACED,
            cwd=folder.parent,
        )
    finally:
        for name in environment:
            del os.environ[name]


def killed_at_14(ranks, config, digits, folder, **environment):
    """A run that lost a rank four steps after its checkpoint at step 10."""
    folder.mkdir(parents=True)
    done = run(ranks, config, digits, folder, KILL_AT=f"14:{ranks - 1}", **environment)
    assert done.code != 0, done.output
    assert max(row["step"] for row in read_log(folder / "run")) == 13
    assert (folder / "run" / "checkpoints" / "step-00000010").is_dir()
    return folder


def continued(killed, ranks, config, digits, folder, *flags, **environment):
    """A copy of a killed run, taken to its end."""
    shutil.copytree(killed, folder)
    shutil.rmtree(folder / "trace")
    done = run(ranks, config, digits, folder, *flags, **environment)
    assert done.code == 0, done.output
    assert "step 10" in done.output
    return folder


def losses(folder) -> list[float]:
    """The logged losses of steps 11 to 20, the last ones written."""
    rows = {row["step"]: row["train_loss"] for row in read_log(folder / "run")}
    return [rows[step] for step in range(11, 21)]


def from_step_11(folder) -> list:
    return [row for row in traced(folder / "trace") if row[0] > 10]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Uninterrupted and killed runs, made when first asked for."""
    made, root = {}, tmp_path_factory.mktemp("elastic")

    def get(kind, ranks, config, **environment):
        key = f"{kind}_{ranks}_{config}"
        if key not in made:
            made[key] = root / key
            if kind == "killed":
                killed_at_14(ranks, config, digits, made[key], **environment)
            else:
                made[key].mkdir()
                assert run(ranks, config, digits, made[key], **environment).code == 0
        return made[key]

    return get


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 2), (4, 2)])
def test_other_world_sizes(runs, digits, tmp_path, before, after):
    """Same batches, noise and, within fp32's rounding, losses; the accumulation adapts."""
    golden = runs("golden", 2, "zero1_fp32")
    killed = runs("killed", before, "zero1_fp32")
    folder = continued(killed, after, "zero1_fp32", digits, tmp_path / "resumed")
    assert losses(folder) == pytest.approx(losses(golden), rel=2e-6)
    assert from_step_11(folder) == from_step_11(golden)
    final = "run/checkpoints/step-00000020/model.safetensors"
    ours, expected = load_file(folder / final), load_file(golden / final)
    for name, weights in expected.items():
        assert ours[name].sub(weights).abs().max() < 1e-3, (
            name
        )  # Adam moves by the sign of tiny gradients


@pytest.mark.parametrize(
    ("before", "after", "tolerance"),
    [
        ("zero1_bf16", "zero2_bf16", 2e-3),
        ("zero2_bf16", "zero1_bf16", 2e-3),
        ("zero1_bf16", "zero1_fp32", 2e-2),
        ("zero1_bf16", "zero2_fp16", 2e-2),
        ("zero2_fp16", "zero1_bf16", 2e-2),
    ],
)
def test_other_stages_and_precisions(runs, digits, tmp_path, before, after, tolerance):
    """fp32 weights and moments carry over: same batches and noise, losses by the precision."""
    golden = runs("golden", 2, before, EMULATE_FP16="1")
    killed = runs("killed", 2, before, EMULATE_FP16="1")
    folder = continued(killed, 2, after, digits, tmp_path / "resumed", EMULATE_FP16="1")
    assert losses(folder) == pytest.approx(losses(golden), rel=tolerance)
    assert from_step_11(folder) == from_step_11(golden)
    scale = {row["step"]: row["lg_loss_scale"] for row in read_log(folder / "run")}[11]
    assert scale == (16 if after == "zero2_fp16" else 0)  # its own, not the old run's


def test_the_json_of_now_decides_what_may_change(runs, digits, tmp_path):
    """A JSON key that does not shape the training is that of the new start; others are refused."""
    killed = runs("killed", 2, "zero2_fp16", EMULATE_FP16="1")
    config = json.loads((CONFIGS / "zero2_fp16.json").read_text())
    config["fp16"]["loss_scale_window"] = 4
    (tmp_path / "window.json").write_text(json.dumps(config))
    folder = continued(
        *[killed, 2, "zero2_fp16", digits, tmp_path / "resumed"],
        *["--deepspeed_config", tmp_path / "window.json"],
        EMULATE_FP16="1",
    )
    scale = {row["step"]: row["lg_loss_scale"] for row in read_log(folder / "run")}
    assert scale[20] > scale[11]  # grows every 4 steps now, every 1000 in the shipped JSON
