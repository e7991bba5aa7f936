# SPDX-License-Identifier: Apache-2.0
"""A layer's part of an adapter file: bits out of scores on saving, checked bits or scores on loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..functional.packing import pack_bits, packed_size, unpack_bits
from ..storage import check_packed
from .adapters import STATE_LOCK, AdapterLayer
from .slots import Slot
from .tracing import is_exporting

__all__ = ["StoredLayer"]


class StoredLayer(AdapterLayer):
    """A layer whose adapters can be saved and loaded."""

    def to_checkpoint(self, adapter_name: str, prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bits, packed from the scores of an adapter that trains; the scores too with `save_scores`.

        Raises:
            ValueError: If scores hold NaN.
        """
        if self._awaiting:
            self.settle()
        entries: dict[str, Tensor] = {}
        for slot in self.smn_info[adapter_name].slots if adapter_name in self.smn_info else ():
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
            entries[mask_key] = pack_bits(self.mask_of_scores(adapter_name, slot, scores))
            if self.smn_info[adapter_name].config.save_scores:
                entries[scores_key] = scores
        return entries

    def from_checkpoint(self, adapter_name: str, prefix: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bits for inference; scores for an adapter that trains, made from the bits if the file has none.

        Raises:
            KeyError: If a mask is missing; the argument is its key.
            TypeError: If a tensor has the wrong dtype.
            ValueError: If a tensor has the wrong shape, or padding bits are set.
        """
        result: dict[str, Tensor] = {}
        for slot in self.smn_info[adapter_name].slots if adapter_name in self.smn_info else ():
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
                self.bits(slot).take_arrived(adapter_name)
                if scores is None:
                    assert packed is not None
                    scores = self.scores_from_bits(adapter_name, slot, packed)
                elif packed is not None:
                    self.reach_density(adapter_name, slot, unpack_bits(packed.to(weight.device), weight.shape))
                result[f"{slot.scores_name}.{adapter_name}"] = scores
            else:
                if packed is None:
                    assert scores is not None
                    packed = pack_bits(self.mask_of_scores(adapter_name, slot, scores))
                result[f"{slot.mask_name}.{adapter_name}"] = packed
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for slot in self.present_slots:  # scores say more than bits: where both come, the bits are not needed
            for name in self.scores(slot):
                if f"{prefix}{slot.scores_name}.{name}" in state_dict:
                    self.bits(slot).take_arrived(name)
                elif f"{prefix}{slot.mask_name}.{name}" in state_dict:
                    self.offer_place(name, slot)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- Bits that a loader wrote past this class, where it found a place for them -----------------------------------

    def offer_place(self, adapter_name: str, slot: Slot) -> None:
        """Give a loader a place where it may write bits for an adapter that trains: its mask as it is now."""
        scores = self.scores(slot)[adapter_name]
        if scores.device.type == "meta":
            packed = torch.empty(packed_size(scores.numel()), dtype=torch.uint8, device="meta")
        else:
            packed = pack_bits(self.mask_of_scores(adapter_name, slot, scores))
        self.bits(slot).expect(adapter_name, packed)
        self._awaiting = True

    def settle(self) -> None:
        """[`receive`], but in a graph, which would break there, only if it has something to do.

        A graph sees no tensor's version; what a loader writes in place comes by `_load_from_state_dict`.
        """
        if not (torch.compiler.is_compiling() or is_exporting()):
            self.receive()
            return
        configs = [info.config for info in self.smn_info.values()]
        arrived = self._was_loaded or any(config.being_loaded or config.awaits_blob for config in configs)
        if is_exporting():  # there every tensor is a stand-in
            if arrived:
                raise RuntimeError("Masks were loaded and not taken over yet: call the model once before its export.")
            return
        if arrived or any(self.bits(slot).replaced for slot in self.present_slots):
            self.receive()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def receive(self) -> bool:
        """Turn the bits that a loader wrote for an adapter that trains into its scores; once, before the first use.

        Other threads wait until it is done.

        Returns:
            Whether there were any.

        Raises:
            RuntimeError: If an adapter's masks lie coded in a file that its loader could not read.
        """
        with STATE_LOCK:
            return self._awaiting and self._receive()

    def _receive(self) -> bool:
        for name, info in self.smn_info.items():
            if info.config.awaits_blob:
                raise RuntimeError(
                    f"The masks of adapter {name!r} never arrived: its file holds them coded "
                    f"(codec={info.config.codec!r}), which transformers' own load_adapter does not read. Load it with "
                    "PeftModel.from_pretrained, or write it bit-packed with `smn unpack`. If you only want its "
                    "configuration for a fresh adapter, pass dataclasses.replace(config, base_fingerprint=None)."
                )
        any_arrived = False
        for slot in self.present_slots:
            for name, scores in self.scores(slot).items():
                self.smn_info[name].config.being_loaded = False
                arrived = self.bits(slot).take_arrived(name)
                if arrived is not None and scores.device.type != "meta":
                    any_arrived = True
                    with torch.no_grad():
                        scores.copy_(self.scores_from_bits(name, slot, arrived))
        self._awaiting = self._was_loaded = False  # now, and not before: other threads look at it
        return any_arrived

    def _replicate_for_data_parallel(self) -> StoredLayer:
        """As torch's, which makes a replica for every device in every forward of `nn.DataParallel`.

        Raises:
            RuntimeError: If something is left to do that every replica would do on its own.
        """
        if self._awaiting and self.receive():
            raise RuntimeError(
                "Masks were loaded and not taken over yet: call the model once before it is in nn.DataParallel."
            )
        if self._disable_adapters and self.merged:
            raise RuntimeError("Adapters are merged and disabled: call unmerge_adapter() before nn.DataParallel runs.")
        replica: StoredLayer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        return replica
