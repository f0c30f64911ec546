"""The validation split that is found beside the training split."""

import json
import shutil

import pytest

from ds_classifier.config import Settings
from ds_classifier.data.convert.sources import open_source
from ds_classifier.data.foreign.index import index
from ds_classifier.data.splits import open_splits, with_validation


def found(data_dir, val_data_dir="") -> str:
    return with_validation(Settings(data_dir=str(data_dir), val_data_dir=val_data_dir)).val_data_dir


def test_it_is_found_beside_the_training_split(digits, monkeypatch):
    assert found(digits / "train") == str(digits / "val")
    assert found(f"{digits}/train/") == str(digits / "val")
    monkeypatch.chdir(digits.parent)
    assert found(f"{digits.name}/train") == f"{digits.name}/val"
    monkeypatch.chdir(digits)
    assert found("train") == "val"


def test_it_is_found_only_if_it_is_a_split(digits, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val" / "cat").mkdir(parents=True)  # a folder of images
    assert found(tmp_path / "train") == ""
    assert found(digits / "val") == ""  # to train on it is to have nothing left


def test_a_url_is_not_asked(served_folder):
    server, folder = served_folder
    (folder / "val").mkdir()
    (folder / "val" / "manifest.json").write_text("{}")
    assert found(f"{server.url}/train") == ""


@pytest.mark.parametrize("named", ["elsewhere", "none"])
def test_what_is_named_stays(digits, named):
    assert found(digits / "train", named) == named


def test_one_that_does_not_fit_says_how_it_was_found(digits, tmp_path):
    (tmp_path / "train").symlink_to(digits / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "manifest.json").write_text("{}")
    settings = with_validation(Settings(data_dir=str(tmp_path / "train")))
    with pytest.raises(ValueError, match="found beside the training split: --val_data_dir none"):
        open_splits(settings, found_beside=True)
    with pytest.raises(ValueError) as named:
        open_splits(settings)
    assert "beside" not in str(named.value)


def test_none_opens_nothing(digits):
    settings = Settings(data_dir=str(digits / "train"), val_data_dir="none")
    assert open_splits(settings)[1] is None
    assert open_splits(with_validation(settings.replace(val_data_dir="")))[1] is not None


def test_shards_of_training_are_not_validated_on(digits, tmp_path):
    """Refuse the same split, a copy of it, and one whose shards include one of its own."""
    train = digits / "train"
    copy = shutil.copytree(train, tmp_path / "copy")
    first = json.loads((train / "manifest.json").read_text())["shards"][0]["name"]
    (tmp_path / "part").mkdir()
    shutil.copy(train / first, tmp_path / "part" / "other-0.tar")
    shutil.copy(next((digits / "val").glob("*.tar")), tmp_path / "part" / "other-1.tar")
    names = tmp_path / "names"
    names.write_text("".join(f"{i}\n" for i in range(10)))
    index(str(tmp_path / "part"), tmp_path / "indexed", classes=names)
    for place in (train, copy, tmp_path / "indexed/train"):
        settings = Settings(data_dir=str(train), val_data_dir=str(place))
        with pytest.raises(ValueError, match=r"--val_data_dir: got .* in both splits") as error:
            open_splits(settings)
        assert f"the bytes of {first} in the training split; need" in str(error.value)
        assert f"ds-classifier evaluate RUN --val_data_dir {train}" in str(error.value)
    with pytest.raises(ValueError, match=r"--val: got .* in both splits"):
        open_source(str(train), str(copy))
