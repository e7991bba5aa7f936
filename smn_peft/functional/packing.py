# SPDX-License-Identifier: Apache-2.0
"""Compact forms of tensors: masks as one bit per weight, and stochastic rounding to bf16.

Bits are in the order of ``numpy.packbits(mask.ravel())``: MSB first, C order of the mask, zero padding in the last
byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2, prod

import numpy as np
import torch
from torch import Tensor

_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def packed_size(numel: int) -> int:
    """Bytes that a mask of `numel` weights takes, ⌈numel / 8⌉."""
    return (numel + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask of any shape into a uint8 tensor of ⌈N/8⌉ bytes on the same device; TypeError if not bool."""
    if mask.dtype != torch.bool:
        raise TypeError(f"pack_bits takes a bool mask, got {mask.dtype}; compare the scores with the threshold first.")
    flat = mask.detach().reshape(-1)
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.packbits(flat.numpy()))
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).reshape(-1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=flat.device)
    return (padded << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack ⌈N/8⌉ bytes into a bool mask of a given shape; TypeError if not uint8, ValueError if they do not fit."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"A packed mask is uint8, got {packed.dtype}.")
    numel = prod(shape)
    if packed.shape != (packed_size(numel),):
        raise ValueError(
            f"A packed mask of {numel} weights has {packed_size(numel)} bytes, got {tuple(packed.shape)}."
        )
    if packed.device.type == "cpu" and not torch.compiler.is_compiling():
        unpacked = np.unpackbits(packed.detach().numpy(), count=numel)
        return torch.from_numpy(unpacked.view(np.bool_)).reshape(tuple(shape))
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts) & 1
    return bits.reshape(-1)[:numel].to(torch.bool).reshape(tuple(shape))


def popcount(packed: Tensor) -> int:
    """Count the bits that are on in a packed mask, or in any tensor of bytes."""
    return int(_POPCOUNT.to(packed.device)[packed.int()].sum(dtype=torch.int64))


def hamming(first: Tensor, second: Tensor) -> int:
    """Count the weights on which two packed masks differ; ValueError if their sizes do."""
    if first.shape != second.shape:
        raise ValueError(f"Masks of {tuple(first.shape)} and {tuple(second.shape)} bytes cannot be compared.")
    return popcount(torch.bitwise_xor(first, second.to(first.device)))


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to one of its two neighbours in bf16, with the chance that makes the mean exact (Gupta et al. 2015).

    Steps smaller than bf16's eight bits then still add up. What is not finite stays what it is. The generator must be
    of the values' device; the same one gives the same answer.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator).add_(
        values.contiguous().view(torch.int32)
    )
    rounded = noise.bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def binary_entropy(share: float) -> float:
    """Entropy in bits of a coin that shows heads with this probability."""
    return sum(p * -log2(p) for p in (share, 1 - share) if p > 0) + 0.0  # a coin with one side has 0, not -0
