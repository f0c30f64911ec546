"""Compare with unmodified guided-diffusion; GUIDED_DIFFUSION names a checkout of it.

Stubs replace mpi4py and blobfile, which it uses for distributed start-up and remote files only.
"""

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made import make_run
from small_models import relative_error

from ds_classifier.checkpoint.weights import load_classifier
from ds_classifier.config import Settings
from ds_classifier.export.export import export
from ds_classifier.export.reference_flags import classifier_flags, flags_text, reference_obstacles
from ds_classifier.guidance.gradient import classifier_gradient

STUBS = {
    "mpi4py.py": "class _World:\n"
    "    rank, size = 0, 1\n"
    "    Get_rank = lambda self: 0\n"
    "    Get_size = lambda self: 1\n"
    "    bcast = lambda self, value, root=0: value\n"
    "class MPI:\n"
    "    COMM_WORLD = _World()\n",
    "blobfile.py": "from os.path import dirname, basename, join, exists\nBlobFile = open\n",
}


@pytest.fixture(scope="module")
def checkout() -> Path:
    path = os.environ.get("GUIDED_DIFFUSION", "")
    if not path:
        pytest.skip("GUIDED_DIFFUSION names no checkout of guided-diffusion")
    return Path(path)


@pytest.fixture(scope="module")
def reference(checkout, tmp_path_factory):
    """Import guided_diffusion.script_util from the checkout, and unload it afterwards."""
    yield from imported(checkout, tmp_path_factory.mktemp("stubs"))


def imported(checkout: Path, stubs: Path):
    for name, text in STUBS.items():
        (stubs / name).write_text(text)
    before = set(sys.modules)
    sys.path[:0] = [str(checkout), str(stubs)]
    try:
        module = importlib.import_module("guided_diffusion.script_util")
        assert Path(inspect.getfile(module)).is_relative_to(checkout)
        yield module
    finally:
        del sys.path[:2]
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("guided_diffusion", "mpi4py", "blobfile"):
                del sys.modules[name]


def flags_of(text: str) -> list[str]:
    """Return the words that `grep -v '^#'` leaves of a flags file."""
    return [w for line in text.splitlines() if not line.startswith("#") for w in line.split()]


def built_there(reference, settings: Settings):
    """Build the reference's classifier from our flags file, through its own parser."""
    import argparse

    parser = argparse.ArgumentParser()
    defaults = reference.classifier_and_diffusion_defaults()
    reference.add_dict_to_argparser(parser, defaults)
    arguments = parser.parse_args(flags_of(flags_text(settings, "model.pt")))
    names = reference.classifier_defaults().keys()
    return reference.create_classifier(**reference.args_to_dict(arguments, names))


def answers(model, x, t, y):
    """Return logits, and the gradient of log p(y | x) with respect to x."""
    x = x.clone().requires_grad_()
    logits = model(x, t)
    logits.log_softmax(dim=-1)[range(len(y)), y].sum().backward()
    return logits.detach().numpy(), x.grad.numpy()


def differences(ours, theirs, size, channels=3, classes=1000) -> tuple[float, float]:
    """Return the differences of logits and input gradients, relative to the largest number."""
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(5))
    t, y = torch.tensor([0, 400, 999]), torch.tensor([1, classes - 1, 3])
    got, expected = answers(ours, x, t, y), answers(theirs, x, t, y)
    assert np.abs(expected[0]).max() > 0.1  # not the zeros of a fresh classifier
    assert np.abs(expected[1]).max() > 1e-4
    return tuple(map(relative_error, got, expected))


@pytest.mark.parametrize(
    ("pool", "size"),
    [
        *(("attention", size) for size in (64, 128)),
        *(("spatial", size) for size in (64, 128)),
        ("adaptive", 64),
        ("spatial_v2", 64),
    ],
)
def test_it_loads_our_file_and_gives_the_same_logits(reference, tmp_path, size, pool, capsys):
    """Compare at the published width, with weights made from their names, so none are zero."""
    own = dict(image_size=size, num_classes=1000, classifier_pool=pool, classifier_width=128)
    own |= dict(classifier_attention_resolutions="32,16,8", classifier_channel_mult="")
    own |= dict(classifier_resblock_updown=pool != "spatial_v2")
    run = make_run(tmp_path / "run", **own)
    exported = export(run)
    assert exported.obstacles == []
    source, ours = load_classifier(run)
    theirs = built_there(reference, source.settings).eval()
    theirs.load_state_dict(torch.load(exported.paths[0], map_location="cpu", weights_only=True))
    logits, gradients = differences(ours, theirs, size)
    with capsys.disabled():
        print(f"\n{pool} {size} px: logits {logits:.1e}, input gradients {gradients:.1e}")
    assert logits < 1e-5
    assert gradients < 1e-5


def edited(checkout: Path, settings: Settings, to: Path) -> Path:
    """Copy the checkout and make the changes that the flags file lists."""
    shutil.copytree(checkout, to)
    for obstacle in reference_obstacles(settings):
        for edit in obstacle.edits:
            path = to / edit.file
            text = path.read_text()
            begin, end = 0, len(text)
            if edit.function:
                begin = text.index(f"def {edit.function}(")
                following = re.search(r"^\S", text[text.index("):", begin) + 2 :], re.MULTILINE)
                end = begin + following.start() + text.index("):", begin) + 2 - begin
            body = text[begin:end]
            assert body.count(edit.old) == 1, edit
            path.write_text(text[:begin] + body.replace(edit.old, edit.new) + text[end:])
    return to


