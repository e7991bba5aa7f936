# SPDX-License-Identifier: Apache-2.0
"""A layer's part of an adapter file: bits out of scores on saving, checked bits or scores on loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..functional.packing import pack_bits, unpack_bits
from ..storage import check_packed
from .adapters import AdapterLayer

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
