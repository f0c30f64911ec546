"""Evaluation at noise levels against loops; the same numbers on any number of ranks."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from made import make_images
from running import ROOT, launch, read_log
from small_models import filled
from tiny_run import CONFIGS, TINY

from ds_classifier import distributed
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.loader import BadSample, Batch
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.evaluation import evaluate
from ds_classifier.evaluation.levels import Confusion, LevelSums
from ds_classifier.evaluation.table import class_table, level_table, series_table
from ds_classifier.loss import NoisedClassifier
from ds_classifier.model import create_classifier

EVALUATE = ROOT / "launch" / "evaluate.py"
RESPACED = dict(diffusion_steps=500, timestep_respacing="50", rescale_timesteps=True)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)


# ------------------------------------------------------------------------------------- the sums


def made_up(count, classes, seed=0):
    """Return log_p, labels, gradient norms and weights; samples are often right, sometimes bad."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = 3 * torch.randn(count, classes, generator=generator)
    logits[range(count), labels] += 2
    log_p = logits.log_softmax(dim=1)
    grad_norms = torch.rand(count, generator=generator) * 10.0 ** torch.randint(
        -5, 6, (count,), generator=generator
    )
    weights = (torch.rand(count, generator=generator) < 0.9).float()
    log_p[weights == 0] = math.nan  # an undecodable image may give any number
    return log_p, labels, grad_norms, weights


def by_hand(log_p, labels, grad_norms, weights, classes):
    """Compute the numbers of one level by a loop, and the values of the samples by class."""
    rows = [[] for _ in range(classes)]
    bins = [[] for _ in range(15)]
    for log_probs, label, norm, weight in zip(
        log_p.tolist(), labels.tolist(), grad_norms.tolist(), weights.tolist(), strict=True
    ):
        if weight == 0:
            continue
        ranked = sorted(range(classes), key=lambda c: -log_probs[c])
        right, among = ranked[0] == label, label in ranked[:5]
        rows[label].append((right, among, -log_probs[label], norm))
        confidence = math.exp(log_probs[ranked[0]])
        b = next(b for b in range(15) if confidence <= (b + 1) / 15 or b == 14)
        bins[b].append((right, confidence))
    total = [row for of_class in rows for row in of_class]
    gap = sum(abs(sum(r for r, _ in b) - sum(c for _, c in b)) for b in bins)
    means = np.mean(np.array(total, dtype=float), axis=0)
    return {
        "samples": len(total),
        "correct@1": sum(row[0] for row in total),
        "correct@5": sum(row[1] for row in total),
        "acc@1": means[0],
        "acc@5": means[1],
        "loss": means[2],
        "grad_norm": means[3],
        "ece": gap / len(total),
    }, rows


@pytest.mark.parametrize("classes", [3, 12])
def test_sums_equal_those_of_a_loop(classes, alone):
    sums = LevelSums(2, classes, "cpu")
    data = [made_up(200, classes, seed) for seed in (0, 1)]
    for level in (1, 0):
        for start in range(0, 200, 33):
            log_p, labels, grad_norms, weights = (part[start : start + 33] for part in data[level])
            sums.add(level, log_p=log_p, labels=labels, grad_norms=grad_norms, weights=weights)
    numbers = sums.read()
    for level in (0, 1):
        expected, rows = by_hand(*data[level], classes)
        got = numbers.overall(level)
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert (got["not_finite"], numbers.samples(level)) == (0, expected["samples"])
        per_class = numbers.per_class(level)
        assert per_class["samples"] == [len(row) for row in rows]
        assert per_class["correct@1"] == [sum(r[0] for r in row) for row in rows]
        losses = [sum(r[2] for r in row) / len(row) for row in rows]
        assert per_class["loss"] == pytest.approx(losses, rel=1e-6)
        assert sum(row["samples"] for row in numbers.reliability(level)) == expected["samples"]


def test_accuracy_and_confusion_agree_on_tied_classes(alone):
    """Check classes that are equally likely, as 16 bits often make them."""
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randint(0, 3, (300, 10), generator=generator).double().log_softmax(dim=1)
    labels = torch.randint(0, 10, (300,), generator=generator)
    weights = torch.ones(300)
    sums, confusion = LevelSums(1, 10, "cpu"), Confusion(300, "cpu")
    sums.add(0, log_p=log_p, labels=labels, grad_norms=torch.ones(300), weights=weights)
    confusion.add(log_p=log_p, labels=labels, positions=torch.arange(300), weights=weights)
    pairs = confusion.read()
    diagonal = sum(
        n
        for a, b, n in zip(pairs["label"], pairs["predicted"], pairs["samples"], strict=True)
        if a == b
    )
    assert sums.read().overall(0)["correct@1"] == diagonal


