"""A finished run that is trained on: --extend, and more --iterations at a constant rate."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from running import ROOT, read_log
from tiny_run import assert_same_run, assert_same_state, losses, traced, train

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.config import parse_training_command
from ds_classifier.config.deepspeed_json import read_ds_config, resolve
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.training.run_dir import read_events
from ds_classifier.training.setup import lr_factor
from ds_classifier.training.start import finished, open_run, parts_of, refuse_changes

JSON = ROOT / "ds_configs" / "zero1_fp32.json"
LR = 1e-3


def fresh_optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def rates_of_a_new_schedule(steps: int, skipped: frozenset = frozenset()) -> list[float]:
    """Return the rate of each step of a run of its own, from DeepSpeed's scheduler.

    skipped: steps, from 0, after which the scheduler does not move.
    """
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    optimizer = fresh_optimizer()
    schedule = WarmupDecayLR(
        optimizer, steps, warmup_max_lr=LR, warmup_num_steps=1, warmup_type="linear"
    )
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        if step not in skipped:
            schedule.step()
    return rates


def resolved(*flags: str):
    command = parse_training_command(["--deepspeed_config", str(JSON), *flags])
    return resolve(command, read_ds_config(JSON), world_size=1)


def at(step: int, *ends: int, skipped: int = 0, **settings) -> dict:
    """Return the state of a checkpoint of a run whose parts end at `ends`."""
    before = resolved("--iterations", str(ends[0])).settings.recorded() | settings
    state = dict(step=step, settings=before, skipped_steps=skipped)
    return state | dict(part_ends=list(ends), skipped_before_part=0)


# ------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A run of 12 steps, extended to 21 in one go; and two as it was when killed after step 18.

    Each part skips a step.
    """
    root = tmp_path_factory.mktemp("extended")
    flags = ["--global_batch", "16", "--iterations", "12", "--save_interval", "6"]
    flags += ["--schedule_sampler", "loss-second-moment", "--diffusion_steps", "4"]
    trace = ("TRACE", str(root / "trace"))
    train(1, "zero1_fp32", digits, root / "run", *flags, environment=[trace, ("NAN_AT", "3:0")])
    flags += ["--extend", "21"]
    nan = ("NAN_AT", "15:0")
    done = train(1, "zero1_fp32", digits, root / "run", *flags, environment=[trace, nan])
    for name in ("killed", "moved"):
        shutil.copytree(root / "run", root / name)
        shutil.rmtree(root / name / "checkpoints" / "step-00000021")
        (root / name / "DONE").unlink()
    return root, flags, done.output


@pytest.mark.slow
def test_each_rate_of_the_tail_is_that_of_a_new_schedule(runs):
    root, _, _ = runs
    rates = [row["lr"] for row in read_log(root / "run")]
    assert rates[:12] == rates_of_a_new_schedule(12, frozenset([2]))
    assert rates[12:] == rates_of_a_new_schedule(9, frozenset([2]))


def test_positions_go_on_exactly_once(runs):
    root, _, _ = runs
    assert [row[1] for row in traced(root / "trace")] == list(range(21 * 16))


@pytest.mark.slow
def test_an_interrupted_extension_continues_bit_equal(runs, digits):
    root, flags, _ = runs
    done = train(1, "zero1_fp32", digits, root / "killed", *flags)
    assert "step-00000018, step 18; extended from 12 to 21 steps" in done.output
    assert_same_run(root / "killed", root / "run", 21)


@pytest.mark.slow
def test_an_interrupted_extension_continues_on_other_ranks(runs, digits):
    root, flags, _ = runs
    train(2, "zero1_fp32", digits, root / "moved", *flags)
    assert losses(root / "moved")[18:] == pytest.approx(losses(root / "run")[18:], rel=2e-6)
    rates = [[row["lr"] for row in read_log(root / run)] for run in ("moved", "run")]
    assert rates[0] == rates[1]


def test_an_extension_is_recorded(runs):
    root, _, screen = runs
    run = root / "run"
    assert "extended from 12 to 21 steps, the learning rate begins anew" in screen
    assert (run / "DONE").read_text() == "step 21\n"
    state = json.loads((run / "checkpoints/step-00000021/state.json").read_text())
    assert (state["part_ends"], state["skipped_before_part"]) == ([12, 21], 1)
    events = [(e["event"], e["step"]) for e in read_events(run)]
    wanted = [("start", 0), ("finish", 12), ("resume", 12), ("extend", 12), ("finish", 21)]
    assert events == wanted
    page = (run / "report.html").read_text()
    assert "extended to 21 steps" in page
    assert "of 21 steps" in page
    params = json.loads((run / "deepspeed.json").read_text())["scheduler"]["params"]
    assert (params["total_num_steps"], params["warmup_num_steps"]) == (9, 1)


