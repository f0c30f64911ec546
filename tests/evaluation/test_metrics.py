"""The table of metrics as it is shown; an entry is all that a new metric needs."""

import pytest
import torch

from ds_classifier import distributed
from ds_classifier.evaluation import metrics
from ds_classifier.evaluation.meter import Meter

TRAINED = {
    **{"train_loss": 1.25, "train_loss_q0": 0.034, "train_loss_q1": 0.996, "train_loss_q3": 2.31},
    **{"train_acc@1": 0.405, "train_acc@1_q0": 1.0, "train_acc@1_q2": 0.306},
    "train_acc@5": 0.9,
}
VALIDATED = {
    **{"val_loss": 2.3026, "val_acc@1": 0.1, "val_acc@5": 0.5, "val_acc@1_t0": 0.125},
    **{"val_acc@1_q0": 0.09, "val_acc@1_q1": 0.11, "val_acc@1_q2": None, "val_acc@1_q3": 0.0},
}


@pytest.fixture
def entropy(monkeypatch):
    """Add the mean entropy of the predicted distribution to METRICS."""

    def per_sample(answers):
        p = answers.logits.softmax(dim=1)
        return -(p * p.log()).nansum(dim=1)

    entry = metrics.Metric(name="entropy", title="Entropy", unit="nats", per_sample=per_sample)
    monkeypatch.setitem(metrics.METRICS, "entropy", entry)


def test_the_console_shows_means_and_quartiles():
    assert metrics.console_heads() == (
        "  loss  q0  q1  q2  q3 acc@1  q0  q1  q2  q3 acc@5  q0  q1  q2  q3"
    )
    assert metrics.console_cells(TRAINED) == (
        " 1.250 .03 1.0   - 2.3  40.5 100   -  31   -  90.0   -   -   -   -"
    )


def test_a_validation_is_one_line():
    assert metrics.validation_words(VALIDATED) == (
        "loss 2.303, acc@1 10.0 % (quartiles of t 9 11 - 0; t=0 12.5), acc@5 50.0 %"
    )


def test_columns_of_an_evaluation():
    heads = [column.head for column in metrics.LEVEL_COLUMNS]
    assert heads == ["acc@1 %", "acc@5 %", "loss", "ECE %", "|grad|"]


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
    row = {f"{split}_{name}": value for split in ("train", "val") for name, value in means.items()}
    assert metrics.console_heads().endswith("entropy  q0  q1  q2  q3")
    assert metrics.console_cells(row).endswith("  0.347 .69   -   - .00")
    assert metrics.validation_words(row).endswith("entropy 0.347")
