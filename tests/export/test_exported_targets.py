"""Test the export and the Predictor of classifiers of several classes, soft vectors and values."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import make_run
from small_models import SMALL, filled

import ds_classifier
from ds_classifier.checkpoint.fitting import tensors_of
from ds_classifier.checkpoint.weights import open_weights
from ds_classifier.config import Settings
from ds_classifier.data.labels.targets import Targets
from ds_classifier.export.export import export
from ds_classifier.export.reference_flags import reference_obstacles
from ds_classifier.model import create_classifier

VALUES = Targets("values", (1.0, 2.5, 4.0, 7.0, 9.0), (2.0, 3.0, 5.0, 8.0), "a `weight` |")
KINDS = {"classes": Targets("classes"), "soft": Targets("soft"), "values": VALUES}


def made(folder, kind):
    """Write a run of the kind; return it, its targets, and its classifier built by hand."""
    targets = KINDS[kind]
    run = make_run(folder, targets=targets.to_json())
    classifier = create_classifier(**Settings(**SMALL).model_kwargs())
    classifier.load_state_dict(filled(tensors_of(Settings(**SMALL))))
    return run, targets, classifier.eval().requires_grad_(False)


def noisy():
    x = np.random.RandomState(1).standard_normal((2, 3, 16, 16)).astype(np.float32)
    return torch.from_numpy(x), torch.tensor([3, 900])


def log_p_by_hand(kind, logits, y):
    """Return log p(y | x), [N], by torch's own functions."""
    if kind == "classes":
        return torch.stack([F.logsigmoid(f[wanted > 0]).sum()
                            for f, wanted in zip(logits, y, strict=True)])  # fmt: skip
    if kind == "values":
        return (
            (logits.softmax(1) * torch.exp(y[:, None] * torch.tensor(VALUES.values))).sum(1).log()
        )
    return -F.cross_entropy(logits, y, reduction="none")


