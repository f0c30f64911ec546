"""Networks of the user's: how they are built, tried, cast, kept in eval mode, saved and loaded."""

import importlib.util
import json
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from own_networks import SMALL, write_module
from pages import python_blocks
from running import ROOT
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ds_classifier
from ds_classifier import distributed
from ds_classifier.checkpoint.fixed_state import refuse_unstorable
from ds_classifier.checkpoint.initial_weights import load_initial_weights
from ds_classifier.checkpoint.weights import load_classifier
from ds_classifier.config import Settings
from ds_classifier.config.settings import changed_settings, check_settings
from ds_classifier.distributed.engine.deepspeed_engine import refuse_single_numbers
from ds_classifier.evaluation.sources import build_classifier
from ds_classifier.export.export import export
from ds_classifier.loss import noised_classifier
from ds_classifier.model import create_classifier
from ds_classifier.model.own import eval_mode_notes, try_once
from ds_classifier.training.logs.flops import forward_flops

NUMBERS = count()
SIZES = dict(num_classes=5, image_size=8, in_channels=3)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module of a new name and returns its --classifier."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda text=SMALL: write_module(tmp_path, f"own_module_{next(NUMBERS)}", text)


def network(body: str, layers: str = "self.a = nn.Linear(192, 5)") -> str:
    """Return a module whose network has these layers and this forward."""
    return (
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        f"    def __init__(self):\n        super().__init__()\n        {layers}\n"
        f"    def forward(self, x, t):\n        {body}\n"
        "def build():\n    return Net()\n"
    )


def tried(name: str, dtype: torch.dtype = torch.float32) -> None:
    """Build a network and try it, as a run does before its ranks meet."""
    built = create_classifier(classifier=name, **SIZES)
    try_once(built, name, image_size=8, in_channels=3, dtype=dtype)


def test_a_factory_gets_the_sizes_that_it_names_and_its_own_arguments(module):
    name = module()
    net = create_classifier(classifier=name, classifier_args='{"width": 12}', **SIZES)
    assert net.conv.weight.shape == (12, 3, 3, 3)
    assert net.head.weight.shape == (5, 12 * 64)
    everything = module(
        "from torch import nn\n"
        "def build(**given):\n"
        "    net = nn.Linear(1, 1)\n    net.given = given\n    return net\n"
    )
    given = create_classifier(classifier=everything, classifier_args='{"depth": 2}', **SIZES).given
    assert given == SIZES | {"depth": 2}


def test_input_is_cast_and_logits_are_fp32_under_the_networks_own_names(module):
    name = module()
    net = create_classifier(classifier=name, **SIZES).to(torch.bfloat16)
    x = torch.randn(4, 8, 8, 3).permute(0, 3, 1, 2)  # as training has it; `view` needs a copy
    logits = net(x, torch.arange(4))
    assert logits.dtype == torch.float32
    assert list(net.state_dict())[:2] == ["conv.weight", "conv.bias"]
    h = F.group_norm(F.conv2d(x.bfloat16(), net.conv.weight, net.conv.bias, padding=1), 4)
    h = h * net.norm.weight[:, None, None] + net.norm.bias[:, None, None]
    h = h + net.time((torch.arange(4)[:, None] / 1000).bfloat16())[:, :, None, None]
    by_hand = net.head(h.relu().flatten(1))
    torch.testing.assert_close(logits, by_hand.float(), atol=0.05, rtol=0.05)