@pytest.mark.parametrize(
    "own",
    [
        dict(image_size=32, num_classes=10, classifier_channel_mult="1,2,4"),
        dict(image_size=64, num_classes=1000, classifier_channel_mult="1,2"),
        dict(image_size=16, num_classes=5, in_channels=1, classifier_channel_mult="2"),
    ],
)
def test_with_the_listed_changes_it_loads_other_classifiers(checkout, tmp_path, own):
    run = make_run(tmp_path / "run", **own)
    exported = export(run)
    source, ours = load_classifier(run)
    assert exported.obstacles
    (tmp_path / "stubs").mkdir()
    module = imported(edited(checkout, source.settings, tmp_path / "edited"), tmp_path / "stubs")
    # Unload the unmodified modules meanwhile, if the module-scoped fixture imported them.
    aside = {n: sys.modules.pop(n) for n in list(sys.modules) if n.startswith("guided_diffusion")}
    try:
        theirs = built_there(next(module), source.settings).eval()
        module.close()
    finally:
        sys.modules.update(aside)
    theirs.load_state_dict(torch.load(exported.paths[0], map_location="cpu", weights_only=True))
    size, channels = source.settings.image_size, source.settings.in_channels
    found = differences(ours, theirs, size, channels, source.settings.num_classes)
    assert max(found) < 1e-5


SMALL_64 = dict(
    image_size=64,
    num_classes=1000,
    classifier_width=32,
    classifier_channel_mult="",
    classifier_attention_resolutions="",
    classifier_pool="spatial",
)


@pytest.mark.parametrize("own", [{}, dict(image_size=32, num_classes=10, in_channels=1)])
def test_its_sampling_script_takes_our_flags(checkout, tmp_path, own):
    """Run scripts/classifier_sample.py with the flags file and a tiny diffusion model.

    The listed changes are made if it needs any.
    """
    run = make_run(tmp_path / "run", **SMALL_64 | own)
    exported = export(run)
    source, _ = load_classifier(run)
    tree = edited(checkout, source.settings, tmp_path / "edited") if own else checkout
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(text)
    unet = "--num_channels 32 --num_res_blocks 1 --attention_resolutions 8 --channel_mult 1,1"
    make = (
        "import sys, torch as th\n"
        "from guided_diffusion.script_util import *\n"
        "import argparse; p = argparse.ArgumentParser()\n"
        "add_dict_to_argparser(p, model_and_diffusion_defaults() | classifier_defaults())\n"
        "a = p.parse_args(sys.argv[1:])\n"
        "m, _ = create_model_and_diffusion(**args_to_dict(a, model_and_diffusion_defaults()))\n"
        "th.save(m.state_dict(), 'unet.pt')\n"
    )
    words = [*unet.split(), *flags_of(exported.paths[3].read_text())]
    environment = os.environ | {"PYTHONPATH": f"{tree}:{stubs}", "OPENAI_LOGDIR": str(tmp_path)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}

    def call(*command):
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)

    call("-c", make, *words)
    paths = ["--model_path", "unet.pt", "--classifier_path", str(exported.paths[0])]
    few = ["--num_samples", "2", "--batch_size", "2", "--timestep_respacing", "2"]
    call(str(tree / "scripts" / "classifier_sample.py"), *words, *paths, *few)
    size, channels = source.settings.image_size, source.settings.in_channels
    arrays = np.load(tmp_path / f"samples_2x{size}x{size}x{channels}.npz")
    assert arrays["arr_0"].shape == (2, size, size, channels)
    assert arrays["arr_1"].max() < source.settings.num_classes


@pytest.mark.parametrize(("loop", "scale"), [("p_sample_loop", 50.0), ("ddim_sample_loop", 1.0)])
def test_its_loops_take_our_gradient(reference, tmp_path, loop, scale):
    """Compare samples guided by our cond_fn and by its script's, from the same noise.

    From a noisy x_t, DDIM magnifies rounding errors by the scale.
    """
    run = make_run(tmp_path / "run", **SMALL_64)
    exported = export(run)
    source, ours = load_classifier(run)
    theirs = built_there(reference, source.settings).eval()
    theirs.load_state_dict(torch.load(exported.paths[0], weights_only=True))
    diffusion = reference.create_gaussian_diffusion(
        # With cosine noise, the first step would magnify rounding errors 20,000 times.
        steps=1000,
        noise_schedule="linear",
        timestep_respacing="4",
        learn_sigma=False,
    )

    def their_cond_fn(x, t, y=None):
        """Return the gradient as its script does."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_p = theirs(x, t).log_softmax(dim=-1)
            return torch.autograd.grad(log_p[range(len(y)), y.view(-1)].sum(), x)[0] * scale

    samples = []
    for cond_fn in (their_cond_fn, classifier_gradient(ours, scale=scale), None):
        torch.manual_seed(1)
        samples.append(
            getattr(diffusion, loop)(
                lambda x, t, y=None: 0.3 * x,
                (2, 3, 64, 64),
                noise=torch.randn(2, 3, 64, 64),
                model_kwargs={"y": torch.tensor([3, 700])},
                cond_fn=cond_fn,
                device="cpu",
            ).numpy()
        )
    assert relative_error(samples[1], samples[0]) < 1e-5
    assert relative_error(samples[2], samples[0]) > 1e-3  # guidance has an effect


def test_the_eight_flags_are_its_own(reference):
    assert classifier_flags(Settings()).keys() == reference.classifier_defaults().keys()
