# SPDX-License-Identifier: Apache-2.0
"""Where the adapters of a model live: its layers, and the keys of their masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .adapters import AdapterLayer, Slot

__all__ = ["Place", "adapter_layers", "places_of"]


class Place(NamedTuple):
    """Where a mask belongs."""

    layer: AdapterLayer
    slot: Slot


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every layer that adapters live on, with its name in the (unsharded) state dict."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name.replace("_fsdp_wrapped_module.", ""), module


def places_of(model: nn.Module, adapter_name: str) -> dict[str, Place]:
    """Where an adapter has masks, by their keys in the (unsharded) state dict without the adapter's name."""
    return {
        f"{name}.{slot.mask_name}".removeprefix("."): Place(layer, slot)
        for name, layer in adapter_layers(model)
        if adapter_name in layer.smn_info
        for slot in layer.smn_info[adapter_name].slots
    }
