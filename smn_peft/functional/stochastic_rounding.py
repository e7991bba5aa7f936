# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding to bf16: right on average, so that steps smaller than its eight bits still add up."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_stochastically"]


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbours in bf16, with the chance that makes the mean exact (Gupta et al. 2015).

    Args:
        values: fp32 of any shape; what is no number, or not finite, stays what it is.
        generator: Of the values' device; the same one gives the same answer.

    Returns:
        bf16 of the values' shape.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator).add_(
        values.contiguous().view(torch.int32)
    )
    rounded = noise.bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()