def test_it_stays_in_eval_mode_under_a_training_engine(module):
    text = SMALL.replace("nn.GroupNorm(4, width)", "nn.BatchNorm2d(width)")
    net = create_classifier(classifier=module(text), **SIZES)
    wrapped = noised_classifier(net, Settings(image_size=8, num_classes=5))
    for mode in (True, False, True):
        wrapped.train(mode)
        assert wrapped.training == mode
        assert not any(m.training for m in net.modules())
    x, t = torch.randn(3, 3, 8, 8), torch.arange(3)
    assert torch.equal(net(x, t), net(x, t))
    assert torch.equal(net.norm.running_mean, torch.zeros(8))
    notes = eval_mode_notes(net)
    assert notes[0] == "1 batch norm keeps its statistics, as in eval mode"
    assert notes[1] == "1 layer (Dropout) draws nothing, as in eval mode"
    assert "mean 0 and variance 1" in notes[2]
    assert "--init_from" in notes[2]
    net.norm.running_mean += 1
    assert len(eval_mode_notes(net)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(depth):\n    pass\n", r"--classifier_args: got none; need those of .*depth"),
        ("def build():\n    return 3\n", "returned a int; need an nn.Module"),
        ("def build():\n    return {}['a']\n", r"which raised KeyError: 'a' \(own_module_.*line 2"),
        ("from torch import nn\ndef build():\n    return nn.ReLU()\n", "has no parameters"),
        (
            network("return self.a(x.flatten(1))", "self.a = self.b = nn.Linear(192, 5)"),
            "has b.bias, which is another parameter too",
        ),
        (network("return self.a(x)", "self.a = nn.LazyLinear(5)"), "has a.weight without a shape"),
        (
            network("return self.a(x)", "self.e = nn.Parameter(torch.zeros(0))"),
            r"has e of the shape \[0\]",
        ),
        (network("return self.a(x)"), "whose forward raised RuntimeError: .*line 8"),
        (network("return self.a(x.flatten(1))[:, :4]"), r"got \[2, 4\] from .*\[2, 5\] here"),
        (network("return [self.a(x.flatten(1))]"), "got a list from .*need logits"),
        (network("return self.a(x.detach().flatten(1))"), "do not depend on x"),
        (
            network(
                "self.n += 1; return self.a(x.flatten(1))",
                "self.a = nn.Linear(192, 5); self.register_buffer('n', torch.zeros(()))",
            ),
            "whose forward changes the buffer n in eval mode",
        ),
        (network("return self.a(x.flatten(1)).detach()"), "have no gradient; need it for guidance"),
    ],
)
def test_what_cannot_be_trained_or_guide_is_one_message(module, text, message):
    name = module(text)
    with pytest.raises(ValueError, match=message) as raised:
        tried(name)
    assert "\n" not in str(raised.value)
    assert name in str(raised.value)


def test_what_computes_with_numbers_is_tried_on_the_cpu(module):
    scale = "x = x / max(1.0, x.abs().max().item()); "
    tried(module(network(scale + "return self.a(x.flatten(1))")))
    with pytest.raises(ValueError, match="do not depend on x"):
        tried(module(network(scale + "return self.a(torch.zeros_like(x).flatten(1))")))


def test_a_timestep_that_is_not_cast_is_found_before_a_run_in_16_bits(module):
    name = module(
        network(
            "return self.a(x.flatten(1)) + self.t(t[:, None].float())",
            "self.a, self.t = nn.Linear(192, 5), nn.Linear(1, 5)",
        )
    )
    tried(name)
    with pytest.raises(ValueError, match=r"with 16-bit weights raised RuntimeError.*to x\.dtype"):
        tried(name, torch.float16)


def test_settings_of_a_network():
    lone = check_settings(Settings(eval_interval=1, classifier_args='{"a": 1}'))
    assert lone == ["--classifier_args: got '{\"a\": 1}'; need --classifier, the network that "
                    "takes them"]  # fmt: skip
    for text in ("[1]", "{", "3"):
        (problem,) = check_settings(
            Settings(eval_interval=1, classifier="a:b", classifier_args=text)
        )
        assert problem.startswith(f"--classifier_args: got {text!r}; need a JSON object")
    now = Settings(classifier="a:b")
    saved = {k: v for k, v in vars(Settings()).items() if not k.startswith("classifier")}
    assert changed_settings(saved, Settings()) == []  # a checkpoint from before the setting
    assert changed_settings(saved, now) == ["classifier: '' in the checkpoint, 'a:b' now"]


def test_checkpointing_is_refused_without_support(module):
    settings = Settings(activation_checkpointing=True, classifier=module())
    net = create_classifier(classifier=settings.classifier, **SIZES)
    with pytest.raises(ValueError, match=r"--activation_checkpointing: got True.*drop the flag"):
        noised_classifier(net, settings)
    net.activation_checkpointing = False
    noised_classifier(net, settings)
    assert net.activation_checkpointing


def test_its_operations_are_counted(module):
    name = module()
    net = create_classifier(classifier=name, **SIZES)
    convolution, linear = 2 * 64 * 8 * 27, 2 * (8 * 64 * 5 + 8)
    assert forward_flops({"classifier": name, **SIZES}) == convolution + linear
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    assert counter.get_total_flops() == convolution + linear
    numbers = module(network("return self.a(x.flatten(1) * (1 + x.sum().item()))"))
    assert forward_flops({"classifier": numbers, **SIZES}) == 2 * 192 * 5


@pytest.fixture
def exported(module, tmp_path):
    """An export of a network of the user's: its file, its --classifier, and the network."""
    name = module()
    given = {"classifier": name, "classifier_args": '{"width": 4}', **SIZES}
    torch.manual_seed(3)
    net = create_classifier(**given)
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    done = export(tmp_path / "mine.pt", given, tmp_path / "out")
    assert [path.name for path in done.paths] == ["mine.safetensors", "mine.json", "README.md"]
    assert done.obstacles is None
    return tmp_path / "out" / "mine.safetensors", name, net


