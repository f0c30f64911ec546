"""Test that weights are found in what other trainers save, and what is told of others."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from small_models import SMALL, filled, small_unet

from ds_classifier.checkpoint.fitting import tensors_of
from ds_classifier.checkpoint.initial_weights import load_initial_weights
from ds_classifier.checkpoint.weights import open_weights
from ds_classifier.config import Settings
from ds_classifier.model import create_classifier


@pytest.fixture(scope="module")
def weights():
    return filled(tensors_of(Settings(**SMALL)))


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def lightning(weights):
    """Return what a LightningModule with attributes `model` and `loss` saves."""
    return {
        "epoch": 3,
        "global_step": 70,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": under("model.", weights) | {"loss.weight": torch.ones(5)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "hyper_parameters": {"lr": 1e-3},
    }


def deepspeed(weights):
    """Return what DeepSpeed saves as mp_rank_00_model_states.pt."""
    return {
        "module": {name: value.bfloat16() for name, value in weights.items()},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: value.shape for name, value in weights.items()}],
        "frozen_param_shapes": {"input_blocks.0.0.bias": torch.Size([32])},
        "ds_config": {"train_batch_size": 8},
        "ds_version": "0.18.2",
    }


def averaged(weights):
    """Return the state dict of torch.optim.swa_utils.AveragedModel."""
    return {"n_averaged": torch.tensor(9)} | under("module.", weights)


WRAPPED = {
    "DDP": lambda w: under("module.", w),
    "compiled": lambda w: under("_orig_mod.", w),
    "both": lambda w: under("module._orig_mod.", w),
    "Lightning": lightning,
    "DeepSpeed": deepspeed,
    "DeepSpeed, wrapped": lambda w: deepspeed(under("classifier.", w)),
    "averaged": averaged,
    "model": lambda w: {"model": w, "optimizer": {"state": {}}, "step": 7},
    "compiled in Fabric": lambda w: {"net": under("_orig_mod.", w)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_in_what_others_save(tmp_path, weights, kind):
    path = tmp_path / "model.ckpt"
    torch.save(WRAPPED[kind](weights), path)
    settings = Settings(**SMALL)
    classifier = create_classifier(**settings.model_kwargs())
    assert load_initial_weights(classifier, path, settings, list("abcde")) == [
        f"weights from {path}"
    ]
    _, read = open_weights(path)
    assert read.keys() == weights.keys()
    for name, value in weights.items():
        expected = value.bfloat16().float() if "DeepSpeed" in kind else value
        assert torch.equal(classifier.state_dict()[name], expected)
        assert torch.equal(read[name].float(), expected)


def test_a_prefix_in_safetensors(tmp_path, weights):
    save_file(under("module.", weights), tmp_path / "model.safetensors")
    _, read = open_weights(tmp_path / "model.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda w: {"model": w, "ema": w}, "'model', 'ema'"),
        (
            lambda w: {"state_dict": under("model.", w) | under("ema.", w)},
            "'state_dict' model., 'state_dict' ema.",
        ),
        (lambda w: under("a.", w) | under("b.c.", w), "a., b.c."),
    ],
)
def test_of_several_networks_none_is_chosen(tmp_path, weights, content, named):
    torch.save(content(weights), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="need one; do: save its state dict alone") as caught:
        open_weights(tmp_path / "model.pt")
    assert f"got 2 networks ({named})" in str(caught.value)


def without(weights, *names):
    return {name: value for name, value in weights.items() if name not in names}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_is_missing_is_named(tmp_path, weights, prefix):
    """Check tensors of all kinds: with --init_from, and as evaluate.py and others read the file."""
    settings, path = Settings(**SMALL), tmp_path / "model.pt"
    classifier = create_classifier(**settings.model_kwargs())
    for name in list(weights)[::9]:
        torch.save(under(prefix, without(weights, name)), path)
        expected = f"got {path}, with 1 tensor missing ({name}); need the {len(weights)} of "
        with pytest.raises(ValueError) as caught:
            load_initial_weights(classifier, path, settings, list("abcde"))
        assert str(caught.value).startswith(f"--init_from: {expected}"), name
        with pytest.raises(ValueError) as caught:
            open_weights(path, SMALL)
        assert str(caught.value).startswith(expected), name


def test_without_flags_it_may_be_unclear_what_is_missing(tmp_path, weights):
    path = tmp_path / "model.pt"
    for name, words in (
        ("out.0.bias", "1 tensor missing"),
        ("out.2.c_proj.weight", "do: give the"),
    ):
        torch.save(without(weights, name), path)
        with pytest.raises(ValueError, match=words):
            open_weights(path)


def test_all_kinds_of_misfit_are_counted(tmp_path, weights):
    first, *others = weights
    changed = without(weights, first, *others[:3]) | {"a": torch.ones(1), "b": torch.ones(2)}
    changed["out.0.bias"] = torch.ones(3)
    torch.save(changed, tmp_path / "model.pt")
    with pytest.raises(ValueError) as caught:
        open_weights(tmp_path / "model.pt", SMALL)
    assert str(caught.value) == (
        f"got {tmp_path}/model.pt, with 4 tensors missing ({first}, {others[0]}, {others[1]}, "
        "...); 2 tensors additional (a, b); 1 tensor of another shape (out.0.bias: got [3], need "
        f"[64]); need the {len(weights)} of guided-diffusion's EncoderUNetModel"
    )


def test_a_diffusion_unet_is_told_from_a_classifier(tmp_path):
    torch.save(small_unet("uncond").state_dict(), tmp_path / "unet.pt")
    with pytest.raises(ValueError, match=r"tensors additional \(.*output_blocks\.0\.0\."):
        open_weights(tmp_path / "unet.pt", SMALL)


def test_a_file_that_holds_code_is_refused(tmp_path, weights):
    """Check Lightning's file with a Namespace: nothing in it is run."""
    content = lightning(weights) | {"hyper_parameters": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"it holds argparse\.Namespace, whose code is not run"):
        open_weights(tmp_path / "model.ckpt")
