# SPDX-License-Identifier: Apache-2.0
"""`MaskState`: what a masked layer holds per adapter, scores or packed bits, the masks they make, and their files.

Scores are of weights, of whole rows or of whole columns (`granularity`). A row is what makes one output of a layer,
its bias with it; a column is what reads one input. A tensor's scores are one tensor per container, each of a shape
that broadcasts to the weight's: the mask is the intersection of theirs. Packed bits are always one per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.distributed import unsharded
from ..functional.masking import compute_mask, density, seeded_generator, select_trainable
from ..functional.merging import Stash, unmerged_weight
from ..functional.packing import pack_bits, packed_size, unpack_bits
from ..storage.adapter_file import check_packed
from ..storage.files import AdapterFileError
from .config import MaskConfig
from .sharding import refuse_if_sharded
from .wrapper import STATE_LOCK, AdapterInfo, AdapterLayer, ResidentBuffers, ScoreDict, Slot

__all__ = ["MaskState", "score_dtype"]

_UNIT_DIMS = {"row": 0, "column": 1}
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch < 2.7 has none


def score_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the scores of a weight: fp32, or fp64 as the weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def initial_scores(config: MaskConfig, granularity: str, name: str, weight: Tensor) -> Tensor:
    """Scores of a new adapter, in the weight's shape and memory format; random ones depend on seed and name only."""
    if config.init_weights and not isinstance(config.init_score, str):
        scores = torch.full_like(weight, config.init_score, dtype=score_dtype(weight), requires_grad=False)
        if granularity == "2:4":
            sizes = weight.detach().abs().to(scores.dtype)
            scores.mul_(sizes / sizes.mean())
        return scores
    generator = seeded_generator(config.seed, f"{name}.init")
    drawn = torch.empty(weight.shape)
    if not config.init_weights:
        drawn.normal_(generator=generator).add_(config.threshold)
    elif weight.dim() > 1:
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
    else:
        drawn.uniform_(-1, 1, generator=generator)
    return torch.empty_like(weight, dtype=score_dtype(weight), requires_grad=False).copy_(drawn)


