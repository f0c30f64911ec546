"""--dry_run and --overfit_batch: on ranks, and their arithmetic."""

import errno
import math
import multiprocessing.synchronize
import os
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import ROOT, launch

from ds_classifier import distributed
from ds_classifier.config.batch_sizes import BatchSizes
from ds_classifier.distributed import memory
from ds_classifier.training.rehearsal import dry_run
from ds_classifier.training.rehearsal.costs import (
    MemoryLine,
    SaveCost,
    StepTime,
    checkpoints_kept,
    disk_line,
    memory_lines,
    time_lines,
    times_done,
)
from ds_classifier.training.rehearsal.dry_run import micro_batches_to_measure

CONFIGS = ROOT / "ds_configs"
TINY = shlex.split(
    "--image_size 8 --classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1 "
    "--classifier_attention_resolutions 4 --noise_schedule cosine --random_flip False --lr 2e-3 "
    "--workers 1 --global_batch 16 --iterations 100"
)
MIB = 2**20


def command(ranks, digits, run, *flags, config="zero2_bf16", launcher=False):
    script = ["--deepspeed_config", CONFIGS / f"{config}.json", "--data_dir", digits / "train"]
    script += ["--val_data_dir", digits / "val", "--run_dir", run, *TINY]
    return launch(ranks, *script, *flags, cwd=run.parent, launcher=launcher)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


# ------------------------------------------------------------------------- whole programs


@pytest.mark.slow
def test_a_dry_run_through_the_launcher(digits, tmp_path):
    """Two ranks, two of four micro-batches; nothing is left, nothing is made."""
    flags = ["--microbatch", "2", "--keep_every", "50", "--save_interval", "25"]
    (tmp_path / "here").mkdir()
    done = command(2, digits, tmp_path / "here" / "run", *flags, "--dry_run", launcher=True)
    assert done.code == 0, done.output
    assert contents(tmp_path / "here") == {}
    heads = [line.split()[0] for line in done.lines if not line.startswith(" ")]
    assert heads == [
        *("classifier", "noise", "data", "validation", "batch", "engine", "start", "run"),
        *("memory", "step", "time", "save", "checkpoints", "dry"),
    ]
    without_paths = [re.sub(r"/\S+", "", line) for line in done.lines]
    assert max(map(len, without_paths)) <= 120, done.output
    assert "global batch 16 = 2 micro-batch x 4 accumulation x 2 ranks" in done.output
    assert "from 2 of its 4 micro-batches" in done.output
    assert "loaded back equal" in done.output
    assert "at most 4 at a time" in done.output  # those of 25, 50, 75, and 100 in hand


@pytest.mark.slow
def test_a_dry_run_of_a_run_half_done(digits, tmp_path):
    """The dry run starts from the checkpoint, counts what is left, refuses what a run would."""
    run = tmp_path / "run"
    flags = ["--iterations", "8", "--save_interval", "4", "--log_interval", "4"]
    trained = command(1, digits, run, *flags, config="zero1_fp32")
    assert trained.code == 0, trained.output
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    before = contents(run)
    done = command(1, digits, run, *flags, "--dry_run", config="zero1_fp32")
    assert done.code == 0, done.output
    assert "step-00000004, step 4; 8 steps in all" in done.output
    assert re.search(r"about 0:\d\d:\d\d = 4 steps x", done.output)
    changed = command(1, digits, run, *flags, "--dry_run", "--seed", "3", config="zero1_fp32")
    assert changed.code == 2
    assert "seed: 0 in the checkpoint, 3 now" in changed.output
    assert contents(run) == before


@pytest.mark.slow
def test_a_dry_run_finds_what_a_run_would(digits, tmp_path):
    run = tmp_path / "run"
    wrong = command(1, digits, run, "--dry_run", "--num_classes", "7")
    assert wrong.code == 2
    assert "--num_classes: got 7; need 10" in wrong.output
    assert not run.exists()


