"""Test that differences between ranks are found and named; test_faults.py has whole runs."""

import pytest
import torch

from ds_classifier.checkpoint.replicas import bit_sum, describe_difference, not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_every_flipped_bit_shows(dtype):
    value = torch.arange(1, 6).to(dtype)
    sums = {int(bit_sum(value))}
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    for bit in range(8 * value.element_size()):
        other = value.clone()
        flip = 1 << bit if bit < 8 * value.element_size() - 1 else -(1 << bit)
        other.view(bits)[2] ^= flip
        sums.add(int(bit_sum(other)))
    assert len(sums) == 1 + 8 * value.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_one_number_that_is_not_finite_shows(dtype, bad):
    value = torch.linspace(-3, 3, 1001).to(dtype)
    assert not_finite(value) == 0
    for place in (0, 499, 1000):
        other = value.clone()
        other[place] = float(bad)
        assert not_finite(other) == 1


def test_a_part_of_a_larger_tensor_sums_like_a_copy_of_it():
    """Check views at any offset, as parameters are views into ZeRO's flat buffers."""
    flat = torch.randn(50).bfloat16()
    for first in range(5):
        part = flat[first : first + 21].view(3, 7)
        assert bit_sum(part) == bit_sum(part.clone())
    assert bit_sum(torch.tensor(1.5)) == torch.tensor(1.5).view(torch.int32)


def test_the_odd_rank_out_is_named():
    names = ["a", "b", "c"]
    rows = torch.tensor([[1, 2, 3]] * 4)
    assert describe_difference(rows, names) is None
    rows[0, 1:] += 1
    assert describe_difference(rows, names) == (
        "the parameters of rank 0 differ from those of the other ranks (first in b, 2 of 3 tensors)"
    )
    rows[3, 0] = 9
    assert "no majority" in describe_difference(rows, names)
    assert "no majority" in describe_difference(rows[[0, 1]], names)
    assert "rank 0, 3 differ " in describe_difference(rows[[0, 1, 1, 3, 2]], names)
