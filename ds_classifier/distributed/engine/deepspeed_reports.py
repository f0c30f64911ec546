"""Send the reports that DeepSpeed makes at the wish of its JSON to a file, off the screen."""

from __future__ import annotations

import logging
from pathlib import Path

from ds_classifier import distributed


def send_to_file(path: Path) -> None:
    """Append all that DeepSpeed's logger and its `print` say on rank 0 to a file.

    It is made with the first line, so there is none where nothing is said.
    Errors are shown on the screen too. Warnings are not, as in a run without reports.
    """
    from deepspeed.runtime import utils
    from deepspeed.utils import comms_logging
    from deepspeed.utils import logging as deepspeed_logging

    if distributed.rank() != 0:
        return
    logger = logging.getLogger("DeepSpeed")
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
    file = logging.FileHandler(path, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(file)
    logger.setLevel(logging.INFO)
    for module in (utils, comms_logging, deepspeed_logging):  # which print some reports
        module.print = logger.info


def summarize_communication() -> None:
    """Report what was reduced and gathered, how often and how fast. Every rank must call it."""
    from deepspeed import comm

    comm.log_summary()
