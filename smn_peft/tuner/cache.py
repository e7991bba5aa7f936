# SPDX-License-Identifier: Apache-2.0
"""What a layer runs on, kept while nothing that it was made from has changed: effective weights, or what trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..functional.masking import MaskSpec
from .substitution import is_plain
from .tracing import is_transformed

__all__ = ["CachedWeight", "Ready", "Source", "Training", "note_recording"]


_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


# Fused optimizers, torch's and others', write past a tensor's version; every one of them is a torch.optim.Optimizer.
register_optimizer_step_post_hook(_count_step)

_recorded = False


def note_recording(weight: Tensor) -> None:
    """Called when something trains: a CUDA graph that records it moves scores at every replay, unseen by Python."""
    global _recorded
    if weight.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        _recorded = True


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
        if (self.step != _steps or _recorded) and any(tensor.requires_grad for tensor in sources):
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


def _is_in_state(layer: Any, active: str | list[str], base: nn.Module) -> bool:
    if layer._disable_adapters or layer.merged_adapters or layer._awaiting or layer._active_adapter != active:
        return False
    return layer._modules["base_layer"] is base and is_plain(base)


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
        if not _is_in_state(layer, self.active, self.base):
            return False
        for info, spec in self.specs:
            if info.spec is not spec:
                return False
        trained = self.step != _steps or _recorded or torch.is_grad_enabled()
        for source in self.sources:
            tensor = source.tensor
            if source.find(source.key) is not tensor or (trained and tensor.requires_grad):
                return False
            if tensor._version != source.version or tensor.data_ptr() != source.place:
                return False
        return True

    def run(self, layer: Any, *args: Any) -> Any:
        """The layer's forward."""
        return layer.run(self.tensors, *args)


class Training:
    """All that a layer runs on while one adapter trains: its tensors, not what is made of them in every forward."""

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
        self.weight, self.bias, self.scores = self.base.weight, bias, self.owner[name]
        self.info = layer.smn_info[name]
        self.spec, self.trainable = self.info.spec, layer.trainable(name, slot)

    def holds(self, layer: Any) -> bool:
        """Whether the layer's next forward is one that trains these scores, and nothing else of the layer."""
        if not torch.is_grad_enabled() or not _is_in_state(layer, self.active, self.base) or is_transformed():
            return False
        own = self.base._parameters
        if own.get("weight") is not self.weight or own.get("bias") is not self.bias or self.weight.requires_grad:
            return False
        if self.owner.get(self.name) is not self.scores or not self.scores.requires_grad:
            return False
        return self.info.spec is self.spec

    def run(self, layer: Any, *args: Any) -> Any:
        """The layer's forward."""
        note_recording(self.weight)
        return layer.train_on(self, *args)
