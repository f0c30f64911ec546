"""The meter's means by quartile of t against a loop over samples."""

import pytest
import torch

from ds_classifier import distributed
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.evaluation.meter import LOSS_EDGES, Meter, describe_quartiles


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)


def by_hand(samples, num_timesteps):
    """Compute the means of loss, top-1 and top-5 per quartile and over all, by a loop."""
    groups = {}
    for loss, logits, label, t, weight in samples:
        if weight == 0:
            continue
        ranked = sorted(range(len(logits)), key=lambda c: -logits[c])
        values = (loss, float(ranked[0] == label), float(label in ranked[:5]))
        for suffix in ("", f"_q{int(4 * t / num_timesteps)}"):
            for name, value in zip(("loss", "acc@1", "acc@5"), values, strict=True):
                groups.setdefault(name + suffix, []).append(value)
    return {key: sum(values) / len(values) for key, values in groups.items()}


def test_quartiles_have_five_borders():
    """Check the borders of a flow, s = 0, 1/4, 1/2, 3/4 and 1 nearly: 2 ln 3 is 2.2."""
    flow = create_gaussian_diffusion(noise_schedule="flow")
    expected = "q0 to q3 lie between the log-SNRs 15.2, 2.2, 0.0, -2.2 and -15.2"
    assert describe_quartiles(flow) == expected
    cosine = create_gaussian_diffusion(noise_schedule="cosine")
    assert "10.1, 1.7, 0.0, -1.8 and -19.8" in describe_quartiles(cosine)  # not "-0.0"


@pytest.mark.parametrize("classes", [3, 12])
@pytest.mark.parametrize("num_timesteps", [1000, 250, 7])
def test_means_equal_those_of_a_loop(classes, num_timesteps):
    generator = torch.Generator().manual_seed(0)
    meter, samples = Meter(num_timesteps, "cpu"), []
    for _ in range(4):
        batch = dict(
            losses=10 * torch.rand(33, generator=generator) ** 4,
            logits=torch.randn(33, classes, generator=generator),
            labels=torch.randint(0, classes, (33,), generator=generator),
            t=torch.randint(0, num_timesteps, (33,), generator=generator),
            weights=(torch.rand(33, generator=generator) < 0.9).float(),
        )
        batch["losses"][batch["weights"] == 0] = float("nan")  # of an image that did not decode
        meter.add(**batch)
        samples += list(zip(*(batch[k].tolist() for k in batch), strict=True))
    means, weight, losses = meter.read()
    expected = by_hand(samples, num_timesteps)
    assert means.keys() == expected.keys()
    assert means == pytest.approx(expected, rel=1e-6)
    assert weight == sum(sample[-1] for sample in samples)
    counts = [[0] * (len(LOSS_EDGES) + 1) for _ in range(4)]
    for loss, _, _, t, weight in samples:
        if weight > 0:
            counts[4 * t // num_timesteps][sum(edge < loss for edge in LOSS_EDGES)] += 1
    assert losses.tolist() == counts
    means, weight, losses = meter.read()
    assert (means, weight, float(losses.sum())) == ({}, 0.0, 0.0)