def test_an_extended_run_is_read_by_the_other_programs(runs):
    import ds_classifier

    root, _, _ = runs
    model = ds_classifier.load(root / "run")
    probabilities = model.predict(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 0)
    assert probabilities.sum(dim=1).tolist() == pytest.approx([1, 1])


@pytest.mark.slow
def test_a_constant_rate_takes_more_iterations(digits, tmp_path):
    flags = ["--global_batch", "8", "--anneal_lr", "False", "--iterations"]
    train(1, "zero1_fp32", digits, tmp_path / "golden", *flags, "8")
    train(1, "zero1_fp32", digits, tmp_path / "run", *flags, "4")
    done = train(1, "zero1_fp32", digits, tmp_path / "run", *flags, "8")
    assert "step 4; extended from 4 to 8 steps\n" in done.output
    last = "checkpoints/step-00000008"
    assert_same_state(tmp_path / "run" / last, tmp_path / "golden" / last)


# ------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("applied", range(12))
def test_a_resume_sets_the_rate_of_its_step(applied):
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    optimizer = fresh_optimizer()
    params = resolved("--iterations", "600", "--lr", str(LR)).with_part(12)
    params = params.ds_config["scheduler"]["params"]
    engine = SimpleNamespace(
        lr_scheduler=WarmupDecayLR(optimizer, **params),
        optimizer=SimpleNamespace(optimizer=optimizer),
    )
    deepspeed_engine.set_schedule(engine, applied)
    assert optimizer.param_groups[0]["lr"] == rates_of_a_new_schedule(12)[applied]


def test_the_references_anneal_begins_anew():
    settings = resolved("--iterations", "600", "--extend", "900", "--anneal_lr", "True").settings
    factor = lr_factor(settings, 300)
    assert [factor(k) for k in range(301)] == pytest.approx([1 - k / 300 for k in range(301)])


@pytest.mark.parametrize(("steps", "warm_up"), [(12, 1), (300, 6), (200_000, 1000)])
def test_the_warm_up_of_a_part_follows_the_rule_of_a_run(steps, warm_up):
    part = resolved("--iterations", "600").with_part(steps).ds_config
    alone = resolved("--iterations", str(steps)).ds_config
    assert part["scheduler"] == alone["scheduler"]
    assert part["scheduler"]["params"]["warmup_num_steps"] == warm_up
    given = resolved("--iterations", "600", "--warmup_steps", "7").with_part(steps).ds_config
    assert given["scheduler"]["params"]["warmup_num_steps"] == 7


# ------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("state", "flags", "ends", "skipped"),
    [
        (None, "--iterations 600", [600], 0),
        (at(600, 600, skipped=3), "--iterations 600 --extend 900", [600, 900], 3),
        (at(700, 600, 900, skipped=5), "--iterations 600 --extend 900", [600, 900], 0),
        (at(900, 600, 900, skipped=5), "--iterations 600 --extend 990", [600, 900, 990], 5),
        (at(600, 600), "--iterations 900 --anneal_lr False", [600, 900], 0),
        (at(400, 600), "--iterations 900 --anneal_lr False", [900], 0),
        (at(400, 600), "--iterations 500 --anneal_lr False", [500], 0),
        (at(600, 600), "--iterations 600 --extend 900 --anneal_lr False", [600, 900], 0),
    ],
)
def test_the_parts_of_a_run(state, flags, ends, skipped):
    parts = parts_of(state, resolved(*flags.split()))
    assert parts == dict(part_ends=ends, skipped_before_part=skipped)


def test_a_checkpoint_of_before_has_one_part():
    old = {k: v for k, v in at(600, 600, skipped=2).items() if "part" not in k}
    assert disk.part_ends(old) == [600]
    parts = parts_of(old, resolved("--iterations", "600", "--extend", "900"))
    assert parts == dict(part_ends=[600, 900], skipped_before_part=2)


