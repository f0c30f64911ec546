"""The keyed random numbers of `keyed_random.py` as tensors, on any device.

torch has no uint64 arithmetic, so int64 is used: two's complement wraps in the same way, and only
right shifts must be masked. The integers equal numpy's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_classifier.common.keyed_random import GOLDEN, MIX_1, MIX_2, stream_key


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(MIX_2)
    return z ^ _shift_right(z, 31)


def _unmixed(key: int, positions: Tensor) -> Tensor:
    """Return the numbers whose mix are the positions' numbers in the stream of `key`."""
    return positions * _signed(GOLDEN) + _signed(key + GOLDEN)


def sample_keys(key: int, positions: Tensor) -> Tensor:
    """Return a key for each position, `fold(key, position)` as signed bits: [N] int64."""
    return _mix(_unmixed(key, positions))


def normal(keys: Tensor, count: int) -> Tensor:
    """Return standard normal numbers, [N, count] fp32; row n depends on keys[n] alone.

    Method: Box & Muller 1958, on the two halves of each 64-bit number; the largest possible value
    is 6.8 standard deviations. Devices differ only in their rounding of log and cos.
    """
    pairs = (count + 1) // 2
    index = torch.arange(1, pairs + 1, device=keys.device)
    z = _mix(torch.add(keys[:, None], index, alpha=_signed(GOLDEN)))  # [N, pairs]
    radius = ((_shift_right(z, 32).float() + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (z & 0xFFFFFFFF).float() * (2.0 * math.pi * 2.0**-32)
    both = torch.stack([angle.cos(), angle.sin()], dim=1).mul_(radius[:, None])  # [N, 2, pairs]
    return both.flatten(1)[:, :count]


def keyed_uniform(seed: int, streams: dict[str, Tensor]) -> Tensor:
    """Return a number in [0, 1) for each position of each stream, [streams, N] float64.

    The numbers have 53 random bits. Streams drawn together take half the operations of streams
    drawn one by one. streams: name -> positions, [N] int64.
    """
    unmixed = [_unmixed(stream_key(seed, name), places) for name, places in streams.items()]
    keys = _mix(torch.stack(unmixed))
    return _shift_right(_mix(keys + _signed(GOLDEN)), 11).double() * 2.0**-53


def keyed_noise(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return Gaussian noise, [N, *shape] fp32, that depends on (seed, stream, position) alone."""
    keys = sample_keys(stream_key(seed, stream), positions)
    return normal(keys, math.prod(shape)).view(len(positions), *shape)
