"""DeepSpeed's reports on a run go to a file."""

import logging

import pytest

from ds_classifier.distributed.engine import deepspeed_reports


@pytest.fixture
def logger():
    """DeepSpeed's logger, which is as before afterwards."""
    from deepspeed.runtime import utils
    from deepspeed.utils import comms_logging, logger
    from deepspeed.utils import logging as deepspeed_logging

    handlers, level = list(logger.handlers), logger.level
    levels = [handler.level for handler in handlers]
    yield logger
    logger.handlers[:], logger.level = handlers, level
    for handler, before in zip(handlers, levels, strict=True):
        handler.setLevel(before)
    for module in (utils, comms_logging, deepspeed_logging):
        vars(module).pop("print", None)


def test_reports_are_in_the_file_and_not_on_the_screen(logger, tmp_path, capfd):
    from deepspeed.runtime.utils import see_memory_usage
    from deepspeed.utils.logging import log_dist, print_dist

    path = tmp_path / "deepspeed.log"
    deepspeed_reports.send_to_file(path)
    assert not path.exists()
    log_dist("time (ms) | fwd: 1", ranks=[-1])
    print_dist("a table of communication", ranks=[-1])
    logger.warning("Attempting to get learning rate")
    see_memory_usage("memory after forward", force=True)
    text = path.read_text()
    for words in (
        "fwd: 1",
        "Attempting",
        "a table of communication",
        "memory after forward",
        "CPU Virtual",
    ):
        assert words in text
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("DeepSpeed") is logger