@pytest.mark.parametrize(
    ("state", "flags", "words"),
    [
        (None, "--iterations 600 --extend 900", ["need a finished run", "without the flag first"]),
        (at(300, 600), "--iterations 600 --extend 900", ["300 of 600 steps are done", "without"]),
        (at(700, 600, 900), "--iterations 600", ["got none; need 900", "of which 700 are done"]),
        (at(700, 600, 900), "--iterations 600 --extend 800", ["got 800; need 900"]),
        (at(700, 600, 900), "--iterations 600 --extend 990", ["with --extend 900 first"]),
        (at(600, 600), "--iterations 600 --extend 602", ["2 steps; need more", "603 or more"]),
        (at(400, 600), "--iterations 300 --anneal_lr False", ["--iterations: got 300; need 400"]),
    ],
)
def test_a_run_that_cannot_be_extended_so(state, flags, words):
    with pytest.raises(ValueError) as error:
        parts_of(state, resolved(*flags.split()))
    for word in words:
        assert word in str(error.value)


def test_the_steps_in_all_are_more_than_the_iterations():
    with pytest.raises(ValueError, match="--extend: got 100; need the number of steps in all"):
        resolved("--iterations", "600", "--extend", "100")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (at(600, 600), ["--iterations 600 --extend 900", "has decayed to 0 at step 600"]),
        (at(300, 600), ["first finish the 600 steps", "then --iterations 600 --extend 900"]),
        (at(900, 600, 900), ["--iterations 600 --extend 900"]),
    ],
)
def test_more_iterations_are_answered_with_the_flag(state, words):
    facts = dict(deepspeed={}, classes=[], data="")
    with pytest.raises(ValueError) as error:
        refuse_changes(state | facts, resolved("--iterations", "900"), facts)
    for word in ("iterations: 600 in the checkpoint, 900 now", *words):
        assert word in str(error.value)
    refuse_changes(
        state | facts | {"settings": state["settings"] | {"anneal_lr": False}},
        resolved("--iterations", "900", "--anneal_lr", "False"),
        facts,
    )


def test_other_targets_are_another_training():
    facts = dict(deepspeed={}, classes=["a", "b"], data="1")
    several = facts | {"data": "2", "targets": {"kind": "classes"}}
    state = at(300, 600)
    run = resolved("--iterations", "600")
    with pytest.raises(ValueError, match="targets: one class per image in the checkpoint, several"):
        refuse_changes(state | facts, run, several)
    with pytest.raises(ValueError, match="several classes per image in the checkpoint, one class"):
        refuse_changes(state | several, run, facts)
    refuse_changes(state | several, run, several)


def test_done_counts_for_the_steps_that_were_done(tmp_path):
    settings = resolved("--iterations", "600").settings
    assert finished(settings, tmp_path) is None
    (tmp_path / "DONE").write_text("step 600\n")
    assert finished(settings, tmp_path) == "step 600"
    assert finished(settings.replace(extend=900), tmp_path) is None
    (tmp_path / "DONE").write_text("step 900\n")
    assert finished(settings.replace(extend=900), tmp_path) == "step 900"
    with pytest.raises(ValueError, match="got 700; need more than the 900 steps"):
        finished(settings.replace(extend=700), tmp_path)


def test_a_run_that_is_extended_is_no_longer_done(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "on_rank_0", lambda task, device: task())  # the only rank
    run = tmp_path / "run"
    flags = ["--iterations", "600", "--run_dir", str(run)]
    facts = dict(deepspeed={}, classes=[], data="")
    state = at(600, 600, run_dir=str(run)) | facts
    state |= dict(format=disk.FORMAT, version=disk.VERSION)
    weights = {"a": torch.zeros(1)}
    final = run / "checkpoints" / disk.step_name(600)
    disk.commit(final, model=weights, optimizer=weights, state=state)
    (run / "DONE").write_text("step 600\n")

    def opened(*more: str):
        words = ["--deepspeed_config", str(JSON), *flags, *more]
        releases = []
        start = open_run(
            parse_training_command(words),
            resolved(*flags, *more),
            facts,
            classifier=torch.nn.Linear(1, 1),
            shell_lines="",
            release_at_end=releases.append,
            device=torch.device("cpu"),
        )
        for release in releases:
            release()
        return start

    assert opened() is None
    assert (run / "DONE").exists()
    assert opened("--extend", "900", "--dry_run").part_steps == 300
    assert (run / "DONE").exists()
    start = opened("--extend", "900")
    assert (start.part_begin, start.part_steps, start.state["part_ends"]) == (600, 300, [600, 900])
    assert not (run / "DONE").exists()
    params = json.loads((run / "deepspeed.json").read_text())["scheduler"]["params"]
    assert params["total_num_steps"] == 300
