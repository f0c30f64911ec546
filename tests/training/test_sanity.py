"""The lines said about made-up and real rows; noise alone must make none."""

import dataclasses
import json
import math

import numpy as np
import pytest
from running import GOLDEN

from ds_classifier.data.labels.targets import Targets
from ds_classifier.training.logs.sanity import Guessing, SanityWatch, above_chance

TEN = Guessing(10, math.log(10), 0.1)
THOUSAND = Guessing(1000, math.log(1000), 0.001)


def watched(rows, guessing=TEN, val_samples=360) -> list[str]:
    """Every line that is said, with its step."""
    watch = SanityWatch(guessing, val_samples=val_samples)
    said = [f"{row['step']} {line}" for row in rows for line in watch.add(row)]
    assert all(len(line) < 115 for line in said), said  # of 120 columns, with large step numbers
    return said


def drawn(
    random, step: int, *, accuracies, loss: float, images: int = 640, spread: float = 1.5, **more
):
    """A row as a training of these true accuracies and losses might write it."""
    counts = random.binomial(images // 4, accuracies)
    return {
        "step": step,
        "window_samples": images,
        "train_loss": random.normal(loss, spread / math.sqrt(images)),
        "train_acc@1": counts.sum() / images,
        **{f"train_acc@1_q{q}": count / (images // 4) for q, count in enumerate(counts)},
        **more,
    }


def judged(name, guessing, means, **more) -> list[str]:
    """Return the lines about rows with these means by quartile of t, which scatter by 1 %."""
    random = np.random.RandomState(0)
    rows = []
    for step, of_row in enumerate(means, 1):
        values = np.multiply(of_row, random.normal(1, 0.01, 4))
        rows.append(
            {"step": step, "window_samples": 640}
            | {f"train_{name}_q{q}": value for q, value in enumerate(values)}
            | {f"window_samples_q{q}": 160 for q in range(4)}
            | {"train_loss": guessing.loss, f"train_{name}": values.mean()}
            | {key: of(step) for key, of in more.items()}
        )
    return watched(rows, guessing)


def test_rare_classes_are_learnt_when_their_loss_falls_though_no_answer_changes():
    """Each of 20 classes is on 1 image of 50, so 98 % of the answers are right without looking."""
    labels = np.zeros((1000, 20))
    labels[::50] = 1
    guessing = Guessing.of(labels, 20, Targets("classes"))
    entropy = -0.02 * math.log(0.02) - 0.98 * math.log(0.98)
    assert guessing.loss == pytest.approx(entropy)
    assert guessing.mean_ap == pytest.approx(0.02)
    answers = {"train_acc": lambda step: 0.98}
    answers |= {f"train_acc_q{q}": lambda step: 0.98 for q in range(4)}
    (said,) = judged("loss", guessing, [[entropy] * 4] * 60, **answers)
    known = "near 0.098, that of guessing by class frequency"
    assert said == f"1 loss 0.099, {known}: nothing learnt yet"
    rates = [1.0] * 20 + [0.8] * 40
    rows = [[entropy * rate, entropy, entropy, entropy] for rate in rates]
    first, second = judged("loss", guessing, rows, **answers)
    assert "nothing learnt yet" in first
    assert ": learning, nearly clean images first" in second
    assert "guessing 0.0980" in second
    last = judged("loss", guessing, [[entropy * 0.5] * 4] * 20, **answers)[-1]
    assert last.startswith("5 loss 0.0496 0.0490 0.0493 ")
    assert last.endswith("by quartile of t over 5 lines, guessing 0.0980: learning at every noise "
                         "level")  # fmt: skip


def test_values_are_judged_by_their_error():
    """Values of 0, 10 and 40; guessing their mean misses by 15.6. Top-1 says nothing of it."""
    targets = Targets("values", values=(0.0, 10.0, 40.0), edges=(5.0, 25.0), name="age")
    guessing = Guessing.of(np.repeat([0, 1, 2], 100), 3, targets)
    mae = (50 / 3 + 20 / 3 + 70 / 3) / 3
    assert guessing.mae == pytest.approx(mae)
    hits = {f"train_acc@1_q{q}": lambda step: 0.9 for q in range(4)}
    (said,) = judged("mae", guessing, [[mae] * 4] * 40, **hits)
    assert said.endswith(", near ln 3: nothing learnt yet")
    *_, said = judged("mae", guessing, [[3, 5, 8, 12]] * 40)
    assert said.startswith("5 mae 3.03 5.00 8.05 12.1 by quartile")
    assert "guessing 15.6: learning at every noise level" in said
    (said,) = [line for line in judged("mae", guessing, [[9, 8, 7, 4]] * 40) if "odd" in line]
    assert "in q3, most noise, below " in said


@pytest.mark.parametrize(("held_out", "said_so"), [(0.24, True), (0.11, False)])
def test_several_classes_are_overfitted_when_the_losses_part(held_out, said_so):
    guessing = Guessing(20, 0.2, 0.95, "acc", 0.0, None, 0.05)
    losses = {2: 0.15, 25: held_out}
    rows = [{"step": step, "val_loss": loss, "val_acc": 0.95} for step, loss in losses.items()]
    trained = [
        {"step": step, "window_samples": 640, "train_loss": 0.1}
        | {f"train_loss_q{q}": 0.1 for q in range(4)}
        for step in range(1, 26)
    ]
    said = watched(sorted(trained + rows, key=lambda row: row["step"]), guessing, val_samples=2000)
    text = "25 training loss 0.100, validation 0.240, loss up from 0.15 at step 2: overfitting"
    assert any(line.startswith(text) for line in said) == said_so, said


def test_values_are_overfitted_when_the_errors_part():
    """An error of 30 is no share; guessing misses by 15.6, and training by 5."""
    guessing = Guessing(3, 1.1, 0.4, mae=15.6)
    trained = [
        {"step": step, "window_samples": 640, "train_loss": 0.4, "train_mae": 5.0}
        | {f"train_mae_q{q}": 5.0 for q in range(4)}
        for step in range(1, 26)
    ]
    validated = {"step": 25, "val_loss": 2.0, "val_acc@1": 0.3, "val_mae": 30.0}
    *_, said = watched([*trained, validated], guessing)
    assert said == "25 training mae 5.00, validation 30.0: overfitting"
    earlier = validated | {"step": 24, "val_loss": 1.95, "val_mae": 5.0}
    *_, said = watched([*trained[:-1], earlier, trained[-1], validated], guessing)
    assert said.endswith("validation 30.0: overfitting; take checkpoints/best")


def test_several_classes_under_a_loss_of_the_users_are_not_judged():
    guessing = Guessing(20, None, 0.95, "acc")
    assert judged("loss", dataclasses.replace(guessing, loss=1.0), [[0.1] * 4] * 20)
    rows = [
        {"step": step, "window_samples": 640, "train_loss": 0.1, "train_loss_q0": 0.1}
        for step in range(20)
    ]
    assert watched(rows, guessing) == []


def test_several_classes_have_the_accuracy_of_their_answers_too():
    """One class on half of the images, three on a tenth: 0.5 and 0.9 right without looking."""
    labels = np.zeros((1000, 4))
    labels[::2, 0] = labels[::10, 1:] = 1
    guessing = Guessing.of(labels, 4, Targets("classes"))
    loss = (math.log(2) + 3 * 0.325083) / 4
    assert (guessing.metric, guessing.accuracy) == ("acc", pytest.approx(0.8))
    assert guessing.loss == pytest.approx(loss, abs=1e-5)


def sequence(steps, seed=0, **by_step):
    """Rows with what each function of the step gives."""
    random = np.random.RandomState(seed)
    return [drawn(random, s, **{name: of(s) for name, of in by_step.items()}) for s in steps]


def flat(value):
    return lambda step: value


# ------------------------------------------------------------------------- how far it has come


def test_a_training_that_learns_says_so_three_times():
    def accuracies(step):
        return [min(0.95, 0.1 + max(0.0, (step - after) / 400)) for after in (100, 150, 200, 400)]

    rows = sequence(
        range(10, 1000, 10),
        accuracies=accuracies,
        loss=lambda s: max(0.3, 2.303 - s / 300),
        spread=flat(0.3),
    )
    said = watched(rows)
    assert len(said) == 3, said
    assert ", near ln 10: nothing learnt yet" in said[0]
    assert "q0 accuracy" in said[1]
    assert "learning, nearly clean images first" in said[1]
    assert "learning at every noise level" in said[2]
    steps = [int(line.split()[0]) for line in said]
    assert 100 < steps[1] < 250
    assert 400 < steps[2] < 700


@pytest.mark.parametrize("images", [4, 16, 64, 640])
@pytest.mark.parametrize(("guessing", "chance"), [(TEN, 0.1), (THOUSAND, 0.001)])
def test_nothing_is_learnt_from_noise(guessing, chance, images):
    """500 rows at chance, of any size: no learning, and nothing wrong either."""
    rows = sequence(
        range(1, 501),
        accuracies=flat([chance] * 4),
        loss=flat(guessing.loss),
        images=flat(images),
        spread=flat(0.3),
    )
    said = watched(rows, guessing)
    assert len(said) == 1, said
    assert f", near ln {guessing.num_classes}: nothing learnt yet" in said[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("images", [16, 640])
def test_noise_around_a_good_training_raises_no_alarm(seed, images):
    """500 rows of a training that has settled, and validations that agree with it."""
    rows = sequence(
        range(1, 501),
        seed,
        accuracies=flat([0.95, 0.9, 0.8, 0.4]),
        loss=flat(0.8),
        images=flat(images),
    )
    random = np.random.RandomState(seed)
    rows[99::100] = [
        row | {"val_loss": random.normal(0.85, 0.06), "val_acc@1": random.binomial(360, 0.76) / 360}
        for row in rows[99::100]
    ]
    said = watched(rows)
    assert len(said) <= 2, said
    assert "learning" in said[-1]


def noisy_rows(random, count, *, accuracy, images):
    """The sampler `noisy` puts 1, 3, 5, 7 of 16 images into the quartiles of t."""
    for step in range(1, count + 1):
        drawn_in = random.multinomial(images, [1 / 16, 3 / 16, 5 / 16, 7 / 16])
        hits = random.binomial(drawn_in, accuracy)
        yield {
            "step": step,
            "window_samples": images,
            "train_loss": random.normal(math.log(10), 0.3 / math.sqrt(images)),
            "train_acc@1": hits.sum() / images,
            **{f"window_samples_q{q}": int(n) for q, n in enumerate(drawn_in)},
            **{f"train_acc@1_q{q}": hits[q] / drawn_in[q] for q in range(4) if drawn_in[q]},
        }


@pytest.mark.parametrize("images", [64, 200])
def test_few_images_in_a_quartile_are_little_evidence(images):
    """1,000 trainings of 5 rows at chance: where quartiles counted alike, dozens would speak."""
    random = np.random.RandomState(0)
    said = [
        line
        for _ in range(1000)
        for line in watched(noisy_rows(random, 5, accuracy=[0.1] * 4, images=images))
    ]
    assert not [line for line in said if "nothing learnt yet" not in line]


def test_a_quartile_that_is_near_is_not_called_behind():
    """q0 a little below what proves it, q1 a little above."""
    rows = [
        {
            "step": step,
            "window_samples": 5120,
            "train_loss": 2.29,
            "train_acc@1": 0.12,
            **{f"train_acc@1_q{q}": a for q, a in enumerate((0.138, 0.145, 0.1, 0.1))},
        }
        for step in (10,)
    ]
    (said,) = watched(rows)
    assert said.endswith("learning")


def test_a_loss_clearly_below_guessing_is_not_called_nothing():
    rows = sequence(
        range(10, 100, 10), accuracies=flat([0.001] * 4), loss=flat(6.72), spread=flat(0.3)
    )
    assert watched(rows, THOUSAND) == []


def test_chance_is_that_of_the_labels_at_hand():
    """Nine of ten images of one class: 90 % right is nothing."""
    guessing = Guessing.of(np.repeat([0, 1], [900, 100]), 2)
    assert guessing.accuracy == pytest.approx(0.9)
    assert guessing.loss == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    rows = sequence(range(10, 300, 10), accuracies=flat([0.9] * 4), loss=flat(guessing.loss))
    (said,) = watched(rows, guessing)
    assert "nothing learnt yet" in said


def test_luck_is_bounded():
    """Luck in 100,000 trials of 160 guesses is never taken for knowledge; the bound is 6e-6."""
    counts = np.random.RandomState(0).binomial(160, 0.1, 100_000)
    assert not any(above_chance(count / 160, 0.1, 160) for count in np.unique(counts))
    assert above_chance(0.3, 0.1, 160)
    assert not above_chance(0.3, 0.1, 16)


# ------------------------------------------------------------------------- what is wrong


def test_a_loss_above_guessing_for_long():
    rows = sequence(range(10, 600, 10), accuracies=flat([0.1] * 4), loss=flat(3.4))
    said = watched(rows)
    assert any("above ln 10 = 2.30: worse than guessing" in line for line in said), said
    assert len([line for line in said if "worse" in line]) == 1


def test_a_loss_that_rises_again():
    rows = sequence(
        range(10, 1200, 10),
        accuracies=lambda s: [0.7] * 4 if s < 600 else [0.3] * 4,
        loss=lambda s: 0.9 if s < 600 else min(2.2, 0.9 + (s - 600) / 300),
    )
    said = [line for line in watched(rows) if "diverging" in line]
    assert len(said) == 1
    assert 600 < int(said[0].split()[0]) < 800


def test_training_far_above_validation():
    def rows_until(step, val_losses):
        rows = sequence(range(10, step, 10), accuracies=flat([0.99] * 4), loss=flat(0.05))
        validations = [
            {"step": 100 * i, "val_loss": loss, "val_acc@1": 0.7}
            for i, loss in enumerate(val_losses, 1)
        ]
        return sorted(rows + validations, key=lambda row: row["step"])

    (said,) = [line for line in watched(rows_until(400, [0.9, 0.8, 1.2])) if "overfit" in line]
    assert said.startswith("300 training accuracy 99 %, validation 70 %, loss up")
    # Of 8 held-out images, 6 right: that tells nothing.
    few = watched(rows_until(400, [0.9, 0.8, 0.8]), val_samples=8)
    assert not any("overfit" in line for line in few)


@pytest.mark.slow
def test_validations_a_thousand_rows_apart_are_remembered():
    """The defaults: a line every 10 steps, a validation every 10,000."""
    rows = sequence(range(10, 30_001, 10), accuracies=flat([0.75] * 4), loss=flat(0.7))
    losses = {10_000: 1.3, 20_000: 1.6, 30_000: 1.9}
    validations = [{"step": s, "val_loss": v, "val_acc@1": 0.66} for s, v in losses.items()]
    said = watched(sorted(rows + validations, key=lambda row: row["step"]), val_samples=5000)
    assert any("loss up from 1.30 at step 10000: overfitting" in line for line in said), said


def test_overfitting_is_seen_where_noisy_timesteps_are_drawn_more_often():
    """Accuracies as under uniform t, so the mean over the images drawn is no measure."""
    random = np.random.RandomState(0)
    rows = list(noisy_rows(random, 20, accuracy=[0.99, 0.99, 0.96, 0.78], images=6400))
    validations = [
        {"step": step, "val_loss": loss, "val_acc@1": 0.85} for step, loss in ((10, 0.9), (20, 1.2))
    ]
    said = watched(sorted(rows + validations, key=lambda row: row["step"]), val_samples=5000)
    assert any("training accuracy 93 %, validation 85 %" in line for line in said), said


def test_what_was_said_before_a_stop_is_not_said_again():
    def accuracies(step):
        return [0.1] * 4 if step < 100 else [0.5, 0.4, 0.3, 0.2]

    rows = sequence(range(10, 400, 10), accuracies=accuracies, loss=flat(2.303), spread=flat(0.3))
    validations = [
        {"step": step, "val_loss": loss, "val_acc@1": 0.3} for step, loss in ((90, 0.9), (350, 2.4))
    ]
    everything = sorted(rows + validations, key=lambda row: row["step"])
    whole = watched(everything)
    assert any("at every noise level" in line for line in whole)
    before = [row for row in everything if row["step"] <= 200]
    resumed = SanityWatch(TEN, val_samples=360)
    resumed.recall(before)
    after = [line for row in everything[len(before) :] for line in resumed.add(row)]
    assert not any("learn" in line for line in after), after


def test_numbers_that_are_none_are_passed_over():
    watch = SanityWatch(TEN, val_samples=10)
    for row in ({"val_loss": None}, {"val_loss": 2.0}, {"train_loss": math.nan}):
        assert watch.add({"step": 1, "window_samples": 5000, **row}) == []


def test_small_batches_are_judged_too():
    """A judgement at 2 images per line takes more than 20 lines."""
    row = {"window_samples": 2, "train_loss": 0.3, "train_acc@1": 0.9}
    row |= {f"train_acc@1_q{q}": 0.9 for q in range(4)}
    (said,) = watched([{"step": step, **row} for step in range(1, 400)])
    assert "over 32 lines, chance 10 %: learning at every noise level" in said


def test_a_loss_scale_that_falls_and_falls():
    def rows_of(scales):
        return sequence(
            range(10, 10 * len(scales) + 1, 10),
            accuracies=flat([0.5] * 4),
            loss=flat(1.0),
            lg_loss_scale=lambda s: scales[s // 10 - 1],
        )

    steady = [16] * 5 + [15, 14, 13] + [12] * 4 + [11, 9, 8]
    (said,) = [line for line in watched(rows_of(steady)) if "scale" in line]
    assert said.startswith("130 loss scale down from 2^16 at step 50 to 2^11, never up")
    start = [11] + [11] * 20 + [12] * 20 + [11] + [12] * 20  # found its level, and moves about it
    assert not any("scale" in line for line in watched(rows_of(start)))
    high = [29, 25, 21, 18, 17, 16, 16]  # where some JSONs begin
    assert not any("scale" in line for line in watched(rows_of(high)))


def test_more_noise_that_is_easier():
    rows = sequence(range(10, 300, 10), accuracies=flat([0.2, 0.2, 0.3, 0.8]), loss=flat(1.8))
    assert any("in q3, most noise, above" in line for line in watched(rows))


# ------------------------------------------------------------------------- real runs


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        ("good", ["nothing learnt yet", "nearly clean images first", "at every noise level"]),
        ("diverging", ["worse than guessing"]),
        ("overfitting", ["at every noise level", "overfitting"]),
    ],
)
def test_rows_of_real_runs(run, wanted):
    """The rows of a tiny classifier on digits, from its log.jsonl."""
    recorded = json.loads((GOLDEN / "sanity_rows.json").read_text())[run]
    said = watched(recorded)
    for words in wanted:
        assert any(words in line for line in said), said
    if run == "good":
        assert len(said) == 3, said
