# SPDX-License-Identifier: Apache-2.0
"""From bit-packed to coded adapters and back, file to file: no base model and no PEFT is needed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adapter_config import CONFIG_NAME, is_settings, read_config, recoded_settings
from .adapter_file import (
    WEIGHTS_NAME,
    AdapterSizes,
    adapter_sizes,
    coded_masks,
    purpose_of,
    read_adapter_file,
    write_adapter_file,
)
from .codec.blob import (
    BLOB_NAME,
    Base,
    decode_masks,
    encode_masks,
)
from .files import AdapterFileError, atomic_write

MAX_UNPACKED = 1 << 28
"""Bytes of masks that are unpacked unless a caller says otherwise: two thousand million weights."""


def pack_adapter(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> AdapterSizes:
    """Write an adapter's folder with its masks coded, and return its sizes; all other tensors stay as they are.

    Args:
        source: Folder of an adapter, bit-packed or coded.
        out: Folder to write, made if it does not exist; may be `source`.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If the adapter is damaged (AdapterFileError), or holds no mask.
    """
    config, tensors = read_config(source), unpack_tensors(read_adapter_file(source, settings=True), MAX_UNPACKED)
    masks = {name: tensor for name, tensor in tensors.items() if purpose_of(name) == "mask"}
    if not masks:
        raise ValueError(f"{source} holds no mask: it is not an adapter of this method.")
    rest = {name: tensor for name, tensor in tensors.items() if name not in masks}
    return _write(source, out, {**rest, **pack_tensors(masks)}, {**config, "codec": "entropy"})


def unpack_adapter(
    source: str | os.PathLike[str], out: str | os.PathLike[str], limit: int = MAX_UNPACKED
) -> AdapterSizes:
    """Write an adapter's folder bit-packed, as [`pack_adapter`] does coded.

    A coded file of a kilobyte can promise any number of bytes: of more than `limit` it is an AdapterFileError.

    Raises:
        ValueError: If only the weights that selective masking trains are coded: that takes the base.
    """
    config, tensors = read_config(source), unpack_tensors(read_adapter_file(source, settings=True), limit)
    return _write(source, out, tensors, {**config, "codec": "bits"})


def pack_tensors(masks: Mapping[str, Tensor], base: Base | None = None) -> dict[str, Tensor]:
    """Encode bit-packed masks by key as one blob, under the part of the path that all of them share.

    A `key_mapping` that renames the shared part then does for a coded file what it does for any other.
    """
    shared = shared_prefix(masks)
    packed = {name.removeprefix(shared): tensor.detach().cpu().numpy() for name, tensor in masks.items()}
    blob = np.frombuffer(encode_masks(packed, base=base), np.uint8).copy()
    return {f"{shared}{BLOB_NAME}": torch.from_numpy(blob)}


def unpack_tensors(tensors: Mapping[str, Tensor], limit: int, base: Base | None = None) -> dict[str, Tensor]:
    """Replace the blob among an adapter's tensors, if there is one, by bit-packed masks; see [`unpack_adapter`]."""
    result = dict(tensors)
    if (coded := coded_masks(tensors)) is not None:
        prefix, blob = coded
        del result[f"{prefix}{BLOB_NAME}"]
        masks = decode_masks(blob, limit, base)
        result |= {f"{prefix}{name}": torch.from_numpy(bits) for name, bits in masks.items()}
    for name, tensor in result.items():
        if purpose_of(name) == "mask" and (tensor.dtype != torch.uint8 or tensor.dim() != 1):
            raise AdapterFileError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} and no packed mask.")
    return result


def shared_prefix(keys: Iterable[str]) -> str:
    """The longest run of leading path components that all keys share, with its dot."""
    paths = [key.split(".")[:-1] for key in keys]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)


def size_change(before: AdapterSizes, after: AdapterSizes) -> str:
    """One line on what became of an adapter's bytes."""
    return f"{before.total:,} -> {after.total:,} bytes, masks {before.mask:,} -> {after.mask:,}"


def _write(
    source: str | os.PathLike[str], out: str | os.PathLike[str], tensors: dict[str, Tensor], config: dict[str, Any]
) -> AdapterSizes:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tensors |= {name: recoded_settings(own, config["codec"]) for name, own in tensors.items() if is_settings(name)}
    write_adapter_file(folder / WEIGHTS_NAME, tensors)
    with atomic_write(folder / CONFIG_NAME) as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    card = Path(source) / "README.md"
    if card.is_file() and not (folder / card.name).exists():
        shutil.copyfile(card, folder / card.name)
    return adapter_sizes(folder)
