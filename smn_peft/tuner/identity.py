# SPDX-License-Identifier: Apache-2.0
"""Which base an adapter belongs to: fingerprints of the weights that it masks, and of all else its features need."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..storage import fingerprint, tensor_digest
from .adapters import AdapterLayer
from .architectures import base_model_of, head_modules, vision_scope
from .base_name import base_name
from .batch_norm import has_statistics
from .config import MaskConfig
from .kinds import iter_layers
from .layer import MaskLayer
from .slots import Slot

__all__ = [
    "base_fingerprint",
    "check_base",
    "fingerprints",
    "masked_parameters",
    "unmasked_fingerprint",
    "unmasked_tensors",
]

#: What is resampled when the same base is loaded for images of another size.
_POSITIONS = re.compile(
    r"(?:^|[._])(?:pos(?:ition(?:al)?)?_?emb\w*|rel(?:ative)?_pos\w*|pos_bias\w*|attention_biases\w*|attn_mask|rope\w*)"
    r"(?:$|\.)"
)
_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (version, place, digest)


def _digest(tensor: Tensor) -> str:
    version = -1 if tensor.is_inference() else tensor._version
    known = _digests.get(tensor)
    if known is None or known[:2] != (version, tensor.data_ptr()):
        known = (version, tensor.data_ptr(), tensor_digest(tensor))
        _digests[tensor] = known
    return str(known[2])


def _fingerprint(tensors: Collection[Tensor | None]) -> str | None:
    """Of the tensors' digests; None if one is not known, or holds no data yet."""
    known = [tensor for tensor in tensors if tensor is not None and tensor.device.type != "meta"]
    if len(known) < len(tensors):
        return None
    return fingerprint((_digest(tensor) for tensor in known), known[0].dtype if known else torch.float32)


def base_fingerprint(layers: Iterable[MaskLayer], adapter_name: str) -> str | None:
    """Fingerprint of the base weights that an adapter masks, whatever is merged into them; None if not loaded yet."""
    weights = [
        _own_value(layer, slot)
        for layer in layers
        if adapter_name in layer.smn_info
        for slot in layer.smn_info[adapter_name].slots
    ]
    return _fingerprint(weights) if weights else None


def unmasked_fingerprint(model: nn.Module, masked: Collection[str], config: Mapping[str, Any]) -> str | None:
    """Fingerprint of all that an adapter's features depend on beside the weights that it masks.

    Args:
        model: The base model, bare or with adapters, which may be merged.
        masked: Names of the masked parameters in the bare model, as from [`masked_parameters`].
        config: The adapter's `batch_norm` and `modules_to_save`.

    Returns:
        As of `storage.fingerprint`; None while a tensor is on the meta device.
    """
    own = _own_values(model)
    return _fingerprint([own.get(id(tensor), tensor) for tensor in unmasked_tensors(model, masked, config).values()])


