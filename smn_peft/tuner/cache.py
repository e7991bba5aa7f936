# SPDX-License-Identifier: Apache-2.0
"""An effective weight that is kept while nothing that it was made from has changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..functional.masking import MaskSpec

__all__ = ["CachedWeight"]


_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


# Fused optimizers, torch's and others', write past a tensor's version; every one of them is a torch.optim.Optimizer.
register_optimizer_step_post_hook(_count_step)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class CachedWeight:
    """An effective weight, and the tensors it was made from with their versions and places.

    An in-place write moves a tensor's version, a new `.data` its place, a replacement its identity; the tensors are
    held here, so that an identity cannot be taken over by a newer tensor.
    """

    __slots__ = ("sources", "specs", "stamps", "step", "weight")

    def __init__(self, weight: Tensor, sources: Sequence[Tensor], specs: Sequence[MaskSpec]) -> None:
        """Keep `weight`, made from `sources` (frozen weight, then scores or bits) under `specs`."""
        self.weight = weight
        self.sources = sources
        self.specs = specs
        self.step = _steps
        self.stamps = [(_version(tensor), tensor.data_ptr()) for tensor in sources]

    def fresh(self, sources: Sequence[Tensor], specs: Sequence[MaskSpec]) -> bool:
        """Whether the same sources, unchanged, and the same specs would give this weight again."""
        if len(sources) != len(self.sources) or self.specs != specs:
            return False
        if self.step != _steps and any(tensor.requires_grad for tensor in sources):
            return False
        for tensor, kept, (version, place) in zip(sources, self.sources, self.stamps, strict=True):
            if tensor is not kept or _version(tensor) != version or tensor.data_ptr() != place:
                return False
        return True
