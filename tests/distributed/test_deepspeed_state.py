"""Test that a checkpoint continues a training, in each kind of DeepSpeed engine and from another.

The uninterrupted training is the judge. tests/helpers/engine_cells.py says what the tasks are.
"""

import json

import pytest
from running import ROOT, launch

SCRIPT = ROOT / "tests" / "helpers" / "engine_cells.py"
CELLS = ("2-bf16-adamw", "3-bf16-adamw", "2o-bf16-adamw")
OTHERS = ("3-fp32-adagrad",)
SLOW = {  # the cells of a start, which takes longer than a cell
    "weights": ("1-fp32-adamw", "1-bf16-adamw", "2-fp32-adam", "3-fp16-adamw", "3p-fp32-adamw"),
    "optimizers": (
        *("2-bf16-muon", "3-bf16-muon", "2o-bf16-muon", "3p-bf16-cpuadam", "2o-fp32-lion"),
        *("2-bf16-muon-frozen", "1-fp32-muon"),
    ),
    "parts": (
        *("1-fp32-adamw-parts", "1-bf16-adamw-parts", "2-fp16-adamw-parts", "3-bf16-adamw-parts"),
        *("3p-fp32-adamw-parts", "2o-bf16-cpuadam-parts"),
    ),
}


def ask(ranks, tasks, cells, folder):
    """Run tasks of engine_cells.py, and return their rows by task and cell."""
    folder.mkdir(exist_ok=True)
    done = launch(ranks, folder, tasks, *cells, script=SCRIPT, cwd=folder, timeout=1200)
    rows = [json.loads(line) for line in done.lines if line.startswith('{"task"')]
    assert done.code == 0, done.output
    assert not any("error" in row for row in rows), done.output
    notes = [line for line in done.lines if line.startswith("note")]
    return {(row["task"], row["cell"]): row for row in rows} | {("notes", tasks): notes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cells")


@pytest.fixture(scope="module")
def rows(folder):
    """The rows of all tasks: on two ranks, then on one, then on two again."""
    rows = ask(2, "resume,skip", [*CELLS, *OTHERS], folder)
    rows |= ask(1, "part,cross", [*CELLS, *OTHERS], folder)
    return rows | ask(2, "close", CELLS, folder)


def assert_resumed(row):
    """Check that nothing tells the resumed training from the uninterrupted one."""
    assert (row["loaded"], row["resumed"]) == ([], [])
    assert row["losses"]
    assert row["rates"]
    assert row["moved"] > 0.01  # so that a difference could show


@pytest.mark.parametrize("cell", [*CELLS, *OTHERS])
def test_a_resumed_training_is_bit_equal_to_the_uninterrupted_one(rows, cell):
    row = rows["resume", cell]
    assert_resumed(row)
    kind, kept = ("Adagrad", 1) if "adagrad" in cell else ("Adam", 2)
    assert row["state"] == {"kind": kind, "scalars": {"step": 6.0}}
    assert row["kept"] == kept * row["parameters"]


def test_every_stage_begins_with_the_weights_of_rank_0(rows):
    """Each rank has made others."""
    first = {cell: rows["resume", cell]["first"] for cell in CELLS}
    assert first == pytest.approx(dict.fromkeys(CELLS, first[CELLS[0]]), rel=1e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_one_rank_takes_over_and_gives_back(rows, cell):
    """Train 2 steps on 2 ranks, 2 on one, 2 on 2: equal within rounding."""
    moved = rows["resume", cell]["moved"]
    assert rows["close", cell]["distance"] < 0.1 * moved


@pytest.mark.parametrize("cell", CELLS)
def test_another_stage_reads_the_same_state(rows, cell):
    row = rows["cross", cell]
    assert row["loaded"] == []
    assert row["loss"] == pytest.approx(rows["cross", CELLS[0]]["loss"], rel=1e-3)


def test_another_optimizer_begins_anew_and_says_so(rows):
    """Adagrad continues weights of Adam, and has its own zeros."""
    row = rows["cross", OTHERS[0]]
    assert row["loss"] == pytest.approx(rows["cross", CELLS[0]]["loss"], rel=1e-3)
    assert all(name.startswith(("exp_avg.", "exp_avg_sq.", "sum.")) for name in row["loaded"])
    assert len(row["loaded"]) == 3 * rows["resume", OTHERS[0]]["parameters"]
    assert rows["notes", "part,cross"] == [
        "note: the optimizer is Adagrad now, and was Adam in the checkpoint: what it keeps of the "
        "gradients starts anew"
    ]


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_with_an_infinite_gradient_changes_nothing(rows, cell):
    """The loss of the step is finite. The schedule and the optimizer do not count the step."""
    row = rows["skip", cell]
    assert (row["stayed"], row["skipped"], row["scalars"]) == (True, 1, {"step": 3.0})
    assert row["rates"][2] == row["rates"][1] < row["rates"][3]


def assert_fixed_state_stayed(row):
    """Check the frozen half and the buffers, which rank 0 made in fp32 and int64."""
    assert_resumed(row)
    assert {n.split(".")[0] for n in row["stayed"]} == {"input_blocks", "count", "mask"}
    assert row["kept"] == 2 * (row["parameters"] - len(row["stayed"]))


def test_what_is_frozen_stays_in_full_precision(tmp_path):
    rows = ask(2, "resume,skip", ["2-bf16-adamw-parts"], tmp_path)
    assert_fixed_state_stayed(rows["resume", "2-bf16-adamw-parts"])
    assert rows["skip", "2-bf16-adamw-parts"]["stayed"]


def test_groups_of_parameters_are_trained_as_by_torch_by_hand(tmp_path):
    """Compare 6 steps with decay; the head has a tenth of the rate."""
    row = ask(1, "by_hand", ["2-fp32-adamw-parts"], tmp_path)["by_hand", "2-fp32-adamw-parts"]
    assert len({rate for rate in row["rates"] if rate > 0}) > 2
    assert row["distance"] < 1e-6
    assert row["moved"]["input_blocks"] == 0
    assert row["moved"]["middle_block"] > 1e-3
    assert 1e-5 < row["moved"]["out"] < row["moved"]["time_embed"] / 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_more_kinds_of_engines(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # Muon would compile for a minute
    cells = SLOW[kind]
    rows = ask(2, "resume,skip", cells, tmp_path)
    ask(1, "part", cells, tmp_path)
    rows |= ask(2, "close", cells, tmp_path)
    for cell in cells:
        resumed, skipped, closed = (rows[task, cell] for task in ("resume", "skip", "close"))
        assert_resumed(resumed)
        if cell.endswith("-parts"):
            assert_fixed_state_stayed(resumed)
        assert (skipped["stayed"], skipped["skipped"]) == (True, 1), cell
        assert closed["distance"] < 0.15 * resumed["moved"], cell
