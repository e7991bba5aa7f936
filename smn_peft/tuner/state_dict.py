# SPDX-License-Identifier: Apache-2.0
"""An adapter's file: its entries out of a model's state dict on saving, and into it, checked, on loading."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..functional.distributed import overwrite, unsharded
from ..storage.adapter_config import (
    SETTINGS_NAME,
    is_settings,
    read_settings,
    settings_tensor,
)
from ..storage.adapter_file import (
    BASE_PREFIX,
    check_packed,
    coded_masks,
    narrowed,
    purpose_of,
    widened,
)
from ..storage.codec.blob import BLOB_NAME, decode_masks
from ..storage.files import AdapterFileError
from ..storage.repack import pack_tensors, shared_prefix
from .batch_norm import BatchNorm
from .checks import check_base, fingerprints
from .config import MaskConfig
from .layer import MaskLayer
from .wrapper import AdapterInfo, AdapterLayer, Slot, adapter_layers


def bare_key(key: str) -> str:
    """Remove what the wrapper of `torch.compile` puts into a key."""
    return key.replace("_orig_mod.", "")


def _named_layers(model: nn.Module) -> list[tuple[AdapterLayer, str, str]]:
    """Adapted layers, with the prefix of their keys in the state dict, and in a file, where no other wrapper shows."""
    wrappers = (name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    wholes = [f"{bare_key(name)}." for name in wrappers]
    found: list[tuple[AdapterLayer, str, str]] = []
    for name, layer in adapter_layers(model):
        prefix = f"{name}." if name else ""
        own = bare_key(prefix)
        for whole in wholes:  # another adapter trains it, and keeps the base's own beside its copies
            if own.startswith(f"{whole}original_module."):
                own = whole + own.removeprefix(f"{whole}original_module.")
        found.append((layer, prefix, own))
    return found


class _Places(dict[str, tuple[MaskLayer, Slot]]):
    """Where an adapter has masks, by their keys in a file; the codec's names lack what all of them `shared`."""

    def __init__(self, model: nn.Module, adapter_name: str, shared: str) -> None:
        self.adapter_name, self.shared = adapter_name, shared.removeprefix(BASE_PREFIX)
        for layer, _, own in _named_layers(model):
            if isinstance(layer, MaskLayer):
                for slot in layer.slots_of(adapter_name):
                    self[f"{own}{slot.mask_name}".removeprefix(BASE_PREFIX)] = layer, slot

    def selected(self, name: str) -> NDArray[np.bool_] | None:
        """Which weights of a layer the adapter masks; None for all."""
        layer, slot = self[f"{self.shared}{name}"]
        chosen = layer.trainable(self.adapter_name, slot)
        return None if chosen is None else chosen.cpu().numpy().reshape(-1)


