"""The judgement whether a classifier is fit to guide: its signs, and the luck that it allows."""

import dataclasses
import json
import math

import numpy as np
import pytest
from report_page import opened, record, training_row, validation_row, write_log, write_record

from ds_classifier.report.data import GuidedSamples, read_run
from ds_classifier.report.fitness import (
    BAD,
    DOUBTFUL,
    GOOD,
    class_prior,
    fitness,
    is_better,
    luck_of_calibration,
)
from ds_classifier.report.guidance import guides
from ds_classifier.report.training import headline
from ds_classifier.report.working import checks
from ds_classifier.training.logs.sanity import Guessing

# t, log-SNR, top-1, cross-entropy, calibration error, gradient norm, and cross-entropy and gradient
# norm of the exact posterior: digits32 after 500 steps in fp16, on 360 held-out digits.
DIGITS = [
    (0, 10.1, 0.9778, 0.1063, 0.0208, 0.0397, 63062.0, 24527.0),
    (413, 0.52, 0.9806, 0.1002, 0.0243, 0.0527, 3.8779, 2.209),
    (760, -1.88, 0.9333, 0.2133, 0.0217, 0.2633, 0.4408, 0.5753),
    (863, -3.07, 0.7667, 0.6705, 0.0500, 0.8882, 0.4223, 0.7809),
    (924, -4.28, 0.4639, 1.5343, 0.0684, 1.4433, 1.1331, 1.2075),
    (957, -5.45, 0.2528, 2.0928, 0.0405, 0.8033, 1.8312, 0.9959),
    (976, -6.66, 0.1444, 2.2669, 0.0280, 0.4076, 2.1626, 0.6096),
    (986, -7.80, 0.1222, 2.3179, 0.0430, 0.3831, 2.2653, 0.3543),
    (992, -9.04, 0.1056, 2.3463, 0.0583, 0.3869, 2.2967, 0.1924),
    (999, -19.84, 0.0833, 2.3754, 0.0827, 0.3766, 2.3024, 0.0009),
]


