# SPDX-License-Identifier: Apache-2.0
"""Write a masked weight over the frozen one such that it can be restored bit for bit, without a copy of the weight.

Dividing ``θ·s`` by s gives θ back for most entries, but not where the product crossed a power of two; those entries,
and the ones that the mask removed, are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .masking import scaled_weight
from .packing import pack_bits, unpack_bits

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stash(NamedTuple):
    """What restores a merged weight."""

    scale: Tensor  # 1/σ that was multiplied in, 0-dim
    where: Tensor  # packed bits, one per weight: on where division alone does not restore the value
    values: Tensor  # the frozen weight's values there, in C order


def _divided(merged: Tensor, scale: Tensor) -> Tensor:
    return (merged.double() / scale.double()).to(merged.dtype)


def check_finite(weight: Tensor, path: str, scores: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError if a frozen weight, at `path`, or scores, with their adapter's name, hold NaN or infinity."""
    for name, own in scores:
        if not torch.isfinite(own).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its scores are "
                "not finite. Nothing was merged; go back to a checkpoint and lower the learning rate."
            )
    if not torch.isfinite(weight).all():
        raise ValueError(f"NaNs detected in the merged weights: the base's own {path} is not finite.")


@torch.no_grad()
def merge_weight(weight: Tensor, mask: Tensor, scale: bool = True) -> Stash:
    """Overwrite `weight` in place with its effective weight ``θ·M/σ``; return what [`unmerge_weight`] needs."""
    merged, _, found = scaled_weight(weight.detach(), mask, scale)
    factor = torch.as_tensor(found, device=weight.device)
    integer = _INTEGERS[weight.element_size()]
    lost = _divided(merged, factor).view(integer) != weight.detach().contiguous().view(integer)
    stash = Stash(factor, pack_bits(lost), weight.detach()[lost].clone())
    weight.copy_(merged)
    return stash


@torch.no_grad()
def unmerged_weight(weight: Tensor, stash: Stash) -> Tensor:
    """Return what [`merge_weight`] overwrote, bit for bit; the stash may be on another device.

    A weight that was cast while it was merged comes back up to rounding.
    """
    restored = _divided(weight.detach(), stash.scale.to(weight.device))
    where = unpack_bits(stash.where.to(weight.device), weight.shape)
    restored[where] = stash.values.to(weight.device, weight.dtype)
    return restored


@torch.no_grad()
def unmerge_weight(weight: Tensor, stash: Stash) -> None:
    """Restore in place what [`merge_weight`] overwrote; see [`unmerged_weight`]."""
    weight.copy_(unmerged_weight(weight, stash))
