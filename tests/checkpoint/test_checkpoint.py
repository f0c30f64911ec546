"""Test commits, damage, and finding checkpoints; test_training.py tests loading into an engine."""

import errno
import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ds_classifier.checkpoint import disk


def commit(folder, step, value=1.0, val_loss=None):
    """Commit a small checkpoint, and return its directory."""
    final = folder / disk.step_name(step)
    disk.commit(
        final,
        model={"a": torch.full((4,), value), "b": torch.zeros(2, 3)},
        optimizer={"exp_avg.a": torch.zeros(4)},
        state={"format": disk.FORMAT, "version": disk.VERSION, "step": step}
        | {"val_loss": val_loss},
    )
    return final


def find(folder):
    """Return the newest valid checkpoint's name, and what was said about the others."""
    said = []
    found = disk.newest_valid(folder, said.append)
    return (found.name if found else None), said


def test_a_commit_is_whole_and_named_by_latest(tmp_path):
    final = commit(tmp_path, 10)
    assert disk.damage(final) is None
    assert (tmp_path / "latest").read_text() == "step-00000010\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010"]
    assert torch.equal(disk.read_model(final)["a"], torch.ones(4))
    assert disk.read_state(final)["step"] == 10


def test_stock_safetensors_reads_what_is_written(tmp_path):
    model = {"a.weight": torch.randn(5, 3), "b": torch.randn(7, 1, 2, 2), "none": torch.zeros(0, 3)}
    optimizer = {"moment": torch.randn(9), "counts": torch.arange(5), "one": torch.tensor(2.5)}
    disk.commit(tmp_path / "step-00000001", model=model, optimizer=optimizer, state={})
    for name, tensors in (("model", model), ("optimizer", optimizer)):
        read = load_file(tmp_path / "step-00000001" / f"{name}.safetensors")
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], value) for key, value in tensors.items())
        assert all(read[key].dtype == value.dtype for key, value in tensors.items())


def test_every_dtype_of_a_buffer_is_read_back(tmp_path):
    kinds = disk.SAFETENSORS_DTYPE
    model = {str(kind): torch.tensor([[0, 1], [3, 7]]).to(kind) for kind in kinds}
    model |= {"number": torch.tensor(5), "none": torch.zeros(0), "mask": torch.tensor([-torch.inf])}
    disk.commit(tmp_path / "step-00000001", model=model, optimizer={}, state={})
    read = load_file(tmp_path / "step-00000001" / "model.safetensors")
    assert read.keys() == model.keys()
    for name, value in model.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


