# SPDX-License-Identifier: Apache-2.0
"""Run a module with other tensors in the place of its own, and write nothing that another thread could see."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["call_with", "is_plain", "view_with"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is nothing more than its class's forward: no hook, no forward put over it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__


def view_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A module like the given one with other tensors; all the rest is shared with it.

    The tensors are plain attributes, which win over parameters, and over what FSDP sets: its gathered parameters are
    attributes as well.

    Args:
        module: The module, which is not changed.
        tensors: Tensors by the path of the parameter or buffer that they stand for.

    Raises:
        AttributeError: If there is no module on the way to a tensor.
    """
    view = _copy(module)
    for path, tensor in tensors.items():
        owner = view
        *parts, attribute = path.split(".")
        for part in parts:
            if part not in owner._modules:
                raise AttributeError(f"{type(owner).__name__} has no module {part!r}.")
            child = _copy(owner._modules[part])
            owner.__dict__["_modules"] = {**owner._modules, part: child}
            owner = child
        owner.__dict__[attribute] = tensor
    return view


def _copy(module: Any) -> Any:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    return copy


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Call a module as if the given tensors were its parameters and buffers.

    As `torch.func.functional_call`, but for threads: nothing of the module is written, not even for the call. Its
    hooks are called with the module itself.

    Args:
        module: The module.
        tensors: Tensors by the path of the parameter or buffer that they stand for.
        args: Passed to the module.
        kwargs: Passed to the module.
    """
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, dict(tensors), args, kwargs)
    if "forward" in module.__dict__:  # it may hold the module, as accelerate's does: no copy would be asked
        with _InPlaceOf({id(_of(module, path)): tensor for path, tensor in tensors.items()}):
            return module(*args, **kwargs)
    view = view_with(module, tensors)
    for name in _HOOKS if not is_plain(module) else ():
        hooks: Mapping[int, Callable[..., Any]] = getattr(module, name)
        view.__dict__[name] = OrderedDict((key, partial(_call_hook, hook, module)) for key, hook in hooks.items())
    return view(*args, **kwargs)


def _of(module: nn.Module, path: str) -> Any:
    owner, _, attribute = path.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def _call_hook(hook: Callable[..., Any], module: nn.Module, view: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return hook(module, *args, **kwargs)


class _InPlaceOf(TorchFunctionMode):
    """Inside, in this thread, torch's functions take other tensors for the given ones."""

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._swapped(args), **{key: self._swapped(value) for key, value in (kwargs or {}).items()})

    def _swapped(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._swapped(item) for item in value)
        return self._tensors.get(id(value), value)
