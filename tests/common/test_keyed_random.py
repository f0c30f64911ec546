"""SplitMix64 gives its published numbers; numpy and torch give the same ones."""

import numpy as np
import pytest
import torch

from ds_classifier.common import keyed_noise, keyed_random


def test_is_splitmix64():
    """First outputs for seed 1234567, as published with the reference C code."""
    assert keyed_random.numbers(1234567, 0, 5).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_one_number_equals_that_of_the_array():
    for key in (0, 7, 2**64 - 1):
        for index in (0, 1, 12345, 2**40):
            assert keyed_random.number(key, index) == keyed_random.numbers(key, index, 1)[0]


def test_numpy_and_torch_agree():
    positions = [0, 1, 2, 10**6, 2**40]
    key = keyed_random.stream_key(7, "noise")
    in_torch = keyed_noise.sample_keys(key, torch.tensor(positions))
    in_numpy = [keyed_random.fold(key, position) for position in positions]
    assert [int(value) % 2**64 for value in in_torch] == in_numpy


def test_uniform_numbers_are_those_of_numpy():
    """Bit by bit, whichever streams are drawn together."""
    positions = {"t": [0, 5, 2**40], "other": [7, 7, 1]}
    tensors = {name: torch.tensor(places) for name, places in positions.items()}
    drawn = keyed_noise.keyed_uniform(3, tensors)
    for row, (name, places) in zip(drawn, positions.items(), strict=True):
        keys = [keyed_random.fold(keyed_random.stream_key(3, name), place) for place in places]
        assert row.tolist() == [(keyed_random.number(key, 0) >> 11) / 2**53 for key in keys]


@pytest.mark.parametrize("count", [6, 7])
def test_normal_numbers_are_those_of_box_and_muller(count):
    keys = [12, 2**63 + 5]
    normal = keyed_noise.normal(torch.tensor(keys, dtype=torch.uint64).view(torch.int64), count)
    for row, key in zip(normal, keys, strict=True):
        z = keyed_random.numbers(key, 0, (count + 1) // 2)
        radius = np.sqrt(-2 * np.log(((z >> np.uint64(32)).astype(float) + 0.5) / 2**32))
        angle = 2 * np.pi * (z & np.uint64(2**32 - 1)).astype(float) / 2**32
        exact = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        np.testing.assert_allclose(row.numpy(), exact, rtol=0, atol=2e-6)


def test_draws_are_in_range_and_even():
    draws = keyed_random.Draws(3)
    counts = np.bincount([draws.randrange(7) for _ in range(7000)], minlength=7)
    assert counts.sum() == 7000
    assert counts.min() > 850
    assert keyed_random.Draws(3).randrange(1) == 0


def test_permutations_are_permutations():
    for length in (1, 2, 1000):
        assert sorted(keyed_random.permutation(length, 5).tolist()) == list(range(length))
    assert keyed_random.permutation(1000, 5).tolist() != keyed_random.permutation(1000, 6).tolist()


def test_streams_differ_by_seed_and_name():
    keys = {keyed_random.stream_key(s, n) for s in range(10) for n in ("crop", "noise", "t")}
    assert len(keys) == 30
