# SPDX-License-Identifier: Apache-2.0
"""Backward of a convolution: torch's, but for the weight's gradient over few pixels, which is one matrix product.

Of small images a ResNet's last stages see 2 to 7 pixels a side and hundreds of channels. There oneDNN may unfold and
sum image by image: on a processor with AVX2, for a weight of 512 × 512 × 3 × 3 over 2 × 2 pixels, in a scratch of
eight times the weight and four times the product's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ConvGeometry", "convolution", "convolution_backward"]

# Output pixels of the whole batch per output channel, up to which the product is quicker: measured with AVX2, weights
# of 3 × 3. With other vectors oneDNN has other kernels: unmeasured, only if the weight outgrows the unfolded input.
_PIXELS_PER_CHANNEL = 4 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1


class ConvGeometry(NamedTuple):
    """Geometry of a convolution, as `aten.convolution` takes it."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


_backward = torch.ops.aten.convolution_backward.default


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    geometry: ConvGeometry,
    wanted: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """Gradients of input, weight and bias, as `aten.convolution_backward` gives them.

    Args:
        grad: Gradient of the output (batch, out_channels, …).
        x: Input (batch, in_channels, …).
        weight: Weight; of it only the gradient of the input depends on the values.
        bias_sizes: Shape of the bias, None without one.
        geometry: Of the convolution.
        wanted: Which of the three to compute; the others mean nothing.
    """
    wants_x, wants_weight, wants_bias = wanted
    if not (wants_weight and _has_few_pixels(grad, x, weight, geometry)):
        return _backward(grad, x, weight, bias_sizes, *geometry, [wants_x, wants_weight, wants_bias])  # type: ignore[no-any-return]
    grad_x = _backward(grad, x, weight, None, *geometry, [True, False, False])[0] if wants_x else None
    return grad_x, _product(grad, x, weight, geometry), grad.sum((0, 2, 3)) if wants_bias else None


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradients = convolution_backward(grad, x, weight, ctx.bias_sizes, ctx.geometry, ctx.needs_input_grad[:3])
        return *gradients, None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A convolution whose weight trains, with the gradients of [`convolution_backward`], twice differentiable.

    Args:
        x: Input (batch, in_channels, …).
        weight: Weight, as `aten.convolution` takes it.
        bias: Bias (out_channels,) or None.
        geometry: Of the convolution.

    Returns:
        Output (batch, out_channels, …).
    """
    result: Tensor = _Convolution.apply(x, weight, bias, geometry)
    return result


def _has_few_pixels(grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether [`_product`] applies and is the faster way: a plain convolution of images, on a CPU."""
    if weight.ndim != 4 or weight.shape[2:].numel() == 1 or geometry.groups != 1 or geometry.transposed:
        return False
    if not x.is_cpu or not x.dtype == grad.dtype == weight.dtype or x.dtype not in (torch.float32, torch.float64):
        return False
    if any(step != 1 for step in geometry.dilation):
        return False
    out_channels = weight.shape[0]
    return grad.numel() // out_channels <= _PIXELS_PER_CHANNEL * out_channels


def _product(grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """`grad` times the unfolded input: the weight's gradient. The batch lies innermost, to be copied in long runs."""
    out_channels, _, height, width = weight.shape
    (down, right), (above, left) = geometry.stride, geometry.padding
    image = F.pad(x.permute(1, 2, 3, 0), (0, 0, left, left, above, above))
    patches = image.unfold(1, height, down).unfold(2, width, right)
    # The columns' order is that of the weight in memory, so that the product lies as the weight does.
    order = [0, 4, 5] if weight.is_contiguous() else [4, 5, 0]
    patches = patches.permute(*order, 1, 2, 3)
    product = grad.permute(1, 2, 3, 0).reshape(out_channels, -1) @ patches.reshape(weight[0].numel(), -1).t()
    result = product.view(out_channels, *patches.shape[:3])
    return result if weight.is_contiguous() else result.permute(0, 3, 1, 2)
