# SPDX-License-Identifier: Apache-2.0
"""An adapter's entries in a file, out of a model's state dict on saving and into it, checked, on loading."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..storage import SETTINGS_NAME, is_settings, settings_tensor
from .checks import BASE_PREFIX, misfit
from .coded import condense, expand
from .config import MaskConfig
from .identity import fingerprints
from .traversal import adapter_layers, at_every_place, file_names, places_of

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
    layers, names = dict(adapter_layers(model)), file_names(model)
    config.take_fingerprints(*fingerprints(model, adapter_name, config))
    entries: dict[str, Tensor] = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        own = layer.to_checkpoint(adapter_name, prefix, state_dict)
        entries.update({f"{names[layer]}{key.removeprefix(prefix)}": value for key, value in own.items()})
    if config.unmasked_fingerprint is not None:  # an adapter of an earlier release keeps its file as it was
        prefix = BASE_PREFIX if next(iter(layers), "").startswith(BASE_PREFIX) else ""
        entries[f"{prefix}{SETTINGS_NAME}.{adapter_name}"] = settings_tensor(config.to_dict())
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
    rest = {key: value for key, value in rest.items() if not is_settings(key)}
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    strange: list[str] = []
    bits_only, names = False, file_names(model)
    for name, layer in adapter_layers(model):
        prefix = f"{name}." if name else ""
        bare = names[layer].removeprefix(BASE_PREFIX)
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
        strange += [f"{bare}{attribute}" for attribute in _unused(entries, loaded)]
        bits_only |= any("scores" in key for key in loaded) and not any("scores" in key for key in entries)
        result.update({f"{prefix}{key}": value for key, value in loaded.items()})
    strange += [key for key in rest if key.rpartition(".")[2].startswith(_PREFIX)]
    strange += [key for key in rest if _is_base_s(model, key)]
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


def _is_base_s(model: nn.Module, key: str) -> bool:
    """Whether a loader would write a file's tensor over the frozen base's: only PEFT's embeddings may come so."""
    path, _, attribute = key.rpartition(".")
    for owner in (path, path.removeprefix(BASE_PREFIX)):
        parts = owner.split(".") if owner else []
        module, copied = model, False
        for part in parts:
            copied |= isinstance(module, AuxiliaryTrainingWrapper) and part != "original_module"
            module = module._modules.get(part)  # type: ignore[assignment]
            if module is None:
                break
        else:
            if attribute in module._parameters or attribute in module._buffers:
                return not copied and not _is_embedding(model, module)
    return False


def _is_embedding(model: nn.Module, module: nn.Module) -> bool:
    ends = (getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output"))
    return isinstance(module, nn.Embedding) or any(module is end() for end in ends)


def _unused(entries: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    """What a file has for a layer and the layer does not take; of a mask's scores and bits it may take either."""

    def what(key: str) -> str:
        return key.partition(".")[0].replace("scores", "mask")

    taken = set(map(what, loaded))
    return [attribute for attribute in entries if what(attribute) not in taken]
