"""Start a network that is not the encoder from other weights (--init_from).

They come from a run, an export or a file of the same network, or, for a network of torchvision,
from torchvision's own file or its download. A head for another number of classes starts afresh.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ds_classifier.checkpoint.fitting import misfit
from ds_classifier.checkpoint.weights import (
    WeightsFile,
    find_recorded,
    read_recorded,
    read_weights,
    refuse_not_finite,
)
from ds_classifier.config import Settings
from ds_classifier.model import torchvision_networks
from ds_classifier.model.own import load_weights
from ds_classifier.model.torchvision_networks import is_torchvision


def load_own_weights(
    classifier: nn.Module, path: Path, settings: Settings
) -> tuple[WeightsFile | None, str, list[str]]:
    """Load weights into a network that is not the encoder.

    Returns the description of a run or an export, else None; the origin of the weights in words;
    and a line on the head, if it starts afresh.
    Raises ValueError for weights of another network.
    """
    name, own = settings.classifier, classifier.state_dict()
    recorded, origin = None, f"weights from {path}"
    if is_torchvision(name) and str(path) == "torchvision":
        weights = torchvision_networks.download(name)
        origin = f"torchvision's weights of {torchvision_networks.check_name(name)}"
    else:
        recorded = find_recorded(path)
        if recorded is not None:
            weights = read_recorded(recorded, name)
        else:
            weights = read_weights(path, own_network=True)
    if is_torchvision(name):
        weights = torchvision_networks.as_timed(weights, own, settings.image_size)
    refuse_not_finite(weights, path, classifier)
    head = _head_of_other_classes(weights, own, settings.num_classes)
    kept = {key: value for key, value in weights.items() if key not in head}
    if weights.keys() != own.keys() or any(own[k].shape != v.shape for k, v in kept.items()):
        raise ValueError(f"got {path}, {misfit(weights, own, f'--classifier {name}')}")
    load_weights(classifier, kept, strict=False)
    if not head:
        return recorded, origin, []
    note = (
        f"another number of classes, {len(weights[head[0]])} there and {settings.num_classes} "
        f"here: the head starts afresh ({', '.join(head)})"
    )
    return recorded, f"{origin}, without its head", [note]


def _head_of_other_classes(
    weights: dict[str, Tensor], own: dict[str, Tensor], num_classes: int
) -> list[str]:
    """Return the names of the last layer's tensors if only the class count differs."""
    layer = list(own)[-1].rpartition(".")[0]
    head = [name for name in own if name.rpartition(".")[0] == layer]
    fits = all(
        name in weights
        and own[name].shape[:1] == (num_classes,)
        and own[name].shape[1:] == weights[name].shape[1:]
        and own[name].shape != weights[name].shape
        for name in head
    )
    return head if fits else []
