"""Build the classifier that the settings name: the reference's encoder, torchvision's, or yours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_classifier.common.user_code import json_object
from ds_classifier.model import own, torchvision_networks
from ds_classifier.model.encoder import create_encoder


def create_classifier(
    *, classifier: str = "", classifier_args: str = "", **encoder: Any
) -> nn.Module:
    """Build a classifier from the settings of the same names.

    classifier: "" for the reference's encoder; "torchvision:NAME" for one of torchvision's networks
        with the timestep in its norms; "package.module:factory" for what a function of the user's
        returns.
    classifier_args: a JSON object, keywords of torchvision's or the user's function.
    encoder: the keywords of `encoder.create_encoder`. Of these, networks that are not the encoder
        get num_classes, image_size and in_channels.

    Returns a module: forward(x [N, in_channels, S, S] in [-1, 1], timesteps [N]) -> logits [N, K]
    fp32. It casts x to the precision of its weights. One that is not the encoder is in eval mode.
    Raises ValueError for values with which no network can be built.
    """
    if not classifier:
        if classifier_args:
            raise ValueError(
                f"--classifier_args: got {classifier_args!r}; need --classifier, the network that "
                "takes them"
            )
        return create_encoder(**encoder)
    arguments = json_object("--classifier_args", classifier_args)
    known = {"num_classes": 1000, "in_channels": 3} | encoder
    sizes = {name: known[name] for name in own.OFFERED}
    if sizes["num_classes"] < 1:
        raise ValueError(f"--num_classes: got {sizes['num_classes']}; need 1 or more")
    if torchvision_networks.is_torchvision(classifier):
        network: nn.Module = torchvision_networks.create(classifier, arguments, **sizes)
    else:
        network = own.create(classifier, arguments, sizes)
    return own.as_classifier(network, classifier, sizes["num_classes"])


def create_without_storage(**settings: Any) -> nn.Module:
    """Build a classifier on the meta device; on the CPU if its factory needs real numbers.

    settings: see `create_classifier`, which says what is raised.
    """
    try:
        with torch.device("meta"):
            return create_classifier(**settings)
    except ValueError:
        if not settings.get("classifier"):
            raise
    return create_classifier(**settings)