def test_a_pickle_under_a_good_hash_is_refused_and_never_run(tmp_path):
    """Check that nothing is unpickled even if the manifest was changed to agree."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    commit(tmp_path, 10)
    final = commit(tmp_path, 20)
    torch.save({"a": Evil()}, final / "model.safetensors")
    manifest = json.loads((final / "manifest.json").read_text())
    data = (final / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (final / "manifest.json").write_text(json.dumps(manifest))
    name, said = find(tmp_path)
    assert name == "step-00000010"
    assert "not a safetensors file" in said[0]
    with pytest.raises(ValueError, match="not a safetensors file"):
        disk.resolve_checkpoint(final)
    assert not (tmp_path / "ran").exists()


def test_there_is_no_pickle_in_it(tmp_path):
    import pickletools

    for file in commit(tmp_path, 1).iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            with pytest.raises((ValueError, OverflowError, UnicodeDecodeError)):
                list(pickletools.genops(file.read_bytes()))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("way", ["flip", "cut", "zeros", "gone"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, file, way):
    commit(tmp_path, 10)
    path = commit(tmp_path, 20) / file
    data = path.read_bytes()
    if way == "gone":
        path.unlink()
    else:
        middle = len(data) // 2
        damaged = {
            "flip": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
            "cut": data[: len(data) * 7 // 10],
            "zeros": bytes(len(data)),
        }
        path.write_bytes(damaged[way])
    name, said = find(tmp_path)
    assert name == "step-00000010"
    assert len(said) == 1
    assert "step-00000020" in said[0]
    assert file in said[0]


def test_a_damaged_manifest_counts_as_damage(tmp_path):
    commit(tmp_path, 10)
    for text in ("", "{}", '{"files": {}}', "[1]", "[" * 100_000):
        (commit(tmp_path, 20) / "manifest.json").write_text(text)
        assert find(tmp_path)[0] == "step-00000010"


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "nothing"])
def test_a_state_that_is_not_an_object_counts_as_damage(tmp_path, text):
    commit(tmp_path, 10)
    swap_state(commit(tmp_path, 20), text)
    assert find(tmp_path)[1] == [
        f"skipped {tmp_path / 'step-00000020'}: state.json is not a JSON object"
    ]
    assert disk.best_checkpoint(tmp_path) is None


@pytest.mark.parametrize("loss", ['"low"', "NaN", "-Infinity", "[1]", "null"])
def test_a_validation_loss_that_is_no_number_is_never_the_best(tmp_path, loss):
    commit(tmp_path, 10, val_loss=1.0)
    swap_state(commit(tmp_path, 20), f'{{"val_loss": {loss}}}')
    assert disk.best_checkpoint(tmp_path).name == "step-00000010"


def swap_state(path, text):
    """Replace state.json, and its hash in the manifest."""
    (path / "state.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    described = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest["files"]["state.json"] = described
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    commit(tmp_path, 10)

    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("ds_classifier.common.files.sha256", fails)
    problem = disk.damage(tmp_path / "step-00000010")
    assert problem == "model.safetensors: Input/output error"


def test_latest_is_never_trusted(tmp_path):
    commit(tmp_path, 10)
    commit(tmp_path, 20)
    for text in ("", "../x", "step-00000099", "step-00000010"):
        (tmp_path / "latest").write_text(text)
        assert find(tmp_path) == ("step-00000020", [])
    (tmp_path / "latest").unlink()
    assert find(tmp_path) == ("step-00000020", [])


def test_all_damaged_is_an_error_and_none_is_a_fresh_start(tmp_path):
    assert find(tmp_path / "absent") == (None, [])
    assert find(tmp_path) == (None, [])
    for step in (10, 20):
        os.truncate(commit(tmp_path, step) / "model.safetensors", 5)
    with pytest.raises(ValueError, match="no checkpoint is whole") as error:
        find(tmp_path)
    assert "step-00000010" in str(error.value)
    assert "step-00000020" in str(error.value)


def test_leftovers_of_a_killed_save_are_ignored_and_overwritten(tmp_path):
    commit(tmp_path, 10)
    for name in (".step-00000020.staging", "step-00000020"):  # before and after no rename
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert find(tmp_path)[0] == "step-00000010"
    final = commit(tmp_path, 20)
    assert disk.damage(final) is None
    assert not (tmp_path / ".step-00000020.staging").exists()


def test_keep_last(tmp_path):
    for step in (1, 2, 3, 10, 100_000_000):
        commit(tmp_path, step)
    disk.prune(tmp_path, keep_last=2, keep_every=0)
    names = [p.name for p in disk.list_checkpoints(tmp_path)]
    assert names == ["step-100000000", "step-00000010"]


def test_every_nth_and_the_best_are_never_pruned(tmp_path):
    losses = {1: None, 2: 0.5, 3: 0.2, 4: 0.7, 5: None, 6: 0.2000001, 7: 0.3, 8: 0.4}
    for step, val_loss in losses.items():
        commit(tmp_path, step, val_loss=val_loss)
        disk.name_best(tmp_path)
        disk.prune(tmp_path, keep_last=2, keep_every=4)
    names = [p.name[-1] for p in disk.list_checkpoints(tmp_path)]
    assert names == ["8", "7", "4", "3"]
    assert (tmp_path / "best").read_text() == "step-00000003 val_loss 0.2\n"
    os.truncate(tmp_path / "step-00000003" / "model.safetensors", 5)
    assert disk.best_checkpoint(tmp_path).name == "step-00000007"


def test_what_cannot_be_deleted_is_reported_and_the_rest_goes(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        commit(tmp_path, step)
    rename = os.rename

    def stubborn(source, target):
        if source.name == "step-00000002":
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", stubborn)
    (problem,) = disk.prune(tmp_path, keep_last=1, keep_every=0)
    assert "step-00000002" in problem
    names = [p.name[-1] for p in disk.list_checkpoints(tmp_path)]
    assert names == ["4", "2"]


def test_leftovers_of_any_step_are_removed(tmp_path):
    commit(tmp_path, 10)
    for name in (".step-00000007.staging", ".step-00000010.replaced", ".step-00000003.pruned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    disk.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010"]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        commit(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / "model.safetensors", 5)
    disk.prune(tmp_path, keep_last=1, keep_every=0)
    assert find(tmp_path)[0] == "step-00000002"


def test_tensors_of_another_classifier_are_refused_before_any_is_sent(tmp_path):
    """Check this because rank 0 would fail in between, and the other ranks wait for it."""
    final = tmp_path / "step-00000001"
    layer = torch.nn.Linear(3, 2)
    model = {name: value.detach() for name, value in layer.named_parameters()}
    moments = {f"{m}.{n}": v for m in ("exp_avg", "exp_avg_sq") for n, v in model.items()}
    disk.commit(
        final, model=model, optimizer=moments | {"schedule_sampler.n": torch.ones(4)}, state={}
    )
    engine, sampler = (
        SimpleNamespace(module=layer),
        SimpleNamespace(state=lambda: {"n": torch.ones(4)}),
    )
    disk._check_tensors(final, engine, sampler)
    sampler.state = lambda: {"n": torch.ones(5)}
    with pytest.raises(ValueError, match=r"got \[4\] for schedule_sampler.n; need the shape \[5\]"):
        disk._check_tensors(final, engine, sampler)
    engine.module = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"model.safetensors: got \[2, 3\] for weight"):
        disk._check_tensors(final, engine, sampler)


def test_checkpoints_of_later_steps_are_set_aside(tmp_path):
    """Check that a run resumed from step 10 never finds the checkpoint of step 20 again."""
    for step in (10, 20, 12):
        final = commit(tmp_path, step)
    disk._set_later_aside(final)
    assert find(tmp_path) == ("step-00000012", [])
    assert (tmp_path / "abandoned-step-00000020" / "manifest.json").exists()


def test_a_failed_write_is_reported_and_changes_nothing(tmp_path, monkeypatch):
    import resource

    commit(tmp_path, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*step-00000020"):
            commit(tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find(tmp_path) == ("step-00000010", [])
    assert not list(tmp_path.glob(".*"))


def test_paths_that_a_user_may_give(tmp_path):
    run = tmp_path / "run"
    step_10 = commit(run / "checkpoints", 10)
    step_20 = commit(run / "checkpoints", 20)
    assert disk.resolve_checkpoint(run) == step_20
    assert disk.resolve_checkpoint(run / "checkpoints") == step_20
    assert disk.resolve_checkpoint(step_10) == step_10
    with pytest.raises(ValueError, match="--init_from"):
        disk.resolve_checkpoint(step_20 / "model.safetensors")
    os.truncate(step_20 / "model.safetensors", 5)
    assert disk.resolve_checkpoint(run) == step_10
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        disk.resolve_checkpoint(step_20)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        disk.resolve_checkpoint(run)


def test_a_classifier_whose_code_changed_is_refused(tmp_path):
    """A layer was added, or taken away, or its parameter frozen, since the checkpoint."""
    final = commit(tmp_path, 3)

    def check(**parameters):
        classifier = torch.nn.ParameterDict(parameters)
        engine = SimpleNamespace(module=torch.nn.ModuleDict({"classifier": classifier}))
        return disk._check_tensors(final, engine, SimpleNamespace(state=dict))

    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2, 3), False)
    assert check(a=a, b=b) == {"a": ["exp_avg"]}
    with pytest.raises(ValueError, match="got nothing for c; need the shape"):
        check(a=a, b=b, c=torch.nn.Parameter(torch.ones(4)))
    with pytest.raises(ValueError, match="got b, which the classifier lacks; need a checkpoint"):
        check(a=a)
    a.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got exp_avg.a, of a parameter that is frozen now"):
        check(a=a, b=torch.nn.Parameter(torch.ones(2, 3)))
