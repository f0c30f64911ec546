"""The classifier gives the numbers recorded from guided-diffusion; values that it refuses."""

import json

import numpy as np
import pytest
import torch
from running import GOLDEN
from small_models import DEFAULT, RELATIVE, filled, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from ds_classifier.model import create_classifier

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def logits_and_gradient(model, size, t, y):
    """Return the logits and d sum(log p(y|x)) / dx of the recorded input."""
    device = next(model.parameters()).device
    x = np.random.RandomState(7).standard_normal((2, 3, size, size)).astype(np.float32)
    x = torch.from_numpy(x).to(device).requires_grad_()
    logits = model(x, torch.from_numpy(t).to(device))
    logits.log_softmax(dim=-1)[range(2), torch.from_numpy(y)].sum().backward()
    return logits.detach().cpu().numpy(), x.grad.cpu().numpy()


def check_against(model, size, recorded):
    model.load_state_dict(filled(model.state_dict()))
    logits, gradient = logits_and_gradient(model, size, recorded["t"], recorded["y"])
    assert relative_error(logits, recorded["logits"]) < RELATIVE
    assert relative_error(gradient, recorded["input_grad"]) < RELATIVE


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("device", DEVICES)
def test_agrees_with_the_golden_case(device, layout, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = create_classifier(**DEFAULT).to(device)
    model.memory_format = layout
    check_against(model, 16, np.load(GOLDEN / "model.npz"))


class WatchNorms(TorchDispatchMode):
    """Keeps the input of each group norm."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.native_group_norm.default:
            self.inputs.append(args[0])
        return function(*args, **(kwargs or {}))


def test_no_norm_has_to_copy_its_input():
    """Watch the inputs of native_group_norm, which on GPUs copies those that are not contiguous."""
    model = create_classifier(**DEFAULT)
    with WatchNorms() as watch:  # the pixels are channels_last, as in training
        model(torch.randn(2, 16, 16, 3).permute(0, 3, 1, 2), torch.tensor([0, 999]))
    assert len(watch.inputs) > 10
    assert all(x.is_contiguous() for x in watch.inputs)


@pytest.mark.parametrize("name", ["attention64", "adaptive64_plain", "spatial64"])
def test_agrees_with_the_recorded_cases(reference, name):
    case = json.loads((reference / "cases.json").read_text())["models"][name]
    flags = {k: v for k, v in case["classifier"].items() if k != "classifier_use_fp16"}
    model = create_classifier(**flags)
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == case["state"]
    assert list(shapes) == list(case["state"])  # optimizer states depend on the order
    check_against(model, flags["image_size"], np.load(reference / f"model_{name}.npz"))


@pytest.mark.parametrize(
    ("size", "depth", "parameters"),
    [
        (64, 4, 65_438_568),
        (64, 2, 41_287_016),
        (128, 2, 42_568_040),
        (256, 2, 54_096_360),
        (512, 2, 54_448_360),
    ],
)
def test_published_parameter_counts(size, depth, parameters):
    with torch.device("meta"):
        model = create_classifier(
            image_size=size,
            classifier_width=128,
            classifier_depth=depth,
            classifier_attention_resolutions="32,16,8",
            classifier_use_scale_shift_norm=True,
            classifier_resblock_updown=True,
            classifier_pool="attention",
        )
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_pool_channels_and_classes(pool, channels):
    model = create_classifier(
        **DEFAULT | dict(classifier_pool=pool, in_channels=channels, num_classes=3)
    )
    logits = model(torch.randn(5, channels, 16, 16), torch.tensor([0, 1, 2, 998, 999]))
    assert logits.shape == (5, 3)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(("size", "mult"), [(32, ""), (24, "1,2,4"), (48, ""), (512, "0.5,1,1")])
def test_other_sizes_and_levels(size, mult):
    flags = DEFAULT | dict(image_size=size, classifier_channel_mult=mult, classifier_width=64)
    with torch.device("meta"):
        logits = create_classifier(**flags)(
            torch.randn(2, 3, size, size), torch.zeros(2, dtype=torch.long)
        )
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_fp32(dtype):
    model = create_classifier(**DEFAULT)
    model.load_state_dict(filled(model.state_dict()))
    x, t = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    exact = model(x, t)
    low = model.to(dtype)(x, t)
    assert low.dtype == torch.float32
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (dict(image_size=30, classifier_channel_mult=""), ["image_size", "30", "28 or 32"]),
        (dict(image_size=4, classifier_channel_mult=""), ["image_size", "4", "8"]),
        (dict(classifier_width=40), ["classifier_width", "40", "32"]),
        (dict(classifier_attention_resolutions="16"), ["attention", "32 channels", "64"]),
        (dict(classifier_attention_resolutions="a"), ["attention_resolutions", "'a'"]),
        (dict(classifier_pool="max"), ["classifier_pool", "'max'", "spatial_v2"]),
        (dict(classifier_channel_mult="1,x"), ["classifier_channel_mult", "'1,x'"]),
        (dict(num_classes=1), ["num_classes", "1"]),
        (dict(in_channels=0), ["in_channels", "0"]),
        (dict(classifier_depth=0), ["classifier_depth", "0"]),
    ],
)
def test_refuses_values_that_cannot_be_built(change, names):
    with pytest.raises(ValueError) as error:
        create_classifier(**DEFAULT | change)
    for name in names:
        assert name in str(error.value)


def gradients(model) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter for one fixed batch."""
    model.load_state_dict(filled(model.state_dict()))
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 16, 16, generator=generator)
    model(x, torch.tensor([0, 10, 500, 999])).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("pool", ["attention", "spatial"])
def test_activation_checkpointing_changes_no_bit(pool):
    model = create_classifier(**{**DEFAULT, "classifier_pool": pool})
    plain = gradients(model)
    kept = []
    model.activation_checkpointing = True
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        again = gradients(model)
    few = sum(kept)
    model.activation_checkpointing, kept = False, []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        gradients(model)
    assert all(plain[name].equal(again[name]) for name in plain)
    assert few < sum(kept) / 2


@pytest.mark.slow
def test_compiled_in_place():
    """The names stay the same, and the numbers differ by rounding only."""
    model = create_classifier(**DEFAULT)
    names, plain = list(model.state_dict()), gradients(model)
    model.compile()
    compiled = gradients(model)
    assert list(model.state_dict()) == names
    scale = max(gradient.abs().max() for gradient in plain.values())
    assert all((compiled[name] - plain[name]).abs().max() < 1e-5 * scale for name in plain)


def test_deepspeed_can_print_the_tree_and_a_user_one_line():
    """DeepSpeed's profiler writes its table into `repr`, by `extra_repr` of each module."""
    model = create_classifier(**DEFAULT)
    for module in model.modules():
        module.extra_repr = lambda: "5 MACs"
    assert repr(torch.nn.Sequential(model)).count("5 MACs") > len(list(model.modules())) / 2
    assert str(model).startswith("EncoderUNetModel(16 px, 3 channels, ")
    assert "\n" not in str(model)
