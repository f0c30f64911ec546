"""The events of a run directory, and when a run must not start anew."""

import json

import pytest

from ds_classifier.training.run_dir import append_event
from ds_classifier.training.start import refuse_lost_checkpoints


def refused(run):
    said = []
    refuse_lost_checkpoints(run, said.append)
    return said


@pytest.mark.parametrize("event", ["stop", "resume", "finish"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(event, tmp_path):
    append_event(tmp_path, "start", step=0)
    append_event(tmp_path, event, step=142)
    with pytest.raises(ValueError, match=r"got no checkpoint; need one.* step 142 was saved; do: "):
        refused(tmp_path)


def test_a_run_killed_before_its_first_checkpoint_starts_anew_and_says_so(tmp_path):
    assert refused(tmp_path) == []
    append_event(tmp_path, "start", step=0)
    append_event(tmp_path, "stop", step=0)
    assert refused(tmp_path) == []
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 30}) + "\n")
    assert refused(tmp_path) == [
        f"no checkpoint in {tmp_path}, whose log reaches step 30: it starts anew"
    ]
