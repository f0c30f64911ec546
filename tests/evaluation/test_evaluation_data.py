"""The data of an evaluation: found from any directory; the score of guessing on it."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made import write_run

from ds_classifier import distributed
from ds_classifier.checkpoint.weights import find_recorded
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import image_folder
from ds_classifier.evaluation.data import open_validation_data, recorded_place
from ds_classifier.evaluation.metrics import scores_of_guessing
from ds_classifier.training.run_dir import launch_lines


@pytest.mark.parametrize(
    ("labels", "accuracy", "loss"),
    [
        ([0, 1, 2, 3], 1 / 4, math.log(4)),
        ([7, 7, 2, 2], 1 / 2, math.log(2)),  # the other classes have no image here
        ([5, 5, 5], 1, 0),
        ([1, 1, 1, 0], 3 / 4, 0.5623351446),
    ],
)
def test_guessing_is_by_the_classes_that_are_there(labels, accuracy, loss):
    found = scores_of_guessing(np.array(labels))
    assert found == pytest.approx({"acc@1": accuracy, "loss": loss})


@pytest.fixture
def started(tmp_path, monkeypatch) -> Path:
    """Return a directory with a quote in its name, in which a run was started twice."""
    home = tmp_path / "Ann's work"
    (home / "data/val").mkdir(parents=True)
    (home / "runs/one").mkdir(parents=True)
    for folder in (tmp_path, home):
        monkeypatch.chdir(folder)
        with open(home / "runs/one/command.sh", "a") as file:
            file.write(launch_lines(["train.py", "--data_dir", "cd x"], 1))
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    return home


def test_a_relative_directory_is_found_from_elsewhere(started, tmp_path):
    run = started / "runs/one"
    assert recorded_place(run, "data/val") == str(started / "data/val")
    (tmp_path / "earlier/val").mkdir(parents=True)
    assert recorded_place(run, "earlier/val") == str(tmp_path / "earlier/val")
    (tmp_path / "else/data/val").mkdir(parents=True)
    assert recorded_place(run, "data/val") == "data/val"  # where the command is given comes first


def test_all_places_are_named_if_it_is_in_none(started, tmp_path):
    run = started / "runs/one"
    with pytest.raises(ValueError) as error:
        recorded_place(run, "data/test")
    message = str(error.value)
    assert message.startswith("got data/test, as the run names it, which is neither in ")
    for folder in (tmp_path / "else", started, tmp_path):
        assert str(folder) in message
    assert message.endswith("do: give the flag, with the place where the shards are now")
    for location in ("https://host/val", "/nowhere/val"):
        assert recorded_place(run, location) == location
    (run / "command.sh").unlink()
    assert recorded_place(run, "data/test") == "data/test"


def trained(run: Path, classes: list[str], **facts):
    """Return what a run records of its weights, if it was trained on these classes."""
    source = find_recorded(run)
    settings = source.settings.replace(val_data_dir="data/train", num_classes=len(classes))
    return dataclasses.replace(source, settings=settings, classes=classes, **facts)


def test_images_of_one_class_do_not_measure_a_classifier_of_several(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "together", lambda task, device: task())
    convert(image_folder(folder), tmp_path / "data")
    run = write_run(tmp_path / "run")
    source = trained(run, ["furry", "tall"], targets={"kind": "classes"})
    options = dict(cache_dir=None, cache_gb=None, device=torch.device("cpu"))
    with pytest.raises(ValueError) as error:
        open_validation_data(source, str(tmp_path / "data/train"), **options)
    message = str(error.value)
    assert message.startswith("--val_data_dir: got one class per image in ")
    assert "; need several classes per image, as " in message
    assert message.endswith("; do: convert both splits in one call, with --val")


@pytest.mark.parametrize("moved", [False, True])
def test_an_evaluation_from_elsewhere_opens_the_run_s_shards(folder, tmp_path, monkeypatch, moved):
    monkeypatch.setattr(distributed, "together", lambda task, device: task())
    run = write_run(tmp_path / "work/run")
    source = trained(run, ["cat", "dog", "emu"])
    convert(image_folder(folder), tmp_path / "work/data")
    monkeypatch.chdir(tmp_path / "work")
    (run / "command.sh").write_text(launch_lines(["train.py"], 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "broadcast_json", lambda value, device: value)
    monkeypatch.setattr(distributed, "raise_together", lambda problem, device: None)
    options = dict(cache_dir=None, cache_gb=None, device=torch.device("cpu"))
    if moved:
        (tmp_path / "work/data").rename(tmp_path / "work/moved")
        with pytest.raises(ValueError, match=r"--val_data_dir: got data/train, .* neither in "):
            open_validation_data(source, "", **options)
    else:
        location, shards = open_validation_data(source, "", **options)
        assert location == str(tmp_path / "work/data/train")
        assert shards.manifest.samples == 15
