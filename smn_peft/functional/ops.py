# SPDX-License-Identifier: Apache-2.0
"""Linear and convolution with a masked weight, as one autograd node each: the floor in memory and passes.

Plain autograd over [`masked_weight`] keeps the effective weight of every layer alive from forward to backward, and
a float mask beside it. These nodes keep neither: they rebuild the effective weight in backward from the frozen
weight and the scores, which are there anyway (one pass over the weight), and write ``dL/dS`` by the formula
``s·θ·g − (s²/2N)·Σ g·θ̂`` (see [`masked_weight`], the reference in the tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .masking import MaskSpec, compute_mask, scale_of
from .workspace import Workspace, is_plain

__all__ = ["ConvGeometry", "masked_conv", "masked_linear"]


class ConvGeometry(NamedTuple):
    """Geometry of a convolution, as `aten.convolution` takes it."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


class _Masked(NamedTuple):
    """An effective weight and what made it: numbers on the CPU, 0-dim tensors where reading them would wait."""

    weight: Tensor
    active: Any
    scale: Any


_workspace = Workspace()
_EXACT = 2**24  # up to here fp32 counts by ones
_CACHED = 2**19  # elements of which the mask is still in a core's cache when it is multiplied


def _indicator(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> Tensor:
    """The mask as ones and zeros of the weight's dtype, in the workspace; torch is slow with bools."""
    room = _workspace.room(weight)
    if spec.mask_type == "threshold" and trainable is None:
        return torch.gt(scores, spec.threshold, out=room)
    return room.copy_(compute_mask(scores, spec, trainable))


def _count(indicator: Tensor) -> float:
    """Number of ones, exactly."""
    wide = torch.float64 if indicator.dtype == torch.float64 else torch.float32
    if indicator.numel() <= _EXACT:
        return float(indicator.sum(dtype=wide))
    return float(sum(part.sum(dtype=wide).item() for part in indicator.view(-1).split(_EXACT)))


def _scale(active: float, size: int, dtype: torch.dtype) -> float:
    """As evaluation computes it, to the last bit; torch's square root is not always the nearest number."""
    return float(scale_of(torch.tensor(int(active), device="cpu"), size, dtype))


def _build(
    weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None, known: tuple[Any, Any] | None = None
) -> _Masked:
    """The effective weight; `known` are the count and the scale that the node's forward found, for its backward."""
    if is_plain(weight, scores):
        kept = _indicator(weight, scores, spec, trainable)
        if known is None:
            active = _count(kept)
            known = active, _scale(active, kept.numel(), kept.dtype) if spec.scale else None
        scale = 1.0 if known[1] is None else known[1]
        return _Masked(torch.addcmul(_workspace.zero(kept.dtype), weight, kept, value=scale, out=kept), *known)
    mask = None
    if spec.mask_type == "threshold" and trainable is None and weight.dtype == scores.dtype:
        kept = torch.ops.aten.threshold_backward(weight, scores, spec.threshold)
    else:
        mask = compute_mask(scores, spec, trainable)
        kept = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    if known is None:
        count = torch.count_nonzero(compute_mask(scores, spec, trainable) if mask is None else mask)
        known = count, scale_of(count, scores.numel(), weight.dtype) if spec.scale else None
    return _Masked(kept if known[1] is None else kept.mul_(known[1]), *known)


def _is_plain_threshold(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> bool:
    """Whether θ·1[S > μ] is one pass on the CPU."""
    plain = spec.mask_type == "threshold" and trainable is None and weight.dtype == scores.dtype
    return plain and is_plain(weight, scores)


def _counted(weight: Tensor, scores: Tensor, spec: MaskSpec) -> _Masked:
    """θ·1[S > μ], not scaled, with count and scale: one pass over memory, part by part."""
    room = torch.empty_like(weight)
    active = 0.0
    for kept, of, by in zip(*(t.view(-1).split(_CACHED) for t in (room, weight, scores)), strict=True):
        active += float(torch.gt(by, spec.threshold, out=kept).sum())
        torch.mul(of, kept, out=kept)
    return _Masked(room, active, _scale(active, room.numel(), room.dtype) if spec.scale else None)


def _score_gradient(
    grad: Tensor,
    masked: _Masked,
    weight: Tensor,
    spec: MaskSpec,
    trainable: Tensor | None,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> Tensor:
    """dL/dS in the scores' dtype from g = dL/dθ̂, in the memory of `grad`; `total` is Σ g·θ̂ if the caller has it."""
    if dtype == torch.bfloat16:  # rounded once, at the end
        return _score_gradient(grad, masked, weight, spec, trainable, torch.float32, total).to(dtype)
    grad = grad.to(dtype)
    _, active, scale = masked
    if scale is None:
        result = grad.mul_(weight)
    elif not spec.scale_gradient:
        result = grad.mul_(weight).mul_(scale)
    else:
        # Σ_j g_j·θ̂_j / (2·active) is the formula's (s²/2N)·Σ; an empty mask has θ̂ = 0, hence no second term.
        if total is None:
            total = _inner(grad, masked.weight)
        if isinstance(scale, float):  # one pass
            shift = total.to(dtype) / (-2 * max(active, 1))
            result = torch.addcmul(shift, weight.to(dtype), grad, value=scale, out=grad)
        else:
            result = grad.mul_(weight).mul_(scale).sub_(total / (2 * active.clamp(min=1)))
    return result if trainable is None else result.mul_(trainable)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Σ of the elementwise product."""
    if first.is_contiguous() and second.is_contiguous() and first.dtype == second.dtype:
        return torch.dot(first.view(-1), second.view(-1))
    return (first * second).sum()


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scores: Tensor,
        bias: Tensor | None,
        spec: MaskSpec,
        trainable: Tensor | None,
    ) -> Tensor:
        masked = _build(weight, scores, spec, trainable)
        ctx.save_for_backward(x, weight, scores, trainable)
        ctx.spec, ctx.known = spec, (masked.active, masked.scale)
        return F.linear(x, masked.weight.to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores, trainable = ctx.saved_tensors  # once: gradient checkpointing recomputes them here
        masked = _build(weight, scores, ctx.spec, trainable, ctx.known)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_scores = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_weight = flat.t() @ x.reshape(-1, x.shape[-1])
            grad_scores = _score_gradient(grad_weight, masked, weight, ctx.spec, trainable, scores.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = (flat @ masked.weight.to(flat.dtype)).reshape(x.shape)
        if ctx.needs_input_grad[3]:
            grad_bias = flat.sum(0)
        return grad_x, None, grad_scores, grad_bias, None, None


class _MaskedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scores: Tensor,
        bias: Tensor | None,
        spec: MaskSpec,
        trainable: Tensor | None,
        geometry: ConvGeometry,
    ) -> Tensor:
        # With few pixels the weight is the larger side: what can be done on inputs and outputs is done there.
        few_pixels = x.numel() < weight.numel() and x.dtype == weight.dtype
        ctx.few_pixels = few_pixels and _is_plain_threshold(weight, scores, spec, trainable)
        scaled_after = ctx.few_pixels and bias is None
        masked = _counted(weight, scores, spec) if scaled_after else _build(weight, scores, spec, trainable)
        ctx.save_for_backward(x, weight, scores, trainable)
        ctx.spec, ctx.known = spec, (masked.active, masked.scale)
        ctx.geometry, ctx.bias_sizes = geometry, None if bias is None else list(bias.shape)
        out = torch.convolution(x, masked.weight.to(x.dtype), bias, *geometry)
        return out.mul_(masked.scale) if scaled_after and masked.scale is not None else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores, trainable = ctx.saved_tensors  # once: gradient checkpointing recomputes them here
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        few_pixels = needed[0] and ctx.few_pixels
        back, options = torch.ops.aten.convolution_backward, (ctx.bias_sizes, *ctx.geometry)
        if few_pixels:
            # One after the other: the gradient of the weight comes where the effective weight was.
            kept = torch.ops.aten.threshold_backward(weight, scores, ctx.spec.threshold)
            grad_x = back(grad, x, kept, *options, [True, False, False])[0]
            del kept
            _, grad_weight, grad_bias = back(grad, x, weight, *options, [False, *needed[1:]])
            masked = _Masked(weight, *ctx.known)  # the effective one is not needed any more
            if masked.scale is not None:
                grad_x.mul_(masked.scale)
        else:
            masked = _build(weight, scores, ctx.spec, trainable, ctx.known)
            grad_x, grad_weight, grad_bias = back(grad, x, masked.weight.to(x.dtype), *options, needed)
        grad_scores = None
        if needed[1]:
            # A convolution is linear in both: Σ θ̂·(dL/dθ̂) = Σ x·(dL/dx), and few pixels are the shorter sum.
            total = _inner(x, grad_x) if few_pixels else None
            grad_scores = _score_gradient(grad_weight, masked, weight, ctx.spec, trainable, scores.dtype, total)
        return grad_x, None, grad_scores, grad_bias, None, None, None


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None = None,
    spec: MaskSpec = MaskSpec(),
    trainable: Tensor | None = None,
) -> Tensor:
    """`F.linear` with the weight masked by its scores; gradients go to `x`, `scores` and `bias`, never to `weight`.

    Args:
        x: Input (…, in_features); the product is computed in its dtype.
        weight: Frozen weight (out_features, in_features).
        scores: Scores of the weight's shape, fp32, fp64 or, with a rounding optimizer, bf16.
        bias: Bias (out_features,) or None.
        spec: Mask type, threshold and scaling.
        trainable: As in [`compute_mask`].

    Returns:
        Output (…, out_features).
    """
    result: Tensor = _MaskedLinear.apply(x, weight, scores, bias, spec, trainable)
    return result


def masked_conv(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    spec: MaskSpec = MaskSpec(),
    trainable: Tensor | None = None,
) -> Tensor:
    """Convolution of 1 to 3 dimensions, plain or transposed, with the weight masked by its scores.

    Args:
        x: Input (batch, channels, …), already padded if the padding is not zeros.
        weight: Frozen weight, as `torch.nn.functional.conv*d` or `conv_transpose*d` take it.
        scores: Scores of the weight's shape, fp32, fp64 or, with a rounding optimizer, bf16.
        bias: Bias (out_channels,) or None.
        geometry: Stride, padding, dilation, groups and so on.
        spec: Mask type, threshold and scaling.
        trainable: As in [`compute_mask`].

    Returns:
        Output (batch, out_channels, …).
    """
    result: Tensor = _MaskedConv.apply(x, weight, scores, bias, spec, trainable, geometry)
    return result
