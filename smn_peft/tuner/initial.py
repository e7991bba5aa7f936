# SPDX-License-Identifier: Apache-2.0
"""Scores of an adapter before it trains: a new one's, or those that a mask is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.masking import seeded_generator
from ..functional.packing import pack_bits, packed_size
from .config import MaskConfig

__all__ = ["initial_bits", "initial_scores", "score_dtype", "scores_of_mask"]


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


def initial_bits(config: MaskConfig, name: str, weight: Tensor) -> Tensor:
    """Packed bits of an adapter for inference before a loader has written its own; see [`initial_scores`]."""
    if weight.device.type == "meta":
        return torch.empty(packed_size(weight.numel()), dtype=torch.uint8, device="meta")
    if config.init_weights:
        return pack_bits(torch.ones(weight.shape, dtype=torch.bool)).to(weight.device)
    return pack_bits(initial_scores(config, name, weight) > config.threshold)


def scores_of_mask(config: MaskConfig, weight: Tensor, mask: Tensor) -> Tensor:
    """Scores that make a mask under a configuration: threshold ± |initial score − threshold|, or ± 1 where that is 0.

    Where scores are ranked by their size, weights that are off have 0.

    Args:
        config: Says `init_score`, `threshold`, `mask_type` and `rank_by`.
        weight: Frozen weight.
        mask: Bool mask of the weight's shape.

    Returns:
        A tensor of the weight's shape and memory format, on its device.
    """
    distance = 0.0 if isinstance(config.init_score, str) else abs(config.init_score - config.threshold)
    distance = distance or 1.0
    by_size = config.mask_type == "topk" and config.rank_by == "absolute"
    low, high = (0.0, distance) if by_size else (config.threshold - distance, config.threshold + distance)
    return torch.full_like(weight, low, dtype=score_dtype(weight), requires_grad=False).masked_fill_(mask, high)