def entries_of(
    model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Collect what an adapter's file holds of its layers, and store the base's fingerprints in the config.

    `state_dict` is the whole model's, gathered if it is sharded. PEFT takes the adapter's `modules_to_save` from it
    afterwards: they are rounded in it to `save_dtype`.
    """
    entries: dict[str, Tensor] = {}
    for layer, prefix, own in _named_layers(model):
        found = layer.to_checkpoint(adapter_name, prefix, state_dict)
        entries.update({f"{own}{key.removeprefix(prefix)}": value for key, value in found.items()})
    config.take_fingerprints(*fingerprints(model, adapter_name, config, state_dict))
    suffix = f".{adapter_name}"
    masks = [key for key in entries if purpose_of(key.removesuffix(suffix)) == "mask"]
    heads = [key for key in state_dict if f".modules_to_save{suffix}." in key]
    state_dict.update({key: unsharded(state_dict[key]) for key in heads})
    changed = 0
    for part, keys in ((state_dict, heads), (entries, [key for key in entries if "smn_running_" in key])):
        narrow, count = _narrow(config.save_dtype, {key: part[key] for key in keys})
        part.update(narrow)
        changed += count
    if changed:
        warnings.warn(
            f"{changed} values of head and statistics were rounded to {config.save_dtype} on saving: the file is not "
            "what was evaluated. Call smn_peft.round_extras(model) before the evaluation.",
            stacklevel=5,
        )
    if config.unmasked_fingerprint is not None:  # an adapter of an earlier release keeps its file as it was
        rest = [value for key, value in entries.items() if key not in masks]
        for name, module in model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT adds it to the file
                rest += _of_wrapper(module, name, adapter_name, state_dict).values()
        prefix = BASE_PREFIX if any(key.startswith(BASE_PREFIX) for key in entries) else ""
        entries[f"{prefix}{SETTINGS_NAME}{suffix}"] = settings_tensor(config.to_dict(), rest)
    if config.codec == "bits" or not masks:
        return entries
    packed = {key.removesuffix(suffix): entries.pop(key) for key in masks}
    coded = pack_tensors(packed, _Places(model, adapter_name, shared_prefix(packed)))
    return {**entries, **{f"{key}{suffix}": value for key, value in coded.items()}}


def _of_wrapper(module: Any, name: str, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter trains whole of a module of PEFT's at `name`, out of the model's state dict."""
    held = {key.removeprefix(f"{name}."): own for key, own in state_dict.items() if key.startswith(f"{name}.")}
    found: dict[str, Tensor] = module.adapter_state_dict(adapter_name, held)
    return found


def _narrow(save_dtype: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Tensors as a file holds them, and how many values change by that."""
    narrow = {key: narrowed(key, tensor, save_dtype) for key, tensor in tensors.items()}
    wide = widened(narrow)
    changed = (wide[key].to(tensor.dtype) != tensor for key, tensor in tensors.items() if narrow[key] is not tensor)
    return narrow, sum(int(each.sum()) for each in changed)


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
    changed, state = 0, model.state_dict()  # the model's: under FSDP2 a part's may be a copy
    for path, module in model.named_modules():
        extras: dict[str, Tensor] = {}
        if isinstance(module, BatchNorm):
            extras = module.statistics_of(adapter_name)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            extras = _of_wrapper(module, path, adapter_name, state)
        values = {name: unsharded(tensor) for name, tensor in extras.items()}
        narrow, count = _narrow(config.save_dtype, {f"{path}.{name}": tensor for name, tensor in values.items()})
        if count:
            changed += count
            wide = widened(narrow)
            for name, tensor in extras.items():
                overwrite(tensor, wide[f"{path}.{name}"])
    return changed


def loaded_entries(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a file's entries, by key without the adapter's name, to buffers for inference or scores for training.

    Raises:
        AdapterFileError: If coded masks are damaged.
        ValueError: If masks are missing, do not fit, or belong to no masked layer.
    """
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    read = {key: value for key, value in _decoded(model, adapter_name, state_dict).items() if not is_settings(key)}
    # What is int8 in the model too is no narrow head.
    rest = read | widened({key: read[key] for key in read if getattr(tensors.get(key), "dtype", None) != torch.int8})
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    strange: list[str] = []
    bits_only = False
    places: dict[nn.Module, list[str]] = defaultdict(list)  # one module may stand in several
    for name, module in model.named_modules(remove_duplicate=False):
        places[module].append(name)
    of_layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in [key for key in rest if key.rpartition(".")[2].startswith("smn_")]:
        name, dot, attribute = key.removeprefix(BASE_PREFIX).rpartition(".")
        of_layers[name + dot][attribute] = rest.pop(key)
    for layer, prefix, own in _named_layers(model):
        entries = of_layers[own.removeprefix(BASE_PREFIX)]
        with_scores = any("scores" in key for key in entries)
        try:
            loaded = layer.from_checkpoint(adapter_name, prefix, entries)
        except KeyError as error:
            missing.append(str(error.args[0]))
            continue
        bits_only |= any("scores" in key for key in loaded) and not with_scores
        for place in places[layer]:
            result.update({f"{place}.{key}".removeprefix("."): value for key, value in loaded.items()})
    strange += [f"{name}{attribute}" for name, entries in of_layers.items() for attribute in entries]
    strange += [key for key in rest if _is_of_base(model, key, tensors)]
    if missing or strange:
        raise _misfit(missing, strange)
    if bits_only:
        warnings.warn(
            f"Adapter {adapter_name!r} was saved as bits: training goes on from its mask, with every score at the "
            "same distance from the threshold, not from its scores. For an exact resume save with "
            "save_scores=True, or resume from the trainer's checkpoint.",
            stacklevel=5,
        )
    return {  # in the dtype of the model's own tensor, for loaders that put them in its place
        key: value.to(tensors[key].dtype) if key in tensors and value.is_floating_point() else value
        for key, value in {**rest, **result}.items()
    }


def _misfit(missing: list[str], strange: list[str]) -> ValueError:
    return ValueError(
        f"The adapter's masks do not fit this model: {len(missing)} missing ({', '.join(missing[:3])} …), "
        f"{len(strange)} that no masked layer takes ({', '.join(strange[:3])} …). If the module paths differ "
        "between versions of transformers, pass key_mapping to from_pretrained: "
        "smn_peft.backbones.clip_key_mapping() gives CLIP's."
    )


def _is_of_base(model: nn.Module, key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensor would overwrite one of the frozen base, as only PEFT's embeddings may."""
    key = key if key in tensors else key.removeprefix(BASE_PREFIX)
    if key not in tensors:
        return False
    wrappers = (name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    if key.startswith(tuple(f"{name}.modules_to_save." for name in wrappers)):
        return False
    module = model.get_submodule(key.rpartition(".")[0])
    ends = (getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output"))
    return not (isinstance(module, nn.Embedding) or any(module is end() for end in ends))


def _decoded(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace a blob among the tensors of an adapter's file by the packed masks that it codes, one per layer."""
    if (coded := coded_masks(state_dict)) is None:
        return dict(state_dict)
    prefix, blob = coded
    places = _Places(model, adapter_name, prefix)
    sizes = {f"{places.shared}{entry.name}": entry.size for entry in blob.entries}
    if sizes.keys() != places.keys():
        raise _misfit(sorted(places.keys() - sizes.keys()), sorted(sizes.keys() - places.keys()))
    for name, (layer, slot) in places.items():
        promised = torch.empty(sizes[name], dtype=torch.uint8, device="meta")
        check_packed(name, promised, layer.base_tensor(slot).numel())
    tensors = dict(state_dict)
    device = tensors.pop(f"{prefix}{BLOB_NAME}").device
    masks = decode_masks(blob, blob.size, places)  # every size is the base's
    return {**tensors, **{f"{prefix}{name}": torch.from_numpy(bits).to(device) for name, bits in masks.items()}}


def _settings_in(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a config decides the answers, which a weights file has too, since PEFT may load that file alone."""
    return next((read_settings(key, state_dict[key]) for key in state_dict if is_settings(key)), {})


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
    config, settings = model.peft_config[adapter_name], _settings_in(state_dict)
    layers = [layer for _, layer in adapter_layers(model) if adapter_name in layer.smn_info]
    infos = {layer: layer.smn_info[adapter_name] for layer in layers}
    statistics = {norm: norm.statistics_of(adapter_name) for norm in layers if isinstance(norm, BatchNorm)}

    def put(config: MaskConfig, infos: Mapping[Any, AdapterInfo], statistics: Mapping[BatchNorm, Any]) -> None:
        model.peft_config[adapter_name] = config
        for layer, info in infos.items():
            layer.smn_info[adapter_name] = info
        for norm, own in statistics.items():
            norm.set_statistics(adapter_name, own)

    try:
        new = config
        if any(getattr(config, name) != value for name, value in settings.items()):
            try:
                new = replace(config, **settings)
            except (TypeError, ValueError) as error:
                raise AdapterFileError(f"The file says what no config can say: {error} Fetch it again.") from error
            adapts, same = new.batch_norm == "adapt", new.mask_spec() == config.mask_spec()
            put(
                new,
                {
                    layer: replace(
                        info, config=new, trainable={}, spec=info.spec if same else new.mask_spec(info.granularity)
                    )
                    for layer, info in infos.items()
                },
                {norm: (own or norm.base_statistics()) if adapts else {} for norm, own in statistics.items()},
            )
        entries = loaded_entries(model, adapter_name, state_dict)
        if warning := check_base(model, adapter_name, new):
            warnings.warn(warning, stacklevel=4)
    except BaseException:
        put(config, infos, statistics)
        raise
    return entries
