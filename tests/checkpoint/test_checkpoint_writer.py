"""Test writing in a thread, and failed writes, on one rank; test_faults.py has more ranks."""

import errno
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed

from ds_classifier.checkpoint import disk as checkpoint
from ds_classifier.checkpoint import writer as checkpoint_writer
from ds_classifier.checkpoint.writer import CheckpointWriter


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """Return a writer for an engine with one layer, whose state is taken without DeepSpeed."""
    module = torch.nn.Linear(3, 1)
    adam = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    adam.step()
    engine = SimpleNamespace(
        module=module,
        global_steps=0,
        skipped_steps=0,
        device=torch.device("cpu"),
        optimizer=SimpleNamespace(
            optimizer=adam,
            single_partition_of_fp32_groups=list(module.parameters()),
            bit16_groups=[[p] for p in module.parameters()],
            _lazy_init_hp_params_optimizer_state=lambda: None,
        ),
        fp16_enabled=lambda: False,
        zero_optimization_stage=lambda: 2,
    )

    def snapshot(self, optimizer, sampled):
        for name, value in module.named_parameters():
            self._keep_copy(self._model, name, value.detach())
            self._keep_copy(self._optimizer, f"exp_avg.{name}", torch.zeros_like(value))

    monkeypatch.setattr(CheckpointWriter, "_snapshot", snapshot)
    monkeypatch.setattr(checkpoint_writer, "RETRY_SECONDS", (0.01, 0.01, 0.01))
    return CheckpointWriter(
        tmp_path,
        engine=engine,
        sampler=SimpleNamespace(state=dict),
        fixed={},
        keep_last=2,
        keep_every=0,
        max_failed=1,
    )


def save(writer, step, **keywords):
    writer._engine.global_steps = step
    writer.save({}, **keywords)


def settle(writer):
    """Do what the training loop does after each step, until the write has ended."""
    while writer.under_way is not None:
        writer.check()


@pytest.fixture
def disk(monkeypatch):
    """Make commits raise the errors in a list first; a closed `gate` holds them up."""
    commit = checkpoint.commit
    disk = SimpleNamespace(errors=[], gate=threading.Event(), tries=0)
    disk.gate.set()

    def wrapped(final, **keywords):
        assert disk.gate.wait(20)
        disk.tries += 1
        if disk.errors:
            number = disk.errors.pop(0)
            raise OSError(number, errno.errorcode[number], str(final / "model.safetensors"))
        commit(final, **keywords)

    monkeypatch.setattr(checkpoint, "commit", wrapped)
    return disk


def test_steps_go_on_while_a_checkpoint_is_written(writer, disk, tmp_path, capsys):
    disk.gate.clear()
    save(writer, 1)
    before = {k: v.detach().clone() for k, v in writer._engine.module.named_parameters()}
    for _ in range(5):  # steps that change the weights, behind whose back the old ones are written
        writer.check()
        with torch.no_grad():
            writer._engine.module.weight += 1
    assert checkpoint.list_checkpoints(tmp_path) == []
    threading.Timer(0.3, disk.gate.set).start()
    save(writer, 2)
    assert "step 2 waits for the checkpoint of step 1" in capsys.readouterr().out
    assert checkpoint.damage(tmp_path / "step-00000001") is None
    written = checkpoint.read_model(tmp_path / "step-00000001")
    assert all(torch.equal(written[name], value) for name, value in before.items())
    writer.finish()
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


def test_errors_that_pass_are_tried_again_and_told(writer, disk, tmp_path, capsys):
    disk.errors = [errno.EIO, errno.ESTALE]
    save(writer, 1)
    writer.finish()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "EIO" in said[0]
    assert "ESTALE" in said[1]
    assert checkpoint.damage(tmp_path / "step-00000001") is None


def test_an_error_that_stays_is_raised_after_the_last_try(writer, disk, capsys):
    disk.errors = [errno.EIO] * 8
    save(writer, 1)
    with pytest.raises(OSError, match=r"last checkpoint is not written.*EIO"):
        writer.finish()
    assert disk.tries == 2 * (1 + len(checkpoint_writer.RETRY_SECONDS))
    assert "trying once more" in capsys.readouterr().out


