"""Test guidance by classifiers of several classes, soft vectors and values."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import make_run
from small_models import CLASSES, training_set
from torch import nn

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.config import Settings
from ds_classifier.data.labels.targets import Targets
from ds_classifier.data.shards import INDEX, MANIFEST, open_shards, parse_manifest
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.guidance import Guide, classifier_gradient
from ds_classifier.guidance.exact_denoiser import ExactDenoiser, read_images
from ds_classifier.guidance.fidelity import NEAREST
from ds_classifier.guidance.gradient import log_probability
from ds_classifier.guidance.guided_sampling import GuidedSampling, load_guided_sampling
from ds_classifier.guidance.sample_files import scale_folder
from ds_classifier.guidance.sampling import ReverseProcess, exact_denoiser, sample
from ds_classifier.report.guidance import read_samples
from launch import sample as command

VALUES = Targets("values", (10.0, 11.5, 14.0, 20.0), (11.0, 12.0, 18.0), "weight")
SEVERAL, SOFT = Targets("classes"), Targets("soft")
K, SHAPE = 4, (2, 3, 3)
WANTED = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
ETA = torch.tensor([0.5, -0.3, 0.0])
ASKED = [
    (Targets(), torch.tensor([3, 0, 1])),
    (SOFT, torch.tensor([3, 0, 1])),
    (SEVERAL, WANTED),
    (VALUES, ETA),
]


class Linear(nn.Module):
    """Logits W x; `curved` takes a sine of them, so that no closed form of a line fits."""

    def __init__(self, curved: bool):
        super().__init__()
        random = np.random.RandomState(2)
        self.rows = torch.from_numpy(random.standard_normal((K, np.prod(SHAPE))))
        self.curved = curved

    def forward(self, x, t):
        logits = x.flatten(1) @ self.rows.to(x).T
        return 3 * torch.sin(logits) + t[:, None] / 100 if self.curved else logits


def points():
    return torch.from_numpy(np.random.RandomState(3).standard_normal((3, *SHAPE)))


def log_p_in_numpy(targets: Targets, logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return log p(y | x), [N], as the head of gradient.py has it, in float64."""
    if targets.kind == "classes":
        return np.array([sum(-np.log1p(np.exp(-f[k])) for k in np.flatnonzero(wanted))
                         for f, wanted in zip(logits, y, strict=True)])  # fmt: skip
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if targets.kind == "values":
        return np.log((p * np.exp(y[:, None].astype(float) * np.array(targets.values))).sum(1))
    return np.log(p[np.arange(len(y)), y])


@pytest.mark.parametrize(("targets", "y"), ASKED, ids=lambda a: getattr(a, "kind", ""))
def test_the_slope_is_that_of_finite_differences(targets, y):
    """Compare with a log p written in numpy, along random directions, with scale 2."""
    model, x, t, step = Linear(curved=True), points(), torch.tensor([0, 50, 900]), 1e-5
    gradient = classifier_gradient(model, scale=2.0, targets=targets)(x, t, y=y)
    for seed in range(4):
        direction = torch.from_numpy(np.random.RandomState(seed).standard_normal(x.shape))
        ahead, behind = (
            log_p_in_numpy(targets, model(x + s * direction, t).numpy(), y.numpy())
            for s in (step, -step)
        )
        slope = (gradient * direction).sum(dim=(1, 2, 3)).numpy()
        np.testing.assert_allclose(slope, (ahead - behind) / step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("targets", "y"), ASKED, ids=lambda a: getattr(a, "kind", ""))
def test_the_closed_form_of_a_linear_classifier(targets, y):
    model, x, t = Linear(curved=False), points(), torch.zeros(3)
    rows, logits = model.rows, model(x, t)
    p = logits.softmax(dim=1)
    if targets.kind == "classes":
        weights = y * (1 - logits.sigmoid())
    elif targets.kind == "values":
        tilted = p * torch.exp(y[:, None].double() * torch.tensor(targets.values))
        weights = tilted / tilted.sum(dim=1, keepdim=True) - p
    else:
        weights = F.one_hot(y, K) - p
    expected = (weights @ rows).view_as(x)
    got = classifier_gradient(model, targets=targets)(x, t, y=y)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if targets.kind in ("classes", "values"):
        assert (got[2] == 0).all()  # asked for nothing: not guided


def test_one_class_of_several_is_a_row_with_one_1():
    logits = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    one = log_probability(logits, torch.tensor([2, 0, 3]), SEVERAL)
    assert torch.equal(one, log_probability(logits, torch.eye(K)[[2, 0, 3]], SEVERAL))


