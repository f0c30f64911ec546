"""Test which parameters --freeze, --lr_scale and --no_decay mean, and runs that use them."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from small_models import SMALL, SMALL_UNET, filled
from tiny_run import assert_same_run, train
from torch import nn
from versions import complete_deepspeed

from ds_classifier.config import Settings
from ds_classifier.distributed.engine.deepspeed_engine import Group
from ds_classifier.guidance.unet import create_unet
from ds_classifier.loss import noised_classifier
from ds_classifier.model import create_classifier
from ds_classifier.training.parameter_groups import describe, divide_parameters


class Own(nn.Module):
    """A network of a user, with norms of three kinds and a bias under another name."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4))
        self.attention = nn.MultiheadAttention(4, 1)  # in_proj_bias
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1))


def divided(network, optimizer="AdamW", **flags):
    """Return the groups as {(lr_scale, decayed): names}, in which each parameter is once."""
    groups = divide_parameters(network, Settings(**flags), optimizer)
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = {(g.lr_scale, g.decayed): [names.pop(p) for p in g.parameters] for g in groups}
    assert not any(parameter.requires_grad for parameter in names)
    return found


def test_without_flags_there_are_no_groups():
    network = Own()
    assert divide_parameters(network, Settings(), "AdamW") is None
    assert divide_parameters(network, Settings(freeze="features.*"), "muon") is None
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == [
        "features.0.weight",
        "features.0.bias",
        *("features.1.weight", "features.1.bias", "features.2.weight", "features.2.bias"),
    ]


def test_words_and_patterns_name_parameters():
    both = divided(Own(), no_decay="norms, biases")
    assert both == {
        (1.0, True): [
            *("scale", "features.0.weight", "attention.in_proj_weight"),
            *("attention.out_proj.weight", "head.weight"),
        ],
        (1.0, False): [
            *("features.0.bias", "features.1.weight", "features.1.bias", "features.2.weight"),
            *("features.2.bias", "attention.in_proj_bias", "attention.out_proj.bias", "head.bias"),
        ],
    }
    assert divided(Own(), no_decay="norms,*.bias,*_bias,scale")[1.0, False][0] == "scale"
    rates = divided(Own(), lr_scale="head.bias=3,head.*=2e-1,*=0.5", freeze="attention.*")
    assert rates[3.0, True] == ["head.bias"]
    assert rates[0.2, True] == ["head.weight"]
    assert len(rates[0.5, True]) == 7


@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_the_trunk_is_all_but_the_head(pool):
    classifier = create_classifier(**Settings(**SMALL, classifier_pool=pool).model_kwargs())
    assert divide_parameters(classifier, Settings(freeze="trunk"), "AdamW") is None
    for name, parameter in classifier.named_parameters():
        assert parameter.requires_grad == name.startswith("out.")


def test_the_trunk_of_a_torchvision_network_is_all_but_its_last_layer_and_the_timesteps():
    settings = Settings(classifier="torchvision:resnet18", num_classes=5, freeze="trunk")
    classifier = create_classifier(**settings.model_kwargs())
    divide_parameters(classifier, settings, "AdamW")
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    tops = {name.partition(".")[0] for name in trained}
    assert tops == {"network", "time_embed", "scale_shift"}
    of_network = {name for name in trained if name.startswith("network.")}
    assert of_network == {"network.fc.weight", "network.fc.bias"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(freeze="trunk"), "trunk for a Own, whose head is not known; need patterns"),
        (dict(freeze="feature.*"), "--freeze: got 'feature.*', which matches no parameter; need"),
        (
            dict(freeze="*"),
            "--freeze: got *, with which no parameter is trained; need some that are; do: give "
            "patterns that leave some of",
        ),
        (dict(lr_scale="head*"), "--lr_scale: got 'head*'; need PATTERN=FACTOR"),
        (dict(lr_scale="head*=0"), "'head*=0'; need PATTERN=FACTOR with a factor above 0"),
        (dict(lr_scale="head*=inf"), "'head*=inf'; need PATTERN"),
        (dict(lr_scale="=2"), "'=2'; need PATTERN"),
        (dict(lr_scale="neck.*=2"), "--lr_scale: got 'neck.*', which matches no parameter that"),
        (dict(freeze="head.*", lr_scale="head.*=2"), "'head.*', which matches no parameter that "),
        (dict(no_decay="norm"), "--no_decay: got 'norm', which matches no parameter that is"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(flags, words):
    with pytest.raises(ValueError) as caught:
        divide_parameters(Own(), Settings(**flags), "AdamW")
    assert words in str(caught.value)


def test_all_problems_come_in_one_message():
    flags = dict(freeze="a,b", lr_scale="c=1,head.*=-1", no_decay="d")
    with pytest.raises(ValueError) as caught:
        divide_parameters(Own(), Settings(**flags), "Muon")
    assert len(str(caught.value).splitlines()) == 6
    assert "got them with Muon" in str(caught.value)


def test_groups_are_described():
    two, three = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1000, 3))
    groups = [Group([two]), Group([three], 0.1), Group([two, three], 2.0, False)]
    assert describe(groups) == [
        "3,000 parameters at 0.1 times that rate",
        "3,002 parameters at 2 times that rate, without weight decay",
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_trunk_keeps_nothing_for_a_backward(recompute):
    """Compare the tensors that autograd keeps with those of the head alone."""
    settings = Settings(**SMALL, freeze="trunk", activation_checkpointing=recompute)
    classifier = create_classifier(**settings.model_kwargs())
    classifier.load_state_dict(filled(classifier.state_dict()))
    divide_parameters(classifier, settings, "AdamW")
    module = noised_classifier(classifier, settings)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda v: kept.append(v.shape) or v, lambda v: v
    )
    features = []
    classifier.out.register_forward_pre_hook(lambda head, args: features.append(args[0]))
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    t, noise = torch.tensor([3, 500]), torch.ones(2, 16, 16, 3)
    with hooks:
        losses, _ = module(images, labels, t, noise)
    whole, kept[:] = list(kept), []
    assert not features[0].requires_grad
    with hooks:
        nn.functional.cross_entropy(classifier.out(features[0]).float(), labels, reduction="none")
    assert len(whole) == len(kept) > 5
    losses.sum().backward()
    graded = {name for name, p in classifier.named_parameters() if p.grad is not None}
    assert graded == {n for n, _ in classifier.named_parameters() if n.startswith("out.")}


