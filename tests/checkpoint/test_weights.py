"""Test reading weights, and inferring the settings of a bare file."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import SMALL

from ds_classifier.checkpoint.fitting import fitting_settings, infer_settings
from ds_classifier.checkpoint.weights import open_weights, read_weights
from ds_classifier.config import RECIPES, Settings
from ds_classifier.model import create_classifier


def tensors(settings: Settings) -> dict[str, torch.Tensor]:
    """Return a state dict of these shapes, without storage."""
    with torch.device("meta"):
        return create_classifier(**settings.model_kwargs()).state_dict()


@pytest.mark.parametrize("recipe", ["imagenet64", "imagenet128", "imagenet256", "imagenet512"])
def test_published_shapes_are_known_from_the_defaults(recipe):
    """Check that a published file needs no flags."""
    settings = Settings(**RECIPES[recipe]).replace(num_classes=1000)
    inferred = infer_settings(tensors(settings), {}, Path("x.pt"))
    assert inferred.model_kwargs() == settings.model_kwargs()


@pytest.mark.parametrize(
    "own",
    [
        dict(),
        dict(in_channels=1, num_classes=17),
        dict(classifier_depth=3, classifier_attention_resolutions=""),
        dict(classifier_resblock_updown=False),
        dict(classifier_resblock_updown=False, classifier_depth=2),
        dict(classifier_use_scale_shift_norm=False),
        dict(classifier_pool="adaptive"),
        dict(classifier_pool="spatial"),
        dict(classifier_pool="spatial_v2", classifier_channel_mult="1,2,4"),
        dict(classifier_width=64, classifier_channel_mult="0.5,1,3"),
    ],
)
def test_what_fits_builds_the_same_tensors(own):
    settings = Settings(**SMALL | own)
    weights = tensors(settings)
    assert fitting_settings(weights, settings) == settings
    undecided = settings.classifier_pool != "attention"
    undecided |= not settings.classifier_attention_resolutions  # 4 levels of 1 block fit as well
    given = dict(image_size=16) if undecided else {}
    shapes = {name: value.shape for name, value in weights.items()}
    for found in (
        fitting_settings(weights, Settings(**given)),
        infer_settings(weights, given, Path("x.pt")),
    ):
        assert {name: value.shape for name, value in tensors(found).items()} == shapes
    assert infer_settings(weights, SMALL | own, Path("x.pt")) == settings


def test_of_several_that_fit_the_nearest_is_found():
    """Check levels of one width without attention, which have the same tensors.

    They are 2 levels of 1 block at 16 px, and 1 level of 3 blocks at 8 px.
    """
    alike = SMALL | dict(classifier_channel_mult="2,2", classifier_attention_resolutions="")
    settings = Settings(**alike)
    other = dict(image_size=8, classifier_depth=3, classifier_channel_mult="2")
    assert tensors(settings).keys() == tensors(settings.replace(**other)).keys()
    for own in (settings, settings.replace(**other)):
        given = own.replace(classifier_use_scale_shift_norm=False)
        assert fitting_settings(tensors(own), given) == own
    # Without flags both fit, so the flag that decides is asked for.
    with pytest.raises(ValueError, match="fit several classifiers") as caught:
        infer_settings(tensors(settings), {}, Path("x.pt"))
    assert "  --classifier_depth: need 3 or 1" in str(caught.value).splitlines()
    given = dict(classifier_depth=1)
    assert infer_settings(tensors(settings), given, Path("x.pt")).image_size == 16


def test_an_image_size_that_the_tensors_do_not_show_is_asked_for():
    """Check another pool than attention, whose positional embedding alone depends on the size."""
    weights = tensors(Settings(**SMALL, classifier_pool="adaptive"))
    with pytest.raises(ValueError, match="--image_size: got none; need the side"):
        infer_settings(weights, {}, Path("x.pt"))
    assert infer_settings(weights, dict(image_size=32), Path("x.pt")).image_size == 32


def test_no_setting_fits_another_network():
    assert fitting_settings({"a": torch.zeros(3)}, Settings()) is None
    weights = tensors(Settings(**SMALL))
    weights["input_blocks.1.0.in_layers.2.weight"] = torch.empty(1, device="meta")
    assert fitting_settings(weights, Settings()) is None


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_flag_that_would_fit_is_named(tmp_path, suffix):
    weights = create_classifier(**Settings(**SMALL).model_kwargs()).state_dict()
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    source, read = open_weights(path, SMALL | {"num_classes": 0})
    assert source.settings.num_classes == 5
    assert (source.step, source.name, source.home) == (None, "model", tmp_path)
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    # No feature map has a side of 32, so attention there contradicts nothing.
    own = dict(classifier_depth=4, in_channels=1, classifier_attention_resolutions="32,8")
    given = SMALL | own
    with pytest.raises(ValueError) as caught:
        open_weights(path, given)
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        "  --in_channels: got 1; need 3",
        "  --classifier_depth: got 4; need 1",
    ]
    # Settings that nobody named are inferred, and reported.
    source, _ = open_weights(path)
    assert source.settings.model_kwargs() == Settings(**SMALL).model_kwargs()
    assert "--classifier_depth 1" in source.notes()[0]
    assert source.notes()[1].endswith("defaults: linear noise, 1000 steps")
    assert open_weights(path, SMALL)[0].inferred == []


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.pt is not a plain state dict"):
        open_weights(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"tensors \(a, ...\) are not those of guided-diffusion's"):
        open_weights(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "got a list"),
        ({}, "got nothing"),
        ({7: torch.zeros(1)}, "got the name 7"),
        ({"a": torch.zeros(1), ("b",): torch.zeros(1)}, r"got the name \('b',\)"),
        ({"a": 1.5}, "got a float called 'a'"),
        ({"model": {"a": torch.zeros(1)}}, "got a dict called 'model'"),
        ({"a": torch.zeros(0, 3)}, r"got 'a' of the shape \[0, 3\]"),
        ({"a": torch.zeros(2).to_sparse()}, "got 'a' as a sparse tensor"),
        ({"a": torch.empty(2, device="meta")}, "got 'a' as .* without storage"),
        ({"a": torch.zeros(2, dtype=torch.bool)}, "got 'a' of torch.bool"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "got 'a' of torch.int64"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "got 'a' of torch.complex64"),
    ],
)
def test_other_content_than_floating_tensors_is_refused(tmp_path, content, words):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"model\.pt: {words}.*; need a state dict") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


class Opened:
    """An object whose unpickling would call a function."""

    def __reduce__(self):
        return os.getpid, ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"args": argparse.Namespace()}, "it holds argparse.Namespace, whose code is not run"),
        (Opened(), "it holds posix.getpid, whose code is not run"),
        (None, "it cannot be unpickled"),
    ],
)
def test_no_message_advises_to_run_the_code_in_a_file(tmp_path, content, words):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    if content is None:
        path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"is not a plain state dict: {words}") as caught:
        read_weights(path)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("input_blocks.x.w", (1,), "1 tensor additional"),
        ("input_blocks.99999999999999.0.weight", (1,), "1 tensor additional"),
        ("input_blocks", (1,), "1 tensor additional"),
        ("input_blocks.3.0.out_layers.0.weight", (), "1 tensor of another shape"),
        ("out.2.c_proj.bias", (), "1 tensor of another shape"),
        ("out.2.c_proj.weight", (), "1 tensor of another shape"),
        ("out.2.positional_embedding", (64,), "1 tensor of another shape"),
        ("out.2.positional_embedding", (64, 1), "1 tensor of another shape"),
    ],
)
def test_names_and_shapes_may_be_anything(tmp_path, name, shape, words):
    weights = create_classifier(**Settings(**SMALL).model_kwargs()).state_dict()
    torch.save(weights | {name: torch.zeros(shape)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"got .*model\.pt, with .*{words}.*; need the \d+ of"):
        open_weights(tmp_path / "model.pt", SMALL)
    with pytest.raises(ValueError, match=r"guided-diffusion's EncoderUNetModel"):
        open_weights(tmp_path / "model.pt")