def test_a_full_disk_minute_is_survived_and_a_full_disk_is_not(writer, disk, tmp_path, capsys):
    """Check max_failed 1: one failed save is reported, the second in a row stops the run."""
    for step in (1, 2, 3, 4):
        disk.errors = [errno.ENOSPC] if step % 2 else []
        save(writer, step)
        settle(writer)
    said = capsys.readouterr().out
    assert "the checkpoint of step 3" in said
    assert "ENOSPC; need 32 bytes" in said
    assert "are free; the checkpoints before it are kept" in said
    assert [p.name[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["4", "2"]
    disk.errors = [errno.ENOSPC] * 2
    save(writer, 5)
    settle(writer)
    save(writer, 6)
    with pytest.raises(OSError, match=r"2 checkpoints in a row.*--max_failed_saves 1.*ENOSPC"):
        settle(writer)
    assert disk.tries == 6  # ENOSPC is not tried again: it does not pass by itself


def test_the_last_checkpoint_gets_a_second_chance(writer, disk, tmp_path):
    disk.errors = [errno.ENOSPC]
    save(writer, 1)
    settle(writer)
    writer.finish()
    assert checkpoint.damage(tmp_path / "step-00000001") is None


def test_a_bug_in_the_writing_thread_is_raised(writer, monkeypatch):
    monkeypatch.setattr(checkpoint, "commit", lambda *_, **__: {}["no such key"])
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    save(writer, 1)
    with pytest.raises(RuntimeError, match=r"KeyError"):
        settle(writer)


def test_weights_that_are_not_finite_are_never_saved(writer, tmp_path):
    save(writer, 1)
    writer.finish()
    with torch.no_grad():
        writer._engine.module.weight[0, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 2: weights are not finite .weight"):
        save(writer, 2)
    with torch.no_grad():
        writer._engine.module.weight[0, 1] = 0
        next(iter(writer._engine.optimizer.optimizer.state.values()))["exp_avg"][0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"not finite .a master weight"):
        save(writer, 2)
    assert [p.name[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["1"]


def test_the_best_by_validation_is_kept(writer, tmp_path):
    for step, val_loss in enumerate([0.1, 0.4, float("nan"), 0.3, 0.2], 1):
        save(writer, step, val_loss=val_loss)
    writer.finish()
    assert [p.name[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["5", "4", "1"]
    assert (tmp_path / "best").read_text() == "step-00000001 val_loss 0.1\n"


def test_pruning_that_fails_is_one_warning(writer, tmp_path, monkeypatch, capsys):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    save(writer, 1)
    writer.finish()
    monkeypatch.setattr(
        checkpoint.shutil,
        "rmtree",
        lambda p, ignore_errors=False: None if ignore_errors else refuse(p),
    )
    for step in (2, 3, 4, 5):
        save(writer, step)
    writer.finish()
    assert capsys.readouterr().out.count("warning: old checkpoints") == 1
    assert checkpoint.newest_valid(tmp_path, print).name == "step-00000005"


def test_room_for_two_checkpoints(tmp_path, monkeypatch):
    checkpoint_writer.check_room(tmp_path / "run" / "checkpoints", 12_000)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    usage = SimpleNamespace(free=23_999)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"23,999 bytes free; need 24,000 for two.*of 12,000"):
        checkpoint_writer.check_room(tmp_path / "run" / "checkpoints", 12_000)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--run_dir.*file.*Not a directory"):
        checkpoint_writer.check_room(tmp_path / "file" / "checkpoints", 12_000)


def test_a_disk_that_syncs_no_directories_gets_checkpoints_and_a_note(
    writer, tmp_path, poor_disk, capsys
):
    checkpoint_writer.check_room(tmp_path, 12_000)
    assert "does not sync directories (Invalid argument)" in capsys.readouterr().out
    save(writer, 1)
    writer.finish()
    assert checkpoint.newest_valid(tmp_path, print).name == "step-00000001"


@pytest.mark.parametrize("call", ["rename", "replace", "fsync"])
def test_the_check_makes_the_calls_of_a_save(call, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "made up")

    monkeypatch.setattr(checkpoint.os, call, refuse)
    with pytest.raises(ValueError, match=r"no checkpoint can be saved.*made up.*choose another"):
        checkpoint_writer.check_room(tmp_path / "checkpoints", 12_000)
