# SPDX-License-Identifier: Apache-2.0
"""Masks of an adapter in one coded blob: packed bits into it on saving, out of it, checked, on loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional.packing import packed_size
from ..storage.codec import BLOB_NAME, MaskBlob, decode_masks, encode_masks
from ..storage.repack import shared_prefix
from .checks import BASE_PREFIX, misfit
from .traversal import Place

__all__ = ["condense", "expand"]


class _Base:
    """What the base knows of the layers of a blob."""

    def __init__(self, places: Mapping[str, Place], adapter_name: str) -> None:
        self.places, self.adapter_name = places, adapter_name

    def selected(self, name: str) -> NDArray[np.bool_] | None:
        layer, slot = self.places[name]
        chosen = layer.trainable(self.adapter_name, slot)
        return None if chosen is None else _to_numpy(chosen).reshape(-1)


def condense(
    entries: Mapping[str, Tensor], places: Mapping[str, Place], adapter_name: str, codec: str
) -> dict[str, Tensor]:
    """Replace the packed masks among an adapter's entries by one blob.

    The blob's key carries the part of the path that all masked layers share, and the blob the rest: a `key_mapping`
    that renames the shared part does for a coded file what it does for any other.

    Args:
        entries: What the layers save, by key with the adapter's name at the end.
        places: Where the masks among them come from, by the same keys.
        adapter_name: Name of the adapter.
        codec: Name of a codec.

    Returns:
        The other entries as they are, and the blob as a uint8 tensor.
    """
    suffix = f".{adapter_name}"
    masks = {key.removesuffix(suffix): value for key, value in entries.items() if key in places}
    if not masks:
        return dict(entries)
    shared = shared_prefix(masks)
    base = _Base({key.removesuffix(suffix).removeprefix(shared): place for key, place in places.items()}, adapter_name)
    packed = {key.removeprefix(shared): _to_numpy(value) for key, value in masks.items()}
    blob = torch.from_numpy(np.frombuffer(encode_masks(packed, codec, base), np.uint8).copy())
    rest = {key: value for key, value in entries.items() if key not in places}
    return {**rest, f"{shared}{BLOB_NAME}{suffix}": blob}


def expand(
    state_dict: Mapping[str, Tensor], places: Mapping[str, Place], adapter_name: str, fingerprint: str | None
) -> dict[str, Tensor]:
    """Replace a blob among the tensors of an adapter's file by the packed masks that it codes.

    Args:
        state_dict: Tensors by key, without the adapter's name.
        places: Where masks are wanted, by key from the base model on.
        adapter_name: Name of the adapter in the model.
        fingerprint: Fingerprint of the base that the masks were coded with.

    Returns:
        The tensors with one packed mask per layer.

    Raises:
        AdapterFileError: If the blob is damaged.
        ValueError: If its layers are not the model's, their sizes are not the base's, or its code builds on
            the weights of another base.
        TypeError: If it is not uint8.
    """
    result = dict(state_dict)
    for key in [key for key in result if key.rpartition(".")[2] == BLOB_NAME]:
        tensor, shared = result.pop(key), key.removesuffix(BLOB_NAME)
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{key} is {tensor.dtype}, coded masks are uint8. The file is damaged: fetch it again.")
        blob = MaskBlob.parse(_to_numpy(tensor).data)
        bare = shared.removeprefix(BASE_PREFIX)
        found = {f"{bare}{entry.name}": entry.size for entry in blob.entries}
        if found.keys() != places.keys():
            raise misfit(sorted(places.keys() - found.keys()), sorted(found.keys() - places.keys()))
        for name, size in found.items():
            _check_size(name, size, places[name])
        base = _Base({entry.name: places[f"{bare}{entry.name}"] for entry in blob.entries}, adapter_name)
        masks = decode_masks(blob, blob.size, base)  # every size is the base's
        result.update({f"{shared}{name}": torch.from_numpy(bits).to(tensor.device) for name, bits in masks.items()})
    return result


def _check_size(key: str, size: int, place: Place) -> None:
    numel = place.layer.base_tensor(place.slot).numel()
    if size != packed_size(numel):
        raise ValueError(
            f"{key} codes {size} bytes, but the base weight has {numel} entries and takes {packed_size(numel)}. The "
            "adapter was made for another architecture: load the base model that its adapter_config.json names."
        )


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array
