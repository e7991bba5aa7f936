# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps from one forward to the next: effective weights made from packed bits, or what trains.

Effective weights made from scores are never kept: a fused optimizer, a CUDA graph or ``scores.data.copy_()`` (as every
average of weights does it) changes scores, and no version of theirs moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .tracing import is_transformed

__all__ = ["CachedWeights", "Training"]


class CachedWeights:
    """Effective tensors of a layer, and the conditions under which they are valid.

    An in-place write moves a source's version, a new `.data` its place, a replacement its identity; the sources are
    held here, so that an identity cannot be taken over by a newer tensor.
    """

    __slots__ = ("active", "base", "owners", "sources", "specs", "tensors")

    def __init__(self, layer: Any, names: Sequence[str], tensors: tuple[Tensor, ...]) -> None:
        """Keep `tensors`, made under the named adapters of a layer for which [`keepable`] holds."""
        self.tensors = tensors
        self.active = layer._active_adapter if isinstance(layer._active_adapter, str) else list(layer._active_adapter)
        self.base: nn.Module = layer.base_layer
        self.specs = [(layer.smn_info[name], layer.smn_info[name].spec) for name in names]
        self.owners: list[tuple[Any, str, nn.Module]] = []
        self.sources: list[tuple[Any, str, Tensor, int, int]] = []
        for slot in layer.present_slots:
            owner, bits = self.base, layer.bits(slot)
            *path, attribute = slot.path.split(".")
            for part in path:
                find, owner = owner._modules.get, owner.get_submodule(part)
                self.owners.append((find, part, owner))
            places = [(owner._parameters.get, attribute)]
            places += [(bits.__getitem__, name) for name in layer.holders(names, slot)]
            for find, key in places:
                tensor = find(key)
                self.sources.append((find, key, tensor, tensor._version, tensor.data_ptr()))

    @staticmethod
    def keepable(layer: Any, names: Sequence[str]) -> bool:
        """Whether nothing that the layer's effective tensors are made of may train, or change unseen."""
        for slot in layer.present_slots:
            weight, bits = layer.base_tensor(slot), layer.bits(slot)
            owner, _, attribute = slot.path.rpartition(".")
            if layer.base_layer.get_submodule(owner)._parameters.get(attribute) is not weight:
                return False  # FSDP's gathered parameters are attributes
            sources = [weight]
            for name in layer.holders(names, slot):
                if name in layer.scores(slot):
                    return False
                sources.append(bits[name])
            if any(tensor.requires_grad or tensor.is_inference() for tensor in sources):
                return False
        return True

    def holds(self, layer: Any) -> bool:
        """Whether the same sources, unchanged, would give the active adapters' tensors again."""
        if layer._active_adapter != self.active or layer._modules["base_layer"] is not self.base:
            return False
        for info, spec in self.specs:
            if info.spec is not spec:
                return False
        for find, key, owner in self.owners:
            if find(key) is not owner:
                return False
        for find, key, tensor, version, place in self.sources:
            if find(key) is not tensor or tensor._version != version:
                return False
            if tensor.data_ptr() != place or tensor.requires_grad:
                return False
        return True

    def run(self, layer: Any, *args: Any) -> Any:
        """The layer's forward."""
        return layer.run(self.tensors, *args)


class Training:
    """What a layer runs on while one adapter trains: its tensors, not what is made of them in every forward."""

    __slots__ = ("active", "base", "bias", "info", "name", "owner", "scores", "spec", "trainable", "weight")

    def __init__(self, layer: Any, name: str, bias: Tensor | None) -> None:
        """Note what the layer has now.

        Args:
            layer: A layer with `weight` and, maybe, `bias`.
            name: The adapter that trains.
            bias: The bias to run with; if it is masked, this serves for one forward only.
        """
        slot = layer.present_slots[0]
        self.active = layer._active_adapter if isinstance(layer._active_adapter, str) else list(layer._active_adapter)
        self.base, self.owner, self.name = layer.base_layer, layer.scores(slot)._parameters, name
        self.weight, self.bias, self.scores = self.base.weight, bias, layer.scores(slot)[name]
        self.info = layer.smn_info[name]
        self.spec, self.trainable = self.info.spec, layer.trainable(name, slot)

    def holds(self, layer: Any) -> bool:
        """Whether the layer's next forward is one that trains these scores, and nothing else of the layer."""
        if not torch.is_grad_enabled() or layer._active_adapter != self.active or is_transformed():
            return False
        if layer._modules["base_layer"] is not self.base:
            return False
        own = self.base._parameters
        if own.get("weight") is not self.weight or own.get("bias") is not self.bias or self.weight.requires_grad:
            return False
        if self.owner.get(self.name) is not self.scores or not self.scores.requires_grad:
            return False
        return self.info.spec is self.spec

    def run(self, layer: Any, *args: Any) -> Any:
        """The layer's forward."""
        return layer.train_on(self, *args)
