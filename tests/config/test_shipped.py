"""The shipped JSON files: found by name, and chosen for a machine."""

import os

import pytest
import torch
from running import ROOT

from ds_classifier.config.shipped import SHIPPED_CONFIGS, choose_config, find_config

FOLDER = ROOT / "ds_configs"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["{}", "{}.json", "ds_configs/{}.json", "ds_configs/{}"])
@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_a_name_is_found_from_anywhere(elsewhere, text, name):
    found = find_config(type(elsewhere)(text.format(name)))
    assert found.samefile(FOLDER / f"{name}.json")


def test_a_file_of_that_name_comes_first(elsewhere):
    (elsewhere / "zero1_bf16").write_text("{}")
    assert find_config(type(elsewhere)("zero1_bf16")).samefile(elsewhere / "zero1_bf16")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zero1_bf61", "did you mean zero1_bf16?"),
        ("mine.json", "which does not exist"),
        ("other/zero1_bf16.json", "which does not exist"),
        (".", "got ., no file"),
    ],
)
def test_an_unknown_name_lists_the_known(elsewhere, text, words):
    with pytest.raises(ValueError) as error:
        find_config(type(elsewhere)(text))
    assert words in str(error.value)
    assert ", ".join(SHIPPED_CONFIGS) in str(error.value)


@pytest.mark.parametrize(
    ("capabilities", "name"),
    [
        ([(9, 0)], "zero1_bf16"),
        ([(8, 0), (8, 6)], "zero1_bf16"),
        ([(7, 5)], "zero1_fp16"),
        ([(8, 0), (7, 0)], "zero1_fp16"),  # all ranks train with one JSON
    ],
)
def test_gpus(monkeypatch, capabilities, name):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    chosen = choose_config()
    assert (chosen.name, chosen.gpus) == (name, len(capabilities))
    assert chosen.why.startswith("A GPU ")
    assert "DS_ACCELERATOR" not in os.environ


@pytest.mark.parametrize(
    ("fp16", "bf16", "name"),
    [
        (True, True, "zero2_fp16"),
        (False, True, "zero2_bf16"),
        (False, False, "zero1_fp32"),
    ],
)
def test_cpus(monkeypatch, fp16, bf16, name):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind, has in (("fp16", fp16), ("bf16", bf16)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda has=has: has)
    chosen = choose_config()
    assert (chosen.name, chosen.gpus) == (name, 0)
    assert "CPU" in chosen.why
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_every_choice_is_shipped():
    assert {p.stem for p in FOLDER.glob("*.json")} == set(SHIPPED_CONFIGS)
