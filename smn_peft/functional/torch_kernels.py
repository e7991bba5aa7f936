# SPDX-License-Identifier: Apache-2.0
"""``θ·M/σ`` in torch's operations, on any device: built, rebuilt for backward, differentiated, and written from bits.

`triton_kernels` has the same functions for CUDA devices; `effective` chooses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .masking import MaskSpec, compute_mask, scale_of, scaled_weight
from .packing import unpack_bits

_CHUNK = 1 << 13  # bytes of bits: their weights stay in the cache between two passes
_CHUNK_ON_DEVICE = 1 << 20  # where every call costs a launch
_ZERO = torch.zeros((), device="cpu")
_EXACT = 2**24  # up to here fp32 counts by ones
# θ·1[S > μ]; on a CPU torch's operations on bools take ten times as long.
_keep_above = torch.ops.aten.threshold_backward.default
_keep_above_out = torch.ops.aten.threshold_backward.grad_input


class Found(NamedTuple):
    """What the forward found of a mask: Python numbers on the CPU, 0-dim tensors where reading waits for a device."""

    active: float | Tensor  # number of active weights
    scale: float | Tensor  # 1/σ; 1.0 without scaling


def build(
    weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Found]:
    """Compute the effective weight, bit for bit that of [`effective_weight`], and what backward needs of the mask.

    `dtype` is the result's; weight and scores are of any float dtype; `trainable` is as in [`compute_mask`].
    """
    if _in_memory(weight, scores):
        kept = _indicator(weight, scores, spec, trainable)
        count = _count(kept)
        scale = _scale(count, kept.numel(), kept.dtype) if spec.scale else 1.0
        torch.addcmul(_ZERO, weight, kept, value=scale, out=kept)
        return kept.to(dtype), Found(count, scale)
    kept, *found = scaled_weight(weight, compute_mask(scores, spec, trainable), spec.scale)
    return kept.to(dtype), Found(*found)


def rebuild(
    weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None, found: Found, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Compute the effective weight of [`build`] again, for backward, up to a factor that is returned beside it."""
    if spec.mask_type == "threshold" and trainable is None and weight.dtype == scores.dtype:
        kept = _keep_above(weight, scores, spec.threshold)
    elif _in_memory(weight, scores):
        kept = _indicator(weight, scores, spec, trainable).mul_(weight)
    else:
        kept = torch.where(compute_mask(scores, spec, trainable), weight, weight.new_zeros(()))
    if isinstance(found.scale, float) and dtype == kept.dtype:  # else it is rounded once, as in the forward
        return kept, found.scale
    return kept.mul_(found.scale).to(dtype), 1.0


def _in_memory(weight: Tensor, scores: Tensor) -> bool:
    """Whether the tensors lie in the CPU's memory and are what they seem, not a tracer's stand-ins."""
    return all(tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter) for tensor in (weight, scores))


def _indicator(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> Tensor:
    """The mask as ones and zeros of the weight's dtype."""
    room = torch.empty_like(weight)
    if spec.mask_type == "threshold" and trainable is None:
        return torch.gt(scores, spec.threshold, out=room)
    return room.copy_(compute_mask(scores, spec, trainable))


def _count(indicator: Tensor) -> float:
    """Number of ones, exactly."""
    wide = torch.float64 if indicator.dtype == torch.float64 else torch.float32
    if indicator.dtype == wide and indicator.is_contiguous() and indicator.numel() <= _EXACT:
        return float(torch.dot(indicator.view(-1), indicator.view(-1)))  # with cold caches quicker than a sum
    return float(sum(part.sum(dtype=wide).item() for part in indicator.reshape(-1).split(_EXACT)))


def _scale(active: float, total: int, dtype: torch.dtype) -> float:
    """1/σ as [`scale_of`] has it, to the last bit; torch's fp64 square root is not always the nearest number."""
    if dtype == torch.float64:
        return scale_of(torch.tensor(active, device="cpu"), total, dtype).item()
    return math.sqrt(total / max(active, 1.0))


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Sum the elementwise product, in fp32 at least."""
    if first.dtype != torch.float32 or second.dtype != torch.float32:
        wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
        first, second = first.to(wide), second.to(wide)
    if first.is_contiguous() and second.is_contiguous():
        return torch.dot(first.view(-1), second.view(-1))
    return (first * second).sum()


def score_gradient(
    grad: Tensor, weight: Tensor, trainable: Tensor | None, found: Found, total: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute ``dL/dS = s·θ·g − Σ g·θ̂ / (2·active)`` from ``g = dL/dθ̂``, in the memory of `grad` where dtypes allow.

    The second term is that of [`masked_weight`], since ``s²/N`` is ``1/active``; an empty mask has none: θ̂ is zero.
    `total` is ``Σ g·θ̂`` by [`inner`], None where σ has no gradient; `dtype` is that of the scores and the result.
    """
    # bf16 is rounded once, at the end.
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    active, scale = found
    result = grad.to(wide)
    if isinstance(active, float) and isinstance(scale, float):  # one pass
        shift = 0.0 if total is None else -float(total) / (2 * max(active, 1.0))
        start = torch.full((), shift, dtype=wide, device=result.device)
        torch.addcmul(start, weight.to(wide), result, value=scale, out=result)
    else:
        result.mul_(weight).mul_(scale)
        if total is not None:
            result.sub_(total / (2 * torch.as_tensor(active).clamp(min=1)))
    if trainable is not None:
        result.mul_(trainable)
    return result.to(dtype)


def write_masked(out: Tensor, weight: Tensor, packed: Tensor, scale: float) -> None:
    """Write ``weight · mask · scale`` to `out`; what is off is +0. See `effective.write_masked`."""
    if out.is_cpu and out.dtype in (torch.float32, torch.float64) and (write := compiled(_write)) is not None:
        write(out.numpy(), weight.numpy(), packed.numpy(), out.numpy().dtype.type(scale))
        return
    chunk = _CHUNK if out.is_cpu else _CHUNK_ON_DEVICE
    room = out.new_empty(min(8 * chunk, out.numel()))
    for start in range(0, packed.numel(), chunk):
        part = slice(8 * start, 8 * (start + chunk))
        target = out[part]
        kept = room[: len(target)].copy_(unpack_bits(packed[start : start + chunk], target.shape))
        _keep_above_out(weight[part], kept, 0.0, grad_input=target)
        if scale != 1.0:
            target.mul_(scale)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Compile a loop over numpy arrays by numba, without the GIL; None where the extra ``fast`` is not installed."""
    try:
        from numba import njit
    except ImportError:
        return None
    result: Callable[..., Any] = njit(nogil=True)(function)  # in the calling thread, beside torch's own
    return result


def _write(out: Any, weight: Any, packed: Any, scale: Any) -> None:
    zero = out.dtype.type(0)
    for byte in range(len(out) // 8):
        bits = packed[byte]
        for bit in range(8):
            value = weight[8 * byte + bit] * scale
            out[8 * byte + bit] = value if (bits >> (7 - bit)) & 1 else zero
    for index in range(len(out) // 8 * 8, len(out)):
        out[index] = weight[index] * scale if (packed[index // 8] >> (7 - index % 8)) & 1 else zero


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous, or an image in channels_last."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def have_one_order(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in one order; a dimension of size 1 has no order."""
    if first.stride() == second.stride():
        return True
    return all(size == 1 or a == b for size, a, b in zip(first.shape, first.stride(), second.stride(), strict=True))