def evaluated(numbers, *, classes=10, images=360, bins=None):
    """Return an evaluation with these levels, of equally frequent classes."""
    names = [str(k) for k in range(classes)]
    made = record(500, names, {(k, k): images // classes for k in range(classes)})
    level = made["classifier"]["levels"][0] | {"samples": images}
    keys = ("t", "log_snr", "acc@1", "loss", "ece", "grad_norm")
    ours, exact = [], []
    for row in numbers:
        ours.append(level | dict(zip(keys, row[:6], strict=True)))
        if len(row) == 8:
            exact.append(ours[-1] | {"loss": row[6], "grad_norm": row[7]})
    made["classifier"]["levels"] = ours
    if exact:
        made["bayes"] = {"pictures": 1437, "uniform_t": level, "levels": exact}
    if bins:
        made["classifier"]["reliability"][0]["bins"] = bins
    return made


def judged(run, made):
    """Return the lines on an evaluation, as a list of signs and texts."""
    write_record(run, made)
    return fitness(read_run(run))


def sign_of(lines, words):
    (found,) = [(sign, text) for sign, text in lines if words in text]
    return found


def test_digits_that_are_worse_than_guessing_at_high_noise(run):
    lines = judged(run, evaluated(DIGITS))
    assert sign_of(lines, "At t = 0 its cross-entropy")[0] == GOOD
    assert sign_of(lines, "is better than guessing by class frequency at t = 0 to 976")[0] == GOOD
    assert sign_of(lines, "no more than luck makes with 360 images")[0] == GOOD
    sign, text = sign_of(lines, "worse than guessing")
    assert sign == BAD
    assert "At t = 986 to 999" in text
    assert "2.375 at t = 999" in text
    assert "the norm 0.3766, that of the exact posterior 9.0e-4" in text
    assert "do: guide only at t below 986, or train longer" in text
    opened(run)


def test_several_classes_are_judged_by_their_yes_no_answers(run):
    """A binary cross-entropy of 0.2 explains 60 % of 0.5, a tenth of it 10 %."""
    made = evaluated([(0, 10.1, 0, 0.2, 0.02, 0.1), (999, -19.8, 0, 0.45, 0.02, 0.1)])
    made["targets"] = {"kind": "classes"}
    made["data"]["guessing"] = {"loss": 0.5, "acc": 0.8, "mAP": 0.2}
    for row, accuracy in zip(made["classifier"]["levels"], (0.95, 0.82), strict=True):
        del row["acc@1"]
        row["acc"] = accuracy
    lines = judged(run, made)
    sign, text = sign_of(lines, "At t = 0 its binary cross-entropy is 0.200")
    assert sign == GOOD
    assert "frequencies of the evaluated images has 0.500; right answers 95.0 %, chance" in text
    assert sign_of(lines, "is better than guessing by class frequency at t = 0 to 999")[0] == GOOD


def test_a_value_in_bins_is_judged_by_its_error(run):
    """The likeliest bin is right less often than the commonest one, yet the value is known better.

    360 images gain 360 (2.3 - 2.0) = 108 nats, far more than luck.
    """
    made = evaluated([(0, 10.1, 0.15, 2.0, 0.02, 0.1), (999, -19.8, 0.15, 2.3, 0.02, 0.1)])
    made["targets"] = {
        "kind": "values",
        "name": "age",
        "values": [*range(10)],
        "edges": [*range(9)],
    }
    made["data"]["guessing"] = {"loss": 2.3, "acc@1": 0.16, "mae": 2.5}
    for row, error in zip(made["classifier"]["levels"], (1.5, 2.6), strict=True):
        row["mae"] = error
    made["classifier"]["uniform_t"]["mae"] = 2.0
    lines = judged(run, made)
    assert sign_of(lines, "is better than guessing by bin frequency at t = 0, but")[0] == DOUBTFUL
    sign, text = sign_of(lines, "At t = 0 its cross-entropy")
    assert sign == BAD
    assert "error of age 1.5, that of guessing the mean of the evaluated images 2.5: it" in text
    assert "it knows little of the answer" in text
    assert not any("class" in text for _, text in lines)
    page = opened(run).text
    assert "taken for another bin" in page
    assert "bin ↓ predicted" in page
    figures = headline(read_run(run))
    assert [f["value"] for f in figures[:2]] == ["2", "1.5"]
    assert figures[0]["text"] == "mean absolute error of age, all noise levels"


def test_a_loss_that_luck_may_lower_is_not_called_no_better(run):
    lines = judged(run, evaluated([(0, 10.1, 0.2, 2.29, 0.02, 0.1)]))
    assert "by class frequency, by more than luck" in sign_of(lines, "At no noise level")[1]


def test_commands_name_the_network_of_the_user_and_eta(run):
    """Copied as they are printed, they run."""
    changed = json.loads((run / "config.json").read_text())
    (changed.get("settings") or changed)["classifier"] = "mynet:build"
    (run / "config.json").write_text(json.dumps(changed))
    assert f"evaluate {run} --classifier mynet:build" in fitness(read_run(run))[0][1]
    made = evaluated([(0, 10.1, 0.15, 2.0, 0.02, 0.1)])
    made["targets"] = {
        "kind": "values",
        "name": "age",
        "values": [*range(10)],
        "edges": [*range(9)],
    }
    write_record(run, made)
    said = guides(read_run(run))
    assert f"--classifier_path {run} --classifier mynet:build --data_dir" in said
    assert " --eta 0.35 --classifier_scale" in said  # 1 / the standard deviation of 0 .. 9


@pytest.mark.parametrize(("loss", "sign"), [(1.2, GOOD), (1.3, DOUBTFUL), (1.95, BAD)])
def test_soft_vectors_are_explained_down_to_their_own_entropy(run, loss, sign):
    """The share is of the 1.5 nats from the entropy of the vectors, 0.5, to guessing, 2.0."""
    made = evaluated([(0, 10.1, 0.9, loss, 0.02, 0.1)])
    made["targets"] = {"kind": "soft"}
    made["data"]["guessing"] = {"loss": 2.0, "acc@1": 0.1, "least": 0.5}
    found, text = sign_of(judged(run, made), "At t = 0 its cross-entropy")
    assert found == sign
    assert "the labels themselves leave 0.500" in text


def test_a_toy_gets_no_tick_for_its_fitness(run):
    """36 % of five classes, 15 to 20 % calibration error, 100 images."""
    toy = [
        (0, 10.1, 0.44, 1.36, 0.16, 0.1),
        (413, 0.5, 0.40, 1.45, 0.15, 0.1),
        (760, -1.9, 0.34, 1.55, 0.17, 0.1),
        (924, -4.3, 0.24, 1.64, 0.18, 0.1),
        (999, -19.8, 0.20, 1.70, 0.20, 0.1),
    ]
    made = evaluated(toy, classes=5, images=100)
    write_log(run, [training_row(500, 1.45), validation_row(500, 1.52, 0.36)])
    (run / "config.json").write_text('{"iterations": 500, "num_classes": 5}')
    assert GOOD not in [sign for sign, _ in judged(run, made)]
    lines = [line for group in checks(read_run(run)) for line in group["lines"]]
    (validation,) = [line for line in lines if "Validation loss 1.520" in line["text"]]
    assert validation["sign"] == "?"
    assert "Guessing has 1.609: train longer" in validation["text"]
    signs = [line["sign"] for line in lines]
    assert signs.count("✓") < 3
    assert signs.count("?") + signs.count("!") >= 4


def test_a_classifier_that_knows_nothing(run):
    flat = [(t, snr, 0.1, 2.31, 0.01, 0.0) for t, snr, *_ in DIGITS]
    lines = judged(run, evaluated(flat))
    assert sign_of(lines, "it knows next to nothing")[0] == BAD
    assert sign_of(lines, "At no noise level is it better")[0] == BAD
    sure = [(t, snr, 0.5, 2.5, 0.4, 1.0) for t, snr, *_ in DIGITS]
    lines = judged(run, evaluated(sure))
    assert sign_of(lines, "it tells classes apart")[0] == BAD
    assert "At t = 0 to 999" in sign_of(lines, "worse than guessing")[1]


def test_a_fit_classifier_gets_ticks_alone(run):
    fit = [(*row[:3], row[6] if row[0] > 800 else row[3], 0.02, row[7]) for row in DIGITS]
    lines = judged(run, evaluated([row if row[0] > 800 else (*row[:5], 0.05) for row in fit]))
    assert [sign for sign, _ in lines] == [GOOD] * 4
    assert "nowhere worse than guessing, up to t = 999" in lines[-1][1]


def test_guessing_names_the_labels_that_it_is_of(run):
    """Training labels are nearly even, those of the evaluated images are not."""
    made = evaluated(DIGITS[:3], classes=3)
    made["classifier"]["per_class"] = [{"samples": [5, 4, 3]}] * 2
    write_log(run, [training_row(500, 0.5)])
    (run / "config.json").write_text('{"num_classes": 3}')
    for loss in (1.05, 1.0976):
        started = {"time": 1.0, "event": "start", "guessing": vars(Guessing(3, loss, 0.34))}
        (run / "events.jsonl").write_text(json.dumps(started) + "\n")
        text = judged(run, made)[0][1]
        assert ("of the evaluated images has 1.078; top-1 97.8 %" in text) == (loss < 1.07)
    assert "of the training images has 1.098; top-1 97.8 %, chance among the evaluated" in text
    assert "images 41.7 %" in text
    assert headline(read_run(run))[2]["more"] == "guessing: ln 3 = 1.099"


def test_a_gradient_that_does_not_vanish_is_doubtful(run):
    # Not worse than guessing anywhere, but its gradient at t = 999 is 400 times too long.
    tame = [(*row[:3], min(row[3], 2.3026), *row[4:]) for row in DIGITS]
    sign, text = sign_of(judged(run, evaluated(tame)), "its gradient is too long")
    assert sign == DOUBTFUL
    assert "at t = 992 to 999" in text
    assert "0.3766 at t = 999, that of the exact posterior 9.0e-4" in text


def test_knowledge_that_ends_where_a_sampler_decides(run):
    early = [row if row[1] > -1 else (*row[:2], 0.1, 2.303, *row[4:]) for row in DIGITS]
    sign, text = sign_of(judged(run, evaluated(early)), "is better than guessing")
    assert (sign, "at t = 0 to 413" in text) == (DOUBTFUL, True)
    assert "but not at log-SNR -1.9 to -19.8, where" in text
    assert "--schedule_sampler noisy" in text
    (run / "config.json").write_text('{"num_classes": 10, "schedule_sampler": "noisy"}')
    assert "--schedule_sampler" not in sign_of(fitness(read_run(run)), "is better than")[1]
    sign, text = sign_of(judged(run, evaluated(DIGITS[:2])), "is better than guessing")
    assert (sign, "evaluate at more noise" in text) == (DOUBTFUL, True)


@pytest.mark.parametrize(
    ("right", "word", "advice"),
    [(30, "too sure", "--joint_temperature 0.8"), (95, "too unsure", "at a larger scale")],
)
def test_miscalibration_has_a_direction(run, right, word, advice):
    off = [(*row[:4], 0.12, *row[5:]) for row in DIGITS]
    bins = [{"bin": 11, "samples": 100, "correct": right, "confidence": 0.75}]
    sign, text = sign_of(judged(run, evaluated(off, images=3600, bins=bins)), "calibration error")
    assert sign == BAD
    assert word in text
    assert advice in text


@pytest.mark.parametrize(("best", "advised"), [(250, True), (500, False), (None, False)])
def test_another_checkpoint_is_advised_only_if_it_is_the_best(run, best, advised):
    """The evaluation is of step 500."""
    if best:
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "best").write_text(f"step-{best:08} val_loss 0.3\n")
    off = [(*row[:4], 0.12, *row[5:]) for row in DIGITS]
    bins = [{"bin": 11, "samples": 100, "correct": 30, "confidence": 0.75}]
    _, text = sign_of(judged(run, evaluated(off, images=3600, bins=bins)), "calibration error")
    advice = "do: take checkpoints/best, or sample with" if advised else "do: sample with"
    assert advice in text
    weak = [(*row[:3], 2.2, *row[4:]) for row in DIGITS]
    _, text = sign_of(judged(run, evaluated(weak)), "hardly better than none")
    assert ("checkpoints/best" in text) == advised


def test_few_images_do_not_show_the_calibration(run):
    lines = judged(run, evaluated(DIGITS[:5], images=50))
    sign, text = sign_of(lines, "calibration error")
    assert (sign, "evaluate on more images" in text) == (DOUBTFUL, True)


def test_answers_that_are_not_finite(run):
    made = evaluated(DIGITS)
    made["classifier"]["levels"][3] |= {"not_finite": 7}
    made["classifier"]["levels"][4] |= {"not_finite": 360, "loss": None, "ece": None}
    sign, text = sign_of(judged(run, made), "not finite")
    assert sign == BAD
    assert text.startswith("At t = 863 to 924 the answers to up to 360 images")


def test_evaluations_to_make_again(run):
    made = evaluated(DIGITS) | {"precision": "bf16"}
    assert sign_of(judged(run, made), "in bf16")[0] == DOUBTFUL
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step-00000750\n")
    sign, text = sign_of(fitness(read_run(run)), "is of step 500")
    assert (sign, "newest checkpoint of step 750" in text) == (DOUBTFUL, True)


def test_without_an_evaluation_the_command_is_named(run):
    ((sign, text),) = fitness(read_run(run))
    assert sign == DOUBTFUL
    assert f"do: ds-classifier evaluate {run}" in text


def test_a_damaged_evaluation_leaves_the_training_judged(run):
    write_log(run, [training_row(10, 1.25)])
    made = evaluated(DIGITS)
    del made["classifier"]["per_class"]
    write_record(run, made)
    fit, trained = checks(read_run(run))
    assert [line["sign"] for line in fit["lines"]] == ["?"]
    assert "cannot be judged: KeyError" in fit["lines"][0]["text"]
    assert "✓" in [line["sign"] for line in trained["lines"]]


@pytest.mark.parametrize(
    ("share", "sign"), [(0.92, GOOD), (0.5, DOUBTFUL), (0.14, BAD), (0.09, BAD)]
)
def test_the_share_of_guided_samples(run, share, sign):
    found = read_run(run)
    samples = dict(scales=[0.0, 10.0], number=100, asked=list(range(10)), step=500, source="x")
    shares = GuidedSamples(**samples, shares={0.0: 0.12, 10.0: share}, levels=[])
    lines = fitness(dataclasses.replace(found, samples=shares))
    assert sign_of(lines, "Guided at scale 10")[0] == sign
    unmeasured = GuidedSamples(**samples, shares={}, levels=[])
    assert len(fitness(dataclasses.replace(found, samples=unmeasured))) == 1


# ------------------------------------------------------------------------------ luck


def numbers(probabilities, labels, t=0):
    """Return an evaluation's numbers of probabilities [n, K] and labels [n], by loops."""
    images = len(labels)
    own = probabilities[np.arange(images), labels]
    top, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    gap = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        gap += abs(((top == labels) & inside).sum() - confidence[inside].sum())
    accuracy, loss = (top == labels).mean(), -np.log(own).mean()
    return {"t": t, "samples": images, "not_finite": 0, "acc@1": accuracy, "loss": loss,
            "ece": gap / images}  # fmt: skip


def test_luck_is_not_taken_for_knowledge():
    """Answers without knowledge never count as better than guessing, in 3,000 trials."""
    rng = np.random.RandomState(0)
    prior = np.array([0.5, 0.3, 0.2])
    for _ in range(3000):
        labels = rng.choice(3, size=100, p=prior)
        answers = rng.dirichlet(100 * prior, size=100)
        counts = np.bincount(labels, minlength=3).tolist()
        guessing = class_prior({"classifier": {"per_class": [{"samples": counts}]}})
        assert not is_better(numbers(answers, labels), guessing)
    share = np.array(counts) / 100
    assert guessing.loss == pytest.approx(-(share * np.log(share)).sum())
    assert guessing.accuracy == max(share)
    answers = np.full((100, 3), 0.1)
    answers[np.arange(100), labels] = 0.8
    assert is_better(numbers(answers, labels), guessing)
    assert not is_better(numbers(answers[:5], labels[:5]), guessing)  # five are too few to tell


def test_few_held_out_images_are_compared_with_the_frequencies_in_training():
    """Nobody who knows equal frequencies in training can get the entropy of uneven labels."""
    record = {"classifier": {"per_class": [{"samples": [8, 1, 1]}]}}
    own = class_prior(record)
    assert class_prior(record, Guessing(3, math.log(3), 1 / 3)).loss == math.log(3)
    assert class_prior(record, Guessing(3, 0.5 * own.loss, 0.9)) == own


def test_too_few_images_to_prove_that_it_is_worse(run):
    high = [(*row[:3], row[3] + 0.03 * (row[0] > 980), *row[4:]) for row in DIGITS]
    sign, text = sign_of(judged(run, evaluated(high, images=50)), "worse than guessing")
    assert (sign, "though 50 images are too few to be sure" in text) == (DOUBTFUL, True)


@pytest.mark.parametrize(("images", "sharpness"), [(100, 0.3), (360, 0.3), (360, 5), (5000, 0.1)])
def test_the_bound_on_the_calibration_error_of_luck(images, sharpness):
    """Labels drawn from the answers themselves are perfectly calibrated."""
    rng = np.random.RandomState(1)
    errors, bounds = [], []
    for _ in range(100):
        answers = rng.dirichlet([sharpness] * 10, size=images)
        labels = (answers.cumsum(axis=1) > rng.uniform(size=(images, 1))).argmax(axis=1)
        found = numbers(answers.clip(1e-12), labels)
        errors.append(found["ece"])
        bounds.append(luck_of_calibration(found))
    assert np.mean(errors) < np.mean(bounds) < 4 * np.mean(errors)
    assert math.isclose(np.mean(bounds), np.median(bounds), rel_tol=0.3)
