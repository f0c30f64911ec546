"""The log in TensorBoard and in Weights & Biases."""

import json
import math
import time

import numpy as np
import pytest
from report_page import training_row, validation_row

from ds_classifier.training.logs.log import RunLogger


def tensorboard_values(run):
    """Yield (step, value) of everything that TensorBoard would show."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (run / "tb").iterdir()
    data = file.read_bytes()
    while data:  # a TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        yield from ((event.step, value) for value in event.summary.value)


def test_tensorboards_sidebar_has_few_groups_and_no_number_outside(tmp_path):
    """The tags stand in groups; log.jsonl has the same numbers under the reference's names."""
    rows = [training_row(10, 1.25, **{"train_loss_q0": 0.5}), validation_row(10, 1.5)]
    logger = RunLogger(tmp_path, first_step=0)
    for row in rows:
        logger.write(row)
    logger.close()
    shown = {value.tag: value.simple_value for _, value in tensorboard_values(tmp_path)}
    assert shown["train/loss"] == 1.25
    assert shown["train_quartiles/loss_q0"] == 0.5
    assert shown["train_quartiles/acc_1_q3"] == pytest.approx(0.3)
    assert shown["val/loss"] == 1.5
    assert shown["val/acc_1_t0"] == pytest.approx(0.8)
    assert shown["optimizer/grad_norm"] == 1.5
    assert shown["speed/images_per_sec"] == 100
    assert {tag.split("/")[0] for tag in shown} == {
        *("train", "train_quartiles", "val", "optimizer", "speed", "counts")
    }
    assert all("/" in tag for tag in shown)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == rows


def test_tensorboard_has_the_images(tmp_path):
    logger = RunLogger(tmp_path, first_step=0)
    logger.image("val/pictures", np.zeros((20, 30, 3), np.uint8), 5)
    logger.close()
    found = [
        (step, v.tag, v.image.height, v.image.width) for step, v in tensorboard_values(tmp_path)
    ]
    assert found == [(5, "val/pictures", 20, 30)]


def test_tensorboard_has_the_losses_of_each_quartile(tmp_path):
    logger = RunLogger(tmp_path, first_step=0)
    logger.histogram("train_quartiles/losses_q0", [0, 3, 0, 1], [1.0, 2.0, 4.0], 5)
    logger.histogram(
        "train_quartiles/losses_q1", [0, 0, 0, 0], [1.0, 2.0, 4.0], 5
    )  # no samples, so nothing is written
    logger.close()
    ((step, value),) = tensorboard_values(tmp_path)
    shown = value.histo
    assert (step, value.tag, shown.num, shown.min, shown.max) == (
        5,
        "train_quartiles/losses_q0",
        4,
        1,
        8,
    )
    bars = dict(zip(shown.bucket_limit, shown.bucket, strict=True))
    assert bars == {1: 0, 2: 3, 4: 0, 8: 1}


def leveldb_records(data: bytes):
    """Yield the records of a LevelDB log: blocks of 32 KiB; `data` lacks the first 7 bytes."""
    place, record = 7, b""
    while place + 7 <= 7 + len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        head = data[place - 7 : place]
        length, kind = int.from_bytes(head[4:6], "little"), head[6]  # 1: whole; 2, 3, 4: a part
        record += data[place : place + length]
        if kind in (1, 4):
            yield record
            record = b""
        place += 7 + length


def test_wandb_has_the_rows_under_the_same_keys(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.5}))
    rows = [training_row(10, 1.25), validation_row(10, 1.5), training_row(20, math.nan)]
    ids = []
    for first, some in ((0, rows[:2]), (10, rows[2:])):
        logger = RunLogger(tmp_path, first_step=first, wandb="a project")
        ids.append(logger._wandb.id)
        assert logger._wandb.config["lr"] == 0.5
        for row in some:
            logger.write(row)
        logger.close()
        time.sleep(1.1)  # wandb names its directories by the second
    assert ids[0] == ids[1]  # resumed, not a new run
    from wandb.proto.wandb_internal_pb2 import Record

    logged = {}
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()[7:]):
            for item in Record.FromString(data).history.item:
                key = item.key or ".".join(item.nested_key)
                logged.setdefault(key, []).append(json.loads(item.value_json))
    assert logged["train_loss"][0] == 1.25
    assert logged["val_loss"] == [1.5]
    assert logged["_step"] == [10, 20]
    assert wandb.run is None


def test_a_missing_wandb_is_reported_before_anything_starts(monkeypatch):
    import importlib.util

    from ds_classifier.config.settings import Settings, check_settings

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else found(n))
    (problem,) = check_settings(Settings(wandb="x", eval_interval=1))
    assert problem.startswith("--wandb: got 'x'; need the package wandb; do: pip install")
    assert check_settings(Settings(eval_interval=1)) == []
