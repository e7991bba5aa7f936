# SPDX-License-Identifier: Apache-2.0
"""Effective weights that are kept while nothing that they were made from has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..functional.masking import MaskSpec

__all__ = ["CachedWeight", "Ready", "Source"]


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


class Source:
    """A tensor that effective weights were made from, its version and place, and where its owner keeps it."""

    __slots__ = ("find", "key", "place", "tensor", "version")

    def __init__(self, find: Callable[[str], Any], key: str) -> None:
        """Note what `find(key)` gives now."""
        self.find, self.key = find, key
        self.tensor: Tensor = find(key)
        self.version, self.place = _version(self.tensor), self.tensor.data_ptr()


class Ready:
    """All that a layer runs on while it evaluates, so that a forward asks one question before the product.

    The question is [`CachedWeight`]'s, put to the places where the tensors lie, and whether the layer is still in the
    state in which it asked last.
    """

    __slots__ = ("active", "base", "sources", "specs", "step", "tensors")

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        sources: Sequence[Source],
        active: str | Sequence[str],
        base: nn.Module,
        specs: Sequence[tuple[Any, MaskSpec]],
    ) -> None:
        """Keep `tensors`.

        Args:
            tensors: Tensors by slot.
            sources: What they were made from, no tensor of inference mode among them.
            active: The layer's active adapters.
            base: Its base layer.
            specs: What it knows of each adapter, with the spec that the tensors were made under.
        """
        self.tensors = tensors
        self.sources = sources
        self.active = active if isinstance(active, str) else list(active)
        self.base = base
        self.specs = specs
        self.step = _steps

    def holds(self, layer: Any) -> bool:
        """Whether the layer's next forward is one with these tensors, and without a gradient for their sources."""
        if layer._disable_adapters or layer.merged_adapters or layer._awaiting or layer._active_adapter != self.active:
            return False
        if layer._modules["base_layer"] is not self.base:
            return False
        for info, spec in self.specs:
            if info.spec is not spec:
                return False
        trained = self.step != _steps or torch.is_grad_enabled()
        for source in self.sources:
            tensor = source.tensor
            if source.find(source.key) is not tensor or (trained and tensor.requires_grad):
                return False
            if tensor._version != source.version or tensor.data_ptr() != source.place:
                return False
        return True
