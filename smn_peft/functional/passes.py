# SPDX-License-Identifier: Apache-2.0
"""From scores to effective weight, and from its gradient to theirs, in as few passes over memory as may be.

What is found on the way, the number of active weights and ``1/σ``, is a number on the CPU, where reading it costs
nothing and every further call does, and a tensor elsewhere, where reading it would wait for the device. On CUDA the
passes are kernels of Triton (`fused`) wherever they apply.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .masking import MaskSpec, compute_mask, scale_of
from .triton_kernels import usable

__all__ = ["build", "inner", "rebuild", "score_gradient"]

_ZERO = torch.zeros((), device="cpu")
_EXACT = 2**24  # up to here fp32 counts by ones
_PLAIN = (Tensor, nn.Parameter)
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_keep_above: Callable[[Tensor, Tensor, float], Tensor] = torch.ops.aten.threshold_backward.default  # θ·1[S > μ]


class Found(NamedTuple):
    """What a node's forward found of a mask, for its backward.

    Attributes:
        active: Number of active weights.
        scale: 1/σ, None without scaling.
    """

    active: Any
    scale: Any


def _in_memory(weight: Tensor, scores: Tensor) -> bool:
    """Whether the tensors lie in the CPU's memory and are what they seem, not a tracer's stand-ins."""
    return weight.is_cpu and scores.is_cpu and type(weight) in _PLAIN and type(scores) in _PLAIN


def _indicator(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> Tensor:
    """The mask as ones and zeros of the weight's dtype; torch is slow with bools on the CPU."""
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
    """As [`scale_of`] has it, to the last bit; torch's fp64 square root is not always the nearest number either."""
    if dtype == torch.float64:
        return scale_of(torch.tensor(active, device="cpu"), total, dtype).item()
    return math.sqrt(total / max(active, 1.0))


@functools.cache
def _kernels() -> Any | None:
    """The module `fused`, tried on eight weights."""

    def load() -> Any:
        from . import fused

        some = torch.ones(8, device="cuda")
        effective, counts = fused.build(some, some, 0.0, True, some.dtype)
        fused.score_gradient(effective, some, counts, fused.dot(some, some), some.dtype)
        return fused

    return usable(load, "the passes of mask training")


