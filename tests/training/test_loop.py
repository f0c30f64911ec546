"""The things due after a step, and the clock of the log."""

import pytest

from ds_classifier.training.logs import log
from ds_classifier.training.logs.log import Clock
from ds_classifier.training.loop import Cadence, Due


def test_what_is_due_is_what_the_intervals_say_and_all_of_it_after_the_last_step():
    cadence = Cadence(iterations=25, log=2, validate=10, save=5)
    due = {step: cadence.at(step) for step in range(1, 26)}
    assert [step for step, what in due.items() if what.log] == [*range(2, 25, 2), 25]
    assert [step for step, what in due.items() if what.validate] == [10, 20, 25]
    assert [step for step, what in due.items() if what.save] == [5, 10, 15, 20, 25]
    assert [step for step, what in due.items() if what.last] == [25]


def test_nothing_is_validated_without_validation_data():
    assert Cadence(iterations=4, log=1, validate=0, save=1).at(4) == Due(
        log=True, validate=False, save=True, last=True
    )


def test_the_clock_leaves_out_pauses_and_restarts_without_a_gap(monkeypatch):
    now = 100.0
    monkeypatch.setattr(log.time, "perf_counter", lambda: now)
    clock = Clock()
    now += 3
    clock.count(waited=0.5)
    with clock.paused():
        now += 60
    now += 2
    clock.count(waited=0.25)
    assert clock.seconds() == pytest.approx(5)
    assert clock.restart() == pytest.approx((5, 2, 0.75))
    now += 1
    assert (clock.seconds(), clock.steps, clock.waited) == pytest.approx((1, 0, 0))
