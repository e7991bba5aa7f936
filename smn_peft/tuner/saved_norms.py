# SPDX-License-Identifier: Apache-2.0
"""Modules that PEFT copies for an adapter (`modules_to_save`): they are of the bare base, BatchNorms included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .adapters import AdapterLayer
from .batch_norm import BatchNorm
from .config import MaskConfig

__all__ = ["bare_norms", "parts_shown", "unwrap_rest"]


@contextmanager
def bare_norms(model: nn.Module, config: MaskConfig) -> Iterator[None]:
    """Inside, the base's own BatchNorms stand in the modules that an adapter trains whole, so that copies have them.

    Afterwards the other adapters' wrappers are where they were, or in the original that PEFT keeps beside its copies.
    """
    ends = tuple(config.modules_to_save or ())
    copied = tuple(f"{name}." for name, _ in model.named_modules() if name and ends and name.endswith(ends))
    wrappers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is BatchNorm and f"{name}.".startswith(copied)
    }
    for name, wrapper in wrappers.items():
        _put(model, name, wrapper.get_base_layer().train(wrapper.training))
    try:
        yield
    finally:
        for name, wrapper in wrappers.items():
            _put(model, name, wrapper)
            wrapper.train(wrapper.training)


@contextmanager
def parts_shown(model: nn.Module) -> Iterator[None]:
    """Afterwards every layer lists its parts again, see [`AdapterLayer.named_modules`]."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, AdapterLayer):
                module.hides_parts = False


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module at a path of the base, through the wrappers that may have come on the way."""
    parent = model
    *path, attribute = name.split(".")
    for part in path:
        parent = getattr(_original(parent, part), part)
    parent = _original(parent, attribute)
    if isinstance(now := getattr(parent, attribute, None), ModulesToSaveWrapper):
        parent, attribute = now, "original_module"
    setattr(parent, attribute, module)


def _original(module: nn.Module, part: str) -> nn.Module:
    held = isinstance(module, ModulesToSaveWrapper) and part not in module._modules
    return module.get_submodule("original_module") if held else module


def unwrap_rest(model: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Take off the layers that PEFT did not come upon, since it took off a wrapper around them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdapterLayer):
            if merge:
                module.merge(safe_merge, adapter_names)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
