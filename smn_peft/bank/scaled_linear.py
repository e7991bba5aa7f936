# SPDX-License-Identifier: Apache-2.0
"""A plain `nn.Linear` that multiplies by 1/σ on the way, at no cost, so that its weight need not hold it."""

from __future__ import annotations

import inspect
from types import CodeType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .live_tensor import LiveTensor

__all__ = ["ScaledLinear", "scalable_weights"]

_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # these use their layers' weights without calling them


def scalable_weights(model: nn.Module) -> set[str]:
    """Names of the weights of plain Linear layers that are always called: there σ may stay out of the weight.

    A layer is not among them if the code of a module around it names both the layer and `weight`, as timm's BEiT, EVA
    and Swin V2 do, whose attention calls ``F.linear(x, self.qkv.weight, …)``.
    """
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, _READERS))
    names = {kind: _names(kind) for kind in {type(module) for module in modules.values()}}
    readers = {name: names[type(module)] for name, module in modules.items() if "weight" in names[type(module)]}

    def is_called(path: str) -> bool:
        *parents, leaf = path.split(".")
        around = (".".join(parents[:depth]) for depth in range(len(parents) + 1))
        return not any(leaf in readers.get(name, ()) for name in around)

    return {
        f"{name}.weight"
        for name, module in modules.items()
        if type(module) is nn.Linear
        and not f"{name}.".startswith(inside)
        and "forward" not in module.__dict__
        and is_called(name)
    }


def _names(kind: type[nn.Module]) -> set[str]:
    """Attributes that a class's forward uses, and the methods that it calls; of torch's own modules none."""
    names: set[str] = set()
    waiting = [] if kind.__module__.startswith("torch.nn.") else ["forward"]
    while waiting:
        found = _names_in(getattr(inspect.unwrap(getattr(kind, waiting.pop())), "__code__", None))
        waiting += [name for name in found - names if inspect.isfunction(getattr(kind, name, None))]
        names |= found
    return names


def _names_in(code: CodeType | None) -> set[str]:
    """Of a function, and of those that are written inside it."""
    if code is None:
        return set()
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


class ScaledLinear:
    """Stands in for the forward of one `nn.Linear`: ``s·(x Wᵀ) + b`` with s of the task that the weight holds."""

    def __init__(self, layer: nn.Linear, live: LiveTensor) -> None:
        """Put itself in place of the layer's forward."""
        self._layer, self._live = layer, live
        self._scale = torch.ones((), dtype=torch.float32, device=layer.weight.device)
        layer.forward = self  # type: ignore[method-assign]

    def follow(self) -> None:
        """Take the scale of the task that was switched to; a compiled graph reads it from the same place."""
        self._scale.fill_(self._live.outside)

    def move(self) -> None:
        """Go to the device where the layer is now."""
        self._scale = self._scale.to(self._layer.weight.device)

    def remove(self) -> None:
        """Give the layer its own forward back."""
        del self._layer.forward

    def __call__(self, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        weight, bias = self._layer.weight, self._layer.bias
        if torch.compiler.is_compiling():
            return F.linear(input * self._scale.to(input.dtype), weight, bias)
        scale = self._live.outside
        if scale == 1.0 or input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
            return F.linear(input if scale == 1.0 else input * scale, weight, bias)
        flat = input.reshape(-1, input.shape[-1])
        if bias is None:
            product = flat.new_empty(len(flat), len(weight))
            product = torch.addmm(product, flat, weight.t(), beta=0, alpha=scale)
        else:
            product = torch.addmm(bias, flat, weight.t(), alpha=scale)
        return product.view(*input.shape[:-1], len(weight))
