# SPDX-License-Identifier: Apache-2.0
"""`MaskLayer`: a layer whose frozen weight is masked per adapter, its effective weights, merging and file entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..functional.effective import build
from ..functional.masking import (
    MaskSpec,
    compute_mask,
    density,
    effective_weight,
    masked_weight,
    seeded_generator,
    select_trainable,
    straight_through,
)
from ..functional.merging import Stash, check_finite, merge_weight, unmerge_weight, unmerged_weight
from ..functional.packing import pack_bits, unpack_bits
from ..storage.adapter_file import check_packed
from .buffers import CachedWeights, ResidentBuffers, ScoreDict, initial_bits, initial_scores, scores_of_mask
from .config import MaskConfig
from .mixed import MixedWeight, in_rows, name_in_force, rows_in_force, running
from .wrapper import STATE_LOCK, AdapterInfo, AdapterLayer, Slot, call_with, is_plain, is_transformed, view_with

__all__ = ["MaskLayer"]

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch < 2.7 has none


class MaskLayer(AdapterLayer):
    """A layer whose frozen weight is masked, one bit per weight and adapter.

    An adapter has either scores (`smn_scores`, trainable) or packed bits (`smn_mask`). Several active adapters give
    the intersection of their masks, with the scale of the intersection. The effective weight of packed bits is
    computed once and cached; that of scores, which may train, is computed in every forward.

    Where a loader may write bits, an adapter that trains has some too until its first use: its initial mask, under the
    key where transformers' own loader looks for it. [`consume_pending`] converts what the loader wrote to scores.
    """

    slots: tuple[Slot, ...] = (Slot("", "weight"), Slot("bias_", "bias", is_bias=True))

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`; `update_layer` adds adapters."""
        super().__init__(base_layer)
        self.present_slots = tuple(slot for slot in self.slots if self._parameter(slot) is not None)
        for slot in self.present_slots:
            self.add_module(slot.scores_name, ScoreDict())
            self.add_module(slot.mask_name, ResidentBuffers())
        self.adapter_layer_names = tuple(slot.scores_name for slot in self.present_slots)
        self.other_param_names = (*(slot.mask_name for slot in self.present_slots), "smn_info")
        self.pending: set[str] = set()  # adapters whose masks a loader may have brought, and nobody has looked at
        self._cached: CachedWeights | None = None
        self._stashes: dict[str, Stash] = {}

    # --- Tensors -----------------------------------------------------------------------------------------------------

    def _parameter(self, slot: Slot) -> nn.Parameter | None:
        owner, _, attribute = slot.path.rpartition(".")
        return getattr(self.get_base_layer().get_submodule(owner), attribute, None)

    def base_tensor(self, slot: Slot) -> nn.Parameter:
        """The base's tensor of a slot."""
        own = self._modules["base_layer"]._parameters.get(slot.path)  # type: ignore[union-attr]
        parameter = self._parameter(slot) if own is None else own
        assert parameter is not None
        return parameter

    def own_tensor(self, slot: Slot) -> Tensor:
        """The base's own values of a slot, whatever is merged into them."""
        weight, stash = self.base_tensor(slot), self._stashes.get(slot.name)
        return weight if stash is None else unmerged_weight(weight, stash)

    def unmerged(self) -> dict[int, Tensor | None]:
        """See [`AdapterLayer.unmerged`]; a weight that was cast while merged comes back up to rounding only."""
        found: dict[int, Tensor | None] = {}
        for slot in self.present_slots:
            if (stash := self._stashes.get(slot.name)) is not None:
                weight = self.base_tensor(slot)
                found[id(weight)] = self.own_tensor(slot) if stash.values.dtype == weight.dtype else None
        return found

    def scores(self, slot: Slot) -> ScoreDict:
        """Scores of a slot by adapter name, of the adapters that can train."""
        return self._modules[slot.scores_name]  # type: ignore[return-value]

    def bits(self, slot: Slot) -> ResidentBuffers:
        """Packed bits of a slot by adapter name, of the adapters that were loaded for inference."""
        return self._modules[slot.mask_name]  # type: ignore[return-value]

    def slots_of(self, adapter_name: str) -> tuple[Slot, ...]:
        """Slots that an adapter masks; none if the layer does not know it."""
        return self.smn_info[adapter_name].slots if adapter_name in self.smn_info else ()

    # --- Masks -------------------------------------------------------------------------------------------------------

    def mask(self, adapter_name: str, slot: Slot | None = None) -> Tensor:
        """Bool mask of an adapter on this layer, of the weight's shape."""
        slot = slot or self.present_slots[0]
        self._ensure_loaded()
        if adapter_name in self.scores(slot):
            return self._mask_of_scores(adapter_name, slot, self.scores(slot)[adapter_name])
        weight = self.base_tensor(slot)  # in a replica on another device than the bits, unless they are the newest
        return unpack_bits(self.bits(slot)[adapter_name].to(weight.device), weight.shape)

    def _mask_of_scores(self, adapter_name: str, slot: Slot, scores: Tensor) -> Tensor:
        return compute_mask(scores.detach(), self.smn_info[adapter_name].spec, self.trainable(adapter_name, slot))

    def set_mask(self, adapter_name: str, slot: Slot, mask: Tensor) -> None:
        """Replace the mask of an adapter; one that trains gets the scores that [`scores_of_mask`] gives."""
        self._cached = None
        self._ensure_loaded()
        packed = pack_bits(mask)
        if adapter_name in self.scores(slot):
            with torch.no_grad():
                self.scores(slot)[adapter_name].copy_(self._scores_from_bits(adapter_name, slot, packed))
        else:
            self.bits(slot)[adapter_name] = packed

    def _scores_from_bits(self, adapter_name: str, slot: Slot, packed: Tensor) -> Tensor:
        weight = self.base_tensor(slot)
        mask = unpack_bits(packed.to(weight.device), weight.shape)
        self._reach_density(adapter_name, slot, mask)
        return scores_of_mask(self.smn_info[adapter_name].config, weight, mask)

    def _reach_density(self, adapter_name: str, slot: Slot, mask: Tensor) -> None:
        """Set the density of a schedule to that of a mask that was made under it."""
        if self.smn_info[adapter_name].config.density_schedule is not None and slot is self.present_slots[0]:
            taking_part = self.trainable(adapter_name, slot)
            self.update_density(adapter_name, density(mask if taking_part is None else mask[taking_part]))

    def trainable(self, adapter_name: str, slot: Slot) -> Tensor | None:
        """Bool tensor of the weights that take part (`trainable_fraction`), None if all do; the others stay on."""
        info, weight = self.smn_info[adapter_name], self.base_tensor(slot)
        if info.config.trainable_fraction == 1.0:
            return None
        selected = info.trainable.get(slot.name)
        if selected is None or selected.device != weight.device:
            generator = seeded_generator(info.config.seed, f"{info.key}.{slot.path}.select")
            with torch.inference_mode(False):  # what is kept serves a backward as well
                selected = select_trainable(
                    self.own_tensor(slot).detach(), info.config.trainable_fraction, info.config.select, generator
                )
            info.trainable[slot.name] = selected
        return selected

    # --- Life cycle --------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: MaskConfig, key: str, *, may_load: bool = False) -> None:
        """Add an adapter: scores if it is to train, room for bits if it is for inference or `may_load`.

        `key`, the layer's name in the base model, seeds what is random.
        """
        slots = tuple(slot for slot in self.present_slots if config.mask_bias or not slot.is_bias)
        self.smn_info[adapter_name] = AdapterInfo(config, config.mask_spec(), key, slots)
        for slot in slots:
            name, weight = f"{key}.{slot.path}", self.base_tensor(slot)
            if config.inference_mode:
                self.bits(slot)[adapter_name] = initial_bits(config, name, weight)
                continue
            self.scores(slot)[adapter_name] = nn.Parameter(initial_scores(config, name, weight))
            self.bits(slot).optional.add(adapter_name)
            if may_load:
                self.bits(slot)[adapter_name] = self._initial_mask(adapter_name, slot)
        if may_load:
            self.pending.add(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initial_mask(self, adapter_name: str, slot: Slot) -> Tensor:
        """Packed mask of the scores that an adapter started from."""
        info, weight = self.smn_info[adapter_name], self.base_tensor(slot)
        if weight.device.type == "meta" or self.scores(slot)[adapter_name].device.type == "meta":
            return initial_bits(info.config, "", weight.to("meta"))
        scores = initial_scores(info.config, f"{info.key}.{slot.path}", weight)
        return pack_bits(compute_mask(scores, info.config.mask_spec(), self.trainable(adapter_name, slot)))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; their scores require gradients, bits never do."""
        self._cached = None
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch the gradients of adapters; one that holds bits only cannot train, and is refused."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names if requires_grad else ():
            if any(name not in self.scores(slot) for slot in self.slots_of(name)):
                raise ValueError(
                    f"Adapter {name!r} was loaded for inference and holds one bit per weight, nothing that could "
                    "train. Load it with is_trainable=True."
                )
        super().set_requires_grad(names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; nothing of it stays resident."""
        self._cached = None
        self.pending.discard(adapter_name)
        for slot in self.present_slots:
            self.bits(slot).optional.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def update_density(self, adapter_name: str, density: float) -> None:
        """Set the density of a topk adapter, which a schedule moves while it trains."""
        info = self.smn_info[adapter_name]
        info.spec = replace(info.spec, density=density)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for slot in self.slots_of(adapter_name):
            target = device or self.base_tensor(slot).device
            for container in (self.scores(slot), self.bits(slot)):
                if adapter_name in container and container[adapter_name].device.type != "meta":
                    container[adapter_name] = container[adapter_name].to(target)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskLayer:
        self._cached = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy: all but the cache."""
        return {**self.__dict__, "_cached": None}

    # --- Effective weights -------------------------------------------------------------------------------------------

    def holders(self, names: Sequence[str], slot: Slot) -> list[str]:
        """Those of the named adapters that mask a slot of this layer."""
        return [name for name in names if name in self.smn_info and slot in self.smn_info[name].slots]

    def active_here(self) -> list[str]:
        """The active adapters that this layer knows."""
        return [name for name in self.active_adapters if name in self.smn_info]

    def effective(self, slot: Slot, names: Sequence[str]) -> Tensor:
        """Effective tensor of a slot under the named adapters: differentiable while something trains."""
        cached = self._from_cache(names)
        return self._compute(slot, names) if cached is None else cached[self.present_slots.index(slot)]

    def effective_tensors(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Effective tensors of all slots, for [`run`]."""
        cached = self._from_cache(names)
        return tuple(self._compute(slot, names) for slot in self.present_slots) if cached is None else cached

    def _compute(self, slot: Slot, names: Sequence[str]) -> Tensor:
        holders, weight = self.holders(names, slot), self.base_tensor(slot)
        if not holders:
            return weight
        scores = self.scores(slot)
        trains = weight.requires_grad or any(name in scores and scores[name].requires_grad for name in holders)
        if trains and torch.is_grad_enabled() and not torch.jit.is_tracing():  # a traced model is for inference
            return self._differentiable(slot, holders)
        return self._build(slot, holders)

    def _from_cache(self, names: Sequence[str]) -> tuple[Tensor, ...] | None:
        """Effective tensors of all slots, computed once; None where nothing may be cached."""
        if is_transformed() or name_in_force() is not None or names != self.active_here():
            return None
        cached = self._cached
        if torch.compiler.is_compiling():  # a graph cannot see a tensor's version
            return None if cached is None or self.training else cached.tensors
        if cached is None or not cached.is_valid(self):
            if not CachedWeights.is_possible(self, names):
                return None
            with torch.inference_mode(False):  # what is cached serves a backward as well
                tensors = tuple(self._compute(slot, names) for slot in self.present_slots)
                self._cached = cached = CachedWeights(self, names, tensors)
        return cached.tensors

    def fused_arguments(self, names: Sequence[str]) -> tuple[Any, ...] | None:
        """Weight, scores, bias, spec and trainable weights for the fused autograd nodes of `functional.ops`.

        None unless exactly one adapter trains on the weight, and a node of ours is possible.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
            return None
        slot, *biases = self.present_slots
        holders, weight, scores = self.holders(names, slot), self.base_tensor(slot), self.scores(slot)
        if len(holders) != 1 or holders[0] not in scores or weight.requires_grad:
            return None
        (name,) = holders
        own = scores[name]
        if not own.requires_grad:
            return None
        bias = self._compute(biases[0], names) if biases else None
        return weight, own, bias, self.smn_info[name].spec, self.trainable(name, slot)

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
        weight, factors = self.base_tensor(slot), []
        for name in holders:
            if name in self.scores(slot):
                spec, trainable = self.smn_info[name].spec, self.trainable(name, slot)
                factors.append(straight_through(self.scores(slot)[name], spec, weight.dtype, trainable))
            else:
                factors.append(self.mask(name, slot).to(weight.dtype))
        return masked_weight(weight, reduce(torch.mul, factors), self._merged_spec(holders))

    # --- Merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weights into the base layer; [`unmerge`] restores the base bit for bit.

        With `safe_merge`, scores or weights that hold NaN or infinity are refused before anything is written.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.smn_info]
        if not names:
            return
        for slot in self.present_slots if safe_merge else ():
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
        self._cached = None
        for slot in self.present_slots:
            if (stash := self._stashes.pop(slot.name, None)) is not None:
                unmerge_weight(self.base_tensor(slot), stash)

    # --- What the layer answers for ----------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The effective weight: some models read it and never call the layer (timm's BEiT …)."""
        return self._in_use("weight")  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The effective bias, None without one."""
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
        self._ensure_loaded()
        self.unmerge_if_disabled()
        if self._disable_adapters or self.merged:
            return self.base_tensor(slot)
        rows = rows_in_force(self)
        if rows is None:
            return self.effective(slot, self.active_here())
        groups = {tuple(self.holders([name], slot)) for name in rows}
        if len(groups) == 1:
            return self.effective(slot, *groups)
        return MixedWeight.of(self.base_tensor(slot), next(iter(self.smn_info.values())).key)

    # --- Forward -----------------------------------------------------------------------------------------------------

    def run(self, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with these tensors in its `present_slots`."""
        raise NotImplementedError

    def masked_forward(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with the effective weights of the named adapters."""
        return self.run(self.effective_tensors(names), *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the layer in whatever state it is: disabled, merged, masked, or mixed over the batch."""
        if not torch.compiler.is_compiling() and self._is_simple():  # decided once: these calls run cold in a step
            cached = self._cached
            if cached is not None and not kwargs:
                if cached.is_valid(self):
                    return self.run(cached.tensors, *args)
                self._cached = None
            if names := self.active_here():
                return self.masked_forward(names, *args, **kwargs)
        self._ensure_loaded()
        self.unmerge_if_disabled()
        if self._disable_adapters:
            return self.base_layer(*args, **kwargs)
        if (rows := rows_in_force(self)) is not None:
            return self._mixed(rows, *args, **kwargs)
        names = self.active_here()
        if self.merged_adapters or not names:
            return self.base_layer(*args, **kwargs)
        return self._masked(names, *args, **kwargs)

    def _is_simple(self) -> bool:
        """Whether the next forward is masked, by the active adapters, and calls the base layer's class alone."""
        other = running() or self._disable_adapters or self.merged_adapters or self.pending
        return not other and is_plain(self._modules["base_layer"])  # type: ignore[arg-type]

    def _masked(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """[`masked_forward`], through the base layer itself where it has hooks, or a forward put over its own."""
        if is_plain(self._modules["base_layer"]):  # type: ignore[arg-type]
            return self.masked_forward(names, *args, **kwargs)
        return call_with(self.base_layer, self._by_path(self.effective_tensors(names)), *args, **kwargs)

    def _by_path(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip((slot.path for slot in self.present_slots), tensors, strict=True))

    def _mixed(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        """Rows under different adapters: each group of rows under its own effective weight."""

        def run(name: str, *rest: Any, **others: Any) -> Any:
            known = name in self.smn_info
            return self._masked([name], *rest, **others) if known else self.base_layer(*rest, **others)

        return in_rows(names, next(iter(self.smn_info.values())).key, run, *args, **kwargs)

    # --- Files -------------------------------------------------------------------------------------------------------

    def to_checkpoint(self, adapter_name: str, prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bits, packed from the scores of an adapter that trains; the scores too with `save_scores`."""
        self._ensure_loaded()
        entries: dict[str, Tensor] = {}
        for slot in self.slots_of(adapter_name):
            mask_key, scores_key = (f"{prefix}{name}.{adapter_name}" for name in (slot.mask_name, slot.scores_name))
            if adapter_name not in self.scores(slot):
                entries[mask_key] = state_dict.get(mask_key, self.bits(slot)[adapter_name])
                continue
            scores = state_dict.get(scores_key, self.scores(slot)[adapter_name])
            if torch.isnan(scores).any():
                raise ValueError(
                    f"The scores of adapter {adapter_name!r} hold NaN at {prefix}{slot.path}: nothing was saved. "
                    "Go back to a checkpoint and train with a lower learning rate."
                )
            entries[mask_key] = pack_bits(self._mask_of_scores(adapter_name, slot, scores))
            if self.smn_info[adapter_name].config.save_scores:
                entries[scores_key] = scores
        return entries

    def from_checkpoint(self, adapter_name: str, prefix: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bits for inference; scores for an adapter that trains, made from the bits if the file has none."""
        result: dict[str, Tensor] = {}
        for slot in self.slots_of(adapter_name):
            weight, packed, scores = self.base_tensor(slot), entries.get(slot.mask_name), entries.get(slot.scores_name)
            if packed is None and scores is None:
                raise KeyError(f"{prefix}{slot.mask_name}")
            if packed is not None:
                check_packed(f"{prefix}{slot.mask_name}", packed, weight.numel())
            if scores is not None and scores.shape != weight.shape:
                raise ValueError(
                    f"{prefix}{slot.scores_name} has shape {tuple(scores.shape)}, the base weight "
                    f"{tuple(weight.shape)}: load the base model that adapter_config.json names."
                )
            if adapter_name not in self.scores(slot):
                if packed is None:
                    assert scores is not None
                    packed = pack_bits(self._mask_of_scores(adapter_name, slot, scores))
                result[f"{slot.mask_name}.{adapter_name}"] = packed
                continue
            if scores is None:
                assert packed is not None
                scores = self._scores_from_bits(adapter_name, slot, packed)
            elif packed is not None:
                self._reach_density(adapter_name, slot, unpack_bits(packed.to(weight.device), weight.shape))
            result[f"{slot.scores_name}.{adapter_name}"] = scores
        return result

    def mark_loaded(self, adapter_name: str) -> None:
        """Record that an adapter's masks are loaded."""
        self.pending.discard(adapter_name)
        for slot in self.present_slots:
            if adapter_name in self.scores(slot):
                self.bits(slot).discard(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load; bits for an adapter that trains become its scores, unless the state dict has these too."""
        self._cached = None
        for slot in self.present_slots:
            for name, scores in self.scores(slot).items():
                packed = state_dict.get(key := f"{prefix}{slot.mask_name}.{name}")
                has_scores = f"{prefix}{slot.scores_name}.{name}" in state_dict
                if packed is not None or has_scores:
                    self.bits(slot).discard(name)
                if packed is not None and not has_scores:
                    check_packed(key, packed, scores.numel())
                    with torch.no_grad():
                        scores.copy_(self._scores_from_bits(name, slot, packed))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _ensure_loaded(self) -> None:
        if not self.pending:
            return
        if _is_exporting() and any(name in self.scores(slot) for slot in self.present_slots for name in self.pending):
            raise RuntimeError("Masks may have been loaded and not taken over: call the model once before its export.")
        self.consume_pending()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def consume_pending(self) -> bool:
        """Convert bits that a loader wrote for a trainable adapter to its scores; once, before the first use.

        Bits that are the initial mask, or the mask of the scores, change nothing. Other threads wait until it is done.
        Returns whether any scores changed.
        """
        with STATE_LOCK:
            changed = False
            for name in self.pending:
                config = self.smn_info[name].config
                if config.codec != "bits" and config.base_fingerprint is not None:
                    raise RuntimeError(
                        f"The masks of adapter {name!r} never arrived: its file holds them coded "
                        f"(codec={config.codec!r}), which transformers' own load_adapter does not read. Load it with "
                        "PeftModel.from_pretrained, or write it bit-packed with `smn unpack`. If you only want its "
                        "configuration for a fresh adapter, pass dataclasses.replace(config, base_fingerprint=None)."
                    )
                for slot in self.slots_of(name):
                    if name in self.scores(slot) and name in self.bits(slot):
                        changed |= self._consume(name, slot, self.bits(slot)[name])
                        del self.bits(slot)[name]
            self.pending = set()  # now, and not before: other threads look at it
            return changed

    def _consume(self, adapter_name: str, slot: Slot, packed: Tensor) -> bool:
        scores = self.scores(slot)[adapter_name]
        if "meta" in (scores.device.type, packed.device.type):
            return False
        own = pack_bits(self._mask_of_scores(adapter_name, slot, scores))
        if any(torch.equal(packed, known) for known in (own, self._initial_mask(adapter_name, slot))):
            return False
        with torch.no_grad():
            scores.copy_(self._scores_from_bits(adapter_name, slot, packed))
        return True

    def _replicate_for_data_parallel(self) -> MaskLayer:
        """Replicate for `nn.DataParallel`; what every replica would do on its own must be done before."""
        if self.pending and self.consume_pending():
            raise RuntimeError(
                "Masks were loaded and not taken over yet: call the model once before it is in nn.DataParallel."
            )
        if self._disable_adapters and self.merged:
            raise RuntimeError("Adapters are merged and disabled: call unmerge_adapter() before nn.DataParallel runs.")
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call,no-any-return]
