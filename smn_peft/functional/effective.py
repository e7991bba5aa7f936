# SPDX-License-Identifier: Apache-2.0
"""Effective weights ``θ·M/σ`` (Eq. 1) from scores or bits, and Linear and convolutions over them as one autograd node.

Plain autograd over [`masked_weight`] keeps the effective weight of every layer alive from forward to backward, and a
float mask beside it. The nodes keep neither: they rebuild the effective weight in backward from the frozen weight and
the scores, which are there anyway (one pass over the weight), and write ``dL/dS`` by the formula
``s·θ·g − (s²/2N)·Σ g·θ̂`` (see [`masked_weight`], the reference in the tests).

The passes are torch's operations (`torch_kernels`), or kernels of Triton (`triton_kernels`) on CUDA devices;
[`kernels_for`] chooses.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import torch_kernels
from .masking import MaskSpec
from .torch_kernels import have_one_order, is_dense

__all__ = ["ConvGeometry", "build", "kernels_for", "masked_conv", "masked_linear", "write_masked"]

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_convolution_backward = torch.ops.aten.convolution_backward.default


class ConvGeometry(NamedTuple):
    """Geometry of a convolution, in the order of `torch.convolution`'s arguments."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


# --- Kernels ---------------------------------------------------------------------------------------------------------


@functools.cache
def _triton_kernels() -> Any | None:
    """The module, tried once on eight weights; None if Triton is missing, with a warning if it cannot compile."""
    try:
        from . import triton_kernels as kernels

        some, spec = torch.ones(8, device="cuda"), MaskSpec()
        effective, counts = kernels.build(some, some, spec, None, some.dtype)
        kernels.score_gradient(effective, some, None, counts, kernels.inner(some, some), some.dtype)
        kernels.write_masked(effective, some, some.to(torch.uint8), 1.0)
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(
            f"Triton cannot compile the kernels of masks, torch's operations are slower: {error}", stacklevel=2
        )
        return None
    return kernels


def kernels_for(
    weight: Tensor, scores: Tensor | None = None, spec: MaskSpec = MaskSpec(), trainable: Tensor | None = None
) -> Any:
    """Return the module with the passes for these tensors: `triton_kernels` where they apply, else `torch_kernels`."""
    fit = weight.is_cuda and _fits(weight, scores, spec, trainable)
    return (_triton_kernels() if fit else None) or torch_kernels


def _fits(weight: Tensor, scores: Tensor | None, spec: MaskSpec, trainable: Tensor | None) -> bool:
    """Whether Triton's kernels can walk through the tensors' memory from end to end."""
    if spec.mask_type != "threshold" or trainable is not None or not weight.numel() or not is_dense(weight):
        return False
    tensors = (weight,) if scores is None else (weight, scores)
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _NARROW for tensor in tensors)
    return plain and have_one_order(weight, tensors[-1])


def build(
    weight: Tensor, scores: Tensor, spec: MaskSpec, trainable: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Any]:
    """Compute the effective weight without gradient, and what backward needs; see `torch_kernels.build`."""
    kernels = kernels_for(weight, scores, spec, trainable)
    return kernels.build(weight, scores, spec, trainable, dtype)  # type: ignore[no-any-return]


def write_masked(out: Tensor, weight: Tensor, packed: Tensor, scale: float = 1.0) -> None:
    """Write ``weight · mask · scale`` to `out`, reading and writing memory once; what is off is +0.

    `out` and `weight` (N,) are contiguous and of one dtype, `packed` (⌈N/8⌉,) is as [`pack_bits`] makes it, all on one
    device. The product is rounded once.
    """
    kernels_for(weight).write_masked(out, weight, packed, scale)


