# SPDX-License-Identifier: Apache-2.0
"""`MaskLayer`: a layer whose frozen weight is masked per adapter, its effective weights, forward and merging."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from ..functional.effective import build
from ..functional.masking import MaskSpec, effective_weight, masked_weight, straight_through
from ..functional.merging import check_finite, merge_weight, unmerge_weight
from .masks import MaskState
from .mixed import MixedWeight, in_mixed_batch, rows_in_force
from .sharding import check_forward, is_managed, refuse_if_sharded
from .wrapper import Slot, call_with, is_plain, view_with

__all__ = ["MaskLayer"]


class _Cached(NamedTuple):
    """Effective tensors made from packed bits, and what must be unchanged for them to be valid.

    An in-place write moves a source's version, a new `.data` its place, a replacement its identity; the sources are
    held here, so that an identity cannot be taken over by a newer tensor. What is made from scores is never cached: a
    fused optimizer, a CUDA graph or ``scores.data.copy_()`` changes scores, and no version of theirs moves.
    """

    names: list[str]
    tensors: dict[str, Tensor]  # by path
    places: list[tuple[Mapping[str, Any], str, Any]]  # what lies where
    versions: list[tuple[Tensor, int, int]]  # of the tensors among them

    def is_valid(self) -> bool:
        for place, key, source in self.places:
            if place.get(key) is not source:
                return False
        for tensor, version, pointer in self.versions:
            if tensor._version != version or tensor.data_ptr() != pointer or tensor.requires_grad:
                return False
        return True


class Trained(NamedTuple):
    """What the one adapter that trains makes a layer's forward of."""

    weight: Tensor
    scores: Tensor
    bias: Tensor | None
    spec: MaskSpec
    trainable: Tensor | None