@pytest.mark.parametrize("shift", [0.0, 1.7e9])
def test_only_differences_between_values_count(shift):
    """Check seconds since 1970, whose products with eta are past the digits of fp32."""
    values = tuple(v + shift for v in VALUES.values)
    logits = torch.randn(3, K, generator=torch.Generator().manual_seed(1), requires_grad=True)
    log_p = log_probability(logits, ETA, Targets("values", values, (0.0, 1.0, 2.0)))
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    p = logits.detach().double().softmax(dim=1)
    tilted = p * torch.exp(ETA[:, None].double() * torch.tensor(VALUES.values))
    expected = tilted / tilted.sum(dim=1, keepdim=True) - p
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_temperatures():
    """Compare with the two-class softmax of each sigmoid, and with a tilt of the joint logits."""
    logits = torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    how = dict(joint_temperature=2.0, marginal_temperature=0.5)
    two = torch.stack([torch.zeros_like(logits), logits], dim=2)  # absent, present
    each = 2.0 * logits - torch.logsumexp(0.5 * two, dim=2)
    got = log_probability(logits, WANTED, SEVERAL, **how)
    torch.testing.assert_close(got, (each * WANTED).sum(dim=1))
    values = torch.tensor(VALUES.values) - np.mean(VALUES.values)
    joint = (torch.exp(2.0 * logits) * torch.exp(ETA[:, None] * values)).sum(dim=1).log()
    got = log_probability(logits, ETA, VALUES, **how)
    torch.testing.assert_close(got, joint - torch.logsumexp(0.5 * logits, dim=1))


@pytest.mark.parametrize(
    ("targets", "y", "words"),
    [
        (
            SEVERAL,
            torch.ones(3, 5),
            r"\[3, 5\] torch.float32; need one .*or several, \[3, 4\] of 0",
        ),
        (SEVERAL, torch.full((3, K), 0.5), "need 0 and 1"),
        (SEVERAL, torch.tensor([0, 1, 4]), "need 0 to 3"),
        (SEVERAL, None, "got no classes y"),
        (SOFT, WANTED, r"need one for each of 3 images, \[3\] int64$"),
        (VALUES, None, r"got no eta y; need a real number for each of 3 images, \[3\]"),
        (VALUES, torch.ones(2), r"got eta y \[2\]"),
        (VALUES, torch.tensor([0, 1, torch.inf]), "need finite numbers"),
    ],
)
def test_what_cannot_be_asked_for(targets, y, words):
    cond_fn = classifier_gradient(Linear(curved=False), targets=targets)
    with pytest.raises(ValueError, match=words):
        cond_fn(points(), torch.zeros(3), y=y)


@pytest.mark.parametrize(
    ("targets", "y", "every"),
    [(VALUES, 0.5, torch.full((3,), 0.5)), (SEVERAL, 2, torch.tensor([2, 2, 2])),
     (SEVERAL, WANTED, WANTED)],
    ids=["eta", "a class", "several"],
)  # fmt: skip
def test_a_guide_asks_as_the_gradient_does(targets, y, every):
    """Compare at a level of the classifier's own process, in whose coordinates nothing changes."""
    diffusion, model = create_gaussian_diffusion(), Linear(curved=True)
    alpha, sigma = (float(n) for n in diffusion.scales(torch.tensor([400])))
    guide = Guide(model, diffusion, scale=1.5, targets=targets)
    cond_fn = classifier_gradient(model, scale=1.5, targets=targets)
    expected = cond_fn(points(), torch.tensor([400.0] * 3), y=every)
    torch.testing.assert_close(guide(points(), alpha, sigma, y), expected, rtol=1e-3, atol=1e-3)


class OfTrainingSet(nn.Module):
    """The best classifier of a training set: the logits of p(label | x_t), for labels by image.

    labels: [M], then the logits are log p; or [M, K] of 0 and 1, then they are log-odds.
    """

    def __init__(self, images, labels, diffusion):
        super().__init__()
        self.clean, self.labels = images.double().flatten(1) / 127.5 - 1, labels
        self.alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod)

    def forward(self, x, t):
        a = self.alphas_cumprod[t][:, None]
        distances = (x.double().flatten(1)[:, None] - a.sqrt()[..., None] * self.clean).square()
        log_w = (-distances.sum(-1) / (2 * (1 - a))).log_softmax(dim=1)
        if self.labels.dim() == 1:
            of_class = [log_w[:, self.labels == k].logsumexp(1) for k in range(K)]
            return torch.stack(of_class, dim=1)
        odds = [
            log_w[:, has].logsumexp(1) - log_w[:, ~has].logsumexp(1) for has in self.labels.T > 0
        ]
        return torch.stack(odds, dim=1)


