# SPDX-License-Identifier: Apache-2.0
"""Linear and convolution with a masked weight, as one autograd node each: the floor in memory and passes.

Plain autograd over [`masked_weight`] keeps the effective weight of every layer alive from forward to backward, and
a float mask beside it. These nodes keep neither: they rebuild the effective weight in backward from the frozen
weight and the scores, which are there anyway (one pass over the weight), and write ``dL/dS`` by the formula
``s·θ·g − (s²/2N)·Σ g·θ̂`` (see [`masked_weight`], the reference in the tests).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import ConvGeometry, convolution_backward
from .masking import MaskSpec
from .passes import build, inner, rebuild, score_gradient

__all__ = ["masked_conv", "masked_linear"]


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
        effective, ctx.found = build(weight, scores, spec, trainable, x.dtype)
        ctx.save_for_backward(x, weight, scores, trainable)
        ctx.spec = spec
        out = F.linear(x, effective, bias)
        if out._is_view():  # nobody could write to it in place
            out = torch.ops.aten._unsafe_view.default(out, out.shape)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores, trainable = ctx.saved_tensors  # once: gradient checkpointing recomputes them here
        spec, found = ctx.spec, ctx.found
        wants_x, _, wants_scores, wants_bias, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_scores = grad_bias = None
        # Before the effective weight is made: its passes are quicker one after the other, the code is in the caches.
        g = flat.t() @ x.reshape(-1, x.shape[-1]) if wants_scores else None
        effective, factor = rebuild(weight, scores, spec, trainable, found, x.dtype)
        if g is not None:
            total = inner(g, effective, found) if spec.scale and spec.scale_gradient else None
            grad_scores = score_gradient(g, weight, scores, trainable, found, total, factor)
            del g  # a copy, where dtypes differ
        if wants_x:
            if factor is None:
                grad_x = flat @ effective
            else:  # as part of the product it costs nothing
                grad_x = torch.addmm(flat.new_empty(()), flat, effective, beta=0, alpha=factor)
            grad_x = grad_x.reshape(x.shape)
        if wants_bias:
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
        effective, ctx.found = build(weight, scores, spec, trainable, x.dtype)
        ctx.save_for_backward(x, weight, scores, trainable)
        ctx.spec, ctx.geometry, ctx.bias_sizes = spec, geometry, None if bias is None else list(bias.shape)
        return torch.convolution(x, effective, bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores, trainable = ctx.saved_tensors  # once: gradient checkpointing recomputes them here
        spec, found = ctx.spec, ctx.found
        wants_x, _, wants_scores, wants_bias, *_ = ctx.needs_input_grad
        back, options = convolution_backward, (ctx.bias_sizes, ctx.geometry)
        with_total, total = wants_scores and spec.scale and spec.scale_gradient, None
        effective, factor = rebuild(weight, scores, spec, trainable, found, x.dtype)
        if wants_x and x.numel() < weight.numel() and x.dtype == weight.dtype:
            # With few pixels the weight is the larger side: what can be done on the input's is done there, and one
            # after the other, so that the gradient of the weight comes where the effective weight was.
            grad_x = back(grad, x, effective, *options, [True, False, False])[0]
            del effective
            # A convolution is linear in both: Σ g·θ̂ = Σ x·(dL/dx), and few pixels are the shorter sum.
            total = inner(x, grad_x, found) if with_total else None
            if factor is not None:
                grad_x.mul_(factor)
            _, g, grad_bias = back(grad, x, weight, *options, [False, wants_scores, wants_bias])
        else:
            if factor is not None:
                effective, factor = effective.mul_(factor), None
            grad_x, g, grad_bias = back(grad, x, effective, *options, [wants_x, wants_scores, wants_bias])
            total = inner(g, effective, found) if with_total else None
        grad_scores = score_gradient(g, weight, scores, trainable, found, total, factor) if wants_scores else None
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
