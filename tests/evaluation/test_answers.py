"""Metrics and sums of several classes, soft vectors and bins of a value against loops."""

import math

import numpy as np
import pytest
import torch
from other_targets import HAS, SQUARES, soft_vectors
from scipy.stats import entropy
from sklearn.metrics import average_precision_score, log_loss

from ds_classifier import distributed
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.labels.targets import Targets
from ds_classifier.data.loader import Batch
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.evaluation import evaluate
from ds_classifier.evaluation.levels import AnswerSums, LevelSums
from ds_classifier.evaluation.meter import Meter
from ds_classifier.evaluation.metrics import scores_of_guessing
from ds_classifier.loss import NoisedClassifier, binary_cross_entropy

SEVERAL, SOFT = Targets("classes"), Targets("soft")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)


def several(count, classes, seed=0):
    """Return logits, labels, gradient norms and weights of several classes per image."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, classes, generator=generator) < 0.3).float()
    logits = 2 * torch.randn(count, classes, generator=generator) + 2 * labels - 1
    weights = (torch.rand(count, generator=generator) < 0.9).float()
    logits[weights == 0] = math.nan  # an undecodable image may give any number
    return logits, labels, torch.rand(count, generator=generator), weights


# ------------------------------------------------------------------------------------ the meter


def test_the_meter_of_several_classes():
    logits, labels, _, weights = several(60, 5)
    t = torch.arange(60)
    losses = binary_cross_entropy(logits, labels, t)
    meter = Meter(60, "cpu", SEVERAL)
    meter.add(losses=losses, logits=logits, labels=labels, t=t, weights=weights)
    means, weight, _ = meter.read()
    seen = [i for i in range(60) if weights[i] > 0]
    right = {i: np.mean([(logits[i, k] > 0) == bool(labels[i, k]) for k in range(5)]) for i in seen}
    assert weight == len(seen)
    assert means["acc"] == pytest.approx(np.mean(list(right.values())), rel=1e-6)
    assert means["acc_q0"] == pytest.approx(np.mean([v for i, v in right.items() if i < 15]))
    assert means["loss"] == pytest.approx(float(losses[seen].mean()), rel=1e-6)
    assert not any("@" in name for name in means)


def test_the_meter_of_values_and_of_soft_vectors():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 10, generator=generator)
    labels = torch.randint(0, 10, (40,), generator=generator)
    rest = dict(losses=torch.ones(40), t=torch.zeros(40, dtype=torch.int64))
    rest["weights"] = torch.ones(40)
    meter = Meter(1000, "cpu", SQUARES)
    meter.add(logits=logits, labels=labels, **rest)
    means = meter.read().means
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    errors = [abs(p[i] @ np.arange(10) ** 2 - int(labels[i]) ** 2) for i in range(40)]
    assert means["mae"] == pytest.approx(np.mean(errors), rel=1e-5)
    soft = Meter(1000, "cpu", SOFT)
    soft.add(logits=logits, labels=torch.from_numpy(soft_vectors(labels.numpy())), **rest)
    found = soft.read().means
    assert found == {name: value for name, value in means.items() if "mae" not in name}


# ------------------------------------------------------------------------------------- the sums


def test_the_sums_of_yes_no_answers():
    logits, labels, norms, weights = several(300, 4)
    sums = AnswerSums(2, 4, "cpu")
    for part in torch.arange(300).split(77):
        sums.add(
            1,
            logits[part],
            labels=labels[part],
            grad_norms=norms[part],
            weights=weights[part],
        )
    seen = weights > 0
    f, y = logits[seen].double().numpy(), labels[seen].numpy()
    p = 1 / (1 + np.exp(-f))
    numbers = sums.read()
    got, of_class = numbers.overall(1), numbers.per_class(1)
    precision = [average_precision_score(y[:, k], p[:, k]) for k in range(4)]
    assert (got["samples"], got["not_finite"]) == (numbers.samples(1), 0) == (len(y), 0)
    assert got["loss"] == pytest.approx(log_loss(y.ravel(), p.ravel()))
    assert got["acc"] == pytest.approx(np.mean((p > 0.5) == y))
    assert got["mAP"] == pytest.approx(np.mean(precision), abs=2e-3)
    assert got["grad_norm"] == pytest.approx(float(norms[seen].mean()), rel=1e-6)
    assert of_class["samples"] == y.sum(axis=0).tolist()
    assert of_class["correct"] == ((p > 0.5) == y).sum(axis=0).tolist()
    assert of_class["answers"] == [len(y)] * 4
    assert of_class["ap"] == pytest.approx(precision, abs=2e-3)
    assert of_class["loss"] == pytest.approx([log_loss(y[:, k], p[:, k]) for k in range(4)])
    confidence, right = np.maximum(p, 1 - p).ravel(), ((p > 0.5) == y).ravel()
    bins = np.ceil(confidence * 15) - 1
    gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)]
    assert got["ece"] == pytest.approx(sum(gaps) / len(right))
    empty = numbers.overall(0)
    assert (empty["samples"], empty["mAP"], empty["acc"]) == (0, None, None)


def test_an_image_without_finite_answers_counts_as_wrong():
    logits, labels = torch.tensor([[3.0, -3.0]] * 3), torch.tensor([[1.0, 0.0]] * 3)
    logits[1, 0] = math.nan
    sums = AnswerSums(1, 2, "cpu")
    sums.add(0, logits, labels=labels, grad_norms=torch.ones(3), weights=torch.ones(3))
    got = sums.read().overall(0)
    assert (got["samples"], got["not_finite"], got["acc"]) == (3, 1, pytest.approx(2 / 3))
    assert got["loss"] == pytest.approx(math.log(1 + math.exp(-3)))


def test_a_calibrated_answer_to_soft_vectors_has_no_calibration_error():
    """Probabilities equal to the soft vectors are right, though the likeliest class always is."""
    vectors = torch.from_numpy(soft_vectors(np.arange(10)))
    sums = LevelSums(1, 10, "cpu", SOFT)
    log_p = vectors.double().clamp_min(1e-12).log()
    ones = torch.ones(10)
    sums.add(0, log_p, labels=vectors, grad_norms=ones, weights=ones)
    numbers = sums.read()
    got = numbers.overall(0)
    assert (got["acc@1"], got["ece"]) == (1.0, pytest.approx(0, abs=1e-6))
    assert got["loss"] == pytest.approx(entropy([0.8, 0.2]), rel=1e-6)
    assert numbers.per_class(0)["samples"] == [1] * 10
    (row,) = numbers.reliability(0)
    assert (row["samples"], row["correct"]) == (10, pytest.approx(8, rel=1e-6))


# ------------------------------------------------------------------------------- the whole set


class Linear(torch.nn.Module):
    """A classifier whose gradient is known without autograd."""

    def __init__(self, numbers, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(classes, numbers) / 5)

    def forward(self, x, timesteps):
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("targets", [SEVERAL, SOFT, SQUARES], ids=lambda targets: targets.kind)
def test_levels_and_validation_agree_with_a_loop(targets):
    torch.manual_seed(0)
    diffusion = create_gaussian_diffusion(diffusion_steps=20)
    digits = torch.arange(24) % 10
    labels = {
        "classes": torch.from_numpy(HAS[digits]).float(),
        "soft": torch.from_numpy(soft_vectors(digits.numpy())),
        "values": digits,
    }[targets.kind]
    classes = labels.shape[1] if labels.dim() == 2 else 10
    model = Linear(48, classes)
    pixels = torch.randint(0, 256, (24, 4, 4, 3)).to(torch.uint8)
    positions, ones = torch.arange(24), torch.ones(24)
    loader = [Batch(pixels, labels, positions, ones, ones, [])]
    where = dict(samples=24, device=torch.device("cpu"), targets=targets)
    (numbers,), _ = evaluate.evaluate_levels(
        [evaluate.classifier_posterior(model, diffusion, targets.kind)],
        diffusion,
        loader,
        levels=[0],
        num_classes=classes,
        **where,
    )
    module = NoisedClassifier(model, diffusion)
    if targets.kind == "classes":
        module.loss = binary_cross_entropy
    means, _ = evaluate.evaluate(module, loader, t=0, **where)
    got = numbers.overall(1)
    for name in {"loss", "acc", "acc@1", "acc@5", "mae", "mAP"} & means.keys():
        assert got[name] == pytest.approx(means[name], rel=1e-5), name
    assert ("mAP" in means, "mae" in means) == (
        targets.kind == "classes",
        targets.kind == "values",
    )
    # The gradient by hand: of the image's classes, of the likeliest class, of the image's bin.
    noise = keyed_noise(0, "validation", positions, (4, 4, 3))
    alpha, sigma = diffusion.scales(torch.zeros(1, dtype=torch.int64))
    x = alpha * (pixels / 127.5 - 1) + sigma * noise
    f = (x.permute(0, 3, 1, 2).flatten(1) @ model.weight.T).detach().double().numpy()
    weight, norms = model.weight.detach().double().numpy(), []
    for i in range(24):
        if targets.kind == "classes":
            direction = labels[i].numpy() / (1 + np.exp(f[i]))  # d log sigmoid(f) = sigmoid(-f)
        else:
            direction = np.eye(10)[digits[i]] - np.exp(f[i]) / np.exp(f[i]).sum()
        norms.append(np.linalg.norm(direction @ weight))
    assert got["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)


# ----------------------------------------------------------------------------------- guessing


def test_guessing_several_classes_by_their_frequencies():
    labels = HAS[np.repeat(np.arange(10), np.arange(10))]
    share = labels.mean(axis=0)
    guess = np.tile(share, (len(labels), 1))
    assert scores_of_guessing(labels, SEVERAL) == pytest.approx(
        {
            "acc": np.mean((guess > 0.5) == labels),
            "loss": log_loss(labels.ravel(), guess.ravel()),
            "mAP": np.mean([average_precision_score(labels[:, k], guess[:, k]) for k in range(4)]),
        }
    )


def test_guessing_soft_vectors_and_values():
    digits = np.repeat(np.arange(10), np.arange(10))
    vectors = soft_vectors(digits)
    mean = vectors.mean(axis=0, dtype=float)
    assert scores_of_guessing(vectors, SOFT) == pytest.approx(
        {
            "acc@1": 9 / 45,
            "loss": np.mean([-(vector * np.log(mean + 1e-300)).sum() for vector in vectors]),
            "least": entropy([0.8, 0.2]),
        },
        rel=1e-6,
    )
    found = scores_of_guessing(digits, SQUARES)
    assert found["mae"] == pytest.approx(np.mean(np.abs(digits**2 - np.mean(digits**2))))
