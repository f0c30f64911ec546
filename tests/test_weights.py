"""Weights wherever they lie: what fits them, and the flag that is named where nothing does."""

import pytest
import torch
from safetensors.torch import save_file

from ds_classifier.config import RECIPES, Settings
from ds_classifier.fitting import fitting_settings
from ds_classifier.model import create_classifier
from ds_classifier.weights import open_weights

SMALL = dict(
    image_size=16,
    num_classes=5,
    classifier_width=32,
    classifier_depth=1,
    classifier_attention_resolutions="8",
    classifier_channel_mult="1,2",
)


def tensors(settings: Settings) -> dict[str, torch.Tensor]:
    """A state dict of these shapes, without storage."""
    with torch.device("meta"):
        return create_classifier(**settings.model_kwargs()).state_dict()


@pytest.mark.parametrize("recipe", ["imagenet64", "imagenet128", "imagenet256", "imagenet512"])
def test_published_shapes_are_known_from_the_defaults(recipe):
    """As someone names a published file and forgets the flags."""
    settings = Settings(**RECIPES[recipe]).replace(num_classes=1000)
    found = fitting_settings(tensors(settings), Settings())
    assert found.model_kwargs() == settings.model_kwargs()


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
    given = Settings(image_size=16) if "spatial" in str(own) or "adaptive" in str(own) else None
    found = fitting_settings(weights, given or Settings())
    shapes = {name: value.shape for name, value in weights.items()}
    assert {name: value.shape for name, value in tensors(found).items()} == shapes


def test_of_several_that_fit_the_nearest_is_found():
    """Levels of one width without attention: 2 levels of 1 block at 16 px look like 1 level of 3
    blocks at 8 px."""
    alike = SMALL | dict(classifier_channel_mult="2,2", classifier_attention_resolutions="")
    settings = Settings(**alike)
    other = dict(image_size=8, classifier_depth=3, classifier_channel_mult="2")
    assert tensors(settings).keys() == tensors(settings.replace(**other)).keys()
    for own in (settings, settings.replace(**other)):
        given = own.replace(classifier_use_scale_shift_norm=False)
        assert fitting_settings(tensors(own), given) == own


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
    source, read = open_weights(path, Settings(**SMALL | {"num_classes": 0}))
    assert source.settings.num_classes == 5
    assert (source.step, source.name, source.home) == (None, "model", tmp_path)
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    # No feature map has a side of 32: naming it is no misfit.
    own = dict(classifier_depth=4, in_channels=1, classifier_attention_resolutions="32,8")
    given = SMALL | own
    with pytest.raises(ValueError) as caught:
        open_weights(path, Settings(**given))
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        "  --in_channels: got 1; need 3",
        "  --classifier_depth: got 4; need 1",
    ]


def test_what_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.pt is no plain state dict"):
        open_weights(path, Settings())
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="need a state dict of tensors"):
        open_weights(path, Settings())
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="are no classifier's"):
        open_weights(path, Settings())
