"""The weights of classes and samples, counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ds_classifier import distributed
from ds_classifier.config import Settings
from ds_classifier.config.settings import check_settings
from ds_classifier.data.labels.targets import Targets
from ds_classifier.data.loader import Batch
from ds_classifier.data.shards import INDEX_DTYPE
from ds_classifier.data.splits import settled_by_data
from ds_classifier.diffusion import (
    UniformSampler,
    create_gaussian_diffusion,
    high_noise_weights,
)
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.evaluation.meter import Meter
from ds_classifier.training import balance
from ds_classifier.training.balance import Balance, measure
from ds_classifier.training.setup import Setup
from ds_classifier.training.step import Objective, train_step

LABELS = [0] * 6 + [1] * 3 + [3]  # of four classes, of which class 2 has no image
OWN = [1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 4.0, 1.0, 0.25, 3.0]


def shards(labels, own=None, classes=4):
    index = np.zeros(len(labels), INDEX_DTYPE)
    index["label"] = labels
    manifest = SimpleNamespace(classes=[str(k) for k in range(classes)])
    own = None if own is None else np.array(own, np.float32)
    return SimpleNamespace(index=index, manifest=manifest, sample_weights=own)


def by_hand(kind, labels, own):
    """Return the weight of each sample: a sum over samples, one by one."""
    frequency = {k: labels.count(k) / len(labels) for k in labels}
    factor = {"equal": lambda f: 1 / f, "sqrt": lambda f: f**-0.5, "": lambda f: 1.0}[kind]
    weights = [s * factor(frequency[k]) for k, s in zip(labels, own, strict=True)]
    mean = sum(weights) / len(weights)
    return [w / mean for w in weights]


def of(batch_labels, own, found):
    """Return the weights that a batch of these samples gets."""
    n = len(own)
    zeros = torch.zeros(n, dtype=torch.int64)
    batch = Batch(
        torch.zeros(n, 8, 8, 3, dtype=torch.uint8), torch.tensor(batch_labels), zeros,
        torch.ones(n), torch.tensor(own), [],
    )  # fmt: skip
    found = Balance(**found | {"by_class": torch.tensor(found["by_class"])})
    return found, found.weights(batch)


@pytest.mark.parametrize("own", [None, OWN], ids=["labels", "weights"])
@pytest.mark.parametrize("kind", ["equal", "sqrt", ""])
def test_weights_and_effective_size_are_those_by_hand(kind, own, monkeypatch):
    monkeypatch.setattr(balance, "INDEX_ROWS", 4)  # three blocks
    expected = by_hand(kind, LABELS, own or [1.0] * 10)
    found, weights = of(LABELS, own or [1.0] * 10, measure(shards(LABELS, own), kind))
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert float(weights.mean()) == pytest.approx(1)
    assert (found.smallest, found.largest) == pytest.approx((min(expected), max(expected)))
    kish = sum(expected) ** 2 / sum(w * w for w in expected)
    assert found.effective == pytest.approx(kish)
    assert found.images == 10
    assert found.by_class[2] == 0


def test_equal_gives_every_class_the_same_sum():
    _, weights = of(LABELS, [1.0] * 10, measure(shards(LABELS), "equal"))
    sums = torch.bincount(torch.tensor(LABELS), weights)
    assert sums.tolist() == pytest.approx([10 / 3, 10 / 3, 0, 10 / 3])


def test_the_line_says_them():
    found, _ = of(LABELS, [1.0] * 10, measure(shards(LABELS), "equal"))
    # Weights 10/18, 10/9, 10/3; 100 / (6 (10/18)^2 + 3 (10/9)^2 + (10/3)^2) = 6.
    assert str(found) == (
        "0.556 to 3.33 per image, 1 on average; they count like 6 of 10 images (Kish)"
    )


def test_vectors_have_their_own_weights_alone():
    found = measure(shards(LABELS, OWN), "")
    vectors = torch.zeros(10, 4)
    vectors[:, 1:3] = 1
    _, weights = of(vectors.tolist(), OWN, found)
    torch.testing.assert_close(weights, torch.tensor(OWN) / (sum(OWN) / 10))


@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_class_balance_needs_one_class_per_image(kind):
    manifest = SimpleNamespace(classes=["a", "b"], targets=Targets(kind), arrays=None)
    with pytest.raises(ValueError, match=r"--class_balance: got equal for data with .*do: drop"):
        settled_by_data(Settings(class_balance="equal"), manifest, given=[])
    assert settled_by_data(Settings(), manifest, given=[]).num_classes == 2
    assert any(
        "--class_balance: got 'all'" in p for p in check_settings(Settings(class_balance="all"))
    )


class Engine:
    """An engine that keeps the loss it is given, of a classifier whose losses are the labels."""

    device = torch.device("cpu")

    def gradient_accumulation_steps(self):
        return 1

    def train_batch_size(self):
        return 10

    def __call__(self, images, labels, t, noise, recent):
        return labels + 1.0, torch.zeros(len(labels), 4)

    def backward(self, loss):
        self.loss = float(loss)

    def step(self):
        pass


def one_step(monkeypatch, **weights):
    """Return the loss of a step, its mean loss in the log, and the timesteps of the samples.

    The last sample did not decode. weights: of `Objective`.
    """
    monkeypatch.setattr(deepspeed_engine, "learning_rate", lambda engine: 0.0)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)
    batch = Batch(
        images=torch.zeros(10, 8, 8, 3, dtype=torch.uint8),
        labels=torch.tensor(LABELS),
        positions=torch.arange(10),
        weights=torch.tensor([1.0] * 9 + [0.0]),
        importance=torch.tensor(OWN),
        bad=[],
    )
    engine, meter = Engine(), Meter(50, "cpu")
    objective = Objective(UniformSampler(50), 0, True, **weights)
    trained = train_step(engine, iter([batch]), objective, meter)
    return engine.loss, meter.read().means["loss"], trained.samples[0, 1].tolist()


def test_the_loss_is_weighted_and_the_log_is_not(monkeypatch):
    """The mean over the micro-batch, of which a bad sample adds nothing but its place."""
    found, _ = of(LABELS, OWN, measure(shards(LABELS, OWN), "sqrt"))
    loss, logged, _ = one_step(monkeypatch, balance=found)
    expected = by_hand("sqrt", LABELS, OWN)
    losses = [k + 1.0 for k in LABELS]
    assert loss == pytest.approx(
        sum(w * x for w, x in zip(expected[:9], losses[:9], strict=True)) / 10
    )
    assert logged == pytest.approx(sum(losses[:9]) / 9)


def test_a_sample_counts_by_its_timestep_too(monkeypatch):
    found, _ = of(LABELS, OWN, measure(shards(LABELS, OWN), "sqrt"))
    of_levels = torch.linspace(1, 99, 50)
    loss, logged, timesteps = one_step(monkeypatch, balance=found, level_weights=of_levels)
    both = [w * (1 + 2 * t) for w, t in zip(by_hand("sqrt", LABELS, OWN), timesteps, strict=True)]
    losses = [k + 1.0 for k in LABELS]
    assert loss == pytest.approx(sum(w * x for w, x in zip(both[:9], losses[:9], strict=True)) / 10)
    assert logged == pytest.approx(sum(losses[:9]) / 9)


@pytest.mark.parametrize("own", [[0.0] * 10, [1.0] * 9 + [np.inf]])
def test_weights_that_have_no_mean_are_refused(own):
    with pytest.raises(ValueError, match=r"weights of the data: got a sum of (0|inf), the"):
        measure(shards(LABELS, own), "")


@pytest.mark.parametrize(("weight", "even"), [(1.0, True), (10.0, False)])
def test_a_run_weighs_its_timesteps_as_its_images_and_process_ask(weight, even):
    """Images of 8 x 8 x 3 numbers have 192."""
    settings = Settings(image_size=8, in_channels=3, high_noise_weight=weight)
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    setup = SimpleNamespace(
        resolved=SimpleNamespace(settings=settings),
        engine=SimpleNamespace(module=SimpleNamespace(diffusion=diffusion), device="cpu"),
        sampler=None,
        balance=None,
    )
    found = Setup.objective(setup, None).level_weights
    assert (found is None) == even
    assert even or torch.equal(found, high_noise_weights(diffusion, 192, weight))
