# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation by the statistics of the batch joined over all processes, with its gradient, on the CPU.

torch's own (`nn.SyncBatchNorm`) refuses tensors on the CPU. One all-reduce forward, one backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .processes import all_reduce

__all__ = ["joined_batch_norm", "joined_statistics"]


@torch.no_grad()
def joined_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance per channel over the joined batch.

    Args:
        x: This process's part, (batch, channels, …), any float dtype; the batch may differ between processes.

    Returns:
        Mean (channels,), biased variance (channels,), both fp32 at least, and the number of values per channel.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, [d for d in range(x.ndim) if d != 1], correction=0)
    # fp64: the mean's square is taken off again.
    moments = torch.stack([torch.ones_like(mean), mean, variance + mean.double().square()]).double()
    count, total, squares = all_reduce(moments * (x.numel() / x.shape[1]))
    joined = total / count
    return joined.to(mean.dtype), (squares / count - joined.square()).clamp_(min=0).to(mean.dtype), int(count[0])


class _JoinedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, n: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps, ctx.has_bias = n, eps, bias is not None
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With x̂ = (x − mean)·r and r = 1/sqrt(var + eps): ``dx = w·r·(g − mean(g) − x̂·mean(g·x̂))``."""
        x, weight, mean, var = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.ndim - 2)
        dims = [d for d in range(x.ndim) if d != 1]
        rstd = (var + ctx.eps).rsqrt()
        wide, normal = grad.to(mean.dtype), (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
        # Gradients of weight and bias stay this process's own: DDP reduces them.
        sums = torch.stack([wide.sum(dims), (wide * normal).sum(dims)])
        grad_bias, grad_weight = sums.clone()
        means = all_reduce(sums) / ctx.count
        dx = None
        if ctx.needs_input_grad[0]:
            factor = rstd if weight is None else rstd * weight.to(rstd.dtype)
            dx = (wide - means[0].view(shape)).sub_(normal.mul_(means[1].view(shape))).mul_(factor.view(shape))
            dx = dx.to(x.dtype)
        return (
            dx,
            None if weight is None else grad_weight.to(weight.dtype),
            grad_bias if ctx.has_bias else None,
            *(None,) * 4,
        )


def joined_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """`F.batch_norm` in train mode, by the statistics of the batch joined over all processes.

    Every process must call this, and must run backward through it.

    Args:
        x: This process's part of the batch, (batch, channels, …).
        running_mean: Running mean (channels,), updated in place; or None.
        running_var: Running variance (channels,), updated in place by the joined batch's unbiased one; or None.
        weight: Scale (channels,), or None.
        bias: Shift (channels,), or None.
        momentum: Share of the new statistics in the running ones.
        eps: Added to the variance.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: If the joined batch has one value per channel only.
    """
    mean, var, count = joined_statistics(x)
    if count < 2:
        raise ValueError(
            f"BatchNorm cannot train on one value per channel, got input {tuple(x.shape)}: enlarge the batch."
        )
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    result: Tensor = _JoinedBatchNorm.apply(x, weight, bias, mean, var, count, eps)
    return result
