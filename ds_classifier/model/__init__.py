"""The networks that learn p(y | x_t, t)."""

from ds_classifier.model.encoder import (
    CHANNEL_MULT,
    EncoderUNetModel,
    create_classifier,
    default_channel_mult,
    parse_channel_mult,
)

__all__ = [
    "CHANNEL_MULT",
    "EncoderUNetModel",
    "create_classifier",
    "default_channel_mult",
    "parse_channel_mult",
]
