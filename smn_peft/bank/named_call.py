# SPDX-License-Identifier: Apache-2.0
"""`adapter_names` on a plain model, as PEFT's models take it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["NamedCall", "answer_names", "forget_names"]


class NamedCall(nn.Module):
    """What a model's class derives from, beside its own, while a bank is open: it answers calls with `adapter_names`.

    A copy, pickled or in memory, is of the model's own class and has no bank.
    """

    smn_mixed: Callable[[], Callable[..., Any] | None]
    smn_model: Callable[[], nn.Module | None]
    smn_class: type[nn.Module]

    def __call__(self, *inputs: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """As the model's own; with `adapter_names`, one per sample, as `MaskBank.forward`."""
        if adapter_names is None:
            return super().__call__(*inputs, **kwargs)
        mixed = self.smn_mixed()
        if mixed is None or self.smn_model() is not self:
            raise ValueError("adapter_names is for the model of an open bank: this is a copy, or its bank is closed.")
        (batch,) = inputs or (kwargs.pop("pixel_values"),)
        return mixed(batch, adapter_names, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the model's own class."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make.__name__ == "__newobj__":  # which pickle grants to an object's present class alone
            make = _new
        own = self.smn_class
        return make, tuple(own if part is type(self) else part for part in arguments), *rest


def _new(own: type[nn.Module], *arguments: Any) -> nn.Module:
    return own.__new__(own, *arguments)


def answer_names(model: nn.Module, mixed: Callable[..., Any]) -> None:
    """Hand the model's calls with `adapter_names` to a bound method, whose object is not kept alive."""
    own = type(model)
    facts = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "smn_mixed": weakref.WeakMethod(mixed),
        "smn_model": weakref.ref(model),
        "smn_class": own,
    }
    model.__class__ = type(own.__name__, (NamedCall, own), facts)


def forget_names(model: nn.Module) -> None:
    """Give the model its own class back."""
    if isinstance(model, NamedCall):
        model.__class__ = model.smn_class  # type: ignore[assignment]
