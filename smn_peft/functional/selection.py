# SPDX-License-Identifier: Apache-2.0
"""Which weights of a tensor take part in masking: a random part, or the largest (the paper's Figs 8 and 9)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .masking import topk_mask

__all__ = ["seeded_generator", "select_trainable"]


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and on a name only, not on the order of creation.

    Args:
        seed: The adapter's seed.
        name: Name of the tensor.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def select_trainable(weight: Tensor, fraction: float, select: str, generator: torch.Generator) -> Tensor:
    """Select ``round(fraction · N)`` weights of a tensor.

    Args:
        weight: Frozen weight θ.
        fraction: Fraction to select, in (0, 1].
        select: ``"random"`` or ``"magnitude"`` (the largest |θ|).
        generator: CPU generator, used by ``"random"``.

    Returns:
        A bool tensor of the weight's shape and device, True where selected.
    """
    if select == "magnitude":
        return topk_mask(weight, fraction, absolute=True)
    drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    return topk_mask(drawn, fraction).to(weight.device)
