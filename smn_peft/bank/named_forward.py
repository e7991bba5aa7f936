# SPDX-License-Identifier: Apache-2.0
"""`adapter_names` on a plain model, as PEFT's models take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["NamedForward"]


class NamedForward:
    """Stands in for a model's forward, and hands calls with `adapter_names` to the bank."""

    def __init__(self, model: nn.Module, mixed: Callable[..., Any]) -> None:
        """Put itself in place of the model's forward."""
        self._model, self._mixed, self._forward = model, mixed, model.forward
        model.forward = self

    def remove(self) -> None:
        """Give the model its own forward back."""
        del self._model.forward

    def __call__(self, *inputs: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """As the model's own; with `adapter_names`, one per sample, as `MaskBank.forward`."""
        if adapter_names is None:
            return self._forward(*inputs, **kwargs)
        (batch,) = inputs or (kwargs.pop("pixel_values"),)
        return self._mixed(batch, adapter_names, **kwargs)
