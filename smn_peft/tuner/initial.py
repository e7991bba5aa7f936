# SPDX-License-Identifier: Apache-2.0
"""Initial scores of a new adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.selection import seeded_generator
from .config import MaskConfig

__all__ = ["initial_scores", "score_dtype"]


def score_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the scores of a weight: fp32, or fp64 for an fp64 weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def initial_scores(config: MaskConfig, name: str, weight: Tensor) -> Tensor:
    """Scores to start from.

    Args:
        config: Says `init_score`, `init_weights`, `threshold` and `seed`.
        name: Name of the weight, so that random scores do not depend on the order of layers.
        weight: Frozen weight.

    Returns:
        A tensor of the weight's shape and memory format, on its device.
    """
    if config.init_weights and not isinstance(config.init_score, str):
        return torch.full_like(weight, config.init_score, dtype=score_dtype(weight), requires_grad=False)
    generator = seeded_generator(config.seed, f"{name}.init")
    drawn = torch.empty(weight.shape)
    if not config.init_weights:
        drawn.normal_(generator=generator).add_(config.threshold)
    elif weight.dim() > 1:
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
    else:
        drawn.uniform_(-1, 1, generator=generator)
    return torch.empty_like(weight, dtype=score_dtype(weight), requires_grad=False).copy_(drawn)
