# SPDX-License-Identifier: Apache-2.0
"""The adapters of one layer: scores while they train, bits for inference, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from threading import RLock
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..functional.masking import compute_mask, density, seeded_generator, select_trainable
from ..functional.merging import Stash, unmerged_weight
from ..functional.packing import pack_bits, unpack_bits
from .buffers import ResidentBuffers, ScoreDict
from .config import MaskConfig
from .initial import initial_bits, initial_scores, scores_of_mask
from .kinds import SIZES
from .mixed import name_in_force
from .slots import AdapterInfo, Slot

__all__ = ["STATE_LOCK", "AdapterLayer"]

STATE_LOCK = RLock()
"""Held where a forward changes what all threads share: it takes over loaded masks, or takes out merged ones."""

_OF_TOOLS = frozenset({"_hf_hook", "_old_forward"})  # accelerate's: they are of the module that it put them on


def _no_hook(module: nn.Module, args: Any) -> None:
    """See [`AdapterLayer.forbid_fast_path`]."""


class AdapterLayer(nn.Module, BaseTunerLayer):
    """State of a masked layer: per adapter, either scores (`smn_scores`, trainable) or packed bits (`smn_mask`)."""

    slots: tuple[Slot, ...] = (Slot("", "weight"), Slot("bias_", "bias", is_bias=True))
    hides_parts = False

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`; [`update_layer`] adds adapters."""
        super().__init__()
        self.base_layer = base_layer
        self.present_slots = tuple(slot for slot in self.slots if self._parameter(slot) is not None)
        for slot in self.present_slots:
            self.add_module(slot.scores_name, ScoreDict())
            self.add_module(slot.mask_name, ResidentBuffers())
        self.adapter_layer_names = tuple(slot.scores_name for slot in self.present_slots)
        self.other_param_names = (*(slot.mask_name for slot in self.present_slots), "smn_info")
        self.smn_info: dict[str, AdapterInfo] = {}
        self._awaiting = self._was_loaded = False
        self._stashes: dict[str, Stash] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """What the base layer has: a stride, a size, whatever a model reads from its layers."""
        own = self.__dict__.get("_modules", ())
        if name in own or "base_layer" not in own or name.startswith("__") or name in _OF_TOOLS:
            return super().__getattr__(name)
        if hasattr(type(self), name):  # a property that failed: the base's value would be the wrong answer
            return super().__getattr__(name)
        return self.of_base(name)

    def of_base(self, name: str) -> Any:
        """An attribute of the base layer, as it is for this layer."""
        base = self._modules["base_layer"]
        known = (alias for alias in (name, *SIZES.get(name, ())) if hasattr(base, alias))
        return getattr(base, next(known, name))

    @property
    def active_adapters(self) -> list[str]:
        """As PEFT's; in a mixed batch the adapter that the running samples are under."""
        name = name_in_force()
        if name is not None:
            return [name] if name in self.smn_info else []
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    def _parameter(self, slot: Slot) -> nn.Parameter | None:
        owner, _, attribute = slot.path.rpartition(".")
        return getattr(self.get_base_layer().get_submodule(owner), attribute, None)

    def base_tensor(self, slot: Slot) -> nn.Parameter:
        """The base's tensor of a slot."""
        own = self.base_layer._parameters.get(slot.path)  # the common case first: this runs in every forward
        parameter = self._parameter(slot) if own is None else own
        assert parameter is not None
        return parameter

    def own_tensor(self, slot: Slot) -> Tensor:
        """The base's own values of a slot, whatever is merged into them."""
        weight, stash = self.base_tensor(slot), self._stashes.get(slot.name)
        return weight if stash is None else unmerged_weight(weight, stash)

    def own_statistics(self) -> dict[str, Tensor]:
        """The base's own running statistics by name, of those that an adapter's are merged into."""
        return {}

    def scores(self, slot: Slot) -> ScoreDict:
        """Scores of a slot by adapter name, of the adapters that can train."""
        return self._modules[slot.scores_name]  # type: ignore[return-value]

    def bits(self, slot: Slot) -> ResidentBuffers:
        """Packed bits of a slot by adapter name, of the adapters that were loaded for inference."""
        return self._modules[slot.mask_name]  # type: ignore[return-value]

    # --- Masks -------------------------------------------------------------------------------------------------------

    def mask(self, adapter_name: str, slot: Slot | None = None) -> Tensor:
        """Bool mask of an adapter on this layer, of the weight's shape."""
        slot = slot or self.present_slots[0]
        if self._awaiting:
            self.settle()
        if adapter_name in self.scores(slot):
            return self.mask_of_scores(adapter_name, slot, self.scores(slot)[adapter_name])
        weight = self.base_tensor(slot)  # in a replica on another device than the bits, unless they are the newest
        return unpack_bits(self.bits(slot)[adapter_name].to(weight.device), weight.shape)

    def mask_of_scores(self, adapter_name: str, slot: Slot, scores: Tensor) -> Tensor:
        """Bool mask that an adapter's settings make of these scores."""
        info = self.smn_info[adapter_name]
        return compute_mask(scores.detach(), info.spec, self.trainable(adapter_name, slot))

    def set_mask(self, adapter_name: str, slot: Slot, mask: Tensor) -> None:
        """Replace the mask of an adapter; one that trains gets the scores that [`scores_from_bits`] gives."""
        packed = pack_bits(mask)
        if adapter_name in self.scores(slot):
            with torch.no_grad():
                self.scores(slot)[adapter_name].copy_(self.scores_from_bits(adapter_name, slot, packed))
        else:
            self.bits(slot)[adapter_name] = packed

    def scores_from_bits(self, adapter_name: str, slot: Slot, packed: Tensor) -> Tensor:
        """Scores to go on training from, for a mask that came without; see [`scores_of_mask`]."""
        weight = self.base_tensor(slot)
        mask = unpack_bits(packed.to(weight.device), weight.shape)
        self.reach_density(adapter_name, slot, mask)
        return scores_of_mask(self.smn_info[adapter_name].config, weight, mask)

    def reach_density(self, adapter_name: str, slot: Slot, mask: Tensor) -> None:
        """Set the density that a schedule has reached to that of a mask which was made under it."""
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

    def update_layer(self, adapter_name: str, config: MaskConfig, key: str) -> None:
        """Add an adapter: scores if it is to train, room for bits if it is for inference.

        Args:
            adapter_name: Name of the adapter.
            config: Its configuration.
            key: Name of the layer in the base model, which seeds what is random.
        """
        slots = tuple(slot for slot in self.present_slots if config.mask_bias or not slot.is_bias)
        self.smn_info[adapter_name] = AdapterInfo(config, config.mask_spec(), key, slots)
        for slot in slots:
            weight = self.base_tensor(slot)
            if config.inference_mode:
                self.bits(slot)[adapter_name] = initial_bits(config, f"{key}.{slot.path}", weight)
                self._awaiting |= config.awaits_blob
            else:
                scores = initial_scores(config, f"{key}.{slot.path}", weight)
                self.scores(slot)[adapter_name] = nn.Parameter(scores)
                if config.expects_bits:
                    self.offer_place(adapter_name, slot)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT's, but an adapter that holds bits only cannot train, and says so.

        Raises:
            ValueError: If `requires_grad` is asked of an adapter without scores.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names if requires_grad else ():
            if name in self.smn_info and any(name not in self.scores(slot) for slot in self.smn_info[name].slots):
                raise ValueError(
                    f"Adapter {name!r} was loaded for inference and holds one bit per weight, nothing that could "
                    "train. Load it with is_trainable=True."
                )
        super().set_requires_grad(names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; nothing of the adapter stays resident."""
        for slot in self.present_slots:
            self.bits(slot).forget(adapter_name)
        super().delete_adapter(adapter_name)

    def forbid_fast_path(self) -> None:
        """Keep torch's fused TransformerEncoderLayer from reading the frozen weights past this layer.

        Its fast path checks for hooks, and for nothing else that a wrapper could set.
        """
        if not self._forward_pre_hooks:
            self.register_forward_pre_hook(_no_hook)

    def update_density(self, adapter_name: str, density: float) -> None:
        """Set the density of a topk adapter, which a schedule moves while it trains."""
        info = self.smn_info[adapter_name]
        info.spec = replace(info.spec, density=density)

    def _take_out_merged(self) -> None:
        """Disabled adapters are not merged; other threads wait until the base is as it was."""
        if self._disable_adapters and self.merged:
            with STATE_LOCK:
                if self.merged:
                    self.unmerge()

    def _get_available_adapters(self) -> set[str]:
        return set(self.smn_info)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for slot in self.smn_info[adapter_name].slots if adapter_name in self.smn_info else ():
            target = device or self.base_tensor(slot).device
            for container in (self.scores(slot), self.bits(slot)):
                if adapter_name in container and container[adapter_name].device.type != "meta":
                    container[adapter_name] = container[adapter_name].to(target)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module`'s, without this layer's parts while PEFT looks for `modules_to_save` by the ends of names."""
        found = super().named_modules(*args, **kwargs)
        return islice(found, 1) if self.hides_parts else found

    # --- State dicts: what a layer's entries in an adapter file are --------------------------------------------------

    def to_checkpoint(self, adapter_name: str, prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entries of the adapter's file for this layer, from a (gathered) state dict where it has them.

        Args:
            adapter_name: Name of the adapter.
            prefix: Name of this layer in `state_dict`, with the final dot.
            state_dict: State dict of the whole model.

        Returns:
            Tensors by key; the keys end in the adapter's name, as PEFT's do.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it saves.")

    def from_checkpoint(self, adapter_name: str, prefix: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State-dict entries of this layer from those of an adapter's file, checked.

        Args:
            adapter_name: Name of the adapter.
            prefix: Name of this layer, with the final dot, for messages.
            entries: Tensors by the last part of their keys (`smn_mask`, `smn_scores` …).

        Returns:
            Tensors by the last two parts of their keys in the model (`smn_mask.default` …).

        Raises:
            KeyError: If a tensor is missing; the argument is its key.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it loads.")
