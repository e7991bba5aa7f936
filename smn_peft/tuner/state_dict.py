# SPDX-License-Identifier: Apache-2.0
"""An adapter's file: its entries out of a model's state dict on saving, and into it, checked, on loading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..functional.packing import packed_size
from ..storage.adapter_config import SETTINGS_NAME, is_settings, read_settings, settings_tensor
from ..storage.adapter_file import BASE_PREFIX, coded_masks, purpose_of, rounded
from ..storage.codec.blob import BLOB_NAME, decode_masks
from ..storage.files import AdapterFileError
from ..storage.repack import pack_tensors, shared_prefix
from .batch_norm import BatchNorm
from .checks import check_base, fingerprints
from .config import MaskConfig
from .layer import MaskLayer
from .wrapper import AdapterLayer, Slot, adapter_layers

__all__ = ["bare_key", "check_pair", "entries_of", "loaded_entries", "reload_entries", "round_extras"]

_PREFIX = "smn_"


# --- Keys ------------------------------------------------------------------------------------------------------------


def bare_key(key: str) -> str:
    """Remove what wrappers of FSDP and `torch.compile` put into a key."""
    return key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


def _file_names(model: nn.Module) -> dict[AdapterLayer, str]:
    """Prefix of every adapted layer's keys in an adapter's file, where no other wrapper shows."""
    wholes = [f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    names: dict[AdapterLayer, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            prefix = f"{name}." if name else ""
            for whole in wholes:  # another adapter trains it, and keeps the base's own beside its copies
                if prefix.startswith(f"{whole}original_module."):
                    prefix = whole + prefix.removeprefix(f"{whole}original_module.")
            names[module] = bare_key(prefix)
    return names


def _places(model: nn.Module, adapter_name: str) -> dict[str, tuple[MaskLayer, Slot]]:
    """Where an adapter has masks, by their keys in the (unsharded) state dict without the adapter's name."""
    return {
        f"{prefix}{slot.mask_name}": (layer, slot)
        for layer, prefix in _file_names(model).items()
        if isinstance(layer, MaskLayer)
        for slot in layer.slots_of(adapter_name)
    }