def test_a_rehearsal_opens_the_log_as_a_run_does(tmp_path, monkeypatch):
    """TensorBoard's writer has a queue, whose semaphores /dev/shm may refuse."""
    monkeypatch.setattr(distributed, "on_rank_0", lambda task, device: task())

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with dry_run.scratch_beside(tmp_path / "run", None):
        pass
    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", refuse)
    with (
        pytest.raises(OSError, match=r"No space left on device.*; do: make room .* in /dev/shm"),
        dry_run.scratch_beside(tmp_path / "run", None),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "code"), [(200, 0), (2, 1)])
def test_overfitting_one_batch(digits, tmp_path, steps, code):
    flags = ["--overfit_batch", str(steps), "--log_interval", "20"]
    done = command(2, digits, tmp_path / "run", *flags, config="zero1_fp32")
    assert done.code == code, done.output
    assert not (tmp_path / "run").exists()
    last = next(line for line in done.lines if "overfitted: loss" in line)
    loss, taken, need = re.search(
        r"loss (\S+) after (\d+) steps, near 0 is (\S+) or", last
    ).groups()
    assert float(need) == pytest.approx(0.01 * math.log(10), abs=1e-4)
    assert (float(loss) <= float(need)) == (code == 0) == last.startswith("overfitted")
    assert int(taken) <= steps
    # The same images, crops, t and noise at every step: a loss that hardly jumps.
    losses = [float(x) for x in re.findall(r"^ +\d+ loss (\S+),", done.output, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)


def test_what_the_command_line_refuses(digits, tmp_path):
    for flags in (["--dry_run", "--overfit_batch"], ["--overfit_batch", "0"]):
        assert command(1, digits, tmp_path / "run", *flags).code == 2


# ------------------------------------------------------------------------- arithmetic


def test_the_largest_micro_batch_on_paper():
    """1,000 MiB and 10 MiB an image, of 4,000 MiB: 0.9 * 4,000 = 1,000 + 10 * 260."""
    peaks = {size: (1000 + 10 * size) * MIB for size in (8, 16, 32)}
    line = MemoryLine.through(peaks, 4000 * MIB)
    assert line.fixed == pytest.approx(1000 * MIB)
    assert line.per_image == pytest.approx(10 * MIB)
    assert line.at(64) == pytest.approx(1640 * MIB)
    assert line.largest() in (259, 260)
    text = "\n".join(memory_lines(line, BatchSizes(32, 16, 2)))
    assert "0.98 GiB + 10.0 MiB per image" in text
    assert "; dividing its 512: 256" in text
    assert "all 64 images of a rank" in memory_lines(line, BatchSizes(32, 2, 1))[1]


@pytest.mark.parametrize("capacity", [4 * MIB, 2 * 1024**2 * MIB])
def test_it_is_told_where_the_micro_batch_is_set(capacity):
    """The line says whether all fit or not, within the 120 columns of a terminal."""
    line = MemoryLine(fixed=10.0, per_image=MIB, capacity=capacity, sizes=(8, 16, 32))
    told = memory_lines(line, BatchSizes(32, 64, 1))[1]
    assert "(train_micro_batch_size_per_gpu)" in told
    assert len(told) <= 120


def test_a_line_through_noise_of_images_that_cost_nothing():
    line = MemoryLine.through({1: 100.0 * MIB, 2: 99.9 * MIB}, 1000 * MIB)
    assert line.largest() is None


@pytest.mark.parametrize(
    ("micro", "sizes"), [(1, [1, 2]), (2, [1, 2]), (3, [1, 3]), (4, [1, 2, 4]), (32, [8, 16, 32])]
)
def test_sizes_to_measure(micro, sizes):
    assert micro_batches_to_measure(micro) == sizes


def test_the_time_of_a_run_on_paper():
    """1,000 steps of 3 x 0.1 + 0.2 s, 2 validations of 5 s, 4 saves of 0.25 s: 511 s."""
    pace = StepTime(within=0.1, last=0.2, waited=0.25, steps=5)
    save = SaveCost(held=0.25, written=1.0, loaded=0.5, bytes=MIB, free=10 * MIB)
    lines = time_lines(
        pace,
        batch=BatchSizes(8, 4, 2),
        steps=1000,
        validation=5.0,
        validations=2,
        save=save,
        saves=4,
        gflops_per_image=3.0,
    )
    assert "500 ms (median of 5, from 2 of its 4 micro-batches)" in lines[0]
    assert "128.0 images/s, 192 GFLOP/s per rank, 25% waiting" in lines[0]
    assert lines[1].split(" = ")[0].endswith("about 0:08:31")


@pytest.mark.parametrize(
    ("first", "last", "interval"), [(0, 10, 3), (3, 10, 3), (4, 12, 4), (9, 10, 50)]
)
def test_how_often(first, last, interval):
    counted = sum(step % interval == 0 or step == last for step in range(first + 1, last + 1))
    assert times_done(first, last, interval) == counted


def test_checkpoints_on_the_disk_at_once():
    """Counted in a made-up run: those kept, the best wherever it lies, the one being written."""
    kept = checkpoints_kept(steps=100, save_interval=10, keep_last=3, keep_every=20, validated=True)
    assert kept == 3 + 5 + 1 + 1


@pytest.mark.parametrize(("keep_last", "saves"), [(1, 1), (1, 2), (1, 3), (1, 9), (3, 2), (3, 9)])
def test_no_more_checkpoints_than_saves(keep_last, saves):
    """Counted save by save, the first one having validated best."""
    steps = range(20, 20 * saves + 1, 20)
    kept, most = set(), 0
    for done, step in enumerate(steps, start=1):
        most = max(most, len(kept | {step}))  # the one in hand, before any is deleted
        kept = {20, *steps[:done][-keep_last:]}
    named = dict(steps=20 * saves, save_interval=20, keep_last=keep_last, keep_every=0)
    assert checkpoints_kept(**named, validated=True) == most


def test_a_disk_without_room():
    save = SaveCost(held=0, written=0, loaded=0, bytes=10 * MIB, free=45 * MIB)
    with pytest.raises(ValueError, match=r"45.0 MiB free; need 50.0 MiB more for 5 checkpoints"):
        disk_line(save, kept=5, present=0)
    assert "at most 5 at a time; 40.0 MiB to come" in disk_line(save, kept=5, present=10 * MIB)


# ------------------------------------------------------------------------- memory


def test_the_peak_follows_what_is_taken():
    """200 MiB taken and given back are in the peak; begun anew, 50 MiB are the peak of them."""
    cpu = torch.device("cpu")
    memory.keep_freed()  # as in training; what is kept for reuse must not count
    memory.restart_peak(cpu)
    before = memory.peak_memory(cpu)
    torch.ones(50 * MIB)
    assert 195 * MIB < memory.peak_memory(cpu) - before < 230 * MIB
    memory.restart_peak(cpu)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel does not restart the peak")
    torch.ones(12 * MIB)
    assert 45 * MIB < memory.peak_memory(cpu) - before < 80 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_s_limit_counts(tmp_path, monkeypatch, version):
    """A job of 4,000 MiB that has 1,500, of them 500 of files: 3,000 left, in two ranks' halves."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    host = SimpleNamespace(available=8000 * MIB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(
        memory.psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=100 * MIB)
    )
    names = ("memory.max", "memory.current", "inactive_file")
    job, line = groups / "jobs/7", "0::/jobs/7/step"
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        job, line = groups / "memory/jobs/7", "9:cpuset,memory:/jobs/7/step"
    (proc / "self/cgroup").write_text(line + "\n")
    job.mkdir(parents=True)
    (job / names[0]).write_text(f"{4000 * MIB}\n")
    (job / names[1]).write_text(f"{1500 * MIB}\n")
    (job / "memory.stat").write_text(f"anon 5\n{names[2]} {500 * MIB}\n")
    monkeypatch.setattr(memory, "_PROC", proc)
    monkeypatch.setattr(memory, "_CGROUPS", groups)
    found = memory.memory_for_rank(torch.device("cpu"), ranks_here=2)
    assert found == (3000 // 2 + 100) * MIB
    (job / names[0]).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert memory.memory_for_rank(torch.device("cpu"), ranks_here=2) == (8000 // 2 + 100) * MIB
