"""Test --init_from: which weights are taken, changed or refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import CLASS_NAMES, make_run
from safetensors.torch import save_file
from small_models import SMALL, SMALL_UNET, filled

from ds_classifier.checkpoint.fitting import tensors_of
from ds_classifier.checkpoint.initial_weights import (
    interpolate_positional_embedding,
    load_initial_weights,
)
from ds_classifier.config import Settings
from ds_classifier.data.arrays import Arrays
from ds_classifier.export.export import export
from ds_classifier.guidance.unet import create_unet
from ds_classifier.model import create_classifier

HEAD = "out.2.c_proj.weight", "out.2.c_proj.bias"
POSITIONAL = "out.2.positional_embedding"


def start(path, classes=CLASS_NAMES, arrays=None, targets=None, **own):
    """Start a classifier from path; return the lines, its state, and the state before."""
    settings = Settings(**SMALL | dict(num_classes=len(classes), noise_schedule="cosine") | own)
    torch.manual_seed(0)
    classifier = create_classifier(**settings.model_kwargs())
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    lines = load_initial_weights(classifier, path, settings, classes, arrays, targets)
    return lines, classifier.state_dict(), before


@pytest.fixture
def weights():
    return filled(tensors_of(Settings(**SMALL)))


@pytest.fixture
def bare(tmp_path, weights):
    torch.save(weights, tmp_path / "bare.pt")
    return tmp_path / "bare.pt"


def test_all_weights_from_each_kind_of_path(tmp_path, bare, weights):
    run = make_run(tmp_path / "run")
    export(run)
    exports = [run / "export" / f"model000007{suffix}" for suffix in (".pt", ".safetensors")]
    for path in (bare, run, run / "checkpoints" / "step-00000007", run / "export", *exports):
        lines, state, _ = start(path)
        assert lines == [f"weights from {path}"]
        assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_other_targets_are_said(tmp_path):
    run = make_run(tmp_path / "run")
    lines = start(run, targets={"kind": "classes"})[0]
    assert lines[1:] == ["other targets: class there, classes here"]


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_a_head_of_other_classes_starts_anew_and_the_rest_is_kept(tmp_path, pool):
    run = make_run(tmp_path / "run", classifier_pool=pool)
    weights = filled(tensors_of(Settings(**SMALL, classifier_pool=pool)))
    (origin, note), state, before = start(run, list("abc"), classifier_pool=pool)
    assert origin.endswith("without its head")
    assert note.startswith("another number of classes, 5 there and 3 here: the head starts afresh")
    new = [name for name in state if torch.equal(state[name], before[name])]
    # The head is found by its shape; other tensors may equal fresh ones by chance.
    assert {name for name in state if state[name].shape != weights[name].shape} <= set(new)
    kept = [name for name in state if state[name].shape == weights[name].shape]
    assert all(torch.equal(state[name], weights[name]) for name in kept)
    assert len(state) - len(kept) == 2


@pytest.mark.parametrize(
    ("pool", "changed"),
    [
        ("attention", {"out.2.qkv_proj.weight": (96, 64, 1), "out.2.qkv_proj.bias": (96,)}),
        ("attention", {"out.0.weight": (96,), "out.0.bias": (96,)}),
        ("attention", {"out.2.c_proj.bias": (3,)}),
        ("attention", {"out.2.c_proj.weight": (3, 64, 1)}),
        ("attention", {"out.2.c_proj.weight": (3, 64, 1), "out.2.c_proj.bias": (4,)}),
        ("attention", {"out.2.c_proj.weight": (3, 64, 1), "out.2.c_proj.bias": ()}),
        ("attention", {"out.2.c_proj.weight": (), "out.2.c_proj.bias": ()}),
        ("attention", {"out.2.c_proj.weight": (3, 32, 1), "out.2.c_proj.bias": (3,)}),
        ("attention", {"out.2.positional_embedding": (64, 1)}),
        ("attention", {"out.2.positional_embedding": (64,)}),
        ("attention", {"out.2.positional_embedding": (64, 18)}),
        ("adaptive", {"out.0.weight": (96,), "out.0.bias": (96,)}),
        ("spatial", {"out.0.weight": (96, 224), "out.0.bias": (96,)}),
        ("spatial_v2", {"out.1.weight": (96,), "out.1.bias": (96,)}),
    ],
)
def test_only_the_last_layer_may_be_of_other_classes(tmp_path, pool, changed):
    weights = filled(tensors_of(Settings(**SMALL, classifier_pool=pool)))
    assert weights.keys() >= changed.keys()
    weights |= {name: torch.zeros(shape) for name, shape in changed.items()}
    torch.save(weights, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"--init_from: got .*bare\.pt, with .* of another shape"):
        start(tmp_path / "bare.pt", classifier_pool=pool)


def test_another_image_size_interpolates_the_positional_embedding(bare, weights):
    own = dict(image_size=32, classifier_attention_resolutions="16")
    (_, note), state, _ = start(bare, **own)
    assert note == (
        "another image size, 16 px there and 32 px here: the attention pool's positional "
        "embedding is interpolated"
    )
    got = state[POSITIONAL]
    assert got.shape == (64, 1 + 16 * 16)
    assert torch.equal(got[:, 0], weights[POSITIONAL][:, 0])  # the mean token's
    others = set(state) - {POSITIONAL}
    assert all(torch.equal(state[name], weights[name]) for name in others)


def test_interpolation_keeps_places():
    """Compare with a smooth image, evaluated at the centres of the new pixels."""

    def image(side):
        at = (np.arange(side) + 0.5) / side
        return np.stack([np.add.outer(2.0 * at, 3.0 * at), np.multiply.outer(at, at)])

    mean = np.array([[7.0], [-7.0]])
    embedding = np.concatenate([mean, image(8).reshape(2, 64)], axis=1)
    for side in (4, 12, 16):
        got = interpolate_positional_embedding(torch.from_numpy(embedding).float(), side)
        assert got.shape == (2, 1 + side**2)
        np.testing.assert_array_equal(got[:, :1], mean)
        inner = slice(side // 4, -(side // 4))  # the edges are extrapolated
        np.testing.assert_allclose(
            got[:, 1:].unflatten(1, (side, side))[:, inner, inner],
            image(side)[:, inner, inner],
            atol=0.05,
        )
    same = interpolate_positional_embedding(torch.from_numpy(embedding).float(), 8)
    np.testing.assert_allclose(same, embedding, atol=1e-6)


def test_the_resized_classifier_still_knows_enlarged_images(bare, weights):
    """Check the axes: logits of an image twice as large change less than with transposed axes."""
    own = dict(image_size=32, classifier_attention_resolutions="16")
    _, state, _ = start(bare, **own)
    small = create_classifier(**Settings(**SMALL).model_kwargs())
    small.load_state_dict(weights)
    large = create_classifier(**Settings(**SMALL | own).model_kwargs())
    grid = torch.arange(16) / 16
    x = torch.sin(6 * grid[:, None] + 2 * grid[None, :]).expand(3, 16, 16)[None]
    enlarged = F.interpolate(x, scale_factor=2, mode="bilinear")
    errors = []
    for transposed in (False, True):
        embedding = state[POSITIONAL].clone()
        if transposed:
            places = embedding[:, 1:].unflatten(1, (16, 16))
            embedding[:, 1:] = places.transpose(1, 2).flatten(1)
        large.load_state_dict(state | {POSITIONAL: embedding})
        with torch.no_grad():
            t = torch.tensor([5])
            errors.append(float((large(enlarged, t) - small(x, t)).norm()))
    assert errors[0] < errors[1]


def test_a_size_that_needs_no_change_is_reported(tmp_path):
    run = make_run(tmp_path / "run", classifier_pool="adaptive")
    own = dict(image_size=32, classifier_attention_resolutions="16", classifier_pool="adaptive")
    (_, note), _, _ = start(run, **own)
    assert note == "another image size, 16 px there and 32 px here: all weights are kept"


def test_differences_in_training_are_reported(tmp_path):
    run = make_run(tmp_path / "run")
    lines, _, _ = start(run, [*CLASS_NAMES[:4], "emu"], noise_schedule="linear", noised=False)
    assert lines[1] == (
        "another noise process: noise_schedule 'cosine' there, 'linear' here; noised True there, "
        "False here"
    )
    assert lines[2].startswith("1 of 5 classes have other names (such as '```' there, 'emu' here)")


def test_flags_that_would_fit_are_named(bare, tmp_path):
    with pytest.raises(ValueError) as caught:
        start(bare, image_size=32, classifier_channel_mult="", classifier_pool="spatial")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"--init_from: the classifier in {bare}")
    assert sorted(lines[1:-1]) == [
        "  --classifier_attention_resolutions: got '8'; need '16'",
        "  --classifier_channel_mult: got ''; need '1,2'",
        "  --classifier_pool: got 'spatial'; need 'attention'",
    ]
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for path in (tmp_path / "other.pt", tmp_path):
        with pytest.raises(ValueError, match="--init_from: got"):
            start(path)


@pytest.mark.parametrize("number", [float("nan"), float("-inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(tmp_path, weights, number):
    """Check also 1e300, which is infinite in fp32."""
    weights["input_blocks.1.0.out_layers.0.weight"] = torch.full((32,), number, dtype=torch.float64)
    torch.save(weights, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"--init_from: got .*bare\.pt.* not all finite \(input_b"):
        start(tmp_path / "bare.pt")


def test_an_absent_path_and_an_empty_one_give_different_errors(tmp_path):
    for path, words in ((tmp_path / "absent.pt", "does not exist"), (tmp_path, "holds no checkp")):
        with pytest.raises(ValueError, match=f"--init_from: got .*, which {words}"):
            start(path)


def test_another_scale_of_arrays_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    arrays = Arrays(3, 32, "float16", [0.5] * 3, [0.0] * 3).to_json()
    here = Arrays(3, 32, "float32", [0.5, 0.25, 1.0], [0.0] * 3).to_json()
    own = "arrays with scale [0.5, 0.25, 1.0] and shift 0.0 here"
    assert start(run, arrays=here)[0][1:] == [f"another x_0: pixels in [-1, 1] there, {own}"]
    run = make_run(tmp_path / "scaled", arrays=arrays)
    assert start(run, arrays=here)[0][1:] == [
        f"another x_0: arrays with scale 0.5 and shift 0.0 there, {own}"
    ]
    assert len(start(run, arrays=arrays | {"dtype": "float32", "mean": [9.0] * 3})[0]) == 1
    pixels = Arrays(3, 32, "uint8", None, None).to_json()
    assert len(start(make_run(tmp_path / "other"), arrays=pixels)[0]) == 1


# ------------------------------------------------------------------------- diffusion models

UNET = SMALL_UNET | dict(num_head_channels=64, resblock_updown=True, learn_sigma=True)


def unet_at(path, **changes):
    """Save a UNet, its weights computed from their names, and return its state dict."""
    state = filled(create_unet(**UNET | changes).state_dict())
    torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)
    return state


@pytest.mark.parametrize("file", ["model000100.pt", "ema_0.9999_000100.safetensors"])
@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_the_first_half_of_a_diffusion_model_is_taken(tmp_path, file, pool):
    path = tmp_path / file
    unet = unet_at(path, class_cond=True)
    lines, state, before = start(path, classifier_pool=pool)
    taken = [name for name in state if not name.startswith("out.")]
    for name in state:
        expected = unet[name] if name in taken else before[name]
        assert torch.equal(state[name], expected), name
    left = [n for n in unet if n.split(".")[0] in ("output_blocks", "out", "label_emb")]
    assert lines[0] == f"the first half of the diffusion model {path}"
    assert lines[1].startswith(f"taken: {len(taken)} tensors of time_embed, input_blocks and ")
    assert f"left out: {len(left)} of output_blocks, out, label_emb; the pool (out.*)" in lines[1]
    assert "64 channels a head in the reference's legacy order" in lines[2]
    assert len(taken) + len(left) == len(unet)


def test_flags_that_would_fit_a_diffusion_model_are_named(tmp_path):
    unet_at(tmp_path / "unet.pt", num_channels=64, channel_mult="1,1,2", num_res_blocks=2,
            attention_resolutions="4", resblock_updown=False)  # fmt: skip
    with pytest.raises(ValueError) as caught:
        start(tmp_path / "unet.pt")
    error = str(caught.value)
    assert error.startswith("--init_from: the UNet in")
    for line in (
        "--classifier_width: got 32; need 64",
        "--classifier_depth: got 1; need 2",
        "--classifier_attention_resolutions: got '8'; need '4'",
        "--classifier_resblock_updown: got True; need False",
        "--classifier_channel_mult: got '1,2'; need '1,1,2'",
    ):
        assert line in error
    fitting = dict(
        classifier_width=64,
        classifier_depth=2,
        classifier_attention_resolutions="4",
        classifier_resblock_updown=False,
        classifier_channel_mult="1,1,2",
    )
    start(tmp_path / "unet.pt", **fitting)


def test_a_diffusion_model_of_another_kind_is_refused(tmp_path):
    state = unet_at(tmp_path / "unet.pt")
    del state["middle_block.1.norm.weight"]
    torch.save(state, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match=r"a UNet, with 1 tensor missing \(middle_block\.1\.norm"):
        start(tmp_path / "unet.pt")
