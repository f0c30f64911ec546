"""Runs that are killed, starved and damaged, and what is left of them.

Each fault is injected by a seam of traced_train.py into real ranks, and a line in FIRED shows that
it happened. What is compared at the end is the uninterrupted run, bit by bit.
"""

import json
import threading
from pathlib import Path

import pytest
from running import read_log
from tiny_run import CONFIGS, assert_same_state, losses, train, without_clocks

from ds_classifier.checkpoint import disk

pytestmark = pytest.mark.slow

KILLED = 247  # -9 as the code of a process


class Faults:
    """Seams for one start, and whether they fired."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0

    def start(self, ranks, config, digits, run, *flags, expect=0, fires=(), **seams):
        """Run with faults; each word of `fires` must stand in a line of its own."""
        self._count += 1
        fired = self._folder / f"fired{self._count}"
        fired.touch()
        seams = {k: v if isinstance(v, str) else json.dumps(v) for k, v in seams.items()}
        environment = seams | {"FIRED": str(fired)}
        done = train(
            ranks, config, digits, run, *flags, expect=expect, environment=environment.items()
        )
        lines = fired.read_text().splitlines()
        assert len(lines) == len(fires), lines
        for line, words in zip(lines, fires, strict=True):
            assert words in line
        assert "Traceback" not in done.output or expect not in (0, 1), done.output
        return done


class Watch(threading.Thread):
    """Reads `latest` every 50 ms; what it names must be whole."""

    def __init__(self, checkpoints: Path):
        super().__init__(daemon=True)
        self._checkpoints, self._ended = checkpoints, threading.Event()
        self.named, self.broken = [], []

    def run(self):
        while not self._ended.wait(0.05):
            name = (self._checkpoints / "latest").read_text().strip()
            if name.startswith("step") and name not in self.named:
                self.named.append(name)
                problem = disk.damage(self._checkpoints / name)
                self.broken += [problem] if problem else []

    def end(self):
        self._ended.set()
        self.join()


def names(run: Path) -> list[int]:
    """The steps of the checkpoints there, and of nothing half-written: those must be hidden."""
    return [int(p.name[5:]) for p in disk.list_checkpoints(run / "checkpoints")][::-1]


def test_a_run_under_a_series_of_faults_ends_as_if_undisturbed(digits, tmp_path):
    """Killed in five ways around a save, restarted each time by the same command."""
    flags = ["--global_batch", "8", "--iterations", "24", "--save_interval", "6"]
    flags += ["--keep_last", "9", "--val_data_dir", digits / "val"]
    golden, run = tmp_path / "golden", tmp_path / "run"
    train(2, "zero1_fp32", digits, golden, *flags)
    checkpoints = run / "checkpoints"
    faults, common = Faults(tmp_path), (2, "zero1_fp32", digits, run, *flags)

    # Fault 1: rank 0 is killed while the first of the files is written.
    file = "step-00000012.staging/model"
    done = faults.start(
        *common,
        FILE_FAULTS=[["fsync", file, "kill", 1]],
        expect=KILLED,
        fires=["model.safetensors kill"],
    )
    assert (names(run), (checkpoints / "latest").read_text()) == ([6], "step-00000006\n")
    assert (checkpoints / ".step-00000012.staging").is_dir()

    # Faults 2 and 5: all is written, at the same step as what the dead run left; no rename yet.
    done = faults.start(
        *common,
        FILE_FAULTS=[["rename", "/step-00000012", "kill", 1]],
        expect=KILLED,
        fires=["rename"],
    )
    assert "checkpoints/step-00000006, step 6" in done.output
    assert (names(run), (checkpoints / "latest").read_text()) == ([6], "step-00000006\n")
    assert (checkpoints / ".step-00000012.staging" / "manifest.json").exists()

    # Fault 3: committed, but `latest` not yet replaced.
    done = faults.start(
        *common, FILE_FAULTS=[["replace", "/latest", "kill", 1]], expect=KILLED, fires=["replace"]
    )
    assert "checkpoints/step-00000006, step 6" in done.output
    assert (names(run), (checkpoints / "latest").read_text()) == ([6, 12], "step-00000006\n")

    # The other rank dies while the state is gathered.
    done = faults.start(
        *common, SNAPSHOT_AT="18:1:kill", expect=(1, KILLED), fires=["snapshot 18 kill"]
    )
    assert "checkpoints/step-00000012, step 12" in done.output  # not what `latest` said
    assert names(run) == [6, 12]

    # Faults 11, 12, 10 and 14: a flipped byte, a `latest` that points outside, and a rank 1 that
    # shares no directory with rank 0. Faults 8, 6 and 4: the disk fails twice and works again, is
    # full at step 18, and slow; rank 1 is slow at step 24; `latest` is watched.
    model = checkpoints / "step-00000012" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 4
    model.write_bytes(data)
    (checkpoints / "latest").write_text("../x\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    watch = Watch(checkpoints)
    watch.start()
    done = faults.start(
        *common,
        "--run_dir",
        run.name,
        CHDIR=f"1:{elsewhere}",
        FILE_FAULTS=[
            ["fsync", "step-00000012.staging/optimizer", "EIO", 2],
            ["fsync", "step-00000018.staging/model", "ENOSPC", 1],
            ["fsync", "step-00000024.staging/", "0.2", 3],
            ["rename", "/step-00000024", "0.2", 1],
            ["replace", "/latest", "0.2", 2],
        ],
        SNAPSHOT_AT="24:1:1",
        fires=[
            *["optimizer.safetensors EIO"] * 2,
            "latest 0.2",
            "model.safetensors ENOSPC",
            "snapshot 24 1",
            *["step-00000024.staging"] * 3,
            "step-00000024 0.2",
            "latest 0.2",
        ],
    )
    watch.end()
    assert "skipped run/checkpoints/step-00000012: model.safetensors is damaged" in done.output
    assert "checkpoints/step-00000006, step 6" in done.output
    assert done.output.count("Input/output error") == 2
    full = next(line for line in done.lines if "No space left" in line)
    for words in ("checkpoint of step 18", "step-00000018.staging/model", "bytes", "are free"):
        assert words in full
    assert names(run) == [6, 12, 24]
    assert watch.named == ["step-00000012", "step-00000024"]
    assert watch.broken == []
    assert [p.name for p in checkpoints.glob(".*")] == []
    assert list(elsewhere.iterdir()) == []

    # What it all comes to.
    for step in (6, 12, 24):
        name = f"checkpoints/step-{step:08d}"
        assert_same_state(golden / name, run / name)
    assert without_clocks(read_log(run)) == without_clocks(read_log(golden))
    assert (run / "checkpoints/best").read_text() == (golden / "checkpoints/best").read_text()
    assert (run / "DONE").exists()

    # Fault 13: all are damaged.
    (run / "DONE").unlink()
    for step in names(run):
        (checkpoints / f"step-{step:08d}" / "state.json").unlink()
    done = train(*common, expect=2)
    (error,) = [line for line in done.lines if "error:" in line]
    for step in (6, 12, 24):
        assert f"step-{step:08d}: state.json: No such file" in error


def test_a_disk_that_stays_full_ends_the_run_with_the_last_good_checkpoint(digits, tmp_path):
    """Both ranks end at once with the same message; the same command then continues the run."""
    flags = ["--global_batch", "8", "--iterations", "12", "--save_interval", "2"]
    golden, run = tmp_path / "golden", tmp_path / "run"
    train(2, "zero2_bf16", digits, golden, *flags)
    faults = Faults(tmp_path)
    done = faults.start(
        *(2, "zero2_bf16", digits, run, *flags),
        FILE_FAULTS=[["fsync", f"step-0000000{n}.staging/model", "ENOSPC", 9] for n in (4, 6)],
        expect=1,
        fires=["step-00000004", "step-00000006"],
    )
    assert "error: 2 checkpoints in a row could not be written" in done.output
    assert names(run) == [2]
    train(2, "zero2_bf16", digits, run, *flags)
    assert_same_state(golden / "checkpoints/step-00000012", run / "checkpoints/step-00000012")
    assert losses(run) == losses(golden)


def test_a_rank_whose_parameters_drifted_is_found(digits, tmp_path):
    """Fault 48, on three ranks, so that there is a majority: one bit of one parameter."""
    flags = ["--global_batch", "6", "--iterations", "4", "--save_interval", "2"]
    run = tmp_path / "run"
    done = Faults(tmp_path).start(
        *(3, "zero1_fp32", digits, run, *flags),
        SNAPSHOT_AT="4:1:flip",
        expect=1,
        fires=["snapshot 4 flip"],
    )
    assert "step 4: the parameters of rank 1 differ from those of the other ranks" in done.output
    assert "first in time_embed.0.weight, 1 of " in done.output
    assert done.output.count("error:") == 1
    assert names(run) == [2]


@pytest.mark.parametrize("config", ["zero1_bf16", "zero2_fp16"])
def test_other_precisions_skip_a_loss_that_is_not_finite(config, digits, tmp_path):
    """Fault 46; zero1_fp32 and zero2_bf16 are in test_training.py."""
    flags = ["--global_batch", "8", "--iterations", "4"]
    run = tmp_path / "run"
    seams = {"INF_AT": "3:1", "EMULATE_FP16": "1"}
    train(2, config, digits, run, *flags, environment=seams.items())
    rows = read_log(run)
    assert rows[2]["skipped_steps"] == rows[1]["skipped_steps"] + 1
    assert rows[3]["skipped_steps"] == rows[2]["skipped_steps"]
    listed = [json.loads(x) for x in (run / "skipped_steps.jsonl").read_text().splitlines()][-1]
    assert [s["position"] for s in listed["not_finite"]] == [17, 19, 21, 23]
    assert names(run) == [4]  # finite, or it would not have been saved


def test_the_floor_of_the_loss_scale_is_told_in_our_words(digits, tmp_path):
    """Fault 47: from step 3 on no gradient is finite, and half of 2^16 is the floor."""
    config = json.loads((CONFIGS / "zero1_fp16.json").read_text())
    config["fp16"]["min_loss_scale"] = 2**15
    (tmp_path / "floor.json").write_text(json.dumps(config))
    flags = ["--global_batch", "8", "--iterations", "20", "--max_skipped_steps", "2"]
    run = tmp_path / "run"
    flags += ["--save_interval", "2"]
    seams = {"NAN_AT": "3+:1", "EMULATE_FP16": "1"}
    done = train(2, tmp_path / "floor", digits, run, *flags, expect=1, environment=seams.items())
    assert "error: fp16's loss scale is at its floor, 32768" in done.output
    assert "2 steps skipped, the last one is 4" in done.output
    assert "Traceback" not in done.output
    assert names(run) == [2]
