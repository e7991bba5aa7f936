# SPDX-License-Identifier: Apache-2.0
"""`MaskLayer`: a layer whose frozen weight is masked per adapter, its effective weights, merging and file entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

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
from .config import MaskConfig, initial_bits, initial_scores, score_dtype
from .mixed import MixedWeight, in_mixed_batch, rows_in_force
from .wrapper import (
    STATE_LOCK,
    AdapterInfo,
    AdapterLayer,
    ResidentBuffers,
    ScoreDict,
    Slot,
    call_with,
    is_plain,
    view_with,
)

__all__ = ["MaskLayer"]

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch < 2.7 has none


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


class MaskLayer(AdapterLayer):
    """A layer whose frozen weight is masked, one bit per weight and adapter.

    An adapter has either scores (`smn_scores`, trainable) or packed bits (`smn_mask`). Several active adapters give
    the intersection of their masks, with the scale of the intersection. The effective weight of packed bits is
    computed once and cached; that of scores, which may train, is computed in every forward.

    Where a loader may write bits, an adapter that trains has some too until its first use: its initial mask, under the
    key where transformers' own loader looks for it. [`consume_pending`] converts what the loader wrote to scores.
    """

    slots: tuple[Slot, ...] = (Slot("", "weight"), Slot("bias_", "bias", is_bias=True))
    has_node = False

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
        self._cached: _Cached | None = None
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
        merged = [(self.base_tensor(slot), slot) for slot in self.present_slots if slot.name in self._stashes]
        return {
            id(weight): self.own_tensor(slot) if self._stashes[slot.name].values.dtype == weight.dtype else None
            for weight, slot in merged
        }

    def scores(self, slot: Slot) -> ScoreDict:
        """Scores of a slot by adapter name, of the adapters that can train."""
        return self._modules[slot.scores_name]  # type: ignore[return-value]

    def bits(self, slot: Slot) -> ResidentBuffers:
        """Packed bits of a slot by adapter name, of the adapters that were loaded for inference."""
        return self._modules[slot.mask_name]  # type: ignore[return-value]

    def slots_of(self, adapter_name: str) -> tuple[Slot, ...]:
        """Slots that an adapter masks; none if the layer does not know it."""
        return self.smn_info[adapter_name].slots if adapter_name in self.smn_info else ()

    def holders(self, names: Sequence[str], slot: Slot) -> list[str]:
        """Those of the named adapters that mask a slot of this layer."""
        return [name for name in names if name in self.smn_info and slot in self.smn_info[name].slots]

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
        """Replace the mask of an adapter; one that trains gets the scores that [`_scores_from_bits`] gives."""
        self._cached = None
        self._ensure_loaded()
        packed = pack_bits(mask)
        if adapter_name in self.scores(slot):
            with torch.no_grad():
                self.scores(slot)[adapter_name].copy_(self._scores_from_bits(adapter_name, slot, packed))
        else:
            self.bits(slot)[adapter_name] = packed

    def _scores_from_bits(self, adapter_name: str, slot: Slot, packed: Tensor) -> Tensor:
        """Scores that make a mask: threshold ± |initial score − threshold|, or ± 1 where that is 0.

        Where scores are ranked by their size, weights that are off have 0. A schedule goes on from the mask's density.
        """
        weight, config = self.base_tensor(slot), self.smn_info[adapter_name].config
        mask = unpack_bits(packed.to(weight.device), weight.shape)
        if config.density_schedule is not None and slot is self.present_slots[0]:
            taking_part = self.trainable(adapter_name, slot)
            self.update_density(adapter_name, density(mask if taking_part is None else mask[taking_part]))
        distance = 0.0 if isinstance(config.init_score, str) else abs(config.init_score - config.threshold)
        distance = distance or 1.0
        by_size = config.mask_type == "topk" and config.rank_by == "absolute"
        low, high = (0.0, distance) if by_size else (config.threshold - distance, config.threshold + distance)
        return torch.full_like(weight, low, dtype=score_dtype(weight), requires_grad=False).masked_fill_(mask, high)

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
        super().delete_adapter(adapter_name)

    def update_density(self, adapter_name: str, density: float) -> None:
        """Set the density of a topk adapter, which a schedule moves while it trains."""
        info = self.smn_info[adapter_name]
        info.spec = replace(info.spec, density=density)

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
                if name in self.scores(slot):
                    return None
                found.append((bits.older if name in bits.older else bits._buffers, name, bits[name]))
        if any(place.get(key) is not source for place, key, source in found):  # FSDP's parameters are attributes
            return None
        tensors = (source for *_, source in found if isinstance(source, Tensor))
        return None if any(tensor.requires_grad or tensor.is_inference() for tensor in tensors) else found

    def _computed(self, names: Sequence[str]) -> dict[str, Tensor]:
        holders = {slot: self.holders(names, slot) for slot in self.present_slots}
        return {slot.path: self._effective(slot, own) for slot, own in holders.items() if own}

    def _effective(self, slot: Slot, holders: Sequence[str]) -> Tensor:
        """Effective tensor of a slot under adapters that mask it."""
        weight: Tensor = self.base_tensor(slot)
        scores = self.scores(slot)
        trains = weight.requires_grad or any(name in scores and scores[name].requires_grad for name in holders)
        if trains and torch.is_grad_enabled() and not torch.jit.is_tracing():  # a traced model is for inference
            factors = []
            for name in holders:
                if name in scores:
                    spec, trainable = self.smn_info[name].spec, self.trainable(name, slot)
                    factors.append(straight_through(scores[name], spec, weight.dtype, trainable))
                else:
                    factors.append(self.mask(name, slot).to(weight.dtype))
            return masked_weight(weight, reduce(torch.mul, factors), self._merged_spec(holders))
        name, weight = holders[0], weight.detach()
        if len(holders) == 1 and name in scores and _is_eager():  # in every forward, so in as few passes as may be
            spec, trainable = self.smn_info[name].spec, self.trainable(name, slot)
            return build(weight, scores[name].detach(), spec, trainable, weight.dtype)[0]
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
        holders, weight, scores = self.holders(names, slot), self.base_tensor(slot), self.scores(slot)
        if len(holders) != 1 or weight.requires_grad or (name := holders[0]) not in scores:
            return None
        if not scores[name].requires_grad or not _is_eager() or not is_plain(self._modules["base_layer"]):  # type: ignore[arg-type]
            return None
        bias: Tensor | None = self.base_tensor(biases[0]) if biases else None
        if biases and (masking := self.holders(names, biases[0])):
            bias = self._effective(biases[0], masking)
        return Trained(weight, scores[name], bias, self.smn_info[name].spec, self.trainable(name, slot))

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
        result: dict[str, Any] = {}
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
            if adapter_name in self.scores(slot):
                made = scores if packed is None else self._scores_from_bits(adapter_name, slot, packed)
                result[f"{slot.scores_name}.{adapter_name}"] = made if scores is None else scores
            else:
                if scores is not None and packed is None:
                    packed = pack_bits(self._mask_of_scores(adapter_name, slot, scores))
                result[f"{slot.mask_name}.{adapter_name}"] = packed
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
                key, scores_key = (f"{prefix}{part}.{name}" for part in (slot.mask_name, slot.scores_name))
                packed = state_dict.pop(key, None)
                if packed is not None and scores_key not in state_dict:
                    check_packed(key, packed, scores.numel())
                    state_dict[scores_key] = self._scores_from_bits(name, slot, packed)
                if scores_key in state_dict:
                    self.bits(slot).discard(name)
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
        replica: MaskLayer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._cached = None
        return replica


def _is_eager() -> bool:
    """Whether neither torch.compile, torch.func nor a tracer runs the code, which want plain operations."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    return not traced
