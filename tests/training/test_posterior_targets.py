"""Training on posterior targets: the same on any number of ranks, and after a kill."""

from __future__ import annotations

import pytest
from tiny_run import assert_same_run, losses, train

pytestmark = pytest.mark.slow


def test_ranks_accumulation_and_a_kill_do_not_change_the_run(digits, tmp_path):
    """40 images are 3 steps of 16 and a part: the first resumed step reads them all again."""
    flags = ["--global_batch", "16", "--iterations", "24", "--save_interval", "12"]
    flags += ["--high_noise_weight", "10", "--posterior_images", "40"]
    train(1, "zero1_fp32", digits, tmp_path / "one", *flags)
    train(2, "zero1_fp32", digits, tmp_path / "two", *flags, "--microbatch", "4")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    labels = ["--posterior_images", "0"]
    train(1, "zero1_fp32", digits, tmp_path / "labels", *flags[:-2], *labels)
    assert losses(tmp_path / "labels")[3:] != pytest.approx(losses(tmp_path / "one")[3:], rel=1e-5)
    train(1, "zero1_fp32", digits, tmp_path / "even", *flags, "--high_noise_weight", "1")
    assert losses(tmp_path / "even")[3:] != pytest.approx(losses(tmp_path / "one")[3:], rel=1e-5)

    killed = tmp_path / "killed"
    how = ("zero1_fp32", digits, killed, *flags, "--microbatch", "4")
    train(2, *how, environment={"KILL_AT": "15:0"}.items(), expect=247, launcher=True)
    assert (killed / "checkpoints" / "latest").read_text() == "step-00000012\n"
    train(2, *how)
    assert_same_run(tmp_path / "two", killed, 24)
