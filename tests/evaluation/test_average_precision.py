"""Average precision from histograms against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ds_classifier import distributed
from ds_classifier.evaluation.average_precision import (
    BINS_PER_NAT,
    ScoreHistograms,
    average_precision,
    mean_over_classes,
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)


def made_up(count, classes, seed=0):
    """Return logits and labels; the later a class, the rarer it is, and no image has the last."""
    rng = np.random.default_rng(seed)
    labels = rng.random((count, classes)) < 0.5 ** np.arange(1, classes + 1)
    labels[:, -1] = False
    logits = 2 * rng.standard_normal((count, classes)) + 2 * labels - np.arange(classes)
    return torch.from_numpy(logits).float(), torch.from_numpy(labels).float()


def by_sklearn(scores, labels):
    """Return the average precision of each class that an image has."""
    columns = range(labels.shape[1] - 1)
    return [average_precision_score(labels[:, k], scores[:, k]) for k in columns]


def test_it_is_that_of_sklearn():
    logits, labels = made_up(2000, 6)
    histograms, counted = ScoreHistograms(2, 6, "cpu"), torch.ones(2000, dtype=torch.bool)
    counted[::7] = False
    logits[0] = torch.nan  # not counted
    for part in torch.arange(2000).split(300):
        histograms.add(1, logits=logits[part], labels=labels[part], counted=counted[part])
    found = histograms.read()
    assert np.isnan(found[0]).all()  # nothing was added at this level
    assert np.isnan(found[1, -1])
    logits, labels = logits[counted], labels[counted]
    np.testing.assert_allclose(found[1, :-1], by_sklearn(logits, labels), atol=2e-3)
    binned = (logits * BINS_PER_NAT).floor().clamp(-12 * BINS_PER_NAT, 12 * BINS_PER_NAT - 1)
    np.testing.assert_allclose(found[1, :-1], by_sklearn(binned, labels), rtol=1e-12)
    assert mean_over_classes(found[1]) == pytest.approx(np.mean(found[1, :-1]))
    assert np.isnan(mean_over_classes(found[0]))


def test_ties_count_together():
    """Two of four images tie at the top, one of them positive: precision 1/2 at recall 1/2."""
    positive, negative = np.array([1, 0, 1]), np.array([0, 1, 1])
    assert average_precision(positive, negative) == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 4)