def test_sums_do_not_depend_on_the_order(alone):
    log_p, labels, grad_norms, weights = made_up(500, 7)
    answers = []
    for seed, batch in ((0, 500), (1, 1), (2, 37)):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
        sums = LevelSums(1, 7, "cpu")
        for part in order.split(batch):
            sums.add(
                0,
                log_p=log_p[part],
                labels=labels[part],
                grad_norms=grad_norms[part],
                weights=weights[part],
            )
        numbers = sums.read()
        answers.append((numbers.overall(0), numbers.per_class(0), numbers.reliability(0)))
    assert answers[0] == answers[1] == answers[2]


def test_a_sample_that_is_not_finite_counts_as_wrong(alone):
    log_p = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]))
    log_p[1] = math.nan
    grad_norms = torch.tensor([1.0, 1.0, math.inf, 3.0])
    sums = LevelSums(1, 2, "cpu")
    labels, weights = torch.tensor([0, 0, 0, 0]), torch.ones(4)
    sums.add(0, log_p=log_p, labels=labels, grad_norms=grad_norms, weights=weights)
    got = sums.read().overall(0)
    assert (got["samples"], got["correct@1"], got["not_finite"]) == (4, 1, 2)
    assert got["loss"] == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 2)
    assert got["grad_norm"] == 2.0
    empty = LevelSums(1, 2, "cpu").read().overall(0)
    assert empty["loss"] is empty["acc@1"] is empty["ece"] is None


# ------------------------------------------------------------------------------- the whole set


class Linear(torch.nn.Module):
    """A classifier whose gradient is known without autograd; its logits depend on the timestep."""

    def __init__(self, numbers, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(classes, numbers) / 10)

    def forward(self, x, timesteps):
        return x.flatten(1) @ self.weight.T * (1 + timesteps.float() / 1000)[:, None]


