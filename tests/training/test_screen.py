"""The table of log rows on the screen: which columns fit, and that they stay aligned."""

import math
import re

import pytest
from running import ROOT

from ds_classifier import distributed
from ds_classifier.config import parse_training_command
from ds_classifier.config.deepspeed_json import read_ds_config, resolve
from ds_classifier.data.labels.targets import Targets
from ds_classifier.distributed import console
from ds_classifier.evaluation import metrics
from ds_classifier.training.logs.screen import (
    EXPLAINED,
    Table,
    lost_line,
    offloaded,
    progress_line,
    schedule,
)

ROW = {
    **{"step": 50, "train_loss": 2.0877, "train_acc@1": 0.248, "train_acc@5": 0.695, "lr": 9.2e-4},
    **{f"train_acc@1_q{q}": share for q, share in enumerate((0.284, 0.284, 0.26, 0.22))},
    **{"grad_norm": 1.954, "lg_loss_scale": 16.0, "images_per_sec": 136.2, "memory_gib": 0.84},
    "data_wait_frac": 0.02,
}
HUGE = {
    **{
        "step": 1_000_000,
        "train_loss": 329.18,
        "train_acc@1": 1.0,
        "train_acc@5": 1.0,
        "lr": 1e-10,
    },
    **{"train_acc@1_q0": 1.0, "train_acc@1_q1": None, "train_acc@1_q3": math.nan},
    **{"grad_norm": 1234567.0, "lg_loss_scale": -3.0, "images_per_sec": 100_000.0},
    **{"data_wait_frac": 1.0, "memory_gib": 139.2, "lr": 1e-10},
}
VALIDATED = {
    **{"step": 250, "val_loss": 2.3026, "val_acc@1": 0.1, "val_acc@5": 0.5, "val_acc@1_t0": 0.125},
    **{"val_acc@1_q0": 0.09, "val_acc@1_q1": 0.11, "val_acc@1_q2": None, "val_acc@1_q3": 0.0},
    "val_seconds": 8.83,
}
OF_ACCURACY = EXPLAINED.format("accuracy")
LOG = f"""\
   step       eta   loss acc@1  q0  q1  q2  q3 acc@5  gnorm      lr scale  img/s wait   mem
{OF_ACCURACY}
     50   0:03:31  2.088  24.8  28  28  26  22  69.5   1.95  9.2e-4  2^16    136   2%  0.8G
1000000 1000 days 329.18 100.0 100   -   - nan 100.0  1.2e6 1.0e-10  2^-3 100000 100%  139G
    250       val  2.303  10.0   9  11   -   0  50.0  at t=0 12.5 %, 8.8 s"""


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that sets the columns of a line; None stands for a log."""

    def has(width: int | None) -> None:
        for module in (distributed, console):
            monkeypatch.setattr(module, "columns", lambda: width)

    return has


def lines(num_classes=10, *, loss_scale=True, rows=((ROW, 211), (HUGE, 86_400 * 1000))):
    """Return head, explanation, a line for each row with its seconds left, and a validation's."""
    table = Table(num_classes=num_classes, loss_scale=loss_scale)
    head = table.begin().splitlines()
    trained = [table.training_line(row, eta_seconds=seconds) for row, seconds in rows]
    return [*head, *trained, table.validation_line(VALIDATED)]


def test_a_log_has_all_columns(terminal):
    terminal(None)
    assert "\n".join(lines()) == LOG


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (139, set()),
        (99, set()),
        (79, {"mem", "acc@5"}),
        (70, {"mem", "acc@5", "wait", "scale"}),
        (60, {"mem", "acc@5", "wait", "scale", "lr"}),
        (40, {"mem", "acc@5", "wait", "scale", "lr", "gnorm", *["q0", "q1", "q2", "q3"]}),
        (30, {*["mem", "acc@5", "wait", "scale", "lr", "gnorm", "q0", "q1", "q2", "q3", "img/s"]}),
    ],
)
def test_a_narrow_terminal_has_fewer_columns_and_no_wrapped_line(terminal, width, missing):
    terminal(None)
    whole = lines()[0].split()
    terminal(width)
    head, *rest = lines()
    assert head.split() == [name for name in whole if name not in missing]
    assert max(map(len, [head, *rest])) <= width
    # Every number ends where its head does, so that a column reads downwards.
    ends = {match.end() for match in re.finditer(r"\S+", head)}
    for line in rest[-3:-1]:
        line = line.replace("1000 days", "1000-days")
        assert {match.end() for match in re.finditer(r"\S+", line)} == ends


def test_80_columns_hold_all_but_the_memory_in_bf16_and_all_for_few_classes(terminal):
    terminal(79)
    assert "mem" not in lines(10, loss_scale=False)[0]
    assert "q3 acc@5  gnorm      lr  img/s wait" in lines(10, loss_scale=False)[0]
    head, *_, validation = lines(5, loss_scale=False)
    assert head.split()[-6:] == ["q3", "gnorm", "lr", "img/s", "wait", "mem"]
    assert "50.0" not in validation
    assert "at t=0 12.5 %" in validation


