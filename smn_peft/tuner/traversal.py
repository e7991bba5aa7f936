# SPDX-License-Identifier: Apache-2.0
"""Where the adapters of a model live: its layers, and the keys of their masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from .adapters import AdapterLayer
from .slots import Slot

__all__ = ["Place", "adapter_layers", "at_every_place", "file_key", "places_of"]


class Place(NamedTuple):
    """Where a mask belongs."""

    layer: AdapterLayer
    slot: Slot


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every layer that adapters live on, with its name in the (unsharded) state dict."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name.replace("_fsdp_wrapped_module.", ""), module


def file_key(key: str) -> str:
    """A key as an adapter's file has it: as if no other adapter trained a module around the layer as a whole."""
    return key.replace("original_module.", "")


def at_every_place(model: nn.Module, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """State-dict entries under every name that their layers have: one module may stand in several places."""
    names = {layer: f"{name}." for name, layer in adapter_layers(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        first = names.get(module) if isinstance(module, AdapterLayer) else None
        if first is not None and first != f"{name}.":
            own = {f"{name}.{key[len(first) :]}": value for key, value in entries.items() if key.startswith(first)}
            entries = {**entries, **own}
    return entries


def places_of(model: nn.Module, adapter_name: str) -> dict[str, Place]:
    """Where an adapter has masks, by their keys in the (unsharded) state dict without the adapter's name."""
    return {
        file_key(f"{name}.{slot.mask_name}").removeprefix("."): Place(layer, slot)
        for name, layer in adapter_layers(model)
        if adapter_name in layer.smn_info
        for slot in layer.smn_info[adapter_name].slots
    }
