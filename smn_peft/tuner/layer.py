# SPDX-License-Identifier: Apache-2.0
"""`MaskLayer`: a layer with a masked frozen weight: effective weights, their cache, merging and mixed batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..functional.masking import MaskSpec, effective_weight, masked_weight, straight_through
from ..functional.merging import merge_weight, unmerge_weight
from .cache import CachedWeight, Ready, Source, Training, note_recording
from .checkpoint import StoredLayer
from .slots import Slot
from .substitution import call_with, is_plain
from .tracing import is_transformed

__all__ = ["MaskLayer"]


class MaskLayer(StoredLayer):
    """A layer whose frozen weight is masked, one bit per weight and adapter.

    Several active adapters give the intersection of their masks, with the scale of the intersection. While nothing
    can change it, the effective weight is computed once and kept; the cache knows the tensors that it was made from,
    and their versions.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`; `update_layer` adds adapters."""
        super().__init__(base_layer)
        self._cache: dict[str, CachedWeight] = {}
        self._ready: Ready | Training | None = None

    # --- Effective weights -------------------------------------------------------------------------------------------

    def holders(self, names: Sequence[str], slot: Slot) -> list[str]:
        """Those of the named adapters that mask a slot of this layer."""
        return [name for name in names if name in self.smn_info and slot in self.smn_info[name].slots]

    def effective(self, slot: Slot, names: Sequence[str]) -> Tensor:
        """Effective tensor of a slot under the named adapters: differentiable while scores train, else cached."""
        holders, weight = self.holders(names, slot), self.base_tensor(slot)
        if not holders:
            return weight
        learns = torch.is_grad_enabled() and not torch.jit.is_tracing()  # a traced model is for inference
        if learns and (weight.requires_grad or self.trains(slot, holders)):
            self._cache.pop(slot.name, None)
            note_recording(weight)
            return self._differentiable(slot, holders)
        cached = self._cache.get(slot.name)
        if torch.compiler.is_compiling():
            # A graph cannot see a tensor's version: it may keep only what no optimizer moves.
            keep = not self.training and names == self.active_here() and not self.trains(slot, holders)
            return cached.weight if cached is not None and keep else self._build(slot, holders)
        if is_transformed():
            return self._build(slot, holders)
        scores, bits = self.scores(slot), self.bits(slot)
        sources = [weight, *(scores[name] if name in scores else bits[name] for name in holders)]
        specs = [self.smn_info[name].spec for name in holders]
        if cached is None or not cached.fresh(sources, specs):
            with torch.inference_mode(False):  # what is kept serves a backward as well
                cached = CachedWeight(self._build(slot, holders), sources, specs)
            if names == self.active_here():
                self._cache[slot.name] = cached
        return cached.weight

    def effective_tensors(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Effective tensors of all slots, for [`run`]; kept ready for the next forward if nothing can train."""
        tensors = tuple(self.effective(slot, names) for slot in self.present_slots)
        if not torch.compiler.is_compiling() and not is_transformed() and names == self.active_here():
            sources = self._sources(names)
            if sources is not None:
                specs = [(self.smn_info[name], self.smn_info[name].spec) for name in names]
                self._ready = Ready(tensors, sources, self._active_adapter, self.base_layer, specs)
        return tensors

    def _sources(self, names: Sequence[str]) -> list[Source] | None:
        """All that the effective tensors are made from, and where it lies; None if it may change unseen or trains."""
        sources: list[Source] = []
        for slot in self.present_slots:
            parameters, scores, bits = self.base_layer._parameters, self.scores(slot), self.bits(slot)
            if parameters.get(slot.path) is None:
                return None
            sources.append(Source(parameters.get, slot.path))
            for name in self.holders(names, slot):
                sources.append(Source(scores._parameters.get if name in scores else bits.__getitem__, name))
        grad = torch.is_grad_enabled()
        return None if any(s.tensor.is_inference() or (grad and s.tensor.requires_grad) for s in sources) else sources

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
        self._cache.pop(slot.name, None)
        note_recording(self.base_tensor(slot))
        training = Training(self, holders[0], self.effective(biases[0], names) if biases else None)
        if names == self.active_here() and training.bias is self.base_layer.bias:
            self._ready = training
        return training

    def _merged_spec(self, holders: Sequence[str]) -> MaskSpec:
        specs = [self.smn_info[name].spec for name in holders]
        return replace(
            specs[0],
            scale=all(spec.scale for spec in specs),
            scale_gradient=all(spec.scale_gradient for spec in specs),
        )

    def _intersection(self, slot: Slot, holders: Sequence[str]) -> Tensor:
        mask = self.mask(holders[0], slot)
        for name in holders[1:]:
            mask = mask & self.mask(name, slot)
        return mask

    def _build(self, slot: Slot, holders: Sequence[str]) -> Tensor:
        mask = self._intersection(slot, holders)
        return effective_weight(self.base_tensor(slot), mask, self._merged_spec(holders).scale)

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
        self._cache.clear()
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
        """State for a copy: all but the cache."""
        return {**self.__dict__, "_cache": {}, "_ready": None}

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
            self._check_finite(names)
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

    def _check_finite(self, names: Sequence[str]) -> None:
        for slot in self.present_slots:
            for name in self.holders(names, slot):
                scores = self.scores(slot)[name] if name in self.scores(slot) else None
                if scores is not None and not torch.isfinite(scores).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its scores are "
                        "not finite. Nothing was merged; go back to a checkpoint and lower the learning rate."
                    )
            if not torch.isfinite(self.base_tensor(slot)).all():
                raise ValueError(f"NaNs detected in the merged weights: the base's own {slot.path} is not finite.")

    # --- Forward -----------------------------------------------------------------------------------------------------

    def masked_forward(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with the effective weights of the named adapters."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to run masked.")

    def run(self, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with these tensors in its slots."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to run.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the layer in whatever state it is: disabled, merged, masked, or mixed over the batch."""
        if not torch.compiler.is_compiling() and self._ready is not None:
            if not kwargs and self._ready.holds(self):
                return self._ready.run(self, *args)
            self._ready = None
        if self._awaiting:
            self.settle()
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None) if kwargs else None
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            return self._mixed(adapter_names, *args, **kwargs)
        names = self.active_here()
        if self.merged or not names:
            return self.base_layer(*args, **kwargs)
        return self._masked(names, *args, **kwargs)

    def _masked(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """[`masked_forward`], through the base layer itself where it has hooks, or a forward put over its own."""
        if is_plain(self.base_layer):
            return self.masked_forward(names, *args, **kwargs)
        tensors = {slot.path: self.effective(slot, names) for slot in self.present_slots}
        return call_with(self.base_layer, tensors, *args, **kwargs)

    def _mixed(self, adapter_names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Samples under different adapters in one batch: each group of samples under its own effective weight."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        result: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            index = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            if name in self.smn_info:
                part = self._masked([name], x[index], *args, **kwargs)
            else:
                part = self.base_layer(x[index], *args, **kwargs)
            if result is None:
                result = part.new_empty((len(x), *part.shape[1:]))
            result[index] = part
        return result

    def __repr__(self) -> str:
        return "smn." + super().__repr__()