def guided_nearest(labels, targets, y, m):
    """Draw samples guided by the best classifier; return their nearest training images."""
    images, _ = training_set(m=m)
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    process = ReverseProcess(
        create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="100")
    )
    generator = torch.Generator().manual_seed(7)
    x, _ = sample(
        process,
        exact_denoiser(ExactDenoiser(images, torch.arange(m) % CLASSES, CLASSES), process),
        lambda i: torch.randn(len(y), 2, 4, 4, generator=generator),
        y,
        cond_fn=classifier_gradient(OfTrainingSet(images, labels, diffusion), targets=targets),
    )
    return torch.cdist(x.flatten(1), images.flatten(1) / 127.5 - 1).argmin(dim=1)


@pytest.mark.parametrize("eta", [0.3, -0.3])
def test_the_best_guide_tilts_the_data_by_exp_eta_v(eta):
    """Compare the share of each bin with p(v) exp(eta v), normalised: the theorem it rests on."""
    labels, n = torch.arange(20) % K, 600
    nearest = guided_nearest(labels, VALUES, torch.full((n,), eta), m=20)
    share = np.bincount(labels[nearest].numpy(), minlength=K) / n
    tilted = np.exp(eta * np.array(VALUES.values))
    expected = tilted / tilted.sum()
    assert np.abs(expected - 0.25).max() > 0.2
    error = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(share - expected) < 5 * error + 0.03).all(), (share, expected)


def test_the_best_guide_reaches_two_classes_at_once():
    labels = torch.tensor([[i & 1, i & 2, i & 4, i & 8] for i in range(16)]).clamp_max(1)
    wanted = torch.tensor([1, 0, 1, 0]).expand(60, K)
    shown = labels[guided_nearest(labels, SEVERAL, wanted, m=16)]
    # A quarter of the images have both. It is not all, since the sum of both log p takes them as
    # independent given x_t.
    assert (shown[:, [0, 2]] == 1).all(dim=1).float().mean() > 0.75
    assert 0.2 < shown[:, [1, 3]].float().mean() < 0.8  # not asked for, either way


# -------------------------------------------------------------------------- the whole program

TENS = Targets("values", tuple(float(k) for k in range(10)), tuple(k + 0.5 for k in range(9)), "v")


def of_targets(split, folder, targets, vectors=None):
    """Copy a split of the digits, and write other targets into its manifest; return the copy."""
    shutil.copytree(split, folder)
    digest = ""
    if vectors is not None:
        np.save(folder / "targets.npy", vectors)
        digest = files.sha256(folder / "targets.npy")
    old = parse_manifest((folder / MANIFEST).read_bytes(), folder)
    new = dataclasses.replace(old, targets=targets, targets_sha256=digest)
    (folder / MANIFEST).write_text(new.to_json())
    return folder


def of_digits(kind, split, folder):
    """Return a copy of the digits with targets of a kind, the targets, and those of each image.

    Of several classes an image has two: its digit and the next one.
    """
    labels = np.load(split / INDEX)["label"]
    if kind == "values":
        return of_targets(split, folder, TENS), TENS, labels.astype(float)
    vectors = np.eye(10, dtype=np.float32)[labels]
    if kind == "soft":
        vectors = 0.7 * vectors + 0.03
    else:
        vectors = np.maximum(vectors, np.eye(10)[(labels + 1) % 10]).astype(np.uint8)
    return of_targets(split, folder, Targets(kind), vectors), Targets(kind), vectors