def test_several_classes_have_columns_of_their_own(terminal):
    """The mean average precision is of validations; the quartiles are of the loss."""
    terminal(None)
    table = Table(num_classes=10, loss_scale=False, targets=Targets("classes"))
    head, explained = table.begin().splitlines()
    assert head.split()[2:9] == ["loss", "q0", "q1", "q2", "q3", "acc", "mAP"]
    assert explained.startswith("q0..q3: loss by quarter")
    quartiles = {f"train_loss_q{q}": loss for q, loss in enumerate((0.0312, 0.5, 12.34, 1e-5))}
    row = ROW | {"train_loss": 0.5, "train_acc": 0.75} | quartiles
    assert table.training_line(row, eta_seconds=10).split()[2:9] == [
        *("0.500", "0.031", "0.500", "12.3", "1e-5", "75.0", "-")
    ]
    validated = {"step": 5, "val_loss": 0.5, "val_acc": 0.7, "val_mAP": 0.6, "val_seconds": 1.0}
    validated |= {f"val_loss_q{q}": 0.7 for q in range(4)} | {"val_acc_t0": 0.8, "val_mAP_t0": 0.9}
    line = table.validation_line(validated)
    assert line.split()[2:9] == ["0.500", *["0.700"] * 4, "70.0", "60.0"]
    assert "at t=0 mAP 90.0 %" in line


@pytest.mark.parametrize(
    ("size", "shown"), [(1.0, "0.123"), (1e4, "1230"), (1e-4, "1.2e-5"), (1e9, "1.23e8")]
)
def test_errors_of_values_of_any_size_can_be_read(terminal, size, shown):
    """The quartiles are of the error, in whatever unit."""
    terminal(None)
    targets = Targets("values", values=(0.0, size), edges=(size / 2,), name="age")
    table = Table(num_classes=2, loss_scale=False, targets=targets)
    head, explained = table.begin().splitlines()
    assert head.split()[2:9] == ["loss", "acc@1", "mae", "q0", "q1", "q2", "q3"]
    assert explained.startswith("q0..q3: mae by quarter")
    row = ROW | {"train_mae": 0.12300001 * size}
    row |= {f"train_mae_q{q}": 0.123 * size for q in range(4)}
    cells = table.training_line(row, eta_seconds=10).split()
    assert cells[4] == shown
    assert {len(cell) for cell in cells[5:9]} <= {4, 5}
    assert [float(cell) for cell in cells[5:9]] == pytest.approx([0.123 * size] * 4, rel=0.2)
    validated = VALIDATED | {"val_mae": 0.2 * size, "val_mae_t0": 0.123 * size}
    assert f"at t=0 mae {shown}, 8.8 s" in table.validation_line(validated)


def test_a_new_metric_has_a_column_and_negative_values_do_not_touch_it(terminal, monkeypatch):
    entry = metrics.Metric(name="margin", title="Margin", unit="nats", per_sample=None)
    monkeypatch.setitem(metrics.METRICS, "margin", entry)
    terminal(None)
    row = ROW | {"train_margin": -123.456, "train_loss": -1.5, "train_acc@1_q1": -0.5}
    head, _, line, _ = lines(loss_scale=False, rows=[(row, 10)])
    assert head.split()[9] == "margin"
    found = line.split()
    assert (found[2], found[5], found[9]) == ("-1.500", "-50", "-123.5")
    assert len(found) == len(head.split())


def test_the_head_is_repeated_every_20_rows_for_the_width_of_that_time(terminal):
    terminal(None)
    table = Table(num_classes=10, loss_scale=False)
    first = table.begin().splitlines()[0]
    shown = []
    for row in range(50):
        if row == 30:
            terminal(40)
        line = (
            table.validation_line(VALIDATED)
            if row % 7 == 6
            else table.training_line(ROW, eta_seconds=1)
        )
        shown += line.splitlines()
    heads = [i for i, line in enumerate(shown) if line.startswith("   step")]
    assert heads == [20, 41]
    assert shown[20] == first
    assert shown[41] == "   step       eta   loss acc@1  img/s"


def test_lost_images_are_reported_on_the_screen(terminal):
    terminal(None)
    table = Table(num_classes=10, loss_scale=False)
    assert "decode" not in table.validation_line(VALIDATED | {"val_bad_samples": 0})
    _, reported = table.validation_line(VALIDATED | {"val_bad_samples": 2}).splitlines()
    assert reported == "        without 2 that did not decode (verify --decode names them)"
    row = {"samples": 9, "skipped_steps": 0}
    assert "9 samples seen so far, 1 bad sample (" in lost_line({**row, "bad_samples": 1}, "")
    assert " 2 bad samples (" in lost_line({**row, "bad_samples": 2}, "")


def test_the_live_line_of_a_slow_and_a_fast_run():
    keywords = dict(step=123, iterations=1000, eta_seconds=201)
    assert progress_line(images_per_sec=211.7, **keywords) == (
        "    123 of 1,000 steps (12%), 212 images/s, 0:03:21 left"
    )
    assert " 0.04 images/s" in progress_line(images_per_sec=0.04, **keywords)


def test_the_engine_line_names_offload_and_warm_up():
    json = ROOT / "ds_configs" / "zero2_bf16.json"
    raw, cpu = read_ds_config(json), {"device": "cpu"}

    def resolved(*flags, **keys):
        command = parse_training_command(["--deepspeed_config", str(json), *flags])
        return resolve(command, raw | keys, world_size=1)

    for stage, parts, words in (
        (1, {}, ""),
        (2, {"offload_optimizer": cpu}, " with the optimizer offloaded to the CPU"),
        (
            3,
            {"offload_optimizer": cpu, "offload_param": cpu},
            " with the optimizer and the parameters offloaded to the CPU",
        ),
        (3, {"offload_optimizer": {"device": "none"}}, ""),
    ):
        ds = resolved(zero_optimization={"stage": stage, **parts}).ds_config
        assert offloaded(ds) == words
    for flags, words in (
        ("", "the JSON's WarmupDecayLR with 12 steps of warm-up"),
        ("--lr_schedule cosine", "cosine to 0"),
        ("--lr_schedule cosine --warmup_steps 1", "cosine to 0 with 1 step of warm-up"),
    ):
        assert schedule(resolved("--iterations", "600", *flags.split())) == words
