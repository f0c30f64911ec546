"""Decide which parameters are trained, and how: --freeze, --lr_scale and --no_decay.

All three name parameters by patterns of their names in the classifier's state dict, as fnmatch
reads them: `out.*` is the head of the reference's encoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from ds_classifier.config import Settings
from ds_classifier.distributed.engine.deepspeed_engine import Group
from ds_classifier.distributed.engine.deepspeed_state import trained, whole_shape
from ds_classifier.model import EncoderUNetModel
from ds_classifier.model.torchvision_networks import TimedNetwork

TRUNK = "trunk"  # for --freeze: all but the head, and, in torchvision's networks, the time layers
NORMS, BIASES = "norms", "biases"  # for --no_decay


def divide_parameters(
    classifier: nn.Module, settings: Settings, optimizer: str
) -> list[Group] | None:
    """Freeze the parameters of --freeze, and return the groups of the others.

    optimizer: its type in the JSON. None: all are trained alike.
    Raises ValueError, with every problem, for a pattern that matches nothing, a factor that is not
    above 0, and an optimizer that has groups of its own.
    """
    problems: list[str] = []
    for pattern in _words(settings.freeze):
        for name in _matching(classifier, "freeze", pattern, problems):
            classifier.get_parameter(name).requires_grad_(False)
    if not trained(classifier):
        what_to_do = f"give patterns that leave some of {_tops(_names(classifier))}"
        if not settings.freeze:
            what_to_do = "build the network with requires_grad True where it is to learn"
        problems.append(
            f"--freeze: got {settings.freeze or 'none'}, with which no parameter is trained; need "
            f"some that are; do: {what_to_do}"
        )
        raise ValueError("\n".join(problems))
    if (settings.lr_scale or settings.no_decay) and optimizer.lower() == "muon":
        problems.append(
            "--lr_scale, --no_decay: got them with Muon, which divides the parameters in its own "
            "way; do: drop them, or use AdamW, with --muon_lr_scale 0"
        )
    factors: dict[str, float] = {}
    for part in _words(settings.lr_scale):
        pattern, _, factor = part.rpartition("=")
        if not pattern or _number(factor) <= 0:
            problems.append(
                f"--lr_scale: got {part!r}; need PATTERN=FACTOR with a factor above 0; do: write "
                "it like input_blocks.*=0.1"
            )
        else:
            matching = _matching(classifier, "lr_scale", pattern, problems)
            factors = dict.fromkeys(matching, _number(factor)) | factors  # the first match counts
    undecayed: set[str] = set()
    for pattern in _words(settings.no_decay):
        undecayed.update(_matching(classifier, "no_decay", pattern, problems))
    if problems:
        raise ValueError("\n".join(problems))
    if not factors and not undecayed:
        return None
    groups: dict[tuple[float, bool], Group] = {}
    for name, parameter in trained(classifier).items():
        kind = factors.get(name, 1.0), name not in undecayed
        groups.setdefault(kind, Group([], *kind)).parameters.append(parameter)
    return list(groups.values())


def describe(groups: list[Group]) -> list[str]:
    """Return a line on each group that is not trained like most parameters."""
    lines = []
    for group in groups:
        parts = [f"at {group.lr_scale:g} times that rate"] * (group.lr_scale != 1)
        parts += ["without weight decay"] * (not group.decayed)
        if parts:
            weights = sum(whole_shape(parameter).numel() for parameter in group.parameters)
            lines.append(f"{weights:,} parameters {', '.join(parts)}")
    return lines


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def _number(text: str) -> float:
    """Return the finite number that a text is; 0 for any other."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if number < float("inf") else 0.0


def _matching(classifier: nn.Module, flag: str, pattern: str, problems: list[str]) -> list[str]:
    """Return the names of the parameters that a pattern means, of those that are trained.

    If there are none, `problems` gets a message.
    """
    names = list(trained(classifier)) if flag != "freeze" else _names(classifier)
    if (flag, pattern) == ("freeze", TRUNK):
        head = _head(classifier)
        if head is None:
            problems.append(
                f"--freeze: got {TRUNK} for a {type(classifier).__name__}, whose head is not "
                f"known; need patterns of names; do: give some of {_tops(names)}"
            )
            return []
        return [name for name in names if not name.startswith(head)]
    if flag == "no_decay" and pattern in (NORMS, BIASES):
        matching = _of_norms(classifier) if pattern == NORMS else _ending(names, "bias")
        found = [name for name in names if name in set(matching)]
    else:
        found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        of_these = "" if flag == "freeze" else " that is trained"
        problems.append(
            f"--{flag}: got {pattern!r}, which matches no parameter{of_these}; need a pattern of "
            f"their names; do: give one like {_tops(names)}"
        )
    return found


def _names(classifier: nn.Module) -> list[str]:
    return [name for name, _ in classifier.named_parameters()]


def _tops(names: Iterable[str]) -> str:
    """Return patterns of the names' first parts."""
    tops = dict.fromkeys(f"{name.partition('.')[0]}.*" if "." in name else name for name in names)
    return ", ".join(list(tops)[:6])


def _ending(names: Iterable[str], suffix: str) -> list[str]:
    return [name for name in names if name.endswith(suffix)]


def _of_norms(classifier: nn.Module) -> list[str]:
    """Return the names of the weights and biases of all norms, by the names of their classes."""
    return [
        f"{place}.{name}" if place else name
        for place, module in classifier.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    ]


def _head(classifier: nn.Module) -> tuple[str, ...] | None:
    """Return how the names of the head's parameters begin; None if that is not known."""
    if isinstance(classifier, EncoderUNetModel):
        return ("out.",)
    if isinstance(classifier, TimedNetwork):
        layers = (nn.Linear, nn.Conv2d)
        last = [n for n, m in classifier.network.named_modules() if isinstance(m, layers)][-1]
        return f"network.{last}.", "time_embed.", "scale_shift."
    return None
