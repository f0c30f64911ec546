"""log.jsonl and progress.csv: what a kill leaves at any byte, and a long run."""

import csv
import errno
import json
import threading
import tracemalloc

import pytest

from ds_classifier.training.logs.log import RunLogger


def train_row(step: int) -> dict:
    return {"step": step, "samples": 8 * step, "train_loss": 1 / step, "lr": 1e-3}


def rows_from(first: int, last: int) -> list[dict]:
    """A row every 10 steps; one of validation, with columns of its own, every 30."""
    rows = []
    for step in range(first + 10, last + 1, 10):
        rows.append(train_row(step))
        if step % 30 == 0:
            rows.append({"step": step, "val_loss": 2 / step, "val_acc@1": 0.5})
    return rows


def write(run, rows, first_step=0):
    logger = RunLogger(run, first_step=first_step)
    for row in rows:
        logger.write(row)
    logger.close()


def read(run) -> tuple[list[dict], list[dict]]:
    """Both files by stock readers, empty cells left out."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    with open(run / "progress.csv", newline="") as file:
        table = [
            {key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)
        ]
    return log, table


def test_both_files_hold_every_row_once(tmp_path):
    write(tmp_path, rows_from(0, 60))
    assert read(tmp_path) == (rows_from(0, 60), rows_from(0, 60))
    header = (tmp_path / "progress.csv").read_text().splitlines()[0]
    assert header == "step,samples,train_loss,lr,val_loss,val_acc@1"


@pytest.mark.parametrize("checkpoint", [0, 30, 50])
def test_a_kill_at_any_byte_changes_nothing_after_the_resume(tmp_path, checkpoint):
    """Killed after step 60 and a part of the next row, in either file; continued from a step."""
    write(tmp_path, rows_from(0, 90))
    whole = {name: (tmp_path / name).read_bytes() for name in ("log.jsonl", "progress.csv")}
    at = whole["log.jsonl"].index(b'{"step": 70')
    for cut in range(at, at + 60):
        (tmp_path / "log.jsonl").write_bytes(whole["log.jsonl"][:cut])
        (tmp_path / "progress.csv").write_bytes(whole["progress.csv"][: cut % 200])
        write(tmp_path, rows_from(checkpoint, 90), first_step=checkpoint)
        assert read(tmp_path) == (rows_from(0, 90), rows_from(0, 90)), cut


def test_a_log_that_loses_nothing_stays_the_same_file(tmp_path):
    """The file must stay the same one for `tail -f`."""
    write(tmp_path, rows_from(0, 60))
    before = (tmp_path / "log.jsonl").stat().st_ino
    write(tmp_path, rows_from(60, 90), first_step=60)
    assert (tmp_path / "log.jsonl").stat().st_ino == before
    assert read(tmp_path)[0] == rows_from(0, 90)


def test_numbers_that_are_none_are_null(tmp_path):
    write(tmp_path, [train_row(10) | {"train_loss": float("nan"), "lr": float("inf")}])
    log, table = read(tmp_path)
    assert (log[0]["train_loss"], log[0]["lr"]) == (None, None)
    assert "train_loss" not in table[0]


def test_a_long_run_is_not_kept_in_memory(tmp_path):
    """10,000 rows: opening and a new column take little of it."""
    rows = (
        train_row(step) | {f"more_{i}": 0.123456789 for i in range(20)} for step in range(1, 10_001)
    )
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    write(tmp_path, [{"step": 10_000, "val_loss": 1.0}], first_step=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6, peak
    assert sum(1 for _ in open(tmp_path / "progress.csv")) == 10_002


class FullDisk:
    """A log file whose disk takes so many bytes, and no more until there is room."""

    def __init__(self, file, bytes_left):
        self._file, self.bytes_left = file, bytes_left

    def write(self, data):
        part = data[: self.bytes_left]
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.bytes_left -= len(part)
        return self._file.write(part)

    def close(self):
        self._file.close()


def test_rows_wait_while_the_disk_is_full(tmp_path, capsys):
    """A row that was written in part waits too; it is reported once, and no row is missing."""
    logger = RunLogger(tmp_path, first_step=0)
    disk = logger._jsonl = FullDisk(logger._jsonl, 200)
    rows = rows_from(0, 90)
    for row in rows[:-3]:
        logger.write(row)
    assert capsys.readouterr().out.count("log.jsonl: cannot write: No space left on device") == 1
    disk.bytes_left = 10**9
    for row in rows[-3:]:
        logger.write(row)
    logger.close()
    assert read(tmp_path) == (rows, rows)


def test_tensorboard_on_a_full_disk_stops_nobody(tmp_path):
    """An unpatched tensorboardX thread would die, and its queue of 10 fill."""
    logger = RunLogger(tmp_path, first_step=0)
    records = logger._tb.file_writer.event_writer._ev_writer._py_recordio_writer
    records._writer = FullDisk(records._writer, 0)
    records._writer.flush = lambda: None
    writing = threading.Thread(
        target=lambda: [logger.write(row) for row in rows_from(0, 300)], daemon=True
    )
    writing.start()
    writing.join(20)
    assert not writing.is_alive()
