"""The packages that a node without network lacks, by reports of pip that are made up here."""

import json
from pathlib import Path

import pytest

from launch.benchmarks import pack_offline

INDEX = {  # what the newest version of each package needs
    "torchvision": [],
    "deepspeed": ["pydantic>=2", "torch", "py-cpuinfo"],
    "pydantic": ["Typing_Inspection>=0.4", "tomli; python_version < '3.11'"],
    "py-cpuinfo": [],
    "typing-inspection": ["typing-extensions>=4.12", "pydantic"],
    "tomli": [],
}


@pytest.fixture
def asked(monkeypatch):
    """The packages that pip was asked for, a list per call."""
    calls = []

    def pip(*words):
        named = [
            w for w in map(str, words) if w.partition(">")[0].lower().replace("_", "-") in INDEX
        ]
        calls.append([w.partition(">")[0].lower().replace("_", "-") for w in named])
        found = [
            {"metadata": {"name": name, "version": "9", "requires_dist": INDEX[name]}}
            for name in calls[-1]
        ]
        Path(words[words.index("--report") + 1]).write_text(json.dumps({"install": found}))

    monkeypatch.setattr(pack_offline, "pip", pip)
    needs = ["torch>=2.6", "torchvision>=0.21", "deepspeed>=0.16"]
    monkeypatch.setattr(pack_offline, "requirements", lambda: needs)
    return calls


NODE = {"torch": "2.11.0", "torchvision": "0.20", "py-cpuinfo": "", "typing-extensions": "4.16"}


@pytest.mark.parametrize(("python", "more"), [("3.12", set()), ("3.10", {"tomli"})])
def test_needs_of_needs_are_packed_and_what_the_node_has_is_not(asked, python, more):
    lacking = pack_offline.lacking_on(NODE, python, [])
    # The node's torchvision is too old. The version of its py-cpuinfo is not known.
    assert set(lacking) == {"torchvision", "deepspeed", "pydantic", "typing-inspection"} | more
    assert set(lacking.values()) == {"9"}


def test_the_requirements_are_those_of_setup_cfg():
    needs = pack_offline.requirements()
    assert needs[0].startswith("torch >=")
    assert any(line.startswith("simplejpeg >=") and "platform_machine" in line for line in needs)