def unmasked_tensors(model: nn.Module, masked: Collection[str], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of [`unmasked_fingerprint`] by their names in the bare model, each tensor once.

    Left out are heads and `modules_to_save`, which may be replaced; with ``batch_norm="adapt"`` the statistics, of
    which the adapter has its own; whatever has to do with positions, which are resampled for other sizes of images;
    integers, a dense pooler (most checkpoints hold none) and, of a model with two towers, all but the masked one.

    Args:
        model: The base model, bare or with adapters.
        masked: Names of the masked parameters in the bare model.
        config: The adapter's `batch_norm` and `modules_to_save`.
    """
    model = base_model_of(model)
    scope, heads = vision_scope(model), head_modules(model)
    if not all(name.startswith(scope) for name in masked):
        scope = ""
    adapts, saved = config.get("batch_norm") == "adapt", tuple(config.get("modules_to_save") or ())
    result: dict[int, tuple[str, Tensor]] = {}
    apart: tuple[str, ...] = ()  # modules whose tensors do not count; a module comes before its parts
    for name, module in iter_layers(model, parts=True):
        prefix = f"{name}." if name else ""
        pooler = name.rpartition(".")[2] == "pooler" and hasattr(module, "dense")
        if pooler or id(module) in heads or (saved and name and name.endswith(saved)):
            apart = (*apart, prefix)
        if not prefix.startswith(scope) or prefix.startswith(apart):
            continue
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = prefix + attribute
            if (
                tensor is not None
                and tensor.is_floating_point()
                and attribute not in module._non_persistent_buffers_set
                and key not in masked
                and not (adapts and attribute in module._buffers and has_statistics(module))
                and not _POSITIONS.search(key)
            ):
                result.setdefault(id(tensor), (key, tensor))
    return dict(result.values())


def masked_parameters(model: nn.Module, adapter_name: str) -> set[str]:
    """Names, in the bare model, of the parameters that an adapter masks."""
    ids = {
        id(layer.base_tensor(slot))
        for layer in model.modules()
        if isinstance(layer, MaskLayer) and adapter_name in layer.smn_info
        for slot in layer.smn_info[adapter_name].slots
    }
    return {
        f"{name}.{attribute}"
        for name, module in iter_layers(base_model_of(model), parts=True)
        for attribute, parameter in module._parameters.items()
        if id(parameter) in ids
    }


def _own_value(layer: AdapterLayer, slot: Slot) -> Tensor | None:
    """The base's own value of a slot; None where it was cast while merged, and comes back up to rounding."""
    stash = layer._stashes.get(slot.name)
    rounded = stash is not None and stash.values.dtype != layer.base_tensor(slot).dtype
    return None if rounded else layer.own_tensor(slot)


def _own_values(model: nn.Module) -> dict[int, Tensor | None]:
    """The base's own values of tensors that adapters are merged into, by the tensor's id."""
    own: dict[int, Tensor | None] = {}
    for layer in model.modules():
        if isinstance(layer, AdapterLayer) and layer.merged:
            own.update({id(layer.base_tensor(slot)): _own_value(layer, slot) for slot in layer.present_slots})
            own.update({id(layer.get_base_layer().get_buffer(n)): s for n, s in layer.own_statistics().items()})
    return own


def fingerprints(model: nn.Module, adapter_name: str, config: MaskConfig) -> tuple[str | None, str | None]:
    """Fingerprints of a model's own weights: those that an adapter masks, and all else that its features depend on."""
    layers = [layer for layer in model.modules() if isinstance(layer, MaskLayer)]
    masked = masked_parameters(model, adapter_name)
    return base_fingerprint(layers, adapter_name), unmasked_fingerprint(model, masked, config.to_dict())


def check_base(model: nn.Module, adapter_name: str, config: MaskConfig) -> str | None:
    """Refuse a base that is not the one that an adapter was learned on.

    Args:
        model: The base model with the adapter, which may be merged.
        adapter_name: Its name.
        config: Its configuration, with the fingerprints that it was saved with.

    Returns:
        A warning if they cannot be compared because their dtypes differ, else None.

    Raises:
        ValueError: If one differs; names both bases, both fingerprints and which weights are not the adapter's.
    """
    expected = (config.base_fingerprint, config.unmasked_fingerprint)
    if not config.check_base or expected == (None, None):
        return None
    warning = None
    parts = ("masked weights", "weights or statistics outside the mask")
    for part, known, present in zip(parts, expected, fingerprints(model, adapter_name, config), strict=True):
        if known is None or present is None or known == present:
            continue
        names = f"made for {config.base_model_name_or_path or 'a base without a name'} ({known}), this base is "
        names += f"{base_name(model) or type(model).__name__} ({present})"
        if known.partition(":")[0] == present.partition(":")[0]:
            raise ValueError(
                f"The adapter does not belong to this base model, whose {part} differ: {names}. Load the base that it "
                "names; check_base=False in the config overrides the check."
            )
        warning = warning or f"The adapter's base model cannot be verified in another dtype: {names}."
    return warning
