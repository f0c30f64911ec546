"""What the launcher was told and forgives, read from the command lines above this process."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from ds_classifier.distributed import processes


def host_names() -> list[str]:
    """The hosts of all ranks, in rank order, as the hostfile names them; [] where nobody says."""
    for word in processes.command_line(os.getppid()):
        if word.startswith("--world_info="):
            try:
                world = json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))
            except ValueError:
                return []
            return [host for host, slots in world.items() for _ in slots]
    return []


def hostfile_problem() -> str | None:
    """Why the launcher did not use the hostfile it was given: then this host trains alone."""
    for _, above in processes.launcher_chain():
        words = processes.command_line(above)
        hostfile = _hostfile(words)
        if hostfile and not (processes.working_directory(above) / hostfile).is_file():
            return (
                f"--hostfile: got {hostfile}, which is not there; the launcher would have this "
                "host train alone; do: name a file of lines like 'node-1 slots=8'"
            )
    return None


def _hostfile(words: list[str]) -> str:
    """What stands behind --hostfile or -H, before the script's own flags."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--hostfile", "-H"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
        if Path(word).suffix == ".py":
            break
    return ""