def test_an_export_is_loaded_by_whoever_names_its_function(exported):
    path, name, net = exported
    description = json.loads(path.with_suffix(".json").read_text())
    assert description["classifier"] == {
        "classifier": name, "classifier_args": '{"width": 4}', **SIZES
    }  # fmt: skip
    assert "reference_flags" not in description
    model = ds_classifier.load(path, classifier=name)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert torch.equal(model.classifier(x, t), net(x, t))
    card = (path.parent / "README.md").read_text()
    assert f'classifier="{name}"' in card
    assert ".pt" not in card
    assert "flags.txt" not in card


def test_no_file_chooses_which_code_runs(exported):
    path, name, _ = exported
    loaded = sys.modules.pop(name.partition(":")[0])
    with pytest.raises(ValueError, match=rf"got none; need {name}.*load\(..., name=...\)"):
        ds_classifier.load(path)
    with pytest.raises(ValueError, match=f"got other:build; need {name}"):
        ds_classifier.load(path, classifier="other:build")
    with pytest.raises(ValueError, match=f"--init_from: --classifier: got none; need {name}"):
        load_initial_weights(nn.Linear(1, 1), path, Settings(), [])
    assert loaded.__name__ not in sys.modules
    (path.parents[1] / f"{loaded.__name__}.py").unlink()
    with pytest.raises(ValueError, match=f"No module named '{loaded.__name__}'"):
        ds_classifier.load(path, classifier=name)


def test_a_bare_file_loads_with_its_flags(exported, tmp_path):
    _, name, net = exported
    given = {"classifier": name, "classifier_args": '{"width": 4}', **SIZES}
    source, read = load_classifier(tmp_path / "mine.pt", given)
    assert source.kind == "file"
    assert torch.equal(read.head.weight, net.head.weight)
    with pytest.raises(ValueError, match="7 tensors of another shape"):
        load_classifier(tmp_path / "mine.pt", given | {"classifier_args": '{"width": 8}'})
    with pytest.raises(ValueError, match="--num_classes: got 0"):
        load_classifier(tmp_path / "mine.pt", given | {"num_classes": 0})


def test_whole_numbers_in_buffers_are_kept(module, tmp_path):
    name = module(SMALL.replace("nn.GroupNorm(4, width)", "nn.BatchNorm2d(width)"))
    given = {"classifier": name, **SIZES}
    net = create_classifier(**given)
    net.norm.num_batches_tracked += 7
    net.norm.running_mean += 0.5
    torch.save(net.state_dict(), tmp_path / "norms.pt")
    done = export(tmp_path / "norms.pt", given, tmp_path / "out")
    model = ds_classifier.load(done.paths[0], classifier=name)
    assert model.classifier.norm.num_batches_tracked == 7
    assert torch.equal(model.classifier.norm.running_mean, torch.full((8,), 0.5))


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_weights_of_16_bits_take_those_of_a_file_without_rounding(module, tmp_path, kind):
    built = "return Net(num_classes, image_size, width)"
    name = module(SMALL.replace(built, f"{built}.{kind}()"))
    state = create_classifier(classifier=module(), **SIZES).state_dict()
    weights = {n: torch.rand_like(value) for n, value in state.items()}
    torch.save(weights, tmp_path / "mine.pt")
    _, read = load_classifier(tmp_path / "mine.pt", {"classifier": name, **SIZES})
    for n, value in read.state_dict().items():
        assert torch.equal(value, weights[n]), n


def test_buffers_of_masks_and_expanded_ones_are_kept(module, tmp_path):
    """-inf is no fault of a mask; an expanded tensor cannot be written to in place."""
    layers = (
        "self.a = nn.Linear(192, 5); self.register_buffer('e', torch.rand(1, 3).expand(4, 3)); "
        "self.register_buffer('m', torch.full((2, 2), -torch.inf).triu(1)); "
        "self.register_buffer('none', torch.zeros(0))"
    )
    name = module(network("return self.a(x.flatten(1))", layers))
    given = {"classifier": name, **SIZES}
    net = create_classifier(**given)
    torch.save(net.state_dict(), tmp_path / "mask.pt")
    done = export(tmp_path / "mask.pt", given, tmp_path / "out")
    model = ds_classifier.load(done.paths[0], classifier=name)
    assert torch.equal(model.classifier.m, net.m)
    assert torch.equal(model.classifier.e, net.e)
    load_initial_weights(create_classifier(**given), done.paths[0], Settings(**given), [])
    state = net.state_dict()
    state["a.weight"][0] = torch.inf
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"not all finite \(a.weight\)"):
        ds_classifier.load(tmp_path / "bad.pt", **given)