def _fused(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> Any | None:
    """The kernels, where they apply."""
    return _kernels() if weight.is_cuda and _fits(weight, scores, spec, trainable) else None


def _fits(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> bool:
    """Whether the kernels can walk through the tensors' memory from end to end."""
    if spec.mask_type != "threshold" or trainable is not None or not weight.numel():
        return False
    if type(weight) not in _PLAIN or type(scores) not in _PLAIN or not _alike(weight, scores):
        return False
    return weight.dtype in _NARROW and scores.dtype in _NARROW and _is_dense(weight)


def _alike(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in one order; a dimension of size 1 has no order."""
    if first.stride() == second.stride():
        return True
    return all(size == 1 or a == b for size, a, b in zip(first.shape, first.stride(), second.stride(), strict=True))


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def build(
    weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Any]:
    """Effective weight ``θ · M / σ`` (Eq. 1), bit for bit that of [`effective_weight`], and what was found for it.

    Args:
        weight: Frozen weight θ, any shape and float dtype.
        scores: Scores of the weight's shape, any float dtype.
        spec: Mask type, threshold and scaling.
        trainable: As in [`compute_mask`].
        dtype: Of the result.
    """
    if (fused := _fused(weight, scores, spec, trainable)) is not None:
        return fused.build(weight, scores, spec.threshold, spec.scale, dtype)  # type: ignore[no-any-return]
    effective, found = _build(weight, scores, spec, trainable)
    return effective.to(dtype), found


def _build(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> tuple[Tensor, Found]:
    if _in_memory(weight, scores):
        kept = _indicator(weight, scores, spec, trainable)
        active = _count(kept)
        if not spec.scale:
            return kept.mul_(weight), Found(active, None)
        scale = _scale(active, kept.numel(), kept.dtype)
        return torch.addcmul(_ZERO, weight, kept, value=scale, out=kept), Found(active, scale)
    mask = compute_mask(scores, spec, trainable)
    count = torch.count_nonzero(mask)
    kept = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    if not spec.scale:
        return kept, Found(count, None)
    scaled = scale_of(count, scores.numel(), weight.dtype)
    return kept.mul_(scaled), Found(count, scaled)


def rebuild(
    weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None, found: Any, dtype: torch.dtype
) -> tuple[Tensor, float | None]:
    """The effective weight once more, for backward, and a factor that it still wants, None if there is none.

    Args:
        weight: Frozen weight θ.
        scores: As in the forward.
        spec: As in the forward.
        trainable: As in the forward.
        found: By the forward.
        dtype: Of the result.
    """
    if not isinstance(found, Found):
        return _kernels().rebuild(weight, scores, found, dtype), None  # type: ignore[union-attr]
    if spec.mask_type == "threshold" and trainable is None and weight.dtype == scores.dtype:
        kept = _keep_above(weight, scores, spec.threshold)
    elif _in_memory(weight, scores):
        kept = _indicator(weight, scores, spec, trainable).mul_(weight)
    else:
        mask = compute_mask(scores, spec, trainable)
        kept = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    if found.scale is None:
        return kept.to(dtype), None
    if isinstance(found.scale, float) and dtype == kept.dtype:  # else it is rounded once, as in the forward
        return kept, found.scale
    return kept.mul_(found.scale).to(dtype), None


def score_gradient(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    trainable: Tensor | None,
    found: Any,
    total: Tensor | None,
    factor: float | None,
) -> Tensor:
    """``dL/dS = s·θ·g − Σ g·θ̂ / (2·active)`` from ``g = dL/dθ̂``, in the memory of `grad` where dtypes allow.

    The second term is that of [`masked_weight`], since ``s²/N`` is ``1/active``; an empty mask has none: θ̂ is zero.

    Args:
        grad: g, of the weight's shape.
        weight: Frozen weight θ.
        scores: The result has their dtype.
        trainable: As in the forward.
        found: By the forward.
        total: ``Σ g·θ̂`` by [`inner`], but for `factor`; it may be overwritten. None where σ has no gradient.
        factor: What `total` is still to be multiplied with.
    """
    if not isinstance(found, Found):
        if not _alike(grad, weight):
            grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
        return _kernels().score_gradient(grad, weight, found, total, scores.dtype)  # type: ignore[union-attr, no-any-return]
    # bf16 is rounded once, at the end.
    dtype = torch.float32 if scores.dtype == torch.bfloat16 else scores.dtype
    active, scale = found
    result = grad.to(dtype)
    if total is None:
        result.mul_(weight)
        if scale is not None:
            result.mul_(scale)
    elif isinstance(scale, float):  # one pass
        share = (1.0 if factor is None else factor) / (2.0 * max(active, 1.0))
        shift = total.fill_(-share * float(total)).to(dtype)
        torch.addcmul(shift, weight.to(dtype), result, value=scale, out=result)
    else:
        result.mul_(weight).mul_(scale).sub_(total / (2 * active.clamp(min=1)))
    if trainable is not None:
        result.mul_(trainable)
    return result.to(scores.dtype)


def inner(first: Tensor, second: Tensor, found: Any) -> Tensor:
    """Σ of the elementwise product for [`score_gradient`], in fp32 at least."""
    fused = None if isinstance(found, Found) else _kernels()
    if fused is not None and _alike(first, second) and _is_dense(first):
        return fused.dot(first, second)  # type: ignore[no-any-return]
    if first.dtype != torch.float32 or second.dtype != torch.float32:
        wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
        first, second = first.to(wide), second.to(wide)
    if first.is_contiguous() and second.is_contiguous():
        return torch.dot(first.view(-1), second.view(-1))
    return (first * second).sum()
