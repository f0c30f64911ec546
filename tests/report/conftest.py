"""A run directory to report on."""

import json

import pytest


@pytest.fixture
def run(tmp_path):
    """A run directory that holds the settings only."""
    folder = tmp_path / "a run"
    folder.mkdir()
    settings = {"iterations": 1000, "num_classes": 10, "lr": 1e-3, "data_dir": "data/train"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "deepspeed.json").write_text("{}")
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "git": {"changes": None}}))
    return folder
