# SPDX-License-Identifier: Apache-2.0
"""A file loaded over an adapter that is on the model already: PEFT reads its tensors alone, settings among them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..storage import AdapterFileError, is_settings, read_settings
from .batch_norm import BatchNorm
from .config import MaskConfig
from .identity import check_base
from .traversal import adapter_layers

__all__ = ["check_pair", "settings_in", "under_settings"]


def settings_in(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings among the tensors of an adapter's file; empty where an earlier release wrote it.

    Raises:
        AdapterFileError: If they are damaged.
    """
    found: dict[str, Any] = {}
    for key in filter(is_settings, state_dict):
        found |= read_settings(key, state_dict[key])
    return found


def check_pair(config: MaskConfig, settings: Mapping[str, Any]) -> None:
    """Refuse a config and a weights file of two adapters, as a copy or a save that was broken off leaves them.

    Raises:
        AdapterFileError: If what decides the answers is not the same in both.
    """
    for name in ("scale", "batch_norm", "base_fingerprint", "unmasked_fingerprint"):
        if name in settings and (own := getattr(config, name)) is not None and own != settings[name]:
            raise AdapterFileError(
                f"The adapter's config and its weights do not belong together: {name} is {own!r} in "
                f"adapter_config.json and {settings[name]!r} in the weights. Fetch or save both again."
            )


@contextmanager
def under_settings(model: Any, adapter_name: str, settings: Mapping[str, Any]) -> Iterator[MaskConfig]:
    """Give an adapter the settings of a file whose masks it takes in the block; if that fails, it has its own again.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: Name of the adapter.
        settings: From [`settings_in`].

    Yields:
        The adapter's config, with what the file says.

    Raises:
        AdapterFileError: If a setting is none that a config can have.
        ValueError: If the file's adapter does not belong to the model's base.
    """
    config: MaskConfig = model.peft_config[adapter_name]
    if all(getattr(config, name) == value for name, value in settings.items()):
        yield config
        _check(model, adapter_name, config)
        return
    try:
        new = replace(config, **settings)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"The adapter's file says what no config can say: {error} Fetch it again.") from error
    new.expects_bits, new.awaits_blob = config.expects_bits, False
    layers = [layer for _, layer in adapter_layers(model) if adapter_name in layer.smn_info]
    infos = [layer.smn_info[adapter_name] for layer in layers]
    kept = [(norm, norm.statistics_of(adapter_name)) for norm in layers if isinstance(norm, BatchNorm)]
    same_maths = new.mask_spec() == config.mask_spec()  # then a schedule goes on where it was
    model.peft_config[adapter_name] = new
    for layer, info in zip(layers, infos, strict=True):
        spec = info.spec if same_maths else new.mask_spec()
        layer.smn_info[adapter_name] = replace(info, config=new, spec=spec, trainable={})
    try:
        for norm, statistics in kept:
            if (new.batch_norm == "adapt") != bool(statistics):
                norm.set_statistics(adapter_name, norm.base_statistics() if new.batch_norm == "adapt" else {})
        yield new
        _check(model, adapter_name, new)
    except BaseException:
        model.peft_config[adapter_name] = config
        for layer, info in zip(layers, infos, strict=True):
            layer.smn_info[adapter_name] = info
        for norm, statistics in kept:
            norm.set_statistics(adapter_name, statistics)
        raise


def _check(model: nn.Module, adapter_name: str, config: MaskConfig) -> None:
    if warning := check_base(model, adapter_name, config):
        warnings.warn(warning, stacklevel=6)
