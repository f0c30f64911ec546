"""The Python interface: README's own lines, and evaluation's numbers."""

import re
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT

import ds_classifier
from ds_classifier import checkpoint
from ds_classifier.config import Settings
from ds_classifier.data.loader import ShardDataset, ValidationPositions, create_loader
from ds_classifier.data.sources import open_source
from ds_classifier.data.store import open_named
from ds_classifier.evaluation import evaluate
from ds_classifier.model import create_classifier
from ds_classifier.noised_classifier import NoisedClassifier

SMALL = Settings(
    image_size=8,
    num_classes=10,
    classifier_width=32,
    classifier_channel_mult="1,2",
    classifier_depth=1,
    classifier_attention_resolutions="4",
    noise_schedule="cosine",
    timestep_respacing="250",
)
BLACK = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)


@pytest.fixture
def run(tmp_path):
    """A run with a checkpoint, of a classifier that was not trained."""
    torch.manual_seed(0)
    classifier = create_classifier(**SMALL.model_kwargs())
    for parameter in classifier.parameters():  # some start at zero and would hide what is wrong
        torch.nn.init.normal_(parameter, std=0.2)
    state = dict(
        format=checkpoint.FORMAT,
        version=checkpoint.VERSION,
        step=7,
        settings=vars(SMALL),
        classes=[f"the {digit}" for digit in range(10)],
        data="",
    )
    home = tmp_path / "runs" / "digits32"
    (home / "checkpoints").mkdir(parents=True)
    final = home / "checkpoints" / checkpoint.step_name(7)
    checkpoint.commit(final, model=classifier.state_dict(), optimizer={}, state=state)
    return home


def test_the_lines_of_the_readme(run, digits, tmp_path):
    """Run as they stand there, in a process of its own, on pictures of the training set."""
    section = (ROOT / "README.md").read_text().split("## In Python\n")[1]
    block = textwrap.dedent(section.strip("\n").split("\n\n")[0])
    assert len(block.splitlines()) == 5
    for name, sample in zip(
        ("three.png", "seven.png"), open_source("digits").splits["train"], strict=False
    ):
        (tmp_path / name).write_bytes(sample.read())
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"\['the \d', 'the \d'\]\n", done.stdout), done.stdout
    assert not done.stderr


def test_predictions_are_those_of_evaluation(run, digits):
    """Accuracy and loss of the validation set at several levels, by the library's own sums."""
    model = ds_classifier.load(run)
    assert (model.step, model.classes[3], len(model.classes)) == (7, "the 3", 10)
    shards = open_named(str(digits / "val"), cache_dir="", cache_gb=0, image_size=8)
    dataset = ShardDataset(shards, image_size=8)
    batch = dataset[range(len(shards.index))]
    positions = ValidationPositions(len(shards.index), batch=100, rank=0, world_size=1)
    module = NoisedClassifier(model.classifier, model.diffusion)
    for t in (0, 60, 249):
        loader = create_loader(dataset, positions, workers=0)
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        try:
            means, _ = evaluate(module, loader, samples=len(shards.index), device="cpu", t=t)
        finally:
            torch.distributed.destroy_process_group()
        p = model.predict(batch.images, t)
        assert torch.allclose(p.sum(dim=1), torch.ones(len(p)))
        assert (p.argmax(dim=1) == batch.labels).double().mean().item() == pytest.approx(
            means["acc@1"]
        )
        loss = -p.gather(1, batch.labels[:, None]).log().mean().item()
        assert loss == pytest.approx(means["loss"], rel=1e-5)


def test_levels_and_noise_of_one_s_own(run):
    model = ds_classifier.load(run)
    pictures = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    levels = torch.tensor([0, 10, 100, 249])
    together = model.predict(pictures, levels)
    for i, t in enumerate(levels.tolist()):
        assert torch.allclose(model.predict(pictures, t)[i], together[i], atol=1e-6)
    noise = torch.randn(4, 8, 8, 3)
    assert not torch.allclose(model.predict(pictures, 100, noise), model.predict(pictures, 100))


def test_a_file_of_weights_brings_no_names(run, tmp_path):
    weights = ds_classifier.load(run).classifier.state_dict()
    torch.save(weights, tmp_path / "model.pt")
    flags = {k: v for k, v in vars(SMALL).items() if k.startswith("classifier_")}
    process = dict(noise_schedule="cosine", timestep_respacing="250")
    model = ds_classifier.load(tmp_path / "model.pt", image_size=8, **flags, **process)
    assert (model.classes, model.step) == (None, None)
    pictures = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    assert torch.equal(model.predict(pictures, 5), ds_classifier.load(run).predict(pictures, 5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(pictures=torch.zeros(2, 8, 8, 3)), "need .N, 8, 8, 3. torch.uint8"),
        (dict(pictures=BLACK.permute(0, 3, 1, 2)), "need .N, 8, 8, 3."),
        (dict(pictures=BLACK, t=250), "t: got 250; need 0 to 249"),
        (dict(pictures=BLACK, t=-1), "t: got -1"),
    ],
)
def test_what_predict_refuses(run, arguments, words):
    with pytest.raises(ValueError, match=words):
        ds_classifier.load(run).predict(**arguments)


def test_what_load_and_read_refuse(run, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        ds_classifier.load(tmp_path)
    with pytest.raises(
        ValueError, match="recipe: got 'imagenet'; need one of reference, imagenet64"
    ):
        ds_classifier.load(run, recipe="imagenet")
    with pytest.raises(ValueError, match="got depth; need names of"):
        ds_classifier.load(run, depth=4)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"no\.png: "):
        ds_classifier.load(run).read([tmp_path / "no.png"])


def test_import_is_cheap():
    code = (
        "import sys, ds_classifier\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert {'load', 'Predictor'} <= set(dir(ds_classifier))\n"
        "ds_classifier.load\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
