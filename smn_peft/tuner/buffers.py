# SPDX-License-Identifier: Apache-2.0
"""Tensors of a layer: scores and bits by adapter, cached effective weights, and what an adapter starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..functional.masking import seeded_generator
from ..functional.packing import pack_bits, packed_size
from .config import MaskConfig

if TYPE_CHECKING:
    from .layer import MaskLayer

__all__ = ["CachedWeights", "ResidentBuffers", "ScoreDict", "initial_bits", "initial_scores", "scores_of_mask"]


class ScoreDict(nn.ParameterDict):
    """Scores by adapter name; a cast of the model to a narrower dtype leaves them as wide as they were.

    A score that crosses its threshold in steps of 1e-4 does not move at all in bf16.
    """

    def __getitem__(self, key: str) -> nn.Parameter:
        """Scores of an adapter; quicker than `nn.ParameterDict`'s own, since every forward reads them."""
        own = self._parameters.get(key)
        return self.__dict__[key] if own is None else own  # a replica of nn.DataParallel has attributes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoreDict:
        def keep_width(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype.itemsize < tensor.dtype.itemsize else result

        super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]
        return self


class ResidentBuffers(BufferDict):
    """Buffers by adapter name, of which only the newest is a registered buffer.

    The newest stands in the module's state dict under exactly the key of the checkpoint, where every loader finds it,
    transformers' native one included. The `older` ones are in a plain dict: `state_dict()`, `named_buffers()` and all
    that loops over them cost the same with two adapters as with a thousand. Of `optional` adapters, whose state is
    their scores, a state dict may have bits or not.
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self.older: dict[str, Tensor] = {}
        self.optional: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        buffer = self._buffers.get(key)
        return self.older[key] if buffer is None else buffer

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        if key in self.older:
            self.older[key] = buffer
            return
        if key not in self._buffers:
            self.older.update((name, old) for name, old in self._buffers.items() if old is not None)
            self._buffers.clear()
        self._buffers[key] = buffer

    def __delitem__(self, key: str) -> None:
        if self._buffers.pop(key, None) is None:
            del self.older[key]
        elif self.older:  # the newest of the rest takes its place
            newest = next(reversed(self.older))
            self._buffers[newest] = self.older.pop(newest)

    def __len__(self) -> int:
        return len(self._buffers) + len(self.older)

    def __iter__(self) -> Iterator[str]:
        yield from self.older
        yield from self._buffers

    def __contains__(self, key: object) -> bool:
        return key in self._buffers or key in self.older

    def keys(self) -> KeysView[str]:
        """Names of all resident adapters, the newest last."""
        return dict.fromkeys(self).keys()

    def discard(self, key: str) -> None:
        """Drop an adapter's buffer if there is one."""
        if key in self:
            del self[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidentBuffers:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.older = {key: fn(buffer) for key, buffer in self.older.items()}
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, _, missing_keys, unexpected_keys, _ = args
        optional = {prefix + key for key in (*self.optional, *self.older)}
        missing_keys[:] = [key for key in missing_keys if key not in optional]
        unexpected_keys[:] = [key for key in unexpected_keys if key not in optional]
        for key, buffer in self.older.items():
            if (loaded := state_dict.get(prefix + key)) is not None:
                buffer.copy_(loaded)


class CachedWeights:
    """Effective tensors of a layer made from packed bits, and the conditions under which they are valid.

    An in-place write moves a source's version, a new `.data` its place, a replacement its identity; the sources are
    held here, so that an identity cannot be taken over by a newer tensor. What is made from scores is never cached: a
    fused optimizer, a CUDA graph or ``scores.data.copy_()`` changes scores, and no version of theirs moves.
    """

    __slots__ = ("active", "base", "owners", "sources", "specs", "tensors")

    def __init__(self, layer: MaskLayer, names: Sequence[str], tensors: tuple[Tensor, ...]) -> None:
        """Keep `tensors`, made under the named adapters of a layer for which [`is_possible`] holds."""
        self.tensors = tensors
        self.active = layer._active_adapter if isinstance(layer._active_adapter, str) else list(layer._active_adapter)
        self.base: nn.Module = layer.base_layer
        self.specs = [(layer.smn_info[name], layer.smn_info[name].spec) for name in names]
        self.owners: list[tuple[Any, str, nn.Module]] = []
        self.sources: list[tuple[Any, str, Tensor, int, int]] = []
        for slot in layer.present_slots:
            owner: Any = self.base
            bits = layer.bits(slot)
            *path, attribute = slot.path.split(".")
            for part in path:
                find, owner = owner._modules.get, owner.get_submodule(part)
                self.owners.append((find, part, owner))
            places: list[tuple[Any, str]] = [(owner._parameters.get, attribute)]
            places += [(bits.__getitem__, name) for name in layer.holders(names, slot)]
            for find, key in places:
                tensor = find(key)
                self.sources.append((find, key, tensor, tensor._version, tensor.data_ptr()))

    @staticmethod
    def is_possible(layer: MaskLayer, names: Sequence[str]) -> bool:
        """Whether no source of the effective tensors may train, or change without moving a version."""
        for slot in layer.present_slots:
            weight, holders = layer.base_tensor(slot), layer.holders(names, slot)
            owner, _, attribute = slot.path.rpartition(".")
            if layer.base_layer.get_submodule(owner)._parameters.get(attribute) is not weight:
                return False  # FSDP's gathered parameters are attributes
            if any(name in layer.scores(slot) for name in holders):
                return False
            sources = [weight, *(layer.bits(slot)[name] for name in holders)]
            if any(tensor.requires_grad or tensor.is_inference() for tensor in sources):
                return False
        return True

    def is_valid(self, layer: MaskLayer) -> bool:
        """Whether the active adapters and all sources are the same and unchanged."""
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


# --- What an adapter starts from -------------------------------------------------------------------------------------


def _score_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def initial_scores(config: MaskConfig, name: str, weight: Tensor) -> Tensor:
    """Scores of a new adapter, in the weight's shape and memory format; random ones depend on seed and name only."""
    if config.init_weights and not isinstance(config.init_score, str):
        return torch.full_like(weight, config.init_score, dtype=_score_dtype(weight), requires_grad=False)
    generator = seeded_generator(config.seed, f"{name}.init")
    drawn = torch.empty(weight.shape)
    if not config.init_weights:
        drawn.normal_(generator=generator).add_(config.threshold)
    elif weight.dim() > 1:
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
    else:
        drawn.uniform_(-1, 1, generator=generator)
    return torch.empty_like(weight, dtype=_score_dtype(weight), requires_grad=False).copy_(drawn)


def initial_bits(config: MaskConfig, name: str, weight: Tensor) -> Tensor:
    """Packed bits of an adapter for inference before a loader has written its own; see [`initial_scores`]."""
    if weight.device.type == "meta":
        return torch.empty(packed_size(weight.numel()), dtype=torch.uint8, device="meta")
    if config.init_weights:
        return pack_bits(torch.ones(weight.shape, dtype=torch.bool)).to(weight.device)
    return pack_bits(initial_scores(config, name, weight) > config.threshold)


def scores_of_mask(config: MaskConfig, weight: Tensor, mask: Tensor) -> Tensor:
    """Scores that make a mask: threshold ± |initial score − threshold|, or ± 1 where that is 0.

    Where scores are ranked by their size, weights that are off have 0.
    """
    distance = 0.0 if isinstance(config.init_score, str) else abs(config.init_score - config.threshold)
    distance = distance or 1.0
    by_size = config.mask_type == "topk" and config.rank_by == "absolute"
    low, high = (0.0, distance) if by_size else (config.threshold - distance, config.threshold + distance)
    return torch.full_like(weight, low, dtype=_score_dtype(weight), requires_grad=False).masked_fill_(mask, high)
