# SPDX-License-Identifier: Apache-2.0
"""What a stored mask must look like, and what is said where it does not."""

from __future__ import annotations

import pytest
import torch

from smn_peft.functional import pack_bits
from smn_peft.storage import FORMAT_VERSION, check_format_version, check_packed


def test_every_version_up_to_this_one_is_read():
    for version in range(1, FORMAT_VERSION + 1):
        check_format_version(version)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**9])
def test_a_later_version_asks_for_an_upgrade(version):
    message = f"format version {version}; this smn_peft reads up to {FORMAT_VERSION}.*pip install -U smn_peft"
    with pytest.raises(ValueError, match=message):
        check_format_version(version)


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", None, True, [1]])
def test_a_version_that_is_none(version):
    with pytest.raises(ValueError, match=r"format_version must be a positive integer, got .*damaged"):
        check_format_version(version)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 64, 1001])
def test_what_pack_bits_writes_is_accepted(numel):
    for seed in range(5):
        check_packed(
            "a.smn_mask", pack_bits(torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < 0.5), numel
        )
    check_packed("a.smn_mask", pack_bits(torch.ones(numel, dtype=torch.bool)), numel)


@pytest.mark.parametrize("numel", [1, 7, 9, 15, 1001])
def test_every_padding_bit_must_be_zero(numel):
    for bit in range(-numel % 8):
        packed = pack_bits(torch.zeros(numel, dtype=torch.bool))
        packed[-1] |= 1 << bit
        with pytest.raises(ValueError, match=f"a.smn_mask has non-zero padding bits after its {numel} bits.*damaged"):
            check_packed("a.smn_mask", packed, numel)
    packed = pack_bits(torch.zeros(numel, dtype=torch.bool))
    packed[-1] |= 1 << (-numel % 8)  # the last bit that counts
    check_packed("a.smn_mask", packed, numel)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float32, torch.int64])
def test_only_uint8_is_a_packed_mask(dtype):
    with pytest.raises(TypeError, match=f"a.smn_mask is {dtype}, a packed mask is uint8.*save_pretrained"):
        check_packed("a.smn_mask", torch.zeros(2, dtype=dtype), 16)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (1, 2), (), (0,)])
def test_only_one_shape_fits(shape):
    with pytest.raises(
        ValueError, match=r"but the base weight has 16 entries and takes \(2,\) bytes.*another architecture"
    ):
        check_packed("a.smn_mask", torch.zeros(shape, dtype=torch.uint8), 16)


def test_a_tensor_without_data_is_checked_by_its_shape():
    check_packed("a.smn_mask", torch.zeros(2, dtype=torch.uint8, device="meta"), 9)
    with pytest.raises(ValueError, match="entries and takes"):
        check_packed("a.smn_mask", torch.zeros(2, dtype=torch.uint8, device="meta"), 90)
