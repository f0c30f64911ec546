"""The table of metrics as it is shown; an entry is all that a new metric needs."""

import pytest
import torch

from ds_classifier import distributed
from ds_classifier.evaluation import metrics
from ds_classifier.evaluation.meter import Meter


@pytest.fixture
def entropy(monkeypatch):
    """Add the mean entropy of the predicted distribution to METRICS."""

    def per_sample(answers):
        p = answers.logits.softmax(dim=1)
        return -(p * p.log()).nansum(dim=1)

    entry = metrics.Metric(name="entropy", title="Entropy", unit="nats", per_sample=per_sample)
    monkeypatch.setitem(metrics.METRICS, "entropy", entry)


def test_top_5_says_nothing_about_five_classes():
    assert {name: metric.classes for name, metric in metrics.METRICS.items()} == {
        **{"loss": 2, "acc@1": 2, "acc@5": 6}
    }


def test_columns_of_an_evaluation():
    heads = [column.head for column in metrics.level_columns(6)]
    assert heads == ["acc@1 %", "acc@5 %", "loss", "ECE %", "|grad|"]
    assert "acc@5 %" not in {column.head for column in metrics.level_columns(4)}


def test_an_entry_is_all_a_metric_needs(entropy, monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)
    meter = Meter(4, "cpu")
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0]])  # entropies ln 2 and 0
    labels, t = torch.tensor([0, 0]), torch.tensor([0, 3])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    meter.add(losses=losses, logits=logits, labels=labels, t=t, weights=torch.ones(2))
    means = meter.read().means
    assert means["entropy_q0"] == pytest.approx(0.693147, abs=1e-6)
    assert means["entropy"] == pytest.approx(0.346574, abs=1e-6)
