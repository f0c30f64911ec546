"""Random numbers that are a pure function of (seed, stream, position): nothing to save, seek free.

SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA):
the i-th number of the stream with key k is mix(k + (i + 1) * GOLDEN). The key of a sample hashes the
run's seed, the name of the use ("crop", "noise", ...) and the sample's position in the training
stream, so it does not matter which rank, worker, device or micro-batch asks.

numpy serves the loader's order and crops (uint64), torch the device's timesteps and noise (int64:
two's complement wraps the same way, only right shifts must be masked). Both give the same integers.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = 0xFFFFFFFFFFFFFFFF


def stream_key(seed: int, stream: str) -> int:
    """A 64-bit key for one use of a run's seed, e.g. stream_key(0, "noise")."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# ---------------------------------------------------------------------------------------- numpy


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 -> uint64, a bijection; arrays only (numpy wraps them)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def numbers(key: int, start: int, count: int) -> np.ndarray:
    """Numbers start .. start + count - 1 of the stream with this key: [count] uint64."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    return mix(np.uint64(key) + index * np.uint64(GOLDEN))


def fold(key: int, value: int) -> int:
    """A key for `value` within the stream of `key`, e.g. fold(stream_key(0, "crop"), position)."""
    return int(numbers(key, value, 1)[0])


def permutation(length: int, key: int) -> np.ndarray:
    """A permutation of range(length), [length] int64: the stable argsort of the key's numbers."""
    return np.argsort(numbers(key, 0, length), kind="stable")


class Draws:
    """Whole numbers drawn one after another from one key, as `random.Random.randrange` does."""

    def __init__(self, key: int):
        self._key, self._drawn = key, 0

    def randrange(self, stop: int) -> int:
        """A whole number in [0, stop)."""
        number = int(numbers(self._key, self._drawn, 1)[0])
        self._drawn += 1
        return number * stop >> 64


# ---------------------------------------------------------------------------------------- torch


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(MIX_2)
    return z ^ _shift_right(z, 31)


def sample_keys(key: int, positions: Tensor) -> Tensor:
    """A key for every position: [N] int64 -> [N] int64, `fold(key, position)` as signed bits."""
    return _mix((positions + 1) * _signed(GOLDEN) + _signed(key))


def uniform(keys: Tensor) -> Tensor:
    """One number in [0, 1) a key, [N] float64, of 53 random bits."""
    return _shift_right(_mix(keys + _signed(GOLDEN)), 11).double() * 2.0**-53


def normal(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers, [N, count] float32: row n depends on keys[n] alone.

    Box & Muller 1958 on the two halves of each 64-bit number; at most 6.8 standard deviations.
    The integers are the same on every device, the normals up to its rounding of log and cos.
    """
    pairs = (count + 1) // 2
    index = torch.arange(1, pairs + 1, device=keys.device) * _signed(GOLDEN)
    z = _mix(keys[:, None] + index)  # [N, pairs]
    radius = ((_shift_right(z, 32).float() + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (z & 0xFFFFFFFF).float() * (2.0 * math.pi * 2.0**-32)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)  # [N, 2 * pairs]
    return both[:, :count]
