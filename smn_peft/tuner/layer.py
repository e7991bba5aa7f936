# SPDX-License-Identifier: Apache-2.0
"""`MaskLayer`: a layer with a masked frozen weight: effective weights, their cache, merging and mixed batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..functional.effective import build
from ..functional.masking import MaskSpec, effective_weight, masked_weight, straight_through
from ..functional.merging import check_finite, merge_weight, unmerge_weight
from .cache import CachedWeights, Training
from .checkpoint import StoredLayer
from .mixed import MixedWeight, in_rows, name_in_force, rows_in_force, running
from .slots import Slot
from .substitution import call_with, is_plain, view_with
from .tracing import is_transformed

__all__ = ["MaskLayer"]


class MaskLayer(StoredLayer):
    """A layer whose frozen weight is masked, one bit per weight and adapter.

    Several active adapters give the intersection of their masks, with the scale of the intersection. The effective
    weight of packed bits is computed once and kept; that of scores, which may train, is computed in every forward.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`; `update_layer` adds adapters."""
        super().__init__(base_layer)
        self._ready: CachedWeights | Training | None = None

    # --- Effective weights -------------------------------------------------------------------------------------------

    def holders(self, names: Sequence[str], slot: Slot) -> list[str]:
        """Those of the named adapters that mask a slot of this layer."""
        return [name for name in names if name in self.smn_info and slot in self.smn_info[name].slots]

    def effective(self, slot: Slot, names: Sequence[str]) -> Tensor:
        """Effective tensor of a slot under the named adapters: differentiable while something trains."""
        holders, weight = self.holders(names, slot), self.base_tensor(slot)
        if not holders:
            return weight
        learns = torch.is_grad_enabled() and not torch.jit.is_tracing()  # a traced model is for inference
        if learns and (weight.requires_grad or self.trains(slot, holders)):
            return self._differentiable(slot, holders)
        kept = self._kept(names)
        return self._build(slot, holders) if kept is None else kept[self.present_slots.index(slot)]

    def effective_tensors(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Effective tensors of all slots, for [`run`]."""
        kept = self._kept(names)
        return tuple(self.effective(slot, names) for slot in self.present_slots) if kept is None else kept

    def _kept(self, names: Sequence[str]) -> tuple[Tensor, ...] | None:
        """Effective tensors of all slots from the cache; None where nothing may be kept."""
        if is_transformed() or name_in_force() is not None or names != self.active_here():
            return None
        ready = self._ready
        cached = ready if isinstance(ready, CachedWeights) else None
        if torch.compiler.is_compiling():  # a graph cannot see a tensor's version
            return None if cached is None or self.training else cached.tensors
        if cached is None or not cached.holds(self):
            if not CachedWeights.keepable(self, names):
                return None
            holders = [(slot, self.holders(names, slot)) for slot in self.present_slots]
            with torch.inference_mode(False):  # what is kept serves a backward as well
                tensors = (self._build(slot, own) if own else self.base_tensor(slot) for slot, own in holders)
                self._ready = cached = CachedWeights(self, names, tuple(tensors))
        return cached.tensors

    def active_here(self) -> list[str]:
        """The active adapters that this layer knows."""
        return [name for name in self.active_adapters if name in self.smn_info]

    def trains(self, slot: Slot, holders: Sequence[str]) -> bool:
        """Whether any of the adapters has scores of this slot that require a gradient."""
        scores = self.scores(slot)
        return any(name in scores and scores[name].requires_grad for name in holders)

    def alone(self, names: Sequence[str]) -> Training | None:
        """What trains, if it is one adapter on the weight: the fused autograd nodes of `functional.ops` apply."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
            return None
        slot, *biases = self.present_slots
        holders = self.holders(names, slot)
        if len(holders) != 1 or self.base_tensor(slot).requires_grad or not self.trains(slot, holders):
            return None
        training = Training(self, holders[0], self.effective(biases[0], names) if biases else None)
        if name_in_force() is None and names == self.active_here() and training.bias is self.base_layer.bias:
            self._ready = training
        return training

    def _merged_spec(self, holders: Sequence[str]) -> MaskSpec:
        specs = [self.smn_info[name].spec for name in holders]
        scale, scale_gradient = all(spec.scale for spec in specs), all(spec.scale_gradient for spec in specs)
        return replace(specs[0], scale=scale, scale_gradient=scale_gradient)

    def _intersection(self, slot: Slot, holders: Sequence[str]) -> Tensor:
        return reduce(torch.logical_and, (self.mask(name, slot) for name in holders))

    def _build(self, slot: Slot, holders: Sequence[str]) -> Tensor:
        weight, scores = self.base_tensor(slot).detach(), self.scores(slot)
        if len(holders) > 1 or holders[0] not in scores or torch.compiler.is_compiling() or is_transformed():
            return effective_weight(weight, self._intersection(slot, holders), self._merged_spec(holders).scale)
        (name,) = holders  # in every forward, so in as few passes as may be
        spec, trainable = self.smn_info[name].spec, self.trainable(name, slot)
        return build(weight, scores[name].detach(), spec, trainable, weight.dtype)[0]

    def _differentiable(self, slot: Slot, holders: Sequence[str]) -> Tensor:
        weight, product = self.base_tensor(slot), None
        for name in holders:
            if name in self.scores(slot):
                spec, trainable = self.smn_info[name].spec, self.trainable(name, slot)
                factor = straight_through(self.scores(slot)[name], spec, weight.dtype, trainable)
            else:
                factor = self.mask(name, slot).to(weight.dtype)
            product = factor if product is None else product * factor
        assert product is not None
        return masked_weight(weight, product, self._merged_spec(holders))

    # --- What empties the cache --------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._ready = None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; scores of the active adapters require gradients, bits never do."""
        self._forget()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def set_mask(self, adapter_name: str, slot: Slot, mask: Tensor) -> None:
        """Replace the mask of an adapter; see [`AdapterLayer.set_mask`]."""
        self._forget()
        super().set_mask(adapter_name, slot, mask)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; nothing of the adapter stays resident."""
        self._forget()
        super().delete_adapter(adapter_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskLayer:
        self._forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._forget()
        self._was_loaded = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy: all but what is kept."""
        return {**self.__dict__, "_ready": None}

    def _replicate_for_data_parallel(self) -> MaskLayer:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_ready"] = None
        return replica  # type: ignore[return-value]

    # --- Merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weights into the base layer; [`unmerge`] restores the base bit for bit.

        Args:
            safe_merge: Refuse scores or weights that are not finite, before anything is written.
            adapter_names: Adapters to merge, the active ones if None.

        Raises:
            ValueError: With `safe_merge`, if scores or the merged weight hold NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.smn_info]
        if not names:
            return
        if safe_merge:
            for slot in self.present_slots:
                scores = {n: own for n, own in self.scores(slot).items() if n in self.holders(names, slot)}
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
        self._forget()
        for slot in self.present_slots:
            if (stash := self._stashes.pop(slot.name, None)) is not None:
                unmerge_weight(self.base_tensor(slot), stash)

    # --- What the layer answers for ----------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies by: some models take it and never call the layer (timm's BEiT …)."""
        return self._in_use("weight")  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """What the layer adds, None without a bias."""
        return self._in_use("bias")  # type: ignore[no-any-return]

    def of_base(self, name: str) -> Any:
        """An attribute of the base layer, masked where it is masked, be it in a module of the layer's."""
        if any(slot.path == name for slot in self.present_slots):
            return self._in_use(name)
        inside = [slot.path for slot in self.present_slots if slot.path.startswith(f"{name}.")]
        if not inside:
            return super().of_base(name)
        return getattr(view_with(self.base_layer, {path: self._in_use(path) for path in inside}), name)

    def _in_use(self, path: str) -> Any:
        slot = next((slot for slot in self.present_slots if slot.path == path), None)
        if slot is None:
            return getattr(self.base_layer, path)
        if self._awaiting:
            self.settle()
        self._take_out_merged()
        if self._disable_adapters or self.merged:
            return self.base_tensor(slot)
        rows = rows_in_force(self)
        if rows is None:
            return self.effective(slot, self.active_here())
        first, *others = dict.fromkeys(tuple(self.holders([name], slot)) for name in rows)
        if not others:
            return self.effective(slot, first)
        return MixedWeight.of(self.base_tensor(slot), next(iter(self.smn_info.values())).key)

    # --- Forward -----------------------------------------------------------------------------------------------------

    def masked_forward(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with the effective weights of the named adapters."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to run masked.")

    def run(self, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with these tensors in its slots."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to run.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the layer in whatever state it is: disabled, merged, masked, or mixed over the batch."""
        ready = self._ready
        if ready is not None and not torch.compiler.is_compiling() and not kwargs and self._is_settled():
            if ready.holds(self):
                return ready.run(self, *args)
            self._ready = None
        if self._awaiting:
            self.settle()
        self._take_out_merged()
        if self._disable_adapters:
            return self.base_layer(*args, **kwargs)
        if (rows := rows_in_force(self)) is not None:
            return self._mixed(rows, *args, **kwargs)
        names = self.active_here()
        if self.merged or not names:
            return self.base_layer(*args, **kwargs)
        return self._masked(names, *args, **kwargs)

    def _is_settled(self) -> bool:
        """Whether the next forward is masked, by the active adapters, and calls the base layer's class alone."""
        other = running() or self._disable_adapters or self.merged_adapters or self._awaiting
        return not other and is_plain(self._modules["base_layer"])  # type: ignore[arg-type]

    def _masked(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """[`masked_forward`], through the base layer itself where it has hooks, or a forward put over its own."""
        if is_plain(self.base_layer):
            return self.masked_forward(names, *args, **kwargs)
        tensors = dict(zip((slot.path for slot in self.present_slots), self.effective_tensors(names), strict=True))
        return call_with(self.base_layer, tensors, *args, **kwargs)

    def _mixed(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        """Rows under different adapters: each group of rows under its own effective weight."""

        def run(name: str, *rest: Any, **others: Any) -> Any:
            known = name in self.smn_info
            return self._masked([name], *rest, **others) if known else self.base_layer(*rest, **others)

        return in_rows(names, next(iter(self.smn_info.values())).key, run, *args, **kwargs)

    def __repr__(self) -> str:
        return "smn." + super().__repr__()
