"""Random numbers that are a pure function of (seed, stream, position): there is no state to save.

SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA):
the i-th number of the stream with key k is mix(k + (i + 1) * GOLDEN). The key of a sample hashes
the run's seed, the name of the use ("crop", "noise", ...) and the sample's position in the training
stream. So the numbers do not depend on the rank, worker, device or micro-batch.

This module is for the loader, in numpy; `keyed_noise.py` gives the same numbers as tensors.
"""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = 0xFFFFFFFFFFFFFFFF


def stream_key(seed: int, stream: str) -> int:
    """Return a 64-bit key for one use of a run's seed, e.g. stream_key(0, "noise")."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(z: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer, a bijection of uint64, to an array (scalars would not wrap)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def numbers(key: int, start: int, count: int) -> np.ndarray:
    """Return numbers start .. start + count - 1 of the stream with this key: [count] uint64."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    return mix(np.uint64(key) + index * np.uint64(GOLDEN))


def number(key: int, index: int) -> int:
    """Return numbers(key, index, 1)[0], ten times faster than by an array."""
    z = (key + (index + 1) * GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * MIX_2) & _MASK
    return z ^ (z >> 31)


def fold(key: int, value: int) -> int:
    """Return a key for `value` in the stream of `key`: fold(stream_key(0, "crop"), position)."""
    return number(key, value)


def permutation(length: int, key: int) -> np.ndarray:
    """Return a permutation of range(length), [length] int64: the stable argsort of its numbers."""
    return np.argsort(numbers(key, 0, length), kind="stable")


class Draws:
    """A sequence of random integers from one key, with the interface of `random.Random`."""

    def __init__(self, key: int):
        self._key, self._drawn = key, 0

    def randrange(self, stop: int) -> int:
        """Return the next random integer in [0, stop)."""
        drawn = number(self._key, self._drawn)
        self._drawn += 1
        return drawn * stop >> 64