FLAGS = ["--freeze", "input_blocks.*,time_embed.*", "--lr_scale", "out.*=0.3,middle_block.0.*=2"]
FLAGS += ["--no_decay", "norms,biases", "--weight_decay", "0.1"]


@complete_deepspeed
def test_muon_by_a_flag_turns_matrices_at_its_rate_and_adam_the_rest(digits, tmp_path):
    """The largest singular value of a matrix's update is the rate; Adam moves a number by about it.

    Jordan et al. 2024: five Newton-Schulz steps bring all singular values to 0.7 .. 1.2.
    """
    flags = "--global_batch 16 --iterations 4 --save_interval 1 --keep_last 4 --lr 1e-3"
    flags += " --muon_lr_scale 20 --lr_schedule cosine --seed 3"
    done = train(1, "zero1_fp32", digits, tmp_path / "run", *flags.split())
    saved = [
        load_file(tmp_path / f"run/checkpoints/step-{step:08}/model.safetensors") for step in (2, 3)
    ]
    moved = {name: saved[1][name] - saved[0][name] for name in saved[0]}
    rate = 1e-3 * (1 + math.cos(math.pi * 2 / 4)) / 2  # of the third step
    turned = [name for name in moved if re.match(r"middle_block.*(layers|qkv).*weight", name)]
    turned = [name for name in turned if saved[0][name].dim() > 1]
    assert len(turned) > 4
    hidden = [
        value.numel()
        for name, value in saved[0].items()
        if value.dim() > 1 and not name.startswith(("input_blocks.0.", "time_embed.", "out."))
    ]
    rates = f"lr 0.001, cosine to 0; 20 times that for {sum(hidden):,} parameters, by Muon"
    assert rates in done.output
    for name in turned:
        update = moved[name].flatten(1)
        tall = math.sqrt(max(1, len(update) / update.shape[1]))  # so a tall matrix is scaled
        largest = torch.linalg.matrix_norm(update, 2)
        assert 0.6 < largest / (20 * rate * tall) < 1.3, name
    for name in ("input_blocks.0.0.weight", "time_embed.0.weight", "out.0.bias"):
        assert 0.1 < moved[name].abs().max() / rate < 2, name


@pytest.mark.slow
def test_a_killed_run_with_groups_continues_bit_equal(digits, tmp_path):
    """Start from a UNet, whose frozen half is the same at the end.

    tests/distributed/test_deepspeed_state.py resumes groups in engines of all kinds.
    """
    config = "zero1_bf16"
    unet = SMALL_UNET | dict(image_size=8, attention_resolutions="4", resblock_updown=True)
    weights = filled(create_unet(**unet | dict(num_head_channels=64)).state_dict())
    torch.save(weights, tmp_path / "unet.pt")
    flags = ["--global_batch", "16", "--iterations", "20", "--save_interval", "10", *FLAGS]
    flags += ["--init_from", tmp_path / "unet.pt"]
    golden, killed = tmp_path / "golden", tmp_path / "killed"
    done = train(2, config, digits, golden, *flags)
    assert "start       from the first half of the diffusion model" in done.output
    train(2, config, digits, killed, *flags, environment=[("KILL_AT", "13:0")], expect=247)
    train(2, config, digits, killed, *flags)
    last = "checkpoints/step-00000020"
    assert_same_run(golden, killed, 20)
    saved = load_file(golden / last / "model.safetensors")
    frozen = [name for name in saved if name.startswith(("input_blocks.", "time_embed."))]
    assert all(torch.equal(saved[name], weights[name]) for name in frozen)
    assert not torch.equal(saved["middle_block.0.in_layers.2.weight"],
                           weights["middle_block.0.in_layers.2.weight"])  # fmt: skip
    kept = load_file(golden / last / "optimizer.safetensors")
    assert not any(name.endswith(tuple(frozen)) for name in kept)
    changed = train(1, config, digits, golden, *flags, "--no_decay", "norms", expect=2)
    assert "no_decay: 'norms,biases' in the checkpoint, 'norms' now" in changed.output
