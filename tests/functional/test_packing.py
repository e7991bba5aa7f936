# SPDX-License-Identifier: Apache-2.0
"""Packed masks against numpy, eager and compiled, at every size around a byte."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from smn_peft.functional.packing import binary_entropy, hamming, pack_bits, packed_size, popcount, unpack_bits

SHAPES = [
    (),
    (0,),
    (1,),
    (3, 0, 2),
    (7,),
    (8,),
    (9,),
    (1, 1, 1),
    (5, 3),
    (16, 3, 3, 3),
    (2, 3, 4, 5),
    (1000,),
    (63, 65),
]


def random_mask(shape: tuple[int, ...], seed: int = 0, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.fixture(params=["numpy", "torch"])
def way(request, monkeypatch):
    """The path for CPU tensors, and the one that other devices and compiled graphs take."""
    if request.param == "torch":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


def test_packing_is_numpy_s(way):
    for shape, (seed, share) in product(SHAPES, enumerate((0.0, 0.03, 0.5, 0.97, 1.0))):
        mask = random_mask(shape, seed, share)
        packed = pack_bits(mask)
        assert packed.dtype == torch.uint8
        assert packed.shape == (packed_size(mask.numel()),)
        assert np.array_equal(packed.numpy(), np.packbits(mask.numpy().reshape(-1)))
        unpacked = unpack_bits(packed, shape)
        assert unpacked.dtype == torch.bool
        assert torch.equal(unpacked, mask)


def test_packing_random_shapes(way):
    rng = np.random.default_rng(0)
    for _ in range(60):
        shape = tuple(rng.integers(0, 9, size=rng.integers(0, 5)).tolist())
        mask = torch.from_numpy(np.asarray(rng.random(shape) < rng.random()))
        packed = pack_bits(mask)
        assert np.array_equal(packed.numpy(), np.packbits(mask.numpy().reshape(-1)))
        assert torch.equal(unpack_bits(packed, shape), mask)


def test_packing_what_is_not_contiguous(way):
    mask = random_mask((6, 5, 7)).transpose(0, 2)[::2]
    assert not mask.is_contiguous()
    assert np.array_equal(pack_bits(mask).numpy(), np.packbits(mask.numpy().reshape(-1)))
    packed = pack_bits(random_mask((400,)))[::2]
    assert torch.equal(unpack_bits(packed, (200,)), unpack_bits(packed.clone(), (200,)))


def test_a_packed_mask_is_a_copy(way):
    mask = random_mask((64,))
    packed = pack_bits(mask)
    before = packed.clone()
    mask.logical_not_()
    assert torch.equal(packed, before)
    unpacked = unpack_bits(packed, (64,))
    packed.zero_()
    assert torch.equal(unpacked, ~mask)
    unpacked.fill_(True)  # and it can be written to
    assert unpacked.all()


def test_the_order_is_msb_first_and_the_padding_zero(way):
    packed = pack_bits(torch.tensor([True] + [False] * 7 + [True, True]))
    assert packed.tolist() == [0b10000000, 0b11000000]


@pytest.mark.parametrize("function", [pack_bits, lambda mask: unpack_bits(pack_bits(mask), mask.shape)])
def test_compiled_functions_give_the_same(function: Callable[[Tensor], Tensor]):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for shape in ((5, 3), (16,), (63, 65)):
        mask = random_mask(shape)
        assert torch.equal(compiled(mask), function(mask))


def test_popcount_and_hamming_count():
    for shape in SHAPES:
        first, second = random_mask(shape, 1, 0.3), random_mask(shape, 2, 0.8)
        assert popcount(pack_bits(first)) == int(first.sum())
        assert hamming(pack_bits(first), pack_bits(second)) == int((first != second).sum())
        assert hamming(pack_bits(first), pack_bits(first)) == 0
        assert isinstance(popcount(pack_bits(first)), int)


def test_popcount_of_every_byte():
    every = torch.arange(256, dtype=torch.uint8)
    assert [popcount(byte[None]) for byte in every] == [bin(byte).count("1") for byte in range(256)]
    assert popcount(every) == 1024
    assert popcount(every.repeat(40_000)) == 40_960_000  # beyond what uint8 or fp32 could sum


@pytest.mark.parametrize(("numel", "size"), [(0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (23454912, 2931864)])
def test_packed_size(numel, size):
    assert packed_size(numel) == size


def test_errors_say_what_is_wrong(way):
    with pytest.raises(
        TypeError, match=r"takes a bool mask, got torch.float32; compare the scores with the threshold"
    ):
        pack_bits(torch.ones(3))
    with pytest.raises(TypeError, match=r"is uint8, got torch.int64"):
        unpack_bits(torch.ones(1, dtype=torch.int64), (8,))
    for packed, shape in (
        (torch.zeros(2), (8,)),
        (torch.zeros(1), (9,)),
        (torch.zeros(1, 1), (8,)),
        (torch.zeros(0), ()),
    ):
        with pytest.raises(ValueError, match=r"packed mask of \d+ weights has \d bytes, got"):
            unpack_bits(packed.to(torch.uint8), shape)
    with pytest.raises(ValueError, match=r"Masks of \(1,\) and \(2,\) bytes cannot be compared"):
        hamming(torch.zeros(1, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8))


def test_the_entropy_of_a_coin():
    for share, entropy in ((0.5, 1.0), (0.25, 0.8112781244591328), (0.999, 0.011407757737461138)):
        assert binary_entropy(share) == pytest.approx(entropy, rel=1e-12)
        assert binary_entropy(1 - share) == pytest.approx(entropy, rel=1e-9)
    for share in (0.0, 1.0):
        assert f"{binary_entropy(share):.4f}" == "0.0000"  # and not -0.0000