@pytest.fixture
def alone(monkeypatch):
    """Make this process the only rank, as `distributed.init` would."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setattr(distributed, "init", lambda: torch.device("cpu"))
    monkeypatch.setattr(distributed, "finish", lambda: None)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("kind", "flags", "asked", "sheets"),
    [
        ("classes", ["--classes", "1+2,3"], [[1, 2], [3]], ["class_0001+0002", "class_0003"]),
        ("soft", ["--classes", "4,2"], [4, 2], ["class_0002", "class_0004"]),
        ("values", ["--eta", "-0.5"], [-0.5], ["eta_-0.5"]),
    ],
)
def test_the_program_asks_and_measures_by_the_kind(
    digits, tmp_path, capsys, kind, flags, asked, sheets
):
    """Compare the files with what was asked for, and the measure with the nearest images."""
    data, targets, of_images = of_digits(kind, digits / "val", tmp_path / "data")
    run = make_run(tmp_path / "run", num_classes=10, targets=targets.to_json())
    words = ["--classifier_path", run, "--data_dir", data, "--classifier_scale", 0, 3, *flags]
    words += ["--num_samples", 6, "--timestep_respacing", 3, "--measure"]
    assert command.main(list(map(str, words))) == 0, capsys.readouterr().err
    assert "Not compared with the best possible classifier" in capsys.readouterr().out
    folder = run / "samples"
    assert sorted(p.stem for p in scale_folder(folder, 3).glob("*.png")) == sheets
    facts = json.loads((folder / "samples.json").read_text())
    assert (facts["classes"], facts["eta"]) == (([], -0.5) if kind == "values" else (asked, None))
    images, _ = read_images(open_shards(data), image_size=16)
    clean = images.permute(0, 2, 3, 1).numpy().reshape(len(images), -1).astype(float)
    measured = json.loads((folder / "fidelity.json").read_text())
    assert measured["kind"] == kind
    for scale in (0.0, 3.0):
        pixels, labels = read_samples(folder, scale)
        x = pixels.reshape(6, -1).astype(float)
        nearest = [int(((clean - one) ** 2).sum(axis=1).argmin()) for one in x]
        found = of_images[nearest]
        for i, label in enumerate(labels):
            wanted = asked[i % len(asked)]
            assert (np.flatnonzero(label).tolist() if kind == "classes" else label) == wanted
        if kind == "classes":
            mean = np.mean(
                [(row[wanted] == 1).all() for row, wanted in zip(found, 3 * asked, strict=True)]
            )
        elif kind == "soft":
            mean = np.mean(found[range(6), 3 * asked])
        else:
            mean = found.mean()
        assert measured["shares"][f"{scale:g}"] == pytest.approx(mean, abs=1e-5)
    page = (run / "report.html").read_text()
    assert {"classes": "dog: a | b + héron", "soft": ">```<", "values": "eta -0.5"}[kind] in page
    assert NEAREST[kind][1:] in page


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("values", [], "got no --eta; need --eta for bins of a value of v"),
        ("values", ["--classes", "3", "--eta", "1"], "got --classes; need --eta"),
        ("class", ["--eta", "1"], "--eta: got 1; need a classifier of values, not of one class"),
        ("class", ["--classes", "1+2"], "--classes: got '1\\+2'; need numbers from 0 to 9"),
        ("classes", ["--classes", "1+x"], "--classes: got 'x'; .*, and \\+ between those of one"),
    ],
)
def test_what_the_program_cannot_be_asked_for(kind, flags, words):
    arguments, _ = command.parse([*flags, "--classifier_path", "x", "--data_dir", "x"])
    with pytest.raises(ValueError, match=words):
        guided_by(kind, list("0123456789")).asked(arguments.classes, arguments.eta)


def guided_by(kind, names):
    """Return guided sampling, without networks, by a classifier of a kind."""
    targets = TENS if kind == "values" else Targets(kind)
    settings = Settings(num_classes=len(names))
    return GuidedSampling(settings, *[None] * 6, torch.device("cpu"), names, {}, targets=targets)


def loaded(path, data_dir, **own):
    """Return what the program loads."""
    how = dict(model_path="", unet={}, classifier_fp16=False, unet_fp16=False)
    return load_guided_sampling(path, own.pop("given", {}), data_dir=str(data_dir), **how | own,
                                device=torch.device("cpu"))  # fmt: skip


def test_other_targets_than_the_data_are_refused(digits, tmp_path):
    data, _, _ = of_digits("classes", digits / "val", tmp_path / "data")
    run = make_run(tmp_path / "run", num_classes=10)
    words = "with several classes per image; need the targets of .*, one class per image"
    with pytest.raises(ValueError, match=words):
        loaded(run, data)
    words = "--classifier_path: got bayes; need a classifier for .*, with several classes"
    with pytest.raises(ValueError, match=words):
        loaded(None, data, given={"image_size": 16})
    unguided = loaded(None, data, given={"image_size": 16}, unguided=True)
    assert unguided.asked("", None).tolist() == list(range(10))  # its denoiser needs no targets
    several = make_run(tmp_path / "several", num_classes=10, targets={"kind": "classes"})
    with pytest.raises(
        ValueError, match="--class_cond: got True; need False for a classifier of s"
    ):
        loaded(several, "", unet={"class_cond": True})


def test_class_names_with_a_plus():
    guided = guided_by("classes", ["C++", "C", "D"])
    asked = guided.asked("C++, C + D,2+0", None)
    assert asked.tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 1]]
    assert guided.asked("", None).tolist() == np.eye(3).tolist()
