# SPDX-License-Identifier: Apache-2.0
"""The dense write on a CUDA device as one kernel of Triton, which torch's CUDA builds bring."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fused_write"]

_BLOCK = 2048


@triton.jit  # type: ignore[untyped-decorator]
def _write(
    out: tl.tensor, weight: tl.tensor, packed: tl.tensor, scale: tl.tensor, numel: tl.tensor, BLOCK: tl.constexpr
) -> None:
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bits = tl.load(packed + byte, mask=byte * 8 < numel, other=0).to(tl.int32)[:, None]
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    inside = at < numel
    # Loaded whether it is kept or not: a mask made of data would take vectors apart.
    value = tl.load(weight + at, mask=inside, other=0.0)
    kept = tl.where(((bits >> (7 - bit)) & 1) != 0, value.to(tl.float32) * scale, 0.0)
    tl.store(out + at, kept.to(value.dtype), mask=inside)


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
        _write[(-(-numel // _BLOCK),)](out, weight, packed, scale, numel, BLOCK=_BLOCK)