ASKED = {
    "classes": torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]]),
    "soft": torch.tensor([4, 0]),
    "values": torch.tensor([0.4, -0.2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_of_a_run_and_of_its_export(tmp_path, kind):
    """Compare probabilities and gradients with autograd of the classifier built by hand."""
    run, targets, classifier = made(tmp_path / "run", kind)
    exported = export(run)
    x, t = noisy()
    x_grad = x.clone().requires_grad_()
    log_p = log_p_by_hand(kind, classifier(x_grad, t), ASKED[kind])
    (expected,) = torch.autograd.grad(log_p.sum(), x_grad)
    images = torch.from_numpy(np.random.RandomState(2).randint(0, 256, (2, 16, 16, 3), np.uint8))
    for path in (run, run / "export", exported.paths[0]):
        assert open_weights(path)[0].targets == targets.to_json()
        model = ds_classifier.load(path)
        assert model.targets == targets
        assert f"targets  {targets}\n" in repr(model)
        assert f"\n  {'bins     ' if kind == 'values' else 'classes  '}5: " in repr(model)
        torch.testing.assert_close(model.gradient(x, t, ASKED[kind]), expected)
        x_t = model.diffusion.q_sample(
            images / 127.5 - 1, torch.tensor([5, 5]), torch.zeros(images.shape)
        )
        logits = classifier(x_t.permute(0, 3, 1, 2), torch.tensor([5, 5]))
        p = model.predict(images, 5, torch.zeros(images.shape))
        by_hand = 1 / (1 + torch.exp(-logits)) if kind == "classes" else F.softmax(logits, dim=1)
        torch.testing.assert_close(p, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ways_to_ask_agree(tmp_path, kind):
    """Check a number for all images, lists, numpy and bool against a tensor with a row each."""
    model = ds_classifier.load(made(tmp_path / "run", kind)[0])
    x, t = noisy()
    one = {"classes": 3, "soft": 3, "values": -0.25}[kind]
    each = torch.tensor([one, one])
    ways = [one, [one, one], each.numpy(), torch.tensor(one)]
    if kind == "classes":
        rows = torch.eye(5)[each]
        ways += [rows, rows.bool(), rows.numpy().astype(np.uint8), rows.int().tolist()]
    if kind == "values":
        assert (model.gradient(x, t, 0) == 0).all()
        assert torch.equal(model.gradient(x, t, 1), model.gradient(x, t, torch.ones(2)))
    expected = model.gradient(x, t, each)
    for way in ways:
        assert torch.equal(model.gradient(x, t, way), expected), way
    assert model.gradient(x[:0], t[:0], one).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("kind", "y", "words"),
    [
        ("classes", torch.ones(2, 4), r"y: got .*; need a class, \[N\] classes, or \[2, 5\] of 0"),
        ("classes", torch.full((2, 5), 2), r"or \[2, 5\] of 0 and 1"),
        ("classes", 0.5, "y: got 0.5; need 0 to 4, the classes' numbers"),
        ("soft", torch.ones(2, 5), "need 0 to 4, the classes' numbers"),
        ("values", torch.ones(3), "y: got .*; need eta, a finite number, or one for each of 2"),
        ("values", float("nan"), "need eta, a finite number"),
        ("values", "large", "need eta, a finite number"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, kind, y, words):
    model = ds_classifier.load(made(tmp_path / "run", kind)[0])
    with pytest.raises(ValueError, match=words):
        model.gradient(*noisy(), y)


@pytest.mark.parametrize("kind", ["class", *KINDS])
def test_the_card_says_what_logits_mean_and_its_python_runs(tmp_path, monkeypatch, kind):
    if kind == "class":
        run, classifier = make_run(tmp_path / "run"), None
    else:
        run, _, classifier = made(tmp_path / "run", kind)
    export(run)
    described = json.loads((run / "export/model000007.json").read_text())
    assert ("targets" in described) == (kind != "class")
    card = (run / "export" / "README.md").read_text()
    meaning = {
        "class": "fp32\n",
        "classes": "the sigmoid of each is the probability of that class by itself",
        "soft": "their softmax is the probability of each class",
        "values": "the expected value is sum_k p_k v_k",
    }
    assert f"logits [N, 5], {meaning['class']}" in card or meaning[kind] in card
    if kind == "values":
        assert f"    column: {json.dumps(VALUES.name)}\n" in card
        assert '    1: "dog: a | b", mean value 2.5\n' in card
        assert card.count("`weight`") == 1  # in a block of code alone, where it breaks nothing
        assert "# Noise-aware classifier, 16 px, 5 bins of `a 'weight' |`\n" in card
        assert "predicts `a 'weight' |` of an image, as the probability of each of its bins" in card
        assert f"torch.full((1,), {1 / np.std(VALUES.values):.2g})" in card  # as sample.py advises
    monkeypatch.chdir(run / "export")
    names: dict = {}
    exec(re.search("```python\n(.*?)```", card, re.DOTALL).group(1), names)
    if kind == "class":
        assert "targets" not in card.split("```python")[1]
        return
    x, t = noisy()
    x, t = x[:1], t[:1]
    y = names.get("y", torch.tensor([0]))
    x_grad = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_p_by_hand(kind, classifier(x_grad, t), y).sum(), x_grad)
    torch.testing.assert_close(names["cond_fn"](x, t, y=y), expected)
    alpha, sigma = (float(n) for n in names["model"].diffusion.scales(t))
    torch.testing.assert_close(names["guide"](x, alpha, sigma, y), expected, rtol=1e-3, atol=1e-4)


def test_sigmoids_are_an_obstacle_for_guided_diffusion(tmp_path):
    """Apply the edit to a cond_fn like that of its classifier_sample.py, and run it."""
    settings = Settings(num_classes=1000)
    assert reference_obstacles(settings, "soft") == reference_obstacles(settings, "values") == []
    (obstacle,) = reference_obstacles(settings, "classes")
    (edit,) = obstacle.edits
    line = "F.log_softmax(logits, dim=-1)"
    assert (edit.file, edit.function, edit.old) == ("scripts/classifier_sample.py", "main", line)
    logits, y = torch.randn(2, 5), torch.tensor([3, 1])
    log_probs = eval(edit.new, {"F": F, "logits": logits})
    selected = log_probs[range(len(logits)), y.view(-1)]
    torch.testing.assert_close(selected, -torch.log(1 + torch.exp(-logits[[0, 1], y])))
    run, _, _ = made(tmp_path / "run", "classes")
    exported = export(run)
    flags = (run / "export/model000007.flags.txt").read_text()
    assert "several classes per image" in flags
    assert line in flags
    assert line in (run / "export/README.md").read_text()
    assert any("sigmoids" in obstacle.reason for obstacle in exported.obstacles)


def test_a_damaged_record_is_named(tmp_path):
    run, _, _ = made(tmp_path / "run", "values")
    export(run)
    path = run / "export/model000007.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"targets": ["values"]}))
    with pytest.raises(ValueError, match="targets: need what a manifest records of them"):
        open_weights(run / "export/model000007.pt")
