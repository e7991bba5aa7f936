# SPDX-License-Identifier: Apache-2.0
"""Take back an adapter whose injection or loading failed, so that the model is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .adapters import AdapterLayer

__all__ = ["discard", "whole_or_nothing"]


@contextmanager
def whole_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Withdraw an adapter from the base model if the block that injects it fails.

    Layers that no other adapter uses are unwrapped, and what was trainable is so again.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    except Exception:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AdapterLayer)]
        for name, layer in layers:
            if adapter_name in layer.smn_info:
                layer.delete_adapter(adapter_name)
            if not layer.smn_info:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise


def discard(model: Any, adapter_name: str) -> None:
    """Take an adapter off a `PeftModel` after its file turned out to be bad; the last one leaves the bare base."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, BaseTuner):  # injected without a PeftModel: PEFT has nothing that could take it back
        return
    if len(tuner.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        tuner.unload()
