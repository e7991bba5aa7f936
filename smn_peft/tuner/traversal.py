# SPDX-License-Identifier: Apache-2.0
"""Where the adapters of a model live: its layers, and the keys of their masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .adapters import AdapterLayer
from .kinds import COMPILED, type_name
from .slots import Slot

__all__ = ["Place", "adapter_layers", "at_every_place", "bare_key", "file_names", "places_of", "uncompiled"]


class Place(NamedTuple):
    """Where a mask belongs."""

    layer: AdapterLayer
    slot: Slot


def bare_key(key: str) -> str:
    """A key without what FSDP and `torch.compile` put into it where they wrap a part of a model."""
    return key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every layer that adapters live on, with its name in the (unsharded) state dict."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name.replace("_fsdp_wrapped_module.", ""), module


def file_names(model: nn.Module) -> dict[AdapterLayer, str]:
    """Every adapted layer's prefix as an adapter's file has it: as if nothing else wrapped it or what it lies in."""
    wholes = [f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    names: dict[AdapterLayer, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            prefix = f"{name}." if name else ""
            for whole in wholes:  # another adapter trains it, and keeps the base's own beside its copies
                if prefix.startswith(f"{whole}original_module."):
                    prefix = whole + prefix.removeprefix(f"{whole}original_module.")
            names[module] = bare_key(prefix)
    return names


def uncompiled(model: nn.Module) -> nn.Module:
    """A model without the wrappers of `torch.compile(module)` around it or its parts; it runs compiled as before.

    They would be in the names of all that lies in them, and an adapter's file would fit no other copy of the base.
    """
    for name, module in list(model.named_modules()):
        if type_name(module) != COMPILED:
            continue
        inner: Any = module.get_submodule("_orig_mod")
        inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)  # as `inner.compile()` does, with its options
        if not name:
            return uncompiled(inner)
        parent, _, attribute = bare_key(name).rpartition(".")
        setattr(model.get_submodule(parent), attribute, inner)
    return model


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
        f"{prefix}{slot.mask_name}": Place(layer, slot)
        for layer, prefix in file_names(model).items()
        if adapter_name in layer.smn_info
        for slot in layer.smn_info[adapter_name].slots
    }
