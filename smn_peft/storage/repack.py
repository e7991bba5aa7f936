# SPDX-License-Identifier: Apache-2.0
"""From bit-packed to coded adapters and back, file to file: no base model and no PEFT is needed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adapter_config import check_config
from .adapter_file import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFileError,
    AdapterSizes,
    adapter_sizes,
    purpose_of,
    read_adapter_file,
)
from .atomic import atomic_write
from .codec import BLOB_NAME, MaskBlob, decode_masks, encode_masks
from .finish import write_adapter_file

__all__ = [
    "MAX_UNPACKED",
    "check_bits",
    "coded_masks",
    "pack_adapter",
    "read_config",
    "shared_prefix",
    "size_change",
    "unpack_adapter",
    "unpack_tensors",
]

MAX_UNPACKED = 1 << 28
"""Bytes of masks that [`unpack_adapter`] makes without being told otherwise: two thousand million weights."""
_CARD = "README.md"


def pack_adapter(source: str | os.PathLike[str], out: str | os.PathLike[str], codec: str = "entropy") -> AdapterSizes:
    """Write an adapter with its masks coded; head, statistics and scores stay what they are.

    Args:
        source: Folder of an adapter, bit-packed or coded.
        out: Folder to write, made if it does not exist; may be `source`.
        codec: A codec that makes a blob.

    Returns:
        Sizes of what was written.

    Raises:
        AdapterFileError: If the file or its config is damaged.
        FileNotFoundError: If there is no adapter.
        ValueError: If there is no such codec, or the adapter holds no mask.
    """
    config, tensors = read_config(source), unpack_tensors(read_adapter_file(source, settings=True), MAX_UNPACKED)
    masks = {name: tensor for name, tensor in tensors.items() if _is_packed_mask(name)}
    if not masks:
        raise ValueError(f"{source} holds no mask: it is not an adapter of this method.")
    shared = shared_prefix(masks)
    packed = {name.removeprefix(shared): tensor.numpy() for name, tensor in masks.items()}
    blob = np.frombuffer(encode_masks(packed, codec), np.uint8).copy()
    rest = {name: tensor for name, tensor in tensors.items() if name not in masks}
    return _write(source, out, {**rest, f"{shared}{BLOB_NAME}": torch.from_numpy(blob)}, {**config, "codec": codec})


def unpack_adapter(
    source: str | os.PathLike[str], out: str | os.PathLike[str], limit: int = MAX_UNPACKED
) -> AdapterSizes:
    """Write an adapter bit-packed.

    Args:
        source: Folder of an adapter, coded or bit-packed.
        out: Folder to write, made if it does not exist; may be `source`.
        limit: Bytes that all masks together may take: a coded file of a kilobyte can promise any number.

    Returns:
        Sizes of what was written.

    Raises:
        AdapterFileError: If the file is damaged, or its masks would be larger than `limit`.
        FileNotFoundError: If there is no adapter.
        ValueError: If only the weights that selective masking trains are coded: that takes the base.
    """
    config, tensors = read_config(source), unpack_tensors(read_adapter_file(source, settings=True), limit)
    return _write(source, out, tensors, {**config, "codec": "bits"})


def unpack_tensors(tensors: dict[str, Tensor], limit: int) -> dict[str, Tensor]:
    """An adapter's tensors with its masks bit-packed, checked against the checksum; see [`unpack_adapter`]."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] != BLOB_NAME:
            check_bits(name, tensor)
            result[name] = tensor
            continue
        shared = name.removesuffix(BLOB_NAME)
        for key, bits in decode_masks(coded_masks(name, tensor), limit).items():
            result[f"{shared}{key}"] = torch.from_numpy(bits)
    return result


def coded_masks(name: str, tensor: Tensor) -> MaskBlob:
    """The blob in a tensor of an adapter's file; AdapterFileError if it is none."""
    if tensor.dtype != torch.uint8:
        raise AdapterFileError(f"{name} is {tensor.dtype}, coded masks are uint8: the file is damaged.")
    return MaskBlob.parse(tensor.numpy().data)


def check_bits(name: str, tensor: Tensor) -> None:
    """AdapterFileError if a tensor has the name of a bit-packed mask and is none."""
    if purpose_of(name) == "mask" and (tensor.dtype != torch.uint8 or tensor.dim() != 1):
        raise AdapterFileError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} and no packed mask.")


def shared_prefix(keys: dict[str, Tensor]) -> str:
    """The longest run of leading path components that all keys share, with its dot."""
    paths = [key.split(".")[:-1] for key in keys]
    first, last = min(paths), max(paths)
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return "".join(f"{part}." for part in first[:length])


def size_change(before: AdapterSizes, after: AdapterSizes) -> str:
    """One line on what became of an adapter's bytes."""
    return f"{before.total:,} -> {after.total:,} bytes, masks {before.mask:,} -> {after.mask:,}"


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """An adapter's config as a dictionary, its format version checked.

    Raises:
        AdapterFileError: If it is no JSON object, or a field is not of its kind.
        FileNotFoundError: If there is none.
        ValueError: If its format is not known.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the folder of an adapter.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged ({error}): fetch it again.") from error
    try:
        return check_config(config)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path} is damaged: {error}") from error


def _is_packed_mask(name: str) -> bool:
    attribute = name.rpartition(".")[2]
    return attribute.startswith("smn_") and attribute.endswith("mask")


def _write(
    source: str | os.PathLike[str], out: str | os.PathLike[str], tensors: dict[str, Tensor], config: dict[str, Any]
) -> AdapterSizes:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter_file(folder / WEIGHTS_NAME, tensors, config.get("base_fingerprint"))
    with atomic_write(folder / CONFIG_NAME) as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    card = Path(source) / _CARD
    if card.is_file() and not (folder / _CARD).exists():
        shutil.copyfile(card, folder / _CARD)
    return adapter_sizes(folder)
