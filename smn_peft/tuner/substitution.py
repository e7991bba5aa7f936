# SPDX-License-Identifier: Apache-2.0
"""Run a module with other tensors in the place of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call_with", "is_plain"]

_ABSENT = object()


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is nothing more than its class's forward: no hook, no forward put over it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Call a module as if the given tensors were its parameters.

    As `torch.func.functional_call`, which FSDP bypasses: it sets its gathered parameters as plain attributes, and an
    attribute wins over `_parameters`. So attributes are what is set here.

    Args:
        module: The module; it is as before when the call returns or raises.
        tensors: Tensors by the path of the parameter that they stand for.
        args: Passed to the module.
        kwargs: Passed to the module.
    """
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, dict(tensors), args, kwargs)
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, tensor in tensors.items():
            owner, _, attribute = path.rpartition(".")
            attributes = module.get_submodule(owner).__dict__
            saved.append((attributes, attribute, attributes.get(attribute, _ABSENT)))
            attributes[attribute] = tensor
        return module(*args, **kwargs)
    finally:
        for attributes, attribute, value in saved:
            if value is _ABSENT:
                del attributes[attribute]
            else:
                attributes[attribute] = value
