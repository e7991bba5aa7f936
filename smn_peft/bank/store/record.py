# SPDX-License-Identifier: Apache-2.0
"""An adapter as one run of bytes: masks coded, tensors one after the other, a table that says where each lies."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...storage import AdapterFileError, purpose_of
from ...storage.codec import BLOB_NAME, MaskBlob, decode_masks, encode_masks
from ...storage.repack import MAX_UNPACKED, shared_prefix

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "Entry",
    "Record",
    "check_blob",
    "checksum_of",
    "read_table",
    "record_of",
    "write_table",
]

ALIGNMENT = 8
"""Every adapter in a shard starts at a multiple of this, so that its tensors can be used where they lie."""
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes by the names that safetensors gives them."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_TABLE = 1 << 22  # an adapter of a ViT-g with all its statistics has 20 kB
_MAX_DIM = 16


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, from the start of its adapter.

    Attributes:
        key: Its key in the adapter's file.
        dtype: A key of [`DTYPES`].
        shape: Its shape.
        start: First byte.
        end: One after the last.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Record:
    """An adapter that is ready to be written.

    Attributes:
        config: adapter_config.json.
        table: What [`write_table`] made of `entries`.
        entries: Its tensors, in the order of the bytes.
        parts: Their bytes.
        size: Bytes of all parts.
        checksum: See [`checksum_of`].
        weights: Bits of all masks.
        inactive: How many of them are off.
    """

    config: bytes
    table: bytes
    entries: tuple[Entry, ...]
    parts: tuple[memoryview, ...]
    size: int
    checksum: int
    weights: int
    inactive: int

    def bytes_by_purpose(self) -> dict[str, int]:
        """Bytes of masks, head, statistics and scores."""
        sums = {"mask": 0, "head": 0, "statistics": 0, "scores": 0}
        for entry in self.entries:
            sums[purpose_of(entry.key)] += entry.end - entry.start
        return sums


def record_of(config: bytes, tensors: Mapping[str, Tensor]) -> Record:
    """Code an adapter's masks, if they are not, and lay its tensors out.

    Args:
        config: adapter_config.json.
        tensors: By key of the adapter's file.

    Raises:
        AdapterFileError: If a mask is damaged.
        ValueError: If there is no mask, or a tensor's dtype is unknown.
    """
    entries: list[Entry] = []
    parts: list[memoryview] = []
    weights = inactive = position = 0
    for key, tensor in sorted(_coded(tensors).items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{key} is {tensor.dtype}, which a bank does not keep: it takes {', '.join(DTYPES)}.")
        data = _bytes_of(tensor)
        entries.append(Entry(key, _NAMES[tensor.dtype], tuple(tensor.shape), position, position + len(data)))
        parts.append(data)
        position += len(data)
        if _is_blob(key):
            blob = MaskBlob.parse(data)
            weights += 8 * blob.size
            inactive += sum(layer.inactive for layer in blob.entries)
    table = write_table(entries)
    checksum = checksum_of(config, table, parts)
    return Record(config, table, tuple(entries), tuple(parts), position, checksum, weights, inactive)


def checksum_of(config: bytes, table: bytes, parts: Iterable[bytes | memoryview]) -> int:
    """CRC-32 of config, table and data: what a store keeps of an adapter is right or wrong as a whole."""
    checksum = zlib.crc32(table, zlib.crc32(config))
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def write_table(entries: Iterable[Entry]) -> bytes:
    """The entries as deflated JSON."""
    rows = [[entry.key, entry.dtype, entry.shape, entry.start, entry.end] for entry in entries]
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 9)


def read_table(table: bytes, size: int) -> tuple[Entry, ...]:
    """The entries of a table, each checked to lie inside the adapter and to have the bytes that its shape takes.

    Args:
        table: From [`write_table`].
        size: Bytes of the adapter.

    Raises:
        AdapterFileError: If it is damaged.
    """
    decoder = zlib.decompressobj()
    try:
        rows: Any = json.loads(decoder.decompress(table, _MAX_TABLE))
        entries = tuple(Entry(key, dtype, tuple(shape), start, end) for key, dtype, shape, start, end in rows)
        valid = decoder.eof and all(_is_valid(entry, size) for entry in entries)
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"its table of tensors is unreadable ({error})") from error
    if not valid or len({entry.key for entry in entries}) != len(entries):
        raise AdapterFileError("its table of tensors is wrong")
    return entries


def _is_valid(entry: Entry, size: int) -> bool:
    numbers = [entry.start, entry.end, *entry.shape]
    if not (isinstance(entry.key, str) and entry.key and entry.dtype in DTYPES and len(entry.shape) <= _MAX_DIM):
        return False
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        return False
    itemsize = DTYPES[entry.dtype].itemsize
    inside = entry.end <= size and entry.start % itemsize == 0
    return inside and entry.end - entry.start == math.prod(entry.shape) * itemsize


def check_blob(data: memoryview) -> None:
    """Decode coded masks and compare them with their checksum, where that does not take the base.

    Raises:
        AdapterFileError: If they are damaged, or would unpack to more than `MAX_UNPACKED` bytes.
    """
    blob = MaskBlob.parse(data)
    if not any(layer.selected for layer in blob.entries):
        decode_masks(blob, MAX_UNPACKED)


def _coded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the masks in one blob."""
    masks = {key: tensor for key, tensor in tensors.items() if purpose_of(key) == "mask"}
    if not masks:
        raise ValueError("The adapter holds no mask: a bank takes adapters of MaskConfig.")
    for key, tensor in masks.items():
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise AdapterFileError(f"{key} is {tensor.dtype} {tuple(tensor.shape)} and no mask: fetch the file again.")
    blobs = [tensor for key, tensor in masks.items() if _is_blob(key)]
    if blobs:
        for blob in blobs:
            check_blob(_bytes_of(blob))
        return dict(tensors)
    shared = shared_prefix(masks)
    data = encode_masks({key.removeprefix(shared): tensor.numpy() for key, tensor in masks.items()})
    rest = {key: tensor for key, tensor in tensors.items() if key not in masks}
    return {**rest, f"{shared}{BLOB_NAME}": torch.from_numpy(np.frombuffer(data, np.uint8).copy())}


def _is_blob(key: str) -> bool:
    return key.rpartition(".")[2] == BLOB_NAME


def _bytes_of(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
