# SPDX-License-Identifier: Apache-2.0
"""From scores to effective weight, and from its gradient to theirs, in as few passes over memory as may be.

What is found on the way, the number of active weights and ``1/σ``, is a number on the CPU, where reading it costs
nothing and every further call does, and a 0-dim tensor elsewhere, where reading it would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .masking import MaskSpec, compute_mask, scale_of

__all__ = ["Found", "build", "inner", "rebuild", "score_gradient"]

_ZERO = torch.zeros((), device="cpu")
_EXACT = 2**24  # up to here fp32 counts by ones
_PLAIN = (Tensor, nn.Parameter)
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
    if indicator.numel() <= _EXACT:
        return float(indicator.sum(dtype=wide))
    return float(sum(part.sum(dtype=wide).item() for part in indicator.reshape(-1).split(_EXACT)))


def _scale(active: float, total: int, dtype: torch.dtype) -> float:
    """As [`scale_of`] has it, to the last bit; torch's fp64 square root is not always the nearest number either."""
    if dtype == torch.float64:
        return scale_of(torch.tensor(active, device="cpu"), total, dtype).item()
    return math.sqrt(total / max(active, 1.0))


def build(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> tuple[Tensor, Found]:
    """Effective weight ``θ · M / σ`` (Eq. 1), bit for bit that of [`effective_weight`], and what was found for it.

    Args:
        weight: Frozen weight θ, any shape and float dtype.
        scores: Scores of the weight's shape, any float dtype.
        spec: Mask type, threshold and scaling.
        trainable: As in [`compute_mask`].
    """
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


def rebuild(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> Tensor:
    """``θ · M`` once more, for backward; not scaled."""
    if spec.mask_type == "threshold" and trainable is None:
        if weight.dtype == scores.dtype:
            return _keep_above(weight, scores, spec.threshold)
        return torch.gt(scores, spec.threshold, out=torch.empty_like(weight)).mul_(weight)
    mask = compute_mask(scores, spec, trainable)
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def score_gradient(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    trainable: Tensor | None,
    found: Found,
    total: Tensor | None,
    factor: Any = 1.0,
) -> Tensor:
    """``dL/dS = s·θ·g − Σ g·θ̂ / (2·active)`` from ``g = dL/dθ̂``, in the memory of `grad` where dtypes allow.

    The second term is that of [`masked_weight`], since ``s²/N`` is ``1/active``; an empty mask has none: θ̂ is zero.

    Args:
        grad: g, of the weight's shape.
        weight: Frozen weight θ.
        scores: The result has their dtype.
        trainable: As in the forward.
        found: By the forward.
        total: ``Σ g·θ̂`` but for `factor`, 0-dim; it may be overwritten. None where σ has no gradient.
        factor: What `total` is to be multiplied with, a number or a 0-dim tensor as ``found.scale`` is.
    """
    # bf16 is rounded once, at the end.
    dtype = torch.float32 if scores.dtype == torch.bfloat16 else scores.dtype
    active, scale = found
    result = grad if grad.dtype == dtype else grad.to(dtype)
    if total is None:
        result.mul_(weight)
        if scale is not None:
            result.mul_(scale)
    elif isinstance(scale, float):  # one pass
        shift = total.to(dtype).mul_(-factor / (2.0 * max(active, 1.0)))
        torch.addcmul(shift, weight.to(dtype), result, value=scale, out=result)
    else:
        result.mul_(weight).mul_(scale).sub_(total * factor / (2 * active.clamp(min=1)))
    if trainable is not None:
        result.mul_(trainable)
    return result.to(scores.dtype)


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Σ of the elementwise product, 0-dim."""
    if first.dtype == second.dtype and first.is_contiguous() and second.is_contiguous():
        return torch.dot(first.view(-1), second.view(-1))
    return (first * second).sum()