class MaskState(AdapterLayer):
    """Scores or packed bits per adapter of a layer's tensors, and what makes one of the other.

    An adapter has either scores (`smn_scores`, `smn_unit_scores`, trainable) or packed bits (`smn_mask`). Where a
    loader may write bits, an adapter that trains has some too until its first use: its initial mask, under the key
    where transformers' own loader looks for it. [`consume_pending`] converts what the loader wrote to scores.
    """

    slots: tuple[Slot, ...] = (Slot("", "weight"), Slot("bias_", "bias", weight=""))

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
        self._cached: Any = None  # of the effective weights
        self._stashes: dict[str, Stash] = {}  # of merging

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
        return weight if stash is None else unmerged_weight(unsharded(weight), stash)

    def unmerged(self) -> dict[int, Tensor | None]:
        """See [`AdapterLayer.unmerged`]; a weight that was cast while merged comes back up to rounding only."""
        merged = [(self.base_tensor(slot), slot) for slot in self.present_slots if slot.name in self._stashes]
        return {
            id(weight): self.own_tensor(slot) if self._stashes[slot.name].values.dtype == weight.dtype else None
            for weight, slot in merged
        }

    def scores(self, slot: Slot) -> ScoreDict:
        """Scores of a slot's single weights by adapter name, of the adapters that can train them."""
        return self._modules[slot.scores_name]  # type: ignore[return-value]

    def scores_of(self, adapter_name: str, slot: Slot) -> dict[str, Tensor]:
        """Scores of a slot by container, in shapes that broadcast to its tensor's; empty for an adapter of bits."""
        found = {}
        for name in (slot.scores_name, slot.unit_scores_name):
            container: Any = self._modules.get(name)
            if container is not None and adapter_name in container:
                found[name] = _shaped(slot, container[adapter_name])
        return found

    def parameters_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """An adapter's scores on this layer by container, each once."""
        containers: dict[str, Any] = {name: self._modules[name] for name in self.adapter_layer_names}
        return {name: own[adapter_name] for name, own in containers.items() if adapter_name in own}

    def bits(self, slot: Slot) -> ResidentBuffers:
        """Packed bits of a slot by adapter name, of the adapters that were loaded for inference."""
        return self._modules[slot.mask_name]  # type: ignore[return-value]

    def slots_of(self, adapter_name: str) -> tuple[Slot, ...]:
        """Slots that an adapter masks; none if the layer does not know it."""
        return self.smn_info[adapter_name].slots if adapter_name in self.smn_info else ()

    def holders(self, names: Sequence[str], slot: Slot) -> list[str]:
        """Those of the named adapters that mask a slot of this layer."""
        return [name for name in names if name in self.smn_info and slot in self.smn_info[name].slots]

    def goes_with_row(self, adapter_name: str, slot: Slot) -> bool:
        """Whether a slot is a bias that an adapter masks with the rows of its weight, and so takes no bits."""
        return slot.is_bias and self.smn_info[adapter_name].granularity.startswith("row")

    def _templates(self, slot: Slot, granularity: str) -> dict[str, Tensor]:
        """Views of the base's tensors in the shapes of a slot's scores, by container."""
        kind, _, weights_too = granularity.partition("+")
        found: dict[str, Tensor] = {}
        weight: Tensor = self.base_tensor(slot)
        if kind not in _UNIT_DIMS or (weights_too and not slot.is_bias):
            found[slot.scores_name] = weight
        if kind in _UNIT_DIMS:
            if slot.is_bias:
                weight = self.base_tensor(next(own for own in self.present_slots if own.name == slot.weight))
            unit: Tensor = weight
            for dim in range(weight.dim()):
                unit = unit if dim == _UNIT_DIMS[kind] else unit.narrow(dim, 0, 1)
            found[slot.unit_scores_name] = unit
        return found

    # --- Masks -------------------------------------------------------------------------------------------------------

    def mask(self, adapter_name: str, slot: Slot | None = None) -> Tensor:
        """Bool mask of an adapter on this layer, of the weight's shape."""
        slot = slot or self.present_slots[0]
        parts = self.mask_parts(adapter_name, slot)
        return reduce(torch.logical_and, parts).expand(self.base_tensor(slot).shape)

    def mask_parts(self, adapter_name: str, slot: Slot) -> list[Tensor]:
        """The masks whose intersection is the mask: one per tensor of scores, in its shape, or that of the bits."""
        self._ensure_loaded()
        if scores := self.scores_of(adapter_name, slot):
            return self._parts_of_scores(adapter_name, slot, scores)
        weight = self.base_tensor(slot)  # in a replica on another device than the bits, unless they are the newest
        return [unpack_bits(self.bits(slot)[adapter_name].to(weight.device), weight.shape)]

    def _parts_of_scores(self, adapter_name: str, slot: Slot, scores: Mapping[str, Tensor]) -> list[Tensor]:
        spec, trainable = self.smn_info[adapter_name].spec, self.trainable(adapter_name, slot)
        return [compute_mask(_shaped(slot, unsharded(own.detach())), spec, trainable) for own in scores.values()]

    def _mask_of_scores(self, adapter_name: str, slot: Slot, scores: Mapping[str, Tensor]) -> Tensor:
        """Packed mask of scores by container."""
        parts = self._parts_of_scores(adapter_name, slot, scores)
        return pack_bits(reduce(torch.logical_and, parts).expand(self.base_tensor(slot).shape))

    def set_mask(self, adapter_name: str, slot: Slot, mask: Tensor) -> None:
        """Replace the mask of an adapter; one that trains gets the scores that [`_scores_from_bits`] gives."""
        self._cached = None
        self._ensure_loaded()
        if self.scores_of(adapter_name, slot):
            self._set_scores(adapter_name, slot, pack_bits(mask))
        else:
            self.bits(slot)[adapter_name] = pack_bits(mask)

    @torch.no_grad()
    def _set_scores(self, adapter_name: str, slot: Slot, packed: Tensor) -> None:
        for name, scores in self._scores_from_bits(adapter_name, slot, packed).items():
            self.parameters_of(adapter_name)[name].copy_(scores)

    def _scores_from_bits(self, adapter_name: str, slot: Slot, packed: Tensor) -> dict[str, Tensor]:
        """Scores by container that make a mask: threshold ± |initial score − threshold|, or ± 1 where that is 0.

        Where scores are ranked by their size, weights that are off have 0. A schedule goes on from the mask's density.
        A row or column is off where all its weights are; their own scores are then those of weights that are on.
        """
        refuse_if_sharded(self, "load or set masks that train")
        weight, info = self.base_tensor(slot), self.smn_info[adapter_name]
        config, templates = info.config, self._templates(slot, info.granularity)
        mask = unpack_bits(packed.to(weight.device), weight.shape)
        if config.density_schedule is not None and slot is self.present_slots[0]:
            taking_part = self.trainable(adapter_name, slot)
            self.update_density(adapter_name, density(mask if taking_part is None else mask[taking_part]))
        distance = 0.0 if isinstance(config.init_score, str) else abs(config.init_score - config.threshold)
        distance = distance or 1.0
        by_size = config.mask_type == "topk" and config.rank_by == "absolute"
        low, high = (0.0, distance) if by_size else (config.threshold - distance, config.threshold + distance)
        on = {slot.scores_name: mask}
        if (unit := templates.get(slot.unit_scores_name)) is not None:
            rest = [dim for dim in range(mask.dim()) if unit.shape[dim] != mask.shape[dim]] if not slot.is_bias else []
            units = mask.amax(rest, keepdim=True) if rest else mask.reshape(unit.shape)
            on = {slot.scores_name: mask | ~_shaped(slot, units), slot.unit_scores_name: units}
        return {
            name: torch.full_like(own, low, dtype=score_dtype(weight), requires_grad=False).masked_fill_(
                on[name], high
            )
            for name, own in templates.items()
        }

    def _checked_scores(self, adapter_name: str, slot: Slot, packed: Tensor, key: str) -> dict[str, Tensor]:
        """[`_scores_from_bits`] of a file's bits, which must be of whole rows or columns where scores are."""
        made = self._scores_from_bits(adapter_name, slot, packed)
        if slot.unit_scores_name in made and packed.device.type != "meta":
            if not torch.equal(self._mask_of_scores(adapter_name, slot, made).to(packed.device), packed):
                raise _no_units(key, self.smn_info[adapter_name])
        return made

    def trainable(self, adapter_name: str, slot: Slot) -> Tensor | None:
        """Bool tensor of the weights that take part (`trainable_fraction`), None if all do; the others stay on."""
        info, weight = self.smn_info[adapter_name], self.base_tensor(slot)
        if info.config.trainable_fraction == 1.0:
            return None
        selected = info.trainable.get(slot.name)
        if selected is None or selected.device != weight.device:
            generator = seeded_generator(info.config.seed, f"{info.key}.{slot.path}.select")
            with torch.inference_mode(False):  # what is kept serves a backward as well
                values, config = unsharded(self.own_tensor(slot).detach()), info.config
                selected = select_trainable(values, config.trainable_fraction, config.select, generator)
            info.trainable[slot.name] = selected
        return selected

    # --- Life cycle --------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: MaskConfig, key: str, *, may_load: bool = False) -> None:
        """Add an adapter: scores if it is to train, room for bits if it is for inference or `may_load`.

        `key`, the layer's name in the base model, seeds what is random.
        """
        granularity = config.granularity_of(key)
        with_biases = config.mask_bias or granularity.startswith("row")
        held = {slot.name for slot in self.present_slots}
        slots = tuple(s for s in self.present_slots if not s.is_bias or (with_biases and s.weight in held))
        self.smn_info[adapter_name] = AdapterInfo(config, config.mask_spec(granularity), key, slots, granularity)
        for slot in slots:
            if not config.inference_mode:
                refuse_if_sharded(self, "add an adapter that trains")
                for name, scores in self._initial_scores(adapter_name, slot).items():
                    if name not in self._modules:
                        self.add_module(name, ScoreDict())
                        self.adapter_layer_names = (*self.adapter_layer_names, name)
                    self._modules[name][adapter_name] = nn.Parameter(scores)  # type: ignore[index,operator]
            if config.inference_mode or may_load:
                self.bits(slot)[adapter_name] = self._initial_mask(adapter_name, slot)
        if may_load:
            self.pending.add(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initial_scores(self, adapter_name: str, slot: Slot) -> dict[str, Tensor]:
        """Scores by container that an adapter starts from."""
        info = self.smn_info[adapter_name]
        names = {
            slot.scores_name: f"{info.key}.{slot.path}",
            slot.unit_scores_name: f"{info.key}.{slot.unit_scores_name}",
        }
        templates = self._templates(slot, info.granularity)
        return {n: initial_scores(info.config, info.granularity, names[n], own) for n, own in templates.items()}

    def _initial_mask(self, adapter_name: str, slot: Slot) -> Tensor:
        """Packed mask of the scores that an adapter started from."""
        weight, config = self.base_tensor(slot), self.smn_info[adapter_name].config
        if any(own.device.type == "meta" for own in (weight, *self.scores_of(adapter_name, slot).values())):
            return torch.empty(packed_size(weight.numel()), dtype=torch.uint8, device="meta")
        if config.inference_mode and config.init_weights:  # a loader will write it
            return pack_bits(torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        return self._mask_of_scores(adapter_name, slot, self._initial_scores(adapter_name, slot))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch the gradients of adapters; one that holds bits only cannot train, and is refused."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names if requires_grad else ():
            if not all(self.scores_of(name, slot) for slot in self.slots_of(name)):
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

    # --- Files -------------------------------------------------------------------------------------------------------

    def to_checkpoint(self, adapter_name: str, prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bits, packed from the scores of an adapter that trains; the scores too with `save_scores`."""
        self._ensure_loaded()
        entries: dict[str, Tensor] = {}
        for slot in self.slots_of(adapter_name):
            mask_key = f"{prefix}{slot.mask_name}.{adapter_name}"
            keys = {name: f"{prefix}{name}.{adapter_name}" for name in self.scores_of(adapter_name, slot)}
            if not keys:
                entries[mask_key] = state_dict.get(mask_key, self.bits(slot)[adapter_name])
                continue
            own = self.parameters_of(adapter_name)
            scores = {name: unsharded(state_dict.get(key, own[name])) for name, key in keys.items()}
            if any(torch.isnan(each).any() for each in scores.values()):
                raise ValueError(
                    f"The scores of adapter {adapter_name!r} hold NaN at {prefix}{slot.path}: nothing was saved. "
                    "Go back to a checkpoint and train with a lower learning rate."
                )
            entries[mask_key] = self._mask_of_scores(adapter_name, slot, scores)
            if self.smn_info[adapter_name].config.save_scores:
                entries.update({key: scores[name] for name, key in keys.items()})
        return entries

    def from_checkpoint(self, adapter_name: str, prefix: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bits for inference; scores for an adapter that trains, made from the bits if the file has none."""
        result: dict[str, Any] = {}
        for slot in self.slots_of(adapter_name):
            info, packed = self.smn_info[adapter_name], entries.get(slot.mask_name)
            templates, key = self._templates(slot, info.granularity), f"{prefix}{slot.mask_name}"
            scores = {name: entries[name] for name in templates if name in entries}
            if packed is None and len(scores) < len(templates):
                raise KeyError(key)
            if packed is not None:
                check_packed(key, packed, self.base_tensor(slot).numel())
            for name, own in scores.items():
                if own.shape != (wanted := templates[name].shape):
                    raise ValueError(
                        f"{prefix}{name} has shape {tuple(own.shape)}, the base weight {tuple(wanted)}: load the base "
                        "model that adapter_config.json names."
                    )
            if not self.scores_of(adapter_name, slot):
                packed = self._mask_of_scores(adapter_name, slot, scores) if packed is None else packed
                result[f"{slot.mask_name}.{adapter_name}"] = packed
                continue
            if packed is not None:
                scores = {**self._checked_scores(adapter_name, slot, packed, key), **scores}
            for name, own in scores.items():
                known = result.setdefault(f"{name}.{adapter_name}", own)
                if known is not own and not torch.equal(known, own):  # a bias's, of its weight's rows
                    raise _no_units(key, info)
        for slot in self.slots_of(adapter_name):
            for name in (slot.mask_name, slot.scores_name, slot.unit_scores_name):
                entries.pop(name, None)
        return result

    def mark_loaded(self, adapter_name: str) -> None:
        """Record that an adapter's masks are loaded."""
        self.pending.discard(adapter_name)
        for slot in self.present_slots:
            if self.scores_of(adapter_name, slot):
                self.bits(slot).discard(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load; bits for an adapter that trains become its scores, unless the state dict has these too."""
        self._cached = None
        for slot in self.present_slots:
            for name in [name for name, info in self.smn_info.items() if slot in info.slots]:
                if not (keys := {part: f"{prefix}{part}.{name}" for part in self.scores_of(name, slot)}):
                    continue
                packed = state_dict.pop(key := f"{prefix}{slot.mask_name}.{name}", None)
                if packed is not None and not state_dict.keys() >= set(keys.values()):
                    check_packed(key, packed, self.base_tensor(slot).numel())
                    made = self._checked_scores(name, slot, packed, key)
                    state_dict.update({keys[part]: own for part, own in made.items()})
                if state_dict.keys() >= set(keys.values()):
                    self.bits(slot).discard(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _ensure_loaded(self) -> None:
        if not self.pending:
            return
        if _is_exporting() and any(self.parameters_of(name) for name in self.pending):
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
                    if self.scores_of(name, slot) and name in self.bits(slot):
                        changed |= self._consume(name, slot, self.bits(slot)[name])
                        del self.bits(slot)[name]
            self.pending = set()  # now, and not before: other threads look at it
            return changed

    def _consume(self, adapter_name: str, slot: Slot, packed: Tensor) -> bool:
        scores = self.scores_of(adapter_name, slot)
        if "meta" in (packed.device.type, *(own.device.type for own in scores.values())):
            return False
        own = self._mask_of_scores(adapter_name, slot, scores)
        if any(torch.equal(packed, known) for known in (own, self._initial_mask(adapter_name, slot))):
            return False
        self._set_scores(adapter_name, slot, packed)
        return True


def _no_units(key: str, info: AdapterInfo) -> AdapterFileError:
    return AdapterFileError(
        f"{key} is not made of whole units, as granularity={info.granularity!r} in adapter_config.json says: the two "
        "do not belong together. Fetch or save both again."
    )


def _shaped(slot: Slot, scores: Tensor) -> Tensor:
    """Scores in a shape that broadcasts to their slot's tensor: a bias has those of its weight's rows."""
    return scores.reshape(-1) if slot.is_bias else scores
