# SPDX-License-Identifier: Apache-2.0
"""An adapter's entries in a file, out of a model's state dict on saving and into it, checked, on loading."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from .checks import BASE_PREFIX, misfit
from .coded import condense, expand
from .config import MaskConfig
from .identity import fingerprints
from .traversal import adapter_layers, at_every_place, file_key, places_of

__all__ = ["entries_of", "loaded_entries"]

_PREFIX = "smn_"


def entries_of(
    model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What an adapter's file holds of its layers; the fingerprint of the base is put into the config.

    Args:
        model: Model with the adapter.
        config: The adapter's configuration.
        adapter_name: Its name, at the end of the keys.
        state_dict: State dict of the whole model, gathered if it is sharded.
    """
    layers = dict(adapter_layers(model))
    config.take_fingerprints(*fingerprints(model, adapter_name, config))
    entries: dict[str, Tensor] = {}
    for name, layer in layers.items():
        own = layer.to_checkpoint(adapter_name, f"{name}." if name else "", state_dict)
        entries.update({file_key(key): value for key, value in own.items()})
    if config.codec == "bits":
        return entries
    places = {f"{key}.{adapter_name}": place for key, place in places_of(model, adapter_name).items()}
    return condense(entries, places, adapter_name, config.codec)


def loaded_entries(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], fingerprint: str | None
) -> dict[str, Tensor]:
    """A file's entries as the model's state dict wants them: buffers for inference, scores for training.

    Args:
        model: Model with the adapter.
        adapter_name: Its name.
        state_dict: The file's tensors, by key without the adapter's name.
        fingerprint: That of the base, from the file's configuration.

    Raises:
        ValueError: If masks are missing, do not fit, or belong to no masked layer.
    """
    places = {key.removeprefix(BASE_PREFIX): place for key, place in places_of(model, adapter_name).items()}
    rest = expand(state_dict, places, adapter_name, fingerprint)
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    bits_only = False
    for name, layer in adapter_layers(model):
        prefix = f"{name}." if name else ""
        bare = file_key(prefix).removeprefix(BASE_PREFIX)
        attributes = {key for key in layer._modules if key.startswith(_PREFIX)}
        entries = {
            attribute: rest.pop(key)
            for attribute in attributes
            for key in (f"{bare}{attribute}", f"{BASE_PREFIX}{bare}{attribute}")
            if key in rest
        }
        try:
            loaded = layer.from_checkpoint(adapter_name, prefix, entries)
        except KeyError as error:
            missing.append(str(error.args[0]))
            continue
        bits_only |= any("scores" in key for key in loaded) and not any("scores" in key for key in entries)
        result.update({f"{prefix}{key}": value for key, value in loaded.items()})
    strange = [key for key in rest if key.rpartition(".")[2].startswith(_PREFIX)]
    if missing or strange:
        raise misfit(missing, strange)
    if bits_only:
        warnings.warn(
            f"Adapter {adapter_name!r} was saved as bits: training goes on from its mask, with every score at the "
            "same distance from the threshold, not from its scores. For an exact resume save with "
            "save_scores=True, or resume from the trainer's checkpoint.",
            stacklevel=5,
        )
    return {**rest, **at_every_place(model, result)}
