"""Facts that the launcher does not pass on, read from the command lines of parent processes."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from ds_classifier.distributed import processes


def host_names() -> list[str]:
    """Return the host of each rank, as the hostfile names it; [] if the launcher does not say."""
    for word in processes.command_line(os.getppid()):
        if word.startswith("--world_info="):
            try:
                world = json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))
            except ValueError:
                return []
            return [host for host, slots in world.items() for _ in slots]
    return []


def hostfile_problem() -> str | None:
    """Return why the launcher ignored its hostfile and trains on this host alone, or None."""
    for _, above in processes.launcher_chain():
        words = processes.command_line(above)
        hostfile = _hostfile(words)
        if hostfile and not (processes.working_directory(above) / hostfile).is_file():
            return (
                f"--hostfile: got {hostfile}, which does not exist; need a file of lines like "
                "'node-1 slots=8', else the launcher starts ranks on this host only"
            )
    return None


def _hostfile(words: list[str]) -> str:
    """Return the value of --hostfile or -H among the launcher's own flags; "" if not given."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--hostfile", "-H"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
        if Path(word).suffix == ".py":  # the flags of the script follow
            break
    return ""
