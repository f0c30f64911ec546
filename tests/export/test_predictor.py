"""Test the Python interface: the lines in README.md, and agreement with evaluation."""

import re
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from made import PREDICTOR_SETTINGS, write_run
from PIL import Image
from running import ROOT
from small_models import SMALL, filled

import ds_classifier
from ds_classifier.checkpoint.fitting import tensors_of
from ds_classifier.config import RECIPES, Settings
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.loader import ShardDataset, ValidationPositions, create_loader
from ds_classifier.data.splits import open_named
from ds_classifier.evaluation.evaluate import evaluate
from ds_classifier.loss import NoisedClassifier

BLACK = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)


def exact_logits(classifier, x, timesteps):
    """Return the logits in float64; the classifier's own end in fp32."""
    logits = []
    handle = classifier.out.register_forward_hook(lambda *arguments: logits.append(arguments[-1]))
    classifier(x, timesteps)
    handle.remove()
    return logits[0]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "digits32")


def test_the_lines_of_the_readme(run, digits, tmp_path):
    """Run them unchanged in a new process, on images of the training set."""
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
    """Compare accuracy and loss of the validation set at several levels."""
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


def test_levels_per_image_and_given_noise(run):
    model = ds_classifier.load(run)
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    levels = torch.tensor([0, 10, 100, 249])
    together = model.predict(images, levels)
    for i, t in enumerate(levels.tolist()):
        assert torch.allclose(model.predict(images, t)[i], together[i], atol=1e-6)
    noise = torch.randn(4, 8, 8, 3)
    assert not torch.allclose(model.predict(images, 100, noise), model.predict(images, 100))


def test_arrays_give_what_tensors_give(run):
    model = ds_classifier.load(run)
    images = np.random.RandomState(1).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    noise = np.random.RandomState(2).standard_normal((3, 8, 8, 3))[:, ::-1]
    images.flags.writeable = False
    expected = model.predict(
        torch.from_numpy(images.copy()),
        torch.tensor([3, 100, 200]),
        torch.from_numpy(noise.copy()).float(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.predict(images, np.array([3, 100, 200]), noise)
    assert torch.equal(found, expected)
    assert torch.equal(model.predict(images, np.int64(3), noise)[0], found[0])


def test_no_image_and_a_single_one(run, tmp_path):
    model = ds_classifier.load(run)
    nothing = model.read([])
    assert (nothing.shape, nothing.dtype) == ((0, 8, 8, 3), torch.uint8)
    assert model.predict(nothing, t=3).shape == (0, 10)
    file = tmp_path / "one.png"
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(file)
    for one in (file, str(file)):
        assert torch.equal(model.read(one), torch.full((1, 8, 8, 3), 7, dtype=torch.uint8))


def test_a_file_of_weights_has_no_names(run, tmp_path):
    weights = ds_classifier.load(run).classifier.state_dict()
    torch.save(weights, tmp_path / "model.pt")
    process = dict(noise_schedule="cosine", timestep_respacing="250")
    model = ds_classifier.load(tmp_path / "model.pt", **process)
    assert (model.classes, model.step) == (None, None)
    assert model.settings.image_size == 8
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    assert torch.equal(model.predict(images, 5), ds_classifier.load(run).predict(images, 5))


def test_the_description_is_short(run, tmp_path):
    model = ds_classifier.load(run)
    first, *facts = repr(model).splitlines()
    assert first.endswith("runs/digits32/checkpoints/step-00000007, step 7")
    assert [" ".join(line.split()) for line in facts] == [
        "classes 10: the 0, the 1, the 2, the 3, the 4, the 5, the 6, the 7, ...",
        "targets one class per image",
        "images 8 x 8 pixels, 3 channels",
        "noise cosine, t from 0 to 249, log-SNR from 10.1 to -19.8",
        f"network {sum(p.numel() for p in model.classifier.parameters()) / 1e6:.2f} M parameters, "
        "float32, on cpu",
    ]
    assert len(str(model.classifier).splitlines()) == 1
    torch.save(model.classifier.state_dict(), tmp_path / "model.pt")
    bare = repr(ds_classifier.load(tmp_path / "model.pt", noise_schedule="cosine"))
    assert bare.splitlines()[0] == f"Predictor from {tmp_path / 'model.pt'}"
    assert "10: no names are recorded" in bare


def test_images_of_pillow_are_read_as_their_files(run, tmp_path):
    """Check every mode that a PNG can have, wider than tall, with an EXIF orientation."""
    model, random = ds_classifier.load(run), np.random.RandomState(0)
    pixels = random.randint(0, 256, (20, 33, 4)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    modes = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]
    images = []
    for mode in modes:
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16))
        image.convert(mode).save(tmp_path / f"{mode}.png", exif=exif)
        images.append(Image.open(tmp_path / f"{mode}.png"))
    assert [image.mode for image in images[:6]] == modes[:6]
    paths = [tmp_path / f"{mode}.png" for mode in modes]
    expected = model.read(paths)
    assert torch.equal(model.read(images), expected)
    assert torch.equal(model.read([paths[0], images[1], str(paths[2])]), expected[:3])
    assert torch.equal(model.read(images[4]), expected[4:5])
    assert expected[4].float().mean() == pytest.approx(127, abs=20)  # they are not all black


