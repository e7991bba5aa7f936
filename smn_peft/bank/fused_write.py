# SPDX-License-Identifier: Apache-2.0
"""The dense write on a CUDA device as one kernel of Triton, which torch's CUDA builds bring."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fused_write"]

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _write(
    out: tl.tensor, weight: tl.tensor, packed: tl.tensor, scale: tl.tensor, numel: tl.tensor, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    bits = tl.load(packed + (at >> 3), mask=inside, other=0).to(tl.int32)
    kept = ((bits >> (7 - (at & 7)).to(tl.int32)) & 1) != 0
    value = tl.load(weight + at, mask=inside & kept, other=0.0)
    tl.store(out + at, (value.to(tl.float32) * scale).to(value.dtype), mask=inside)


def fused_write(out: Tensor, weight: Tensor, packed: Tensor, scale: float) -> None:
    """``out = weight · mask · scale``, reading and writing memory once; what is off is +0.

    Args:
        out: (N,), contiguous, fp32, fp16 or bf16; overwritten.
        weight: (N,), contiguous, of the same dtype and device.
        packed: uint8 (⌈N/8⌉,) on the same device, in numpy's `packbits` order.
        scale: Multiplier of the kept weights; the product is rounded once.
    """
    numel = out.numel()
    with torch.cuda.device_of(out):
        _write[(triton.cdiv(numel, _BLOCK),)](out, weight, packed, scale, numel, BLOCK=_BLOCK)
