# SPDX-License-Identifier: Apache-2.0
"""`LiveParameter`: a weight that notices who reads it: products follow the task, and no other read errs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["LiveParameter", "Reading", "unwatch", "watch"]

# What can be asked of a tensor without looking at its values; anything else settles it, which is slower and as right.
_FACTS = frozenset(
    getattr(Tensor, name).__get__
    for name in "shape dtype device layout requires_grad is_leaf grad grad_fn ndim is_cuda is_cpu is_meta nbytes "
    "itemsize is_sparse is_quantized is_nested _version _backward_hooks _grad".split()
) | frozenset(
    getattr(Tensor, name)
    for name in "size dim numel nelement element_size is_floating_point is_complex is_contiguous stride __len__ "
    "storage_offset is_inference requires_grad_ get_device ndimension".split()
)


class Reading(Protocol):
    """What becomes of a parameter that is read."""

    @property
    def scale(self) -> Tensor:
        """fp32, 0-dim: what the values are still to be multiplied by; compiled graphs read it at every call."""

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear(input, weight, bias)`` with the weight that is meant."""

    def settle(self) -> None:
        """Told before anything but `F.linear` reads or writes the values: they must be right afterwards."""


class LiveParameter(nn.Parameter):
    """A parameter whose values may lack something, such as its task's 1/σ, that [`Reading`] knows.

    Whoever calls `F.linear`, the layer itself or a function around it, gets the product that is meant, at no cost. Any
    other use of the values, through whatever name or reference, settles them first.

    Compiled extensions that take a tensor without torch's Python functions are not seen (``torch.jit.script`` too).
    """

    smn_reading: Reading

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand products to the reading; settle the values before any other use of them."""
        kwargs = kwargs or {}
        if func is F.linear:
            input, weight, bias = _arguments(*args, **kwargs)
            if isinstance(weight, LiveParameter) and not isinstance(input, LiveParameter) and len(types) == 1:
                with torch._C.DisableTorchFunctionSubclass():
                    if torch.compiler.is_dynamo_compiling():
                        return F.linear(input * weight.smn_reading.scale.to(input.dtype), weight, bias)
                    return weight.smn_reading.linear(input, weight, bias)
        if torch.compiler.is_dynamo_compiling():  # the graph serves later tasks too
            with torch._C.DisableTorchFunctionSubclass():
                args, kwargs = tree_map(_scaled, (tuple(args), dict(kwargs)))
                return func(*args, **kwargs)
        if func not in _FACTS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, LiveParameter):
                    leaf.smn_reading.settle()
                    if len(types) > 1:  # another class's turn, which must see an ordinary parameter
                        unwatch(leaf)
            if len(types) > 1:
                return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter that holds what is live."""
        self.smn_reading.settle()
        with torch._C.DisableTorchFunctionSubclass():
            copy = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        return memo.setdefault(id(self), copy)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as an ordinary parameter that holds what is live."""
        self.smn_reading.settle()
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)

    __hash__ = object.__hash__


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _scaled(leaf: Any) -> Any:
    return leaf * leaf.smn_reading.scale.to(leaf.dtype) if isinstance(leaf, LiveParameter) else leaf


def watch(parameter: Tensor, reading: Reading) -> Reading | None:
    """Let a reading answer for a parameter, whose identity and memory stay; returns the one that did before."""
    before = parameter.__dict__.get("smn_reading")
    parameter.__class__ = LiveParameter
    parameter.smn_reading = reading  # type: ignore[attr-defined]
    return before


def unwatch(parameter: Tensor) -> None:
    """Make it an ordinary parameter again; its values must be settled."""
    if isinstance(parameter, LiveParameter):
        del parameter.smn_reading
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
