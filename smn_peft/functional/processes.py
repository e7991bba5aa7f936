# SPDX-License-Identifier: Apache-2.0
"""Sums, maxima and rows over the processes of a distributed run; with one process they return what they are given."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce", "gather_rows", "process_count", "process_index"]


def process_count() -> int:
    """Number of processes of the default group; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Rank of this process in the default group; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce(tensor: Tensor, reduction: Literal["sum", "max"] = "sum") -> Tensor:
    """Reduce a tensor over all processes, in place and without gradient.

    Args:
        tensor: Tensor of the same shape and dtype on every process.
        reduction: ``"sum"`` or ``"max"``.

    Returns:
        `tensor`.
    """
    if process_count() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if reduction == "sum" else dist.ReduceOp.MAX)
    return tensor


def gather_rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """Join the rows of all processes, in the order of their ranks and without gradient.

    Args:
        tensor: Tensor of the same shape and dtype on every process.
        dim: Dimension along which the processes' tensors are joined.

    Returns:
        The joined tensor, the same on every process.
    """
    tensor = tensor.detach()
    if process_count() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(process_count())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)