class MaskLayer(MaskState):
    """A layer whose frozen weight is masked, one bit per weight and adapter.

    Several active adapters give the intersection of their masks, with the scale of the intersection. The effective
    weight of packed bits is computed once and cached; that of scores, which may train, is computed in every forward.
    """

    has_node = False
    _cached: _Cached | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskLayer:
        self._cached = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy: all but the cache."""
        return {**self.__dict__, "_cached": None}

    # --- Effective weights -------------------------------------------------------------------------------------------

    def effective(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Effective tensors of what the named adapters mask, by path; those of packed bits are computed once.

        They are differentiable while something trains.
        """
        cached = self._cached
        if cached is not None and cached.names == names:  # a graph cannot see a tensor's version
            if not self.training if torch.compiler.is_compiling() else cached.is_valid():
                return cached.tensors
        # A mixed batch would drop the active adapter's tensors for its own, adapter by adapter.
        sources = self._sources(names) if _is_eager() and not in_mixed_batch() else None
        if sources is None:
            return self._computed(names)
        versions = [(x, x._version, x.data_ptr()) for *_, x in sources if isinstance(x, Tensor)]
        with torch.inference_mode(False):  # what is cached serves a backward as well
            self._cached = cached = _Cached(list(names), self._computed(names), sources, versions)
        return cached.tensors

    def _sources(self, names: Sequence[str]) -> list[tuple[Mapping[str, Any], str, Any]] | None:
        """All that effective tensors are made from, and where it lies; None where one may change unnoticed."""
        if is_managed(self):  # what FSDP frees after the forward is not kept here
            return None
        base: Any = self._modules["base_layer"]
        found: list[tuple[Mapping[str, Any], str, Any]] = [(self._modules, "base_layer", base)]
        found += [(self.smn_info, name, self.smn_info[name]) for name in names]
        for slot in self.present_slots:
            owner, bits, holders = base, self.bits(slot), self.holders(names, slot)
            if not holders:
                continue
            *path, attribute = slot.path.split(".")
            for part in path:
                found.append((owner._modules, part, owner.get_submodule(part)))
                owner = found[-1][-1]
            found.append((owner._parameters, attribute, self.base_tensor(slot)))
            for name in holders:
                if self.scores_of(name, slot):
                    return None
                found.append((bits.older if name in bits.older else bits._buffers, name, bits[name]))
        if any(place.get(key) is not source for place, key, source in found):  # a replica's parameters are attributes
            return None
        tensors = (source for *_, source in found if isinstance(source, Tensor))
        return None if any(tensor.requires_grad or tensor.is_inference() for tensor in tensors) else found

    def _computed(self, names: Sequence[str]) -> dict[str, Tensor]:
        holders = {slot: self.holders(names, slot) for slot in self.present_slots}
        return {slot.path: self._effective(slot, own) for slot, own in holders.items() if own}

    def _effective(self, slot: Slot, holders: Sequence[str]) -> Tensor:
        """Effective tensor of a slot under adapters that mask it."""
        weight: Tensor = self.base_tensor(slot)
        scores = {name: self.scores_of(name, slot) for name in holders}
        trains = weight.requires_grad or any(s.requires_grad for own in scores.values() for s in own.values())
        if trains and torch.is_grad_enabled() and not torch.jit.is_tracing():  # a traced model is for inference
            factors = []
            for name in holders:
                spec, trainable = self.smn_info[name].spec, self.trainable(name, slot)
                factors += [straight_through(own, spec, weight.dtype, trainable) for own in scores[name].values()]
                if not scores[name]:
                    factors.append(self.mask(name, slot).to(weight.dtype))
            return masked_weight(weight, reduce(torch.mul, factors), self._merged_spec(holders))
        name, weight = holders[0], weight.detach()
        if len(holders) == 1 and scores[name].keys() == {slot.scores_name} and _is_eager():
            (own,) = scores[name].values()  # in every forward, so in as few passes as may be
            spec, trainable = self.smn_info[name].spec, self.trainable(name, slot)
            return build(weight, own.detach(), spec, trainable, weight.dtype)[0]
        return effective_weight(weight, self._intersection(slot, holders), self._merged_spec(holders).scale)

    def _merged_spec(self, holders: Sequence[str]) -> MaskSpec:
        specs = [self.smn_info[name].spec for name in holders]
        scale, scale_gradient = all(spec.scale for spec in specs), all(spec.scale_gradient for spec in specs)
        return replace(specs[0], scale=scale, scale_gradient=scale_gradient)

    def _intersection(self, slot: Slot, holders: Sequence[str]) -> Tensor:
        return reduce(torch.logical_and, (self.mask(name, slot) for name in holders))

    # --- Forward -----------------------------------------------------------------------------------------------------

    def run(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """See [`AdapterLayer.run`]."""
        if self.pending:
            self._ensure_loaded()
        names = [name for name in names if name in self.smn_info]
        base: Any = self._modules["base_layer"]
        if not names:
            return base(*args, **kwargs)
        if not torch.compiler.is_compiling():
            check_forward(self, names)
        if self.has_node and torch.is_grad_enabled() and (own := self._trained_alone(names)) is not None:
            return self.node(own, *args, **kwargs)
        return self.run_with(self.effective(names), *args, **kwargs)

    def run_with(self, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with these tensors, by path."""
        return call_with(self._modules["base_layer"], tensors, *args, **kwargs)  # type: ignore[arg-type]

    def node(self, own: Trained, *args: Any, **kwargs: Any) -> Any:
        """The forward as an autograd node over the scores, which keeps no effective weight alive, if `has_node`."""
        raise NotImplementedError

    def _trained_alone(self, names: Sequence[str]) -> Trained | None:
        """What [`node`] takes, if exactly one adapter trains on the weight and a node of ours is possible."""
        slot, *biases = self.present_slots
        holders, weight = self.holders(names, slot), self.base_tensor(slot)
        if len(holders) != 1 or weight.requires_grad:
            return None
        if (scores := self.scores_of(name := holders[0], slot)).keys() != {slot.scores_name}:
            return None
        (own,) = scores.values()
        if not own.requires_grad or not _is_eager() or not is_plain(self._modules["base_layer"]):  # type: ignore[arg-type]
            return None
        bias: Tensor | None = self.base_tensor(biases[0]) if biases else None
        if biases and (masking := self.holders(names, biases[0])):
            bias = self._effective(biases[0], masking)
        return Trained(weight, own, bias, self.smn_info[name].spec, self.trainable(name, slot))

    # --- Merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weights into the base layer; [`unmerge`] restores the base bit for bit.

        With `safe_merge`, scores or weights that hold NaN or infinity are refused before anything is written.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.smn_info]
        if not names:
            return
        refuse_if_sharded(self, "merge")
        for slot in self.present_slots if safe_merge else ():
            scores = ((name, own) for name in self.holders(names, slot) for own in self.scores_of(name, slot).values())
            check_finite(self.base_tensor(slot), slot.path, scores)
        together = [*self.merged_adapters, *names]
        self._restore()
        for slot in self.present_slots:
            if holders := self.holders(together, slot):
                mask, scale = self._intersection(slot, holders), self._merged_spec(holders).scale
                self._stashes[slot.name] = merge_weight(self.base_tensor(slot), mask, scale)
        self.merged_adapters = together

    def unmerge(self) -> None:
        """Restore the base layer's weights, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters = []

    def _restore(self) -> None:
        self._cached = None
        for slot in self.present_slots:
            if (stash := self._stashes.pop(slot.name, None)) is not None:
                unmerge_weight(self.base_tensor(slot), stash)

    # --- What the layer answers for ----------------------------------------------------------------------------------

    # PEFT's give the base's own; some models read them and never call the layer (timm's BEiT …).
    weight = property(lambda self: self.in_use("weight"))
    bias = property(lambda self: self.in_use("bias"))

    def of_base(self, name: str) -> Any:
        """An attribute of the base layer, masked where it is masked, be it in a module of the layer's."""
        if any(slot.path == name for slot in self.present_slots):
            return self.in_use(name)
        inside = [slot.path for slot in self.present_slots if slot.path.startswith(f"{name}.")]
        if not inside:
            return super().of_base(name)
        return getattr(view_with(self.base_layer, {path: self.in_use(path) for path in inside}), name)

    def in_use(self, path: str) -> Any:
        """The tensor at a path of the base layer as it is computed with."""
        slot = next((slot for slot in self.present_slots if slot.path == path), None)
        if slot is None:
            return getattr(self.base_layer, path)
        self._ensure_loaded()
        self.unmerge_if_disabled()
        own = self.base_tensor(slot)
        if self._disable_adapters or self.merged:
            return own
        rows = rows_in_force(self)
        groups = {tuple(self.holders([name], slot)) for name in rows} if rows else {tuple(self.active_adapters)}
        if len(groups) > 1:
            return MixedWeight.of(own, next(iter(self.smn_info.values())).key)
        return self.effective([name for name in next(iter(groups)) if name in self.smn_info]).get(path, own)

    def _replicate_for_data_parallel(self) -> MaskLayer:
        """Replicate for `nn.DataParallel`; what every replica would do on its own must be done before."""
        if self.pending and self.consume_pending():
            raise RuntimeError(
                "Masks were loaded and not taken over yet: call the model once before it is in nn.DataParallel."
            )
        if self._disable_adapters and self.merged:
            raise RuntimeError("Adapters are merged and disabled: call unmerge_adapter() before nn.DataParallel runs.")
        replica: MaskLayer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._cached = None
        return replica


def _is_eager() -> bool:
    """Whether neither torch.compile, torch.func nor a tracer runs the code, which want plain operations."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    return not traced
