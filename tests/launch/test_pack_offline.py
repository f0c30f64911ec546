"""The packages that a node without network lacks, by reports of pip that are made up here."""

import json
import re
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
        split = [re.split("(?=[=>])", str(word), maxsplit=1) for word in words]
        named = {name.lower().replace("_", "-"): more for name, *more in split}
        calls.append({name: more for name, more in named.items() if name in INDEX})
        found = [
            {
                "metadata": {
                    "name": name,
                    "version": more[0][2:] if more and more[0].startswith("==") else "9",
                    "requires_dist": INDEX[name],
                }
            }
            for name, more in calls[-1].items()
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
    assert {v for name, v in lacking.items() if name != "torchvision"} == {"9"}
    assert lacking["torchvision"] == "0.26.0"  # the newest one would need another torch


@pytest.mark.parametrize("torchvision", ["0.24.0a0", ""])
def test_packages_of_nvidias_containers_are_not_packed_again(asked, torchvision):
    """The versions of torch and torchvision there are pre-releases."""
    node = NODE | {"torch": "2.9.0a0", "torchvision": torchvision}
    assert not {"torch", "torchvision"} & set(pack_offline.lacking_on(node, "3.12", []))


def test_a_torch_of_unknown_version_gets_the_newest_torchvision(asked):
    lacking = pack_offline.lacking_on({"torch": ""}, "3.12", [])
    assert lacking["torchvision"] == "9"


def test_the_requirements_are_those_of_setup_cfg():
    needs = pack_offline.requirements()
    assert needs[0].startswith("torch >=")
    assert any(line.startswith("simplejpeg >=") and "platform_machine" in line for line in needs)
