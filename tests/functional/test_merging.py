# SPDX-License-Identifier: Apache-2.0
"""Merging overwrites a weight with its effective weight; unmerging restores every bit of it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from smn_peft.functional.masking import effective_weight
from smn_peft.functional.merging import merge_weight, unmerge_weight
from smn_peft.functional.packing import unpack_bits

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
DENSITIES = [0.0, 0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0]


def bits(tensor: Tensor) -> Tensor:
    """The bytes as integers: NaN payloads and the sign of zero count."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.dtype]).clone()


def awkward(dtype: torch.dtype, shape: tuple[int, ...] = (40, 30)) -> Tensor:
    """Ordinary values, and every kind that arithmetic does not bring back."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    info, flat = torch.finfo(dtype), weight.view(-1)
    special = [0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal / 2, info.max, info.min, torch.inf, -torch.inf]
    flat[: len(special)] = torch.tensor(special, dtype=dtype)
    flat[20:30] = torch.nextafter(torch.zeros(10, dtype=dtype), torch.ones(10, dtype=dtype))
    payload = flat[30:34].view(INTEGERS[dtype])  # quiet and signalling NaNs of both signs with payloads
    nan = int(bits(torch.full((1,), torch.nan, dtype=dtype))[0])
    payload.copy_(torch.tensor([nan, nan | 1, nan | 5, -(1 << (8 * dtype.itemsize - 1)) | nan | 3]))
    return weight


@pytest.mark.parametrize("dtype", INTEGERS)
def test_unmerging_restores_every_bit(dtype):
    for share, scale, seed in product(DENSITIES, (True, False), range(2)):
        weight = awkward(dtype)
        before, place = bits(weight), weight.data_ptr()
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < share
        expected = bits(effective_weight(weight, mask, scale))
        stash = merge_weight(weight, mask, scale)
        assert torch.equal(bits(weight), expected)
        assert weight.data_ptr() == place
        unmerge_weight(weight, stash)
        assert torch.equal(bits(weight), before)
        assert weight.data_ptr() == place


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_narrow_value_comes_back(dtype):
    if dtype.itemsize > 2:
        weight = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1), dtype=dtype) * 1e3
    else:
        weight = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    before = bits(weight)
    for share in (0.2, 0.6, 0.95):
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < share
        unmerge_weight(weight, merge_weight(weight, mask))
        assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_a_weight_is_kept(memory_format):
    weight = torch.randn(6, 5, 3, 3).to(memory_format=memory_format)
    strides, before = weight.stride(), weight.clone()
    mask = torch.rand(6, 5, 3, 3) < 0.6
    stash = merge_weight(weight, mask)
    assert weight.stride() == strides
    torch.testing.assert_close(weight, before * mask / (mask.float().mean() ** 0.5))
    unmerge_weight(weight, stash)
    assert torch.equal(weight, before)
    assert weight.stride() == strides


def test_parameters_merge_without_a_graph():
    weight = torch.nn.Parameter(torch.randn(7, 5))
    before = weight.detach().clone()
    stash = merge_weight(weight, torch.rand(7, 5) < 0.5)
    assert weight.requires_grad
    assert weight.is_leaf
    unmerge_weight(weight, stash)
    assert torch.equal(weight, before)


def test_the_stash_is_smaller_than_a_copy():
    weight = torch.randn(1000, 1000)
    mask = torch.rand(1000, 1000) < 0.95
    stash = merge_weight(weight, mask)
    size = stash.where.numel() + stash.values.numel() * 4
    assert size < 0.35 * weight.numel() * 4
    assert torch.equal(stash.scale, torch.sqrt(torch.tensor(1e6) / mask.sum()))
    kept = unpack_bits(stash.where, weight.shape)
    assert kept[~mask].float().mean() > 0.99  # what the mask removed; the rest is what rounding would lose
    full = merge_weight(torch.randn(100, 100), torch.ones(100, 100, dtype=torch.bool))
    assert full.values.numel() == 0


def test_an_empty_weight():
    weight = torch.empty(0, 4)
    unmerge_weight(weight, merge_weight(weight, torch.ones(0, 4, dtype=torch.bool)))
    assert weight.shape == (0, 4)
