# SPDX-License-Identifier: Apache-2.0
"""Linear and convolution with a masked weight, as one autograd node each: the floor in memory and passes.

Plain autograd over [`masked_weight`] keeps the effective weight of every layer alive from forward to backward, and
a float mask beside it. These nodes keep neither: they rebuild the effective weight in backward from the frozen
weight and the scores, which are there anyway (one pass over the weight), and write ``dL/dS`` by the formula
``s·θ·g − (s²/2N)·Σ g·θ̂`` (see [`masked_weight`], the reference in the tests).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .masking import MaskSpec, compute_mask, scale_of

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
    """A frozen weight under its mask, and what makes it the effective weight."""

    kept: Tensor
    active: Tensor
    scale: Tensor | None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The effective weight, in the memory of `kept`."""
        return (self.kept if self.scale is None else self.kept.mul_(self.scale)).to(dtype)


class _Workspace(threading.local):
    """Memory on the CPU that the nodes of one thread share; fresh pages would cost more than writing to them."""

    def __init__(self) -> None:
        self.blocks: dict[torch.dtype, Tensor] = {}

    def room(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised tensor of the shape of `like`, valid until the next call with this dtype."""
        block = self.blocks.get(dtype)
        if block is None or block.numel() < like.numel():
            with torch.inference_mode(False):
                block = self.blocks[dtype] = torch.empty(like.numel(), dtype=dtype, device="cpu")
        return block[: like.numel()].view(like.shape)


_workspace = _Workspace()


def _plain(*tensors: Tensor) -> bool:
    """Whether the tensors lie in the CPU's memory in C order, and are what they seem (not a tracer's stand-ins)."""
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def _keep(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> Tensor | None:
    """θ·1[S > μ] in one pass, where the mask is a plain threshold."""
    if spec.mask_type != "threshold" or trainable is not None or weight.dtype != scores.dtype:
        return None
    keep = torch.ops.aten.threshold_backward
    if not _plain(weight, scores):
        return keep(weight, scores, spec.threshold)  # type: ignore[no-any-return]
    room = _workspace.room(weight, weight.dtype)
    return keep.grad_input(weight, scores, spec.threshold, grad_input=room)  # type: ignore[no-any-return]


def _build(weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None) -> _Masked:
    kept = _keep(weight, scores, spec, trainable)
    if kept is not None and _plain(weight, scores):
        mask = torch.gt(scores, spec.threshold, out=_workspace.room(scores, torch.bool))
    else:
        mask = compute_mask(scores, spec, trainable)
    active = torch.count_nonzero(mask)
    if kept is None:
        kept = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    return _Masked(kept, active, scale_of(active, mask.numel(), weight.dtype) if spec.scale else None)


def _rebuild(ctx: Any, weight: Tensor, scores: Tensor, trainable: Tensor | None) -> _Masked:
    """The masked weight of a node in its backward; the count of active weights is remembered."""
    kept = _keep(weight, scores, ctx.spec, trainable)
    if kept is None:
        return _build(weight, scores, ctx.spec, trainable)
    return _Masked(kept, ctx.active, ctx.scale)


def _score_gradient(
    grad: Tensor,
    masked: _Masked,
    weight: Tensor,
    scores: Tensor,
    spec: MaskSpec,
    trainable: Tensor | None,
    total: Tensor | None = None,
) -> Tensor:
    """dL/dS from g = dL/dθ̂ and the kept weight, not yet scaled, in the scores' dtype, in the memory of `grad`.

    `total` is Σ g·(kept weight), where the caller has it.
    """
    grad = grad.to(scores.dtype)
    scale, kept = masked.scale, masked.kept
    if scale is None:
        result = grad.mul_(weight)
    elif not spec.scale_gradient:
        result = grad.mul_(weight).mul_(scale)
    else:
        # Σ_j g_j·θ̂_j / (2·active) is the formula's (s²/2N)·Σ; an empty mask has θ̂ = 0, hence no second term.
        if total is None:
            total = _inner(grad, kept)
        shift = total * scale / (2 * masked.active.clamp(min=1))
        if grad.device.type == "cpu":  # one pass; elsewhere reading the scale would wait for the device
            result = torch.addcmul(-shift, weight.to(grad.dtype), grad, value=scale.item(), out=grad)
        else:
            result = grad.mul_(weight).mul_(scale).sub_(shift)
    return result if trainable is None else result.mul_(trainable)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Σ of the elementwise product."""
    if first.is_contiguous() and second.is_contiguous() and first.dtype == second.dtype:
        return torch.dot(first.view(-1), second.view(-1))
    return (first * second).sum()


def _product(flat: Tensor, masked: _Masked, transposed: bool, bias: Tensor | None = None) -> Tensor:
    """`flat` times the effective weight or its transpose, plus bias; on the CPU the scale rides along."""
    scale = None if masked.scale is None or flat.device.type != "cpu" else masked.scale.item()
    weight = masked.weight(flat.dtype) if scale is None else masked.kept.to(flat.dtype)
    weight = weight.t() if transposed else weight
    start = torch.zeros((), dtype=flat.dtype, device=flat.device) if bias is None else bias
    return torch.addmm(start, flat, weight, beta=0 if bias is None else 1, alpha=1 if scale is None else scale)


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
        ctx.spec, ctx.active, ctx.scale = spec, masked.active, masked.scale
        flat = x.reshape(-1, x.shape[-1])
        return _product(flat, masked, transposed=True, bias=bias).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores, trainable = ctx.saved_tensors  # once: gradient checkpointing recomputes them here
        masked = _rebuild(ctx, weight, scores, trainable)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_scores = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_weight = flat.t() @ x.reshape(-1, x.shape[-1])
            grad_scores = _score_gradient(grad_weight, masked, weight, scores, ctx.spec, trainable)
        if ctx.needs_input_grad[0]:
            grad_x = _product(flat, masked, transposed=False).reshape(x.shape)
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
        masked = _build(weight, scores, spec, trainable)
        ctx.save_for_backward(x, weight, scores, trainable)
        ctx.spec, ctx.active, ctx.scale = spec, masked.active, masked.scale
        ctx.geometry, ctx.bias_sizes = geometry, None if bias is None else list(bias.shape)
        if bias is not None or masked.scale is None:
            return torch.convolution(x, masked.weight(x.dtype), bias, *geometry)
        result = torch.convolution(x, masked.kept.to(x.dtype), None, *geometry)
        return result.mul_(masked.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores, trainable = ctx.saved_tensors  # once: gradient checkpointing recomputes them here
        masked = _rebuild(ctx, weight, scores, trainable)
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, masked.kept.to(x.dtype), ctx.bias_sizes, *ctx.geometry, needed
        )
        total = None
        if grad_x is not None and masked.scale is not None:
            if x.numel() < weight.numel() and x.dtype == weight.dtype:
                total = _inner(x, grad_x)  # a convolution is linear in both: Σ x·(dL/dx) = Σ θ̂·(dL/dθ̂)
            grad_x.mul_(masked.scale)
        grad_scores = None
        if needed[1]:
            grad_scores = _score_gradient(grad_weight, masked, weight, scores, ctx.spec, trainable, total)
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
        scores: Scores of the weight's shape, fp32 or fp64.
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
        scores: Scores of the weight's shape, fp32 or fp64.
        bias: Bias (out_channels,) or None.
        geometry: Stride, padding, dilation, groups and so on.
        spec: Mask type, threshold and scaling.
        trainable: As in [`compute_mask`].

    Returns:
        Output (batch, out_channels, …).
    """
    result: Tensor = _MaskedConv.apply(x, weight, scores, bias, spec, trainable, geometry)
    return result