# --- Autograd nodes --------------------------------------------------------------------------------------------------


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
        ctx.kernels = kernels_for(weight, scores, spec, trainable)
        effective, ctx.found = ctx.kernels.build(weight, scores, spec, trainable, x.dtype)
        ctx.save_for_backward(x, weight, scores, trainable)
        ctx.spec = spec
        out = F.linear(x, effective, bias)
        # Nobody could write to a view in place.
        return torch.ops.aten._unsafe_view.default(out, out.shape)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores, trainable = ctx.saved_tensors  # once: gradient checkpointing recomputes them here
        spec, kernels = ctx.spec, ctx.kernels
        wants_x, _, wants_scores, wants_bias, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_scores = None
        # Before the effective weight is made: its passes are quicker one after the other, the code is in the caches.
        g = flat.t() @ x.reshape(-1, x.shape[-1]) if wants_scores else None
        effective, factor = kernels.rebuild(weight, scores, spec, trainable, ctx.found, x.dtype)
        if g is not None:
            total = kernels.inner(g, effective) if spec.scale and spec.scale_gradient else None
            total = total.mul_(factor) if total is not None and factor != 1.0 else total
            grad_scores = kernels.score_gradient(g, weight, trainable, ctx.found, total, scores.dtype)
            del g  # a copy, where dtypes differ
        if wants_x:  # the factor as part of the product costs nothing
            grad_x = torch.addmm(flat.new_empty(()), flat, effective, beta=0, alpha=factor).reshape(x.shape)
        return grad_x, None, grad_scores, flat.sum(0) if wants_bias else None, None, None


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
        ctx.kernels = kernels_for(weight, scores, spec, trainable)
        effective, ctx.found = ctx.kernels.build(weight, scores, spec, trainable, x.dtype)
        ctx.save_for_backward(x, weight, scores, trainable)
        ctx.spec, ctx.options = spec, (None if bias is None else list(bias.shape), *geometry)
        return torch.convolution(x, effective, bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores, trainable = ctx.saved_tensors  # once: gradient checkpointing recomputes them here
        spec, kernels, options = ctx.spec, ctx.kernels, ctx.options
        wants_x, _, wants_scores, wants_bias, *_ = ctx.needs_input_grad
        with_total, total = wants_scores and spec.scale and spec.scale_gradient, None
        effective, factor = kernels.rebuild(weight, scores, spec, trainable, ctx.found, x.dtype)
        if wants_x and x.numel() < weight.numel() and x.dtype == weight.dtype:
            # The weight is the larger side: its gradient comes after the effective weight has gone, in its memory.
            grad_x = _convolution_backward(grad, x, effective, *options, [True, False, False])[0]
            del effective
            # A convolution is linear in both: Σ g·θ̂ = Σ x·(dL/dx), and the input's is the shorter sum.
            grad_x = grad_x.mul_(factor) if factor != 1.0 else grad_x
            total = kernels.inner(x, grad_x) if with_total else None
            _, g, grad_bias = _convolution_backward(grad, x, weight, *options, [False, wants_scores, wants_bias])
        else:
            effective = effective.mul_(factor) if factor != 1.0 else effective
            grad_x, g, grad_bias = _convolution_backward(
                grad, x, effective, *options, [wants_x, wants_scores, wants_bias]
            )
            total = kernels.inner(g, effective) if with_total else None
        if wants_scores:
            g = kernels.score_gradient(g, weight, trainable, ctx.found, total, scores.dtype)
        return grad_x, None, g, grad_bias, None, None, None


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None = None,
    spec: MaskSpec = MaskSpec(),
    trainable: Tensor | None = None,
) -> Tensor:
    """Compute `F.linear` with the weight masked by its scores; `x`, `scores` and `bias` get gradients, `weight` none.

    (…, in_features) -> (…, out_features), computed in the dtype of `x`. Scores, of the weight's shape, are fp32, fp64
    or, with a rounding optimizer, bf16. `trainable` is as in [`compute_mask`].
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
    """Compute a convolution of 1 to 3 dimensions, plain or transposed, with the weight masked by its scores.

    `x` is (batch, channels, …), already padded if the padding is not zeros; `weight` is as `F.conv*d` or
    `F.conv_transpose*d` take it; the rest is as in [`masked_linear`].
    """
    result: Tensor = _MaskedConv.apply(x, weight, scores, bias, spec, trainable, geometry)
    return result
