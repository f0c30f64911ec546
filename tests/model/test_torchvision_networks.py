"""torchvision's networks: at the start what they are, then moved by the timestep; their weights."""

import pytest
import torch
from torch import nn
from torchvision import models

from ds_classifier.checkpoint.initial_weights import load_initial_weights
from ds_classifier.config import Settings
from ds_classifier.export.export import export
from ds_classifier.model import create_classifier
from ds_classifier.model.own import try_once
from ds_classifier.model.torchvision_networks import download

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's presets
# One of each kind of norm and layout: batch norm, LayerNorm2d, tokens, windows [N, H, W, C].
KINDS = {"resnet18": 32, "convnext_tiny": 32, "vit_b_32": 32, "swin_t": 32}


def build(name: str, size: int = 32, **changes) -> nn.Module:
    """Return a network with 10 classes and weights that are the same each time."""
    torch.manual_seed(0)
    sizes = dict(image_size=size, num_classes=10, in_channels=3) | changes
    network = create_classifier(classifier=f"torchvision:{name}", **sizes)
    if name.startswith("vit"):  # whose head is 0
        nn.init.normal_(network.network.heads.head.weight)
    return network


def plain(name: str, timed: nn.Module, **arguments) -> nn.Module:
    """Return torchvision's own network with the same weights."""
    network = models.get_model(name, num_classes=10, **arguments)
    weights = {
        n.removeprefix("network."): v
        for n, v in timed.state_dict().items()
        if n.startswith("network.")
    }
    network.load_state_dict(weights)
    return network.eval()


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] as torchvision's presets normalise them."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return ((x + 1) / 2 - mean) / std