def batches(count, size, classes, batch):
    """Return random images as the loader does: padded to whole batches, one of them bad."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator).to(torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    made = []
    for start in range(0, count, batch):
        positions = torch.arange(start, start + batch)
        inside = positions < count
        rows = positions.where(inside, 0)
        weights = inside.float()
        bad = []
        if start == 0:
            weights[1], bad = 0.0, [BadSample(1, "key", "no image")]
        positions = positions.where(inside, -1)
        made.append(Batch(pixels[rows], labels[rows], positions, weights, weights, bad))
    return made


def test_levels_equal_those_of_a_loop(alone):
    torch.manual_seed(0)
    count, size, classes, levels = 23, 4, 6, [0, 7, 49]
    diffusion = create_gaussian_diffusion(**RESPACED)
    model = Linear(3 * size * size, classes)
    loader = batches(count, size, classes, 5)
    (numbers,), bad = evaluate.evaluate_levels(
        [evaluate.classifier_posterior(model, diffusion)],
        diffusion,
        loader,
        levels=levels,
        num_classes=classes,
        samples=count,
        device=torch.device("cpu"),
    )
    assert bad == 1
    # The process before respacing: 50 steps evenly from 0 to 499; timesteps are scaled by 1000/500.
    kept = [round(i * 499 / 49) for i in range(50)]
    alpha_bar = np.cumprod(1 - np.linspace(2e-4, 0.04, 500))[kept]
    weight = model.weight.detach().double().numpy()
    expected = {row: [] for row in range(1 + len(levels))}
    for batch in loader:
        for image, label, position, sample_weight in zip(*batch[:4], strict=True):
            if sample_weight == 0:
                continue
            q = int(position)
            noise = keyed_noise(0, "validation", torch.tensor([q]), (size, size, 3))[0].numpy()
            x_0 = image.numpy() / 127.5 - 1
            spread = int((q + 0.5) * 0.6180339887498949 % 1.0 * 50)
            for row, t in enumerate([spread, *levels]):
                x_t = math.sqrt(alpha_bar[t]) * x_0 + math.sqrt(1 - alpha_bar[t]) * noise
                scale = 1 + kept[t] * 2 / 1000
                logits = weight @ x_t.transpose(2, 0, 1).ravel() * scale
                p = np.exp(logits - logits.max())
                p /= p.sum()
                gradient = scale * (weight[label] - p @ weight)
                values = (logits.argmax() == label, -np.log(p[label]), np.linalg.norm(gradient))
                expected[row].append(values)
    for row, values in expected.items():
        hits, loss, norm = np.mean(np.array(values, dtype=float), axis=0)
        got = numbers.overall(row)
        assert got["samples"] == count - 1
        assert got["acc@1"] == pytest.approx(hits, abs=1e-12)
        assert (got["loss"], got["grad_norm"]) == pytest.approx((loss, norm), rel=1e-5)
    described = evaluate.describe_levels(numbers, diffusion, levels, chosen=[7])
    assert [row["timestep"] for row in described["levels"]] == [2.0 * kept[t] for t in levels]
    snr = [math.log(alpha_bar[t] / (1 - alpha_bar[t])) for t in levels]
    assert [row["log_snr"] for row in described["levels"]] == pytest.approx(snr)
    assert [level["t"] for level in described["per_class"]] == [None, 7]

    # The validation during training uses the same images and the same noise.
    module = NoisedClassifier(model, diffusion)
    for row, t in ((0, None), (1, 0)):
        means, _ = evaluate.evaluate(module, loader, samples=count, device=torch.device("cpu"), t=t)
        got = numbers.overall(row)
        assert means["loss"] == pytest.approx(got["loss"], rel=1e-6)
        assert (means["acc@1"], means["acc@5"]) == pytest.approx((got["acc@1"], got["acc@5"]))


def test_a_sample_left_out_is_an_error(alone):
    diffusion = create_gaussian_diffusion(diffusion_steps=20)
    posterior = evaluate.classifier_posterior(Linear(48, 4), diffusion)
    keywords = dict(levels=[0], num_classes=4, device=torch.device("cpu"))
    loader = batches(10, 4, 4, 5)
    with pytest.raises(RuntimeError, match="counted 9 of 11 samples, and 1 bad"):
        evaluate.evaluate_levels([posterior], diffusion, loader, samples=11, **keywords)
    (only_bad,) = batches(2, 4, 4, 2)
    only_bad.weights[:] = 0
    with pytest.raises(ValueError, match="none of its 1 images decodes"):
        evaluate.evaluate_levels([posterior], diffusion, [only_bad], samples=1, **keywords)


@pytest.mark.parametrize(
    "schedule", [dict(), dict(noise_schedule="cosine"), RESPACED, dict(timestep_respacing="ddim25")]
)
@pytest.mark.parametrize("count", [1, 20])
def test_levels_are_even_in_log_snr(schedule, count):
    diffusion = create_gaussian_diffusion(**schedule)
    levels = evaluate.level_grid(diffusion, count)
    snr = [math.log(a / (1 - a)) for a in diffusion.alphas_cumprod]
    # The number asked for, if there are as many; one more where timesteps lie far apart.
    assert min(count + 1, len(snr)) <= len(levels) <= count + 2
    assert levels == sorted(set(levels))
    assert (levels[0], levels[-1]) == (0, diffusion.num_timesteps - 1)
    # A gap is wider than the others only if there is no timestep in it.
    gaps = [(snr[a] - snr[b], b - a) for a, b in itertools.pairwise(levels)]
    even = (snr[0] - snr[-1]) / count
    assert all(gap < 1.5 * even for gap, steps in gaps if steps > 1)
    middle = evaluate.middle_level(diffusion, levels)
    assert abs(snr[middle]) == min(abs(snr[t]) for t in levels)


# ------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_record(tmp_path, monkeypatch):
    """Evaluate a .pt in the published format on 1, 2 and 3 ranks, on 1, 7 and 1,000 images."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun and the launcher set it
    names = [f"train/{c}/{i}.png" for c in ("cat", "dog", "emu") for i in range(2)]
    make_images(tmp_path, names)
    sets = []
    for count, batch in ((1, 64), (7, 3), (1000, 64)):
        held_out = tmp_path / f"held_out{count}"
        make_images(held_out, [f"{('cat', 'dog', 'emu')[i % 3]}/{i}.png" for i in range(count)])
        source = open_source(str(tmp_path / "train"), val=str(held_out))
        manifests = convert(source, tmp_path / f"shards{count}")
        assert manifests["val"].samples == count
        sets.append((tmp_path / f"shards{count}" / "val", batch, f"set{count}"))
    classifier = create_classifier(
        image_size=8,
        classifier_width=32,
        classifier_depth=1,
        classifier_attention_resolutions="4",
        classifier_use_scale_shift_norm=True,
        classifier_resblock_updown=True,
        classifier_pool="attention",
        classifier_channel_mult="1,2",
        num_classes=3,
    )
    torch.save(filled(classifier.state_dict()), tmp_path / "model000123.pt")
    records = {}
    for ranks in (1, 2, 3):
        words = [str(word) for s in sets for word in (*s[:2], tmp_path / f"ranks{ranks}" / s[2])]
        done = launch(
            ranks,
            tmp_path / "model000123.pt",
            *words,
            script=ROOT / "tests" / "evaluation" / "evaluate_sets.py",
            cwd=tmp_path,
        )
        assert done.code == 0, done.output
        assert max(map(len, done.lines)) <= 100 + len(str(tmp_path)), done.output
        for _, _, name in sets:
            folder = tmp_path / f"ranks{ranks}" / name
            record = json.loads((folder / "model000123.json").read_text())
            assert (folder / "model000123.png").read_bytes().startswith(b"\x89PNG")
            assert record.pop("machine")["world_size"] == ranks
            records[ranks, name] = record
    for _, _, name in sets:
        assert records[1, name] == records[2, name] == records[3, name]
        count = int(name.removeprefix("set"))
        numbers = records[1, name]["classifier"]
        rows = [numbers["uniform_t"], *numbers["levels"]]
        assert len(rows) == 5
        assert [row["samples"] for row in rows] == [count] * 5
        assert all(row["acc@5"] == 1.0 for row in rows)  # with three classes
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert 0.2 < records[1, "set1000"]["classifier"]["uniform_t"]["acc@1"] < 0.5


