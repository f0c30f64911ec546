"""Numbers, durations and tables as text; progress in a log."""

import pytest

from ds_classifier.common import progress, text


def test_counts_agree_with_their_noun():
    assert [text.count(n, "image") for n in (0, 1, 12_000)] == [
        "0 images",
        "1 image",
        "12,000 images",
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (7.9, "0:00:07"),
        (3723, "1:02:03"),
        (359_999, "99:59:59"),
        (363_000, "4.2 days"),
        (859_000, "9.9 days"),
        (860_400, "10 days"),
        (864_000, "10 days"),
        (-1, "0:00:00"),
    ],
)
def test_durations(seconds, shown):
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (3.14e-4, "3.1e-4"),
        (12_345, "12.35k"),
        (65_400_000, "65.4M"),
        (None, "-"),
    ],
)
def test_short_numbers(value, shown):
    assert text.short(value) == shown
    assert len(text.short(value)) <= 7


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.3026, "2.303"),
        (-2.3026, "-2.303"),
        (329.18, "329.18"),
        (-329.18, "-329.2"),
        (123_456, "123456"),
        (1_234_567, "1.2e6"),
        (-1.75e100, "-2e100"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (None, "-"),
    ],
)
def test_numbers_fitted_into_six_characters(value, shown):
    assert text.fitted(value, 6, 3) == shown


def test_percent():
    assert text.percent(0.9672) == "96.7 %"
    assert text.percent(None) == "-"


def test_a_message_of_several_lines_or_none():
    assert text.first_line(ValueError("got 3\nneed 4")) == "got 3"
    assert text.first_line(KeyError()) == "KeyError"


def test_a_table_has_one_width_a_column():
    lines = text.table(["host", "rank"], [["a", "0"], ["longer", "12"]])
    assert lines == ["host    rank", "a          0", "longer    12"]


def test_progress_in_a_log_is_lines_with_rate_and_time_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress() as shown:
        for done in (10, 30, 50, 70):
            shown(done, 100, "verify")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "verify: 30 of 100 images, 0.5/s, 0:02:20 left",
        "verify: 70 of 100 images, 0.8/s, 0:00:40 left",
    ]


def test_other_ranks_show_nothing(capsys):
    with progress.Progress(shown=False) as shown:
        shown(1, 2)
    assert capsys.readouterr().err == ""