def test_the_gradient_agrees_with_finite_differences(run):
    """Check the slope of log p(y | x_t) in float64; levels and classes are given in each form."""
    model = ds_classifier.load(run)
    random = np.random.RandomState(5)
    x_t = torch.from_numpy(random.standard_normal((3, 3, 8, 8)).astype(np.float32))
    t, y = torch.tensor([0, 100, 249]), torch.tensor([3, 0, 9])
    with torch.no_grad():  # as in a sampling loop
        gradient = model.gradient(x_t, t, y)
    assert (gradient.shape, gradient.dtype) == (x_t.shape, torch.float32)
    exact = ds_classifier.load(run).classifier.double()
    timesteps, step = torch.tensor([0, 401, 999]), 1e-5
    assert model.diffusion.model_timesteps(t).tolist() == timesteps.tolist()

    def log_p(x):  # [N]
        return exact_logits(exact, x, timesteps).log_softmax(dim=1)[range(3), y]

    for _ in range(3):
        direction = torch.from_numpy(random.standard_normal(x_t.shape))
        ahead, behind = (log_p(x_t.double() + s * direction) for s in (step, -step))
        slope = (gradient.double() * direction).sum(dim=(1, 2, 3))
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-5)
    assert torch.equal(model.gradient(x_t.numpy(), t.numpy(), [3, 0, 9]), gradient)
    assert torch.equal(
        model.gradient(x_t[1:2].double(), 100, 0), model.gradient(x_t[1:2], t[1], y[1])
    )
    assert model.gradient(x_t[:0], 3, y[:0]).shape == (0, 3, 8, 8)
    cond_fn = ds_classifier.guidance.classifier_gradient(model.classifier)
    assert torch.equal(cond_fn(x_t, timesteps, y=y), gradient)


X_T = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((BLACK, 0, 0), r"x_t: got .2, 8, 8, 3. torch.uint8; need .N, 3, 8, 8., floating"),
        ((X_T.permute(0, 2, 3, 1), 0, 0), r"x_t: got .2, 8, 8, 3. torch.float32"),
        ((X_T[0], 0, 0), r"x_t: got .3, 8, 8. torch.float32"),
        ((X_T, 250, 0), "t: got 250; need 0 to 249"),
        ((X_T, [1, 2, 3], 0), r"t: got .1, 2, 3.; .* one for each of 2 images"),
        ((X_T, 0, 10), "y: got 10; need 0 to 9, the classes' numbers, a whole number or"),
        ((X_T, 0, -1), "y: got -1"),
        ((X_T, 0, "the 3"), "y: got 'the 3'"),
        ((X_T, 0, True), "y: got True"),
        ((X_T, 0, torch.tensor([1.0, 2.0])), "y: got tensor"),
        ((X_T, 0, [1, 2, 3]), r"y: got .1, 2, 3.; .* one for each of 2 images"),
        ((X_T, 0, [[1], [2, 3]]), "y: got "),
        ((X_T, 0, [True, False]), "y: got .True"),
    ],
)
def test_gradient_refuses_wrong_input(run, arguments, words):
    with pytest.raises(ValueError, match=words):
        ds_classifier.load(run).gradient(*arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(images=torch.zeros(2, 8, 8, 3)), "need .N, 8, 8, 3. torch.uint8"),
        (dict(images=BLACK.permute(0, 3, 1, 2)), "need .N, 8, 8, 3."),
        (dict(images=BLACK, t=250), "t: got 250; need 0 to 249"),
        (dict(images=BLACK, t=-1), "t: got -1"),
        (dict(images=BLACK, t=10**30), "t: got 10{30}; need 0 to 249"),
        (dict(images=BLACK, t=1.7), "t: got 1.7; need 0 to 249, .* whole"),
        (dict(images=BLACK, t="5"), "t: got '5'"),
        (dict(images=BLACK, t=True), "t: got True"),
        (dict(images=BLACK, t=torch.tensor([1.0, 2.0])), "t: got tensor"),
        (dict(images=BLACK, t=torch.tensor([1, 2, 3])), "t: got tensor.*each of 2 images"),
        (dict(images=BLACK, t=torch.tensor([[1], [2]])), "t: got tensor.*each of 2 images"),
        (dict(images=[BLACK[0], BLACK[1]]), r"images: got a list; need .N, 8, 8, 3."),
        (dict(images=BLACK.float().numpy()), r"images: got .2, 8, 8, 3. torch.float32"),
        (dict(images=np.array(["a"])), "images: got a ndarray"),
        (dict(images=BLACK, noise="none"), r"noise: got a str; need .2, 8, 8, 3., floating"),
        (dict(images=BLACK, noise=BLACK), r"noise: got .2, 8, 8, 3. torch.uint8; need"),
        (dict(images=BLACK, noise=torch.zeros(1, 8, 8, 3)), "noise: got .1, 8, 8, 3."),
    ],
)
def test_predict_refuses_wrong_input(run, arguments, words):
    with pytest.raises(ValueError, match=words):
        ds_classifier.load(run).predict(**arguments)


