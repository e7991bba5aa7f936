# SPDX-License-Identifier: Apache-2.0
"""Reductions over the processes of a distributed run, and what is built on them: BatchNorm and Sinkhorn-Knopp.

With one process the reductions return what they are given. Sharded tensors (`DTensor`) made whole and written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def process_count() -> int:
    """Number of processes of the default group; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Rank of this process in the default group; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce(tensor: Tensor, reduction: Literal["sum", "max"] = "sum") -> Tensor:
    """Reduce a tensor over all processes, in place and without gradient, and return it."""
    if process_count() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if reduction == "sum" else dist.ReduceOp.MAX)
    return tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return gather_rows(tensor, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sum the gradients that all processes have for this one's rows."""
        total = all_reduce(grad.contiguous().clone())
        return total.chunk(process_count(), ctx.dim)[process_index()], None


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which each process may hold a part, as outside a forward under FSDP2."""
    return type(tensor).__name__ == "DTensor"


def unsharded(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, on every process, which must all call this; any other tensor is returned as it is.

    Differentiable: each process takes its part of the gradient, which must be the same on all.
    """
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def shard_as(tensor: Any, values: Tensor) -> Tensor:
    """Shard values, which every process has, as another tensor of their shape is sharded."""
    from torch.distributed.tensor import distribute_tensor

    values = values.to(tensor.device)
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of their shape; of a sharded one each process writes its own part."""
    tensor.copy_(shard_as(tensor, values) if is_sharded(tensor) else values)


def gather_rows(tensor: Tensor, dim: int = 0, *, differentiable: bool = False) -> Tensor:
    """Concatenate the processes' tensors, all of one shape and dtype, along `dim`, by rank.

    With `differentiable`, gradients go back to the process whose rows they are of, summed over the processes; without,
    there are none.
    """
    if differentiable:
        gathered: Tensor = tensor if process_count() == 1 else _GatherRows.apply(tensor, dim)
        return gathered
    tensor = tensor.detach()
    if process_count() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(process_count())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def read_flags(flags: Sequence[Tensor]) -> list[bool]:
    """Read several 0-dim bool tensors with one synchronisation."""
    answers: list[bool] = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return answers


@torch.no_grad()
def joined_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Compute mean and biased variance per channel, fp32 at least, and the number of values per channel.

    They are of the batch of all processes; `x` (batch, channels, …) is this one's part, whose size may differ.
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
        weight_grad = None if weight is None else grad_weight.to(weight.dtype)
        return dx, weight_grad, grad_bias if ctx.has_bias else None, None, None, None, None


def joined_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """`F.batch_norm` in train mode by the statistics of all processes' batch; `nn.SyncBatchNorm` refuses CPU tensors.

    Every process must call this, and must run backward through it. The arguments are those of `F.batch_norm`; running
    statistics are updated in place, the variance by the unbiased one. ValueError if the joined batch has one value per
    channel only.
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


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Assign a batch to prototypes such that all are used equally: ``exp(scores / ε)`` normalised (SwAV, section 3.1).

    Columns, then rows are normalised in turn, on logarithms, so that no epsilon gives 0/0. The sums run over the batch
    of all processes, each of which must call this; the number of rows may differ.

    Args:
        scores: Similarity of each embedding to each prototype, (batch, prototypes), any float dtype.
        epsilon: Strength ε of the entropy term, above 0; the smaller, the harder the codes.
        iterations: Number of times that columns and rows are normalised, at least 1.

    Returns:
        Codes (batch, prototypes) of this process's rows, fp32 also under autocast; each row sums to 1.
    """
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"sinkhorn takes scores (batch, prototypes) with entries, got {tuple(scores.shape)}.")
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon must be above 0 and iterations at least 1, got {epsilon} and {iterations}.")
    logits = scores.float() / epsilon  # fp32: the exponent of a bf16 score would be wrong by its rounding
    for _ in range(iterations):
        top = all_reduce(logits.amax(0, keepdim=True), "max")
        logits = logits - (top + all_reduce((logits - top).exp_().sum(0, keepdim=True)).log_())
        logits = logits.log_softmax(1)
    return logits.exp_()