@pytest.mark.slow
def test_a_run_and_its_checkpoints(digits, tmp_path):
    """Compare with the numbers that training logged, for one checkpoint and for a series."""
    run = tmp_path / "run"
    flags = ["--deepspeed_config", CONFIGS / "zero1_fp32.json", "--run_dir", run, *TINY]
    data = ["--data_dir", digits / "train", "--val_data_dir", digits / "val"]
    length = ["--iterations", 4, "--save_interval", 2, "--batch_size", 16]
    done = launch(1, *flags, *data, *length, cwd=tmp_path)
    assert done.code == 0, done.output
    done = launch(1, run, "--checkpoints", "nope", script=EVALUATE, cwd=tmp_path)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert not list((run / "eval").glob("step-*"))  # it was refused before any evaluation
    done = launch(
        2,
        *(run, "--checkpoints", "all", "--timesteps", "0,300"),
        script=EVALUATE,
        launcher=True,
        cwd=tmp_path,
    )
    assert done.code == 0, done.output
    records = json.loads((run / "eval" / "series.json").read_text())
    assert [record["step"] for record in records] == [2, 4]
    assert records[1] == json.loads((run / "eval" / "step-00000004.json").read_text())
    done = launch(1, run, "--timesteps", "0,300", script=EVALUATE, cwd=tmp_path)
    alone = json.loads((run / "eval" / "step-00000004.json").read_text())
    assert records[0]["bayes"] == records[1]["bayes"] == alone["bayes"]  # computed once per series
    flags = ("--timesteps", "0", "--precision", "bf16", "--bayes", digits / "train")
    done = launch(1, run, *flags, script=EVALUATE, cwd=tmp_path)
    rough = json.loads((run / "eval" / "step-00000004-bf16.json").read_text())
    assert (rough["precision"], rough["weights_sha256"]) == ("bf16", alone["weights_sha256"])
    assert alone == json.loads((run / "eval" / "step-00000004.json").read_text())  # unchanged
    for name in ("series.png", "step-00000002.png", "step-00000004.png"):
        assert (run / "eval" / name).read_bytes().startswith(b"\x89PNG")
    logged = {row["step"]: row for row in read_log(run) if "val_loss" in row}
    for record in records:
        row, numbers = logged[record["step"]], record["classifier"]
        for name in ("loss", "acc@1", "acc@5"):
            assert numbers["uniform_t"][name] == pytest.approx(row[f"val_{name}"], rel=1e-5)
            assert numbers["levels"][0][name] == pytest.approx(row[f"val_{name}_t0"], rel=1e-5)
        # The digits are few: their exact posterior is evaluated too, and beats 4 steps of training.
        assert record["bayes"]["pictures"] == 1437
        assert record["bayes"]["levels"][0]["acc@1"] > 0.9
        tables = [*level_table(record), *class_table(record), *series_table(records)]
        assert max(map(len, tables)) <= 100
    assert records[0]["data"]["samples"] == 360

    done = launch(1, run, "--image_size", 16, script=EVALUATE, cwd=tmp_path)
    assert done.code == 2
    assert "got --image_size; need none" in done.output