@pytest.mark.parametrize("name", KINDS)
def test_it_begins_as_the_plain_network_and_then_the_timestep_moves_each_norm(name):
    timed = build(name)
    sized = {"image_size": 32} if name.startswith("vit") else {}
    x, t = torch.rand(3, 3, 32, 32) * 2 - 1, torch.tensor([0, 400, 999])
    logits = timed(x, t)
    expected = plain(name, timed, **sized)(normalised(x))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    # A norm that scales by 1 + s and shifts by b is the plain one with weight (1 + s) w and bias
    # (1 + s) b_0 + b: here the same s and b for every t.
    torch.manual_seed(1)
    changed = plain(name, timed, **sized)
    norms = [m for m in changed.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    assert len(norms) == len(timed.scale_shift) > 0
    with torch.no_grad():
        for norm, layer in zip(norms, timed.scale_shift, strict=True):
            scale, shift = 0.1 * torch.randn(2, norm.weight.numel())
            layer.bias.copy_(torch.cat([scale, shift]))
            norm.weight.mul_(1 + scale)
            norm.bias.mul_(1 + scale).add_(shift)
    moved = timed(x, t)
    torch.testing.assert_close(moved, changed(normalised(x)), atol=1e-3, rtol=1e-3)
    assert (moved - logits).abs().max() > 1e-3
    with torch.no_grad():
        timed.scale_shift[0].weight.normal_()
    same_x = timed(x[:1].expand(3, -1, -1, -1), t)
    assert not torch.allclose(same_x[0], same_x[1])
    assert not torch.allclose(same_x[1], same_x[2])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_of_plus_minus_one_get_it(name):
    timed = build(name, 96)
    x = torch.rand(2, 3, 96, 96) * 2 - 1
    with torch.no_grad():
        logits = timed(x, torch.zeros(2))
        # With its weights, torchvision undoes the normalisation inside (transform_input).
        own = plain(name, timed, aux_logits=False, init_weights=False, transform_input=True)
        torch.testing.assert_close(logits, own(normalised(x)), atol=1e-4, rtol=1e-3)


def test_other_channels_have_a_first_convolution_of_their_own():
    timed = build("resnet18", in_channels=4)
    first = timed.network.conv1
    assert first.weight.shape == (64, 4, 7, 7)
    assert (first.stride, first.padding, first.bias) == ((2, 2), (3, 3), None)
    x, own = torch.randn(2, 4, 32, 32), models.resnet18(num_classes=10)
    own.conv1 = nn.Conv2d(4, 64, 7, stride=2, padding=3, bias=False)
    names = {n.removeprefix("network."): v for n, v in timed.state_dict().items()}
    own.load_state_dict({n: names[n] for n in own.state_dict()})
    expected = own.eval()(x)  # arrays have no normalisation of torchvision's
    torch.testing.assert_close(timed(x, torch.zeros(2)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet19", 32, "got torchvision:resnet19; need one of .*resnet18"),
        ("vgg11", 32, "no norms for the timestep.*do: torchvision:vgg11_bn"),
        ("alexnet", 64, "no norms for the timestep.*do: torchvision:resnet18"),
        ("maxvit_t", 32, "cannot build .*not divisible by partition size"),
        ("vit_b_16", 40, "cannot build .*divisible by patch size"),
    ],
)
def test_what_cannot_be_built_is_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        build(name, size)


def test_its_arguments_and_its_size_are_checked():
    with pytest.raises(ValueError, match=r"for image_size 32, depth 3, .*unexpected keyword"):
        build("resnet18", classifier_args='{"depth": 3}')
    wide = build("resnet18", classifier_args='{"width_per_group": 64}')
    assert wide.network.fc.out_features == 10
    small, sizes = build("inception_v3", 32), dict(image_size=32, in_channels=3)
    with pytest.raises(ValueError, match="whose forward raised RuntimeError"):
        try_once(small, "torchvision:inception_v3", **sizes, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient(dtype):
    timed = build("convnext_tiny").to(dtype)
    try_once(timed, "x", image_size=32, in_channels=3, dtype=dtype)
    timed(torch.rand(2, 3, 32, 32), torch.tensor([3, 500])).square().sum().backward()
    assert all(p.grad is not None for p in timed.parameters())


def settings(**changes) -> Settings:
    """Return the settings of a resnet18 with 10 classes at 32 px."""
    return Settings(
        **dict(image_size=32, num_classes=10, classifier="torchvision:resnet18") | changes
    )


def load(path, given: Settings) -> tuple[nn.Module, list[str]]:
    """Return a new network with these weights, and the lines about them."""
    network = create_classifier(**given.model_kwargs())
    return network, load_initial_weights(network, path, given, ["x"] * given.num_classes)


def test_it_starts_from_torchvisions_own_file(tmp_path):
    torch.manual_seed(5)
    theirs = models.resnet18(num_classes=1000)
    theirs.bn1.running_mean += 0.25
    torch.save(theirs.state_dict(), tmp_path / "resnet18-abc.pth")
    network, lines = load(tmp_path / "resnet18-abc.pth", settings())
    assert "1000 there and 10 here" in lines[1]
    assert "network.fc.weight, network.fc.bias" in lines[1]
    for name, value in theirs.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(network.state_dict()[f"network.{name}"], value), name
    whole, lines = load(tmp_path / "resnet18-abc.pth", settings(num_classes=1000))
    assert len(lines) == 1
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = theirs.eval()(normalised(x))
    torch.testing.assert_close(whole(x, torch.tensor([0, 7])), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"--init_from: got .*abc.pth, whose .* not those of .*34"):
        load(tmp_path / "resnet18-abc.pth", settings(classifier="torchvision:resnet34"))


def test_the_positional_embedding_of_a_vit_is_interpolated(tmp_path):
    theirs = models.vit_b_32(image_size=64, num_classes=10)
    nn.init.normal_(theirs.heads.head.weight)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    given = settings(classifier="torchvision:vit_b_32", image_size=96)
    network, _ = load(tmp_path / "vit.pth", given)
    own = network.network.encoder.pos_embedding
    assert own.shape == (1, 1 + 9, 768)
    assert torch.equal(own[:, 0], theirs.encoder.pos_embedding[:, 0])  # of the class token
    corners = own[0, 1:].view(3, 3, -1)[::2, ::2]  # bicubic, corners on corners
    torch.testing.assert_close(corners, theirs.encoder.pos_embedding[0, 1:].view(2, 2, -1))


def test_auxiliary_heads_are_left_out(tmp_path):
    theirs = models.googlenet(num_classes=10, aux_logits=True, init_weights=False)
    torch.save(theirs.state_dict(), tmp_path / "googlenet.pth")
    network, lines = load(tmp_path / "googlenet.pth", settings(classifier="torchvision:googlenet"))
    assert len(lines) == 1
    assert torch.equal(network.network.fc.weight, theirs.fc.weight)


def test_the_word_torchvision_downloads_the_weights(monkeypatch):
    theirs = models.resnet18(num_classes=1000)
    asked = []

    def get_state_dict(self, **options):
        asked.append((str(self), options))
        return theirs.state_dict()

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", get_state_dict)
    network, lines = load("torchvision", settings())
    assert asked == [("ResNet18_Weights.IMAGENET1K_V1", {"progress": False, "check_hash": True})]
    assert lines[0] == "torchvision's weights of resnet18, without its head"
    assert torch.equal(network.network.conv1.weight, theirs.conv1.weight)

    def refuse(self, **options):
        raise OSError("no network here")

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", refuse)
    with pytest.raises(ValueError, match=r"no network here.*bring https://.*resnet18.*\.pth here"):
        download("torchvision:resnet18")


def test_it_compiles_without_a_break_and_to_the_same_numbers():
    timed, x, t = build("resnet18"), torch.rand(2, 3, 32, 32), torch.tensor([1, 600])
    nn.init.normal_(timed.scale_shift[2].weight, std=0.1)
    expected = timed(x, t)
    timed.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(timed(x, t), expected)


def test_layers_that_ask_for_the_version_of_their_weights_are_loaded(tmp_path):
    """torchvision's MNASNet refuses a state without one, which no file of weights holds."""
    given = dict(classifier="torchvision:mnasnet0_5", num_classes=4, image_size=32, in_channels=3)
    network = create_classifier(**given)
    torch.save(dict(network.state_dict()), tmp_path / "mnasnet.pt")
    done = export(tmp_path / "mnasnet.pt", given, tmp_path / "out")
    x, t = torch.rand(2, 3, 32, 32), torch.tensor([3, 700])
    again = create_classifier(**given)
    load_initial_weights(again, done.paths[0], Settings(**given), [])
    assert torch.equal(again(x, t), network(x, t))
