"""The networks that learn p(y | x_t, t)."""

from ds_classifier.model.create import create_classifier, create_without_storage
from ds_classifier.model.encoder import (
    CHANNEL_MULT,
    EncoderUNetModel,
    default_channel_mult,
    parse_channel_mult,
)

__all__ = [
    "CHANNEL_MULT",
    "EncoderUNetModel",
    "create_classifier",
    "create_without_storage",
    "default_channel_mult",
    "parse_channel_mult",
]