def _at_every_place(model: nn.Module, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Repeat entries under every name of their layers: one module may stand in several places."""
    names = {layer: f"{name}." for name, layer in adapter_layers(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        first = names.get(module) if isinstance(module, AdapterLayer) else None
        if first is not None and first != f"{name}.":
            own = {f"{name}.{key[len(first) :]}": value for key, value in entries.items() if key.startswith(first)}
            entries = {**entries, **own}
    return entries


# --- Saving ----------------------------------------------------------------------------------------------------------


def entries_of(
    model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Collect what an adapter's file holds of its layers, and store the base's fingerprints in the config.

    `state_dict` is the whole model's, gathered if it is sharded. PEFT takes the adapter's `modules_to_save` from it
    afterwards: they are rounded in it to `save_dtype`.
    """
    layers, names = dict(adapter_layers(model)), _file_names(model)
    entries: dict[str, Tensor] = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        own = layer.to_checkpoint(adapter_name, prefix, state_dict)
        entries.update({f"{names[layer]}{key.removeprefix(prefix)}": value for key, value in own.items()})
    config.take_fingerprints(*fingerprints(model, adapter_name, config))
    suffix = f".{adapter_name}"
    masks = [key for key in entries if purpose_of(key.removesuffix(suffix)) == "mask"]
    heads = [key for key in state_dict if f".modules_to_save{suffix}." in key]
    changed = _round(config.save_dtype, state_dict, heads)
    changed += _round(config.save_dtype, entries, [key for key in entries if "smn_running_" in key])
    if changed:
        warnings.warn(
            f"{changed} values of head and statistics were rounded to {config.save_dtype} on saving: the file is not "
            "what was evaluated. Call smn_peft.round_extras(model) before the evaluation.",
            stacklevel=5,
        )
    if config.unmasked_fingerprint is not None:  # an adapter of an earlier release keeps its file as it was
        prefix = BASE_PREFIX if next(iter(layers), "").startswith(BASE_PREFIX) else ""
        rest = [value for key, value in entries.items() if key not in masks]
        rest += _saved_whole(model, adapter_name, state_dict)
        entries[f"{prefix}{SETTINGS_NAME}{suffix}"] = settings_tensor(config.to_dict(), rest)
    if config.codec == "bits" or not masks:
        return entries
    packed = {key.removesuffix(suffix): entries.pop(key) for key in masks}
    coded = pack_tensors(packed, _Selected(_places(model, adapter_name), adapter_name, shared_prefix(packed)))
    return {**entries, **{f"{key}{suffix}": value for key, value in coded.items()}}


def _saved_whole(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> list[Tensor]:
    """Tensors of the adapter's `modules_to_save`, which PEFT adds to its file."""
    found: list[Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            prefix = f"{name.removeprefix('_fsdp_wrapped_module.')}."
            own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
            found += module.adapter_state_dict(adapter_name, own).values()  # type: ignore[call-arg]
    return found


def _round(save_dtype: str, tensors: dict[str, Tensor], keys: list[str]) -> int:
    """Round some of the tensors; returns how many values changed."""
    changed = 0
    for key in keys:
        narrow = rounded(key, tensors[key], save_dtype)
        if narrow is not tensors[key]:
            changed += int((narrow.to(tensors[key].dtype) != tensors[key]).sum())
            tensors[key] = narrow
    return changed


class _Selected:
    """What the codec asks of the base: which weights an adapter masks, by the layer's name in a blob."""

    def __init__(self, places: Mapping[str, tuple[MaskLayer, Slot]], adapter_name: str, shared: str) -> None:
        self._places, self._adapter_name, self._shared = places, adapter_name, shared

    def selected(self, name: str) -> NDArray[np.bool_] | None:
        layer, slot = self._places[f"{self._shared}{name}"]
        chosen = layer.trainable(self._adapter_name, slot)
        return None if chosen is None else chosen.cpu().numpy().reshape(-1)


# --- Loading ---------------------------------------------------------------------------------------------------------


def loaded_entries(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a file's entries, by key without the adapter's name, to buffers for inference or scores for training.

    Raises:
        AdapterFileError: If coded masks are damaged.
        ValueError: If masks are missing, do not fit, or belong to no masked layer.
    """
    rest = {key: value for key, value in _decoded(model, adapter_name, state_dict).items() if not is_settings(key)}
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    strange: list[str] = []
    bits_only, names = False, _file_names(model)
    for name, layer in adapter_layers(model):
        prefix = f"{name}." if name else ""
        bare = names[layer].removeprefix(BASE_PREFIX)
        entries = {
            attribute: rest.pop(key)
            for attribute in layer._modules
            if attribute.startswith(_PREFIX)
            for key in (f"{bare}{attribute}", f"{BASE_PREFIX}{bare}{attribute}")
            if key in rest
        }
        try:
            loaded = layer.from_checkpoint(adapter_name, prefix, entries)
        except KeyError as error:
            missing.append(str(error.args[0]))
            continue
        taken = {key.partition(".")[0].replace("scores", "mask") for key in loaded}  # of scores and bits either
        strange += [f"{bare}{attribute}" for attribute in entries if attribute.replace("scores", "mask") not in taken]
        bits_only |= any("scores" in key for key in loaded) and not any("scores" in key for key in entries)
        result.update({f"{prefix}{key}": value for key, value in loaded.items()})
    strange += [key for key in rest if key.rpartition(".")[2].startswith(_PREFIX) or _is_of_base(model, key)]
    if missing or strange:
        raise _misfit(missing, strange)
    if bits_only:
        warnings.warn(
            f"Adapter {adapter_name!r} was saved as bits: training goes on from its mask, with every score at the "
            "same distance from the threshold, not from its scores. For an exact resume save with "
            "save_scores=True, or resume from the trainer's checkpoint.",
            stacklevel=5,
        )
    own = dict((*model.named_parameters(), *model.named_buffers()))
    return {  # in the dtype of the model's own tensor, for loaders that put them in its place
        key: value.to(own[key].dtype) if key in own and value.is_floating_point() else value
        for key, value in {**rest, **_at_every_place(model, result)}.items()
    }


def _misfit(missing: list[str], strange: list[str]) -> ValueError:
    return ValueError(
        f"The adapter's masks do not fit this model: {len(missing)} missing ({', '.join(missing[:3])} …), "
        f"{len(strange)} that no masked layer takes ({', '.join(strange[:3])} …). If the module paths differ "
        "between versions of transformers, pass key_mapping to from_pretrained: "
        "smn_peft.backbones.clip_key_mapping() gives CLIP's."
    )


def _is_of_base(model: nn.Module, key: str) -> bool:
    """Whether a file's tensor would overwrite one of the frozen base, as only PEFT's embeddings may."""
    path, _, attribute = key.rpartition(".")
    for owner in (path, path.removeprefix(BASE_PREFIX)):
        module, copied = model, False
        for part in owner.split(".") if owner else ():
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


def _decoded(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace a blob among the tensors of an adapter's file by the packed masks that it codes, one per layer."""
    if (coded := coded_masks(state_dict)) is None:
        return dict(state_dict)
    prefix, blob = coded
    shared = prefix.removeprefix(BASE_PREFIX)
    places = {key.removeprefix(BASE_PREFIX): place for key, place in _places(model, adapter_name).items()}
    found = {f"{shared}{entry.name}": entry.size for entry in blob.entries}
    if found.keys() != places.keys():
        raise _misfit(sorted(places.keys() - found.keys()), sorted(found.keys() - places.keys()))
    for name, size in found.items():
        layer, slot = places[name]
        numel = layer.base_tensor(slot).numel()
        if size != packed_size(numel):
            raise ValueError(
                f"{name} codes {size} bytes, but the base weight has {numel} entries and takes {packed_size(numel)}. "
                "The adapter was made for another architecture: load the base model that adapter_config.json names."
            )
    device = state_dict[f"{prefix}{BLOB_NAME}"].device
    masks = decode_masks(blob, blob.size, _Selected(places, adapter_name, shared))  # every size is the base's
    rest = {key: value for key, value in state_dict.items() if key != f"{prefix}{BLOB_NAME}"}
    return {**rest, **{f"{prefix}{name}": torch.from_numpy(bits).to(device) for name, bits in masks.items()}}


# --- Settings: the weights file has what of the config decides the answers, since PEFT may load that file alone ------


def _settings_in(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings among the tensors of an adapter's file; empty where an earlier release wrote it."""
    found: dict[str, Any] = {}
    for key in filter(is_settings, state_dict):
        found |= read_settings(key, state_dict[key])
    return found


def check_pair(config: MaskConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a config and a weights file of two adapters, as an interrupted copy or save leaves them."""
    settings = _settings_in(state_dict)
    for name in ("scale", "batch_norm", "base_fingerprint", "unmasked_fingerprint"):
        if name in settings and (own := getattr(config, name)) is not None and own != settings[name]:
            raise AdapterFileError(
                f"The adapter's config and its weights do not belong together: {name} is {own!r} in "
                f"adapter_config.json and {settings[name]!r} in the weights. Fetch or save both again."
            )


def reload_entries(model: Any, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[`loaded_entries`] for an adapter that is on the model already; its file's settings replace the adapter's.

    If anything fails, the adapter is as it was.
    """
    with _under_settings(model, adapter_name, _settings_in(state_dict)) as config:
        entries = loaded_entries(model, adapter_name, state_dict)
        if warning := check_base(model, adapter_name, config):
            warnings.warn(warning, stacklevel=5)
        return entries


@contextmanager
def _under_settings(model: Any, adapter_name: str, settings: Mapping[str, Any]) -> Iterator[MaskConfig]:
    """Apply a file's settings to an adapter; if the block fails, restore its own."""
    config: MaskConfig = model.peft_config[adapter_name]
    if all(getattr(config, name) == value for name, value in settings.items()):
        yield config
        return
    try:
        new = replace(config, **settings)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"The adapter's file says what no config can say: {error} Fetch it again.") from error
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
    except BaseException:
        model.peft_config[adapter_name] = config
        for layer, info in zip(layers, infos, strict=True):
            layer.smn_info[adapter_name] = info
        for norm, statistics in kept:
            norm.set_statistics(adapter_name, statistics)
        raise


# --- Head and statistics in a narrow dtype ---------------------------------------------------------------------------


@torch.no_grad()
def round_extras(model: PeftModel, adapter_name: str = "default") -> int:
    """Round an adapter's head and BatchNorm statistics to the `save_dtype` of its config, in place.

    The tensors keep their dtype and hold values that the file holds exactly: evaluate after this call, and what is
    measured is what is saved. With ``save_dtype="float32"`` nothing is done.

    Returns:
        The number of values that changed.

    Raises:
        ValueError: If a value is beyond what the dtype can hold.
    """
    config: MaskConfig = model.peft_config[adapter_name]  # type: ignore[assignment]
    part, changed = f".modules_to_save.{adapter_name}.", 0
    for path, module in model.named_modules():
        extras: dict[str, Tensor] = {}
        if isinstance(module, BatchNorm):
            extras = {f"{path}.{name}": tensor for name, tensor in module.statistics_of(adapter_name).items()}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            own = (*module.named_parameters(prefix=path), *module.named_buffers(prefix=path))
            extras = {key: tensor for key, tensor in own if part in key}
        narrow = dict(extras)
        changed += _round(config.save_dtype, narrow, list(extras))
        for key, tensor in extras.items():
            if narrow[key] is not tensor:
                tensor.copy_(narrow[key])
    return changed