def test_load_and_read_refuse_wrong_input(run, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        ds_classifier.load(tmp_path)
    with pytest.raises(
        ValueError, match="recipe: got 'imagenet'; need one of reference, imagenet64"
    ):
        ds_classifier.load(run, recipe="imagenet")
    with pytest.raises(ValueError, match="got depth; need names of"):
        ds_classifier.load(run, depth=4)
    with pytest.raises(ValueError, match="classifier_depth: got 'four'; need int, like 2"):
        ds_classifier.load(run, classifier_depth="four")
    with pytest.raises(ValueError, match="device: got sun; need one that torch can use"):
        ds_classifier.load(run, device="sun")
    (tmp_path / "no.png").write_text("no image")
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)).save(
        whole
    )
    cut.write_bytes(whole.read_bytes()[:5000])
    for wrong, words in [
        (tmp_path / "no.png", r"images\[1\], .*no\.png: no image in a known format"),
        (
            Image.open(cut),
            r"images\[1\], .*mode=RGB size=64x64.*: OSError: image file is truncated",
        ),
        (cut, r"images\[1\], .*cut\.png: OSError: "),
        (BLACK, r"images\[1\]: got .2, 8, 8, 3. torch.uint8; need a path or an image of Pillow"),
        (None, r"images\[1\]: got a NoneType; need"),
    ]:
        with pytest.raises(ValueError, match=words):
            ds_classifier.load(run).read([whole, wrong])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run):
    with pytest.raises(ValueError, match=r"device: got cuda; need .*do: device='cpu'"):
        ds_classifier.load(run, device="cuda")


def test_settings_of_a_run_cannot_be_contradicted(run):
    """Check settings given by name and by a recipe, whose training settings do not count."""
    with pytest.raises(ValueError, match=r"got image_size 64; need none for .*, in which it is 8"):
        ds_classifier.load(run, image_size=64)
    with pytest.raises(ValueError, match="got classifier_width 64 of recipe cifar32; need none"):
        ds_classifier.load(run, recipe="cifar32", image_size=8)
    assert ds_classifier.load(run, image_size=8, noise_schedule="cosine").step == 7
    of_build = {k: v for k, v in vars(PREDICTOR_SETTINGS).items() if k in RECIPES["digits32"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "small", of_build | {"lr": 1.0, "log_interval": 3})
        assert ds_classifier.load(run, recipe="small").step == 7


def test_flags_that_an_error_names_are_keywords(run, tmp_path):
    torch.save(ds_classifier.load(run).classifier.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"(?s)--image_size: .*--name is load\(\.\.\., name="):
        ds_classifier.load(tmp_path / "model.pt", image_size=64)


def test_import_is_cheap():
    code = (
        "import sys, ds_classifier\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert {'load', 'Predictor'} <= set(dir(ds_classifier))\n"
        "assert not hasattr(ds_classifier, 'wieghts')\n"
        "ds_classifier.load\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "name",
    ["weights.load_classifier", "guidance.classifier_gradient", "model.create_classifier"],
)
def test_packages_are_attributes(name):
    """Check names that the pages and the model cards of any version give, after a bare import."""
    code = f"import ds_classifier; assert callable(ds_classifier.{name})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_assumed_noise_of_a_bare_file_is_a_warning(run, tmp_path):
    torch.save(ds_classifier.load(run).classifier.state_dict(), tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="linear noise, 1000 steps; if it is another: load"):
        ds_classifier.load(tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds_classifier.load(tmp_path / "model.pt", noise_schedule="cosine")


def test_the_name_of_version_0_1_takes_settings(run, tmp_path):
    from ds_classifier.config import Settings
    from ds_classifier.weights import load_classifier

    torch.save(ds_classifier.load(run).classifier.state_dict(), tmp_path / "model.pt")
    source, _ = load_classifier(tmp_path / "model.pt", Settings(noise_schedule="cosine"))
    assert source.settings.noise_schedule == "cosine"


def test_weights_that_are_not_finite_are_refused(tmp_path):
    settings = Settings(**SMALL)
    weights = filled(tensors_of(settings))
    weights["out.0.bias"][3] = float("inf")
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt, whose weights are not all finite"):
        ds_classifier.load(tmp_path / "model.pt", noise_schedule="cosine")