def test_evaluation_keeps_complex_buffers(module, monkeypatch):
    """nn.Module.to casts these as well, and drops the imaginary parts."""
    monkeypatch.setattr(distributed, "broadcast_bytes", lambda tensor: tensor)
    layers = (
        "self.a = nn.Linear(192, 5); turn = torch.polar(torch.ones(192), torch.arange(192.)); "
        "self.register_buffer('turn', turn, persistent=False)"
    )
    name = module(network("return self.a((x.flatten(1) * self.turn).imag)", layers))
    settings = Settings(classifier=name, **SIZES)
    net = create_classifier(**settings.model_kwargs())
    built = build_classifier(settings, net.state_dict(), "fp32", torch.device("cpu"))
    x, t = torch.rand(2, 3, 8, 8), torch.tensor([3, 700])
    assert torch.equal(built(x, t), net(x, t))


def test_what_a_checkpoint_cannot_store_is_found_before_the_first_step(module):
    layers = "self.a = nn.Linear(192, 5); self.register_buffer('c', torch.zeros(2).cfloat())"
    complex_one = network("return self.a(x.flatten(1))", layers)
    extra = network("return self.a(x.flatten(1))").replace(
        "def build", "Net.get_extra_state = lambda self: {}\ndef build"
    )
    for text, kind in ((complex_one, "c, a torch.complex64"), (extra, "_extra_state, a dict")):
        name = module(text)
        net = create_classifier(classifier=name, **SIZES)
        with pytest.raises(ValueError, match=f"whose state dict has {kind}, which checkpoints"):
            refuse_unstorable(net, name)


def test_init_from_takes_the_same_network_with_another_head(exported):
    path, name, net = exported
    six = dict(classifier=name, classifier_args='{"width": 4}', image_size=8, num_classes=6)
    fresh = create_classifier(**six, in_channels=3)
    head = fresh.head.weight.clone()
    lines = load_initial_weights(fresh, path, Settings(**six), ["a"] * 6)
    assert "without its head" in lines[0]
    assert "5 there and 6 here: the head starts afresh (head.weight, head.bias)" in lines[1]
    assert torch.equal(fresh.conv.weight, net.conv.weight)
    assert torch.equal(fresh.head.weight, head)
    wide = six | {"classifier_args": '{"width": 8}'}
    with pytest.raises(ValueError, match=r"--init_from: got .*conv.weight: got \[4, 3, 3, 3\]"):
        load_initial_weights(create_classifier(**wide, in_channels=3), path, Settings(**wide), [])


class SmallBody(nn.Module):
    """A network as timm's create_model returns it for num_classes=0."""

    num_features = 6

    def __init__(self, in_chans):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 6, 3)

    def forward(self, x):
        return self.conv(x).mean(dim=(2, 3))


def create_model(name, *, pretrained, num_classes, in_chans):
    """Stand in for timm.create_model, which refuses further keywords for most of its networks."""
    assert (name, pretrained, num_classes) == ("resnet10t", False, 0)
    return SmallBody(in_chans)


@pytest.mark.parametrize("file", ["mynet.py", "mytimm.py"])
def test_the_networks_of_the_page_work(file, module, monkeypatch):
    """Build each from the text of docs/extending.md; timm's with random weights.

    Where timm is not installed, a small network takes the place of its networks.
    """
    page = (ROOT / "docs" / "extending.md").read_text()
    codes = [code for code in python_blocks(page) if "nn.Module" in code]
    code = codes[["mynet.py", "mytimm.py"].index(file)]
    name = module(code)
    arguments = "{}"
    if file == "mytimm.py":
        if importlib.util.find_spec("timm") is None:
            monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
        name = name.replace(":build", ":timed")
        arguments = '{"name": "resnet10t", "pretrained": false}'
    net = create_classifier(classifier=name, classifier_args=arguments, **SIZES)
    for dtype in (torch.float32, torch.bfloat16):
        try_once(net, name, image_size=8, in_channels=3, dtype=dtype)
    logits = net(torch.rand(2, 3, 8, 8), torch.tensor([3, 800]))
    assert logits.shape == (2, 5)


def test_a_single_number_is_refused_for_zero_3_alone():
    net = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(1.0))})
    refuse_single_numbers(net, "mine:f", {"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match=r"whose scale has the shape \[\], with ZeRO 3"):
        refuse_single_numbers(net, "mine:f", {"zero_optimization": {"stage": 3}})
