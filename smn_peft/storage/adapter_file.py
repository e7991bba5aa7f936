# SPDX-License-Identifier: Apache-2.0
"""The adapter's safetensors file: checked before it is read, and its bytes counted by what they are for."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

__all__ = [
    "CONFIG_NAME",
    "REST_CHECKSUM",
    "SETTINGS_NAME",
    "WEIGHTS_NAME",
    "AdapterFileError",
    "AdapterSizes",
    "adapter_sizes",
    "check_adapter_file",
    "purpose_of",
    "read_adapter_file",
    "read_metadata",
    "rest_checksum",
]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
REST_CHECKSUM = "smn_rest_checksum"
"""Metadata key of the checksum of all tensors that are not masks, see [`rest_checksum`]."""
SETTINGS_NAME = "smn_settings"
"""Last part of the key of the tensor that holds an adapter's settings, see `storage.settings`."""
_MAX_HEADER = 25_000_000  # a ViT-g header has 60 kB
_MAX_DIM = 16
_PIECE = 1 << 20  # bytes that are read at a time for a checksum
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
"""Bits of a number, by the names that safetensors gives dtypes."""


class AdapterFileError(ValueError):
    """An adapter file that cannot be trusted: truncated, damaged or hostile."""


@dataclass(frozen=True)
class AdapterSizes:
    """Bytes of an adapter file, split by purpose.

    Attributes:
        mask: Masks, packed or coded.
        head: `modules_to_save`, in general the task head.
        statistics: BatchNorm running statistics.
        scores: Scores, with ``save_scores=True``.
        total: The whole file, header and settings included.
    """

    mask: int
    head: int
    statistics: int
    scores: int
    total: int


def _weights_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / WEIGHTS_NAME if path.is_dir() else path


def purpose_of(name: str) -> str:
    """What a tensor of an adapter's file is for: ``"mask"``, ``"head"``, ``"statistics"`` or ``"scores"``."""
    attribute = name.rpartition(".")[2]
    if not attribute.startswith("smn_"):
        return "head"
    if attribute.endswith(("mask", "masks")):
        return "mask"
    return "scores" if attribute.endswith("scores") else "statistics"


def rest_checksum(parts: Mapping[str, bytes]) -> str:
    """CRC-32 of the names and bytes of tensors, by name; masks have a checksum of their own."""
    return _rest_checksum((name, [parts[name]]) for name in sorted(parts))


def _rest_checksum(parts: Iterable[tuple[str, Iterable[bytes]]]) -> str:
    checksum = 0
    for name, pieces in parts:
        checksum = zlib.crc32(name.encode(), checksum)
        for piece in pieces:
            checksum = zlib.crc32(piece, checksum)
    return f"crc32:{checksum:08x}"


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Entries by tensor name, metadata, and where the tensors start; each byte after that is of one tensor.

    Args:
        path: Of the file, for messages.
        file: At its start.
    """
    advice = "The download or copy is incomplete or the file is damaged: fetch it again."
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    if len(start) < 8:
        raise AdapterFileError(f"{path} is truncated: {size} bytes. {advice}")
    (length,) = struct.unpack("<Q", start)
    if length > _MAX_HEADER or length > size - 8:
        raise AdapterFileError(f"{path} promises a header of {length} bytes but has {size} bytes. {advice}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} has an unreadable header. {advice}") from error
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path} has an unreadable header. {advice}")
    metadata = header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_readable(entry):
            raise AdapterFileError(f"{path}: the header entry of {name!r} is unreadable. {advice}")
        if entry["dtype"] not in _BITS:
            known = ", ".join(_BITS)
            raise AdapterFileError(f"{path}: {name!r} is unreadable: its dtype is {entry['dtype']!r}, not in {known}.")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end:
            raise AdapterFileError(f"{path}: {name!r} starts at byte {first}, the one before ends at {end}. {advice}")
        end = last
        if 8 * (last - first) != math.prod(entry["shape"]) * _BITS[entry["dtype"]]:
            raise AdapterFileError(
                f"{path}: {name!r} has {last - first} bytes, which are no {entry['dtype']} of shape {entry['shape']}. "
                f"{advice}"
            )
    if 8 + length + end != size:
        raise AdapterFileError(f"{path} has {size} bytes, its header promises {8 + length + end}. {advice}")
    return header, metadata if isinstance(metadata, dict) else {}, 8 + length


def _is_readable(entry: Any) -> bool:
    try:
        numbers = [*entry["data_offsets"], *entry["shape"]]
        first, last = entry["data_offsets"]
        known = isinstance(entry["dtype"], str) and len(entry["shape"]) <= _MAX_DIM and first <= last
        return known and all(type(number) is int and 0 <= number < 1 << 64 for number in numbers)
    except (TypeError, KeyError, ValueError):
        return False


def check_adapter_file(path: str | os.PathLike[str]) -> None:
    """Check header and size of an adapter file, and head and statistics against their checksum if it has one.

    Masks are not read: a coded file has their checksum where they are decoded.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.

    Raises:
        AdapterFileError: If the file is truncated, its header is unreadable or does not say of every byte once whose
            it is, or the checksum differs.
        FileNotFoundError: If there is no such file.
    """
    path = _weights_path(path)
    with path.open("rb") as file:
        _check(path, file)


def _check(path: Path, file: BinaryIO) -> list[str]:
    """Names of the tensors, in the order of their bytes."""
    header, metadata, offset = _read_header(path, file)
    names = sorted(header, key=lambda name: (header[name]["data_offsets"], name))
    if (expected := metadata.get(REST_CHECKSUM)) is None:
        return names

    def pieces(first: int, last: int) -> Iterator[bytes]:
        file.seek(offset + first)
        for position in range(first, last, _PIECE):
            yield file.read(min(_PIECE, last - position))

    rest = sorted(name for name in header if purpose_of(name) != "mask")
    if (found := _rest_checksum((name, pieces(*header[name]["data_offsets"])) for name in rest)) != expected:
        raise AdapterFileError(
            f"{path}: head and statistics have the checksum {found}, the file says {expected}: it is damaged. "
            "Fetch it again."
        )
    return names


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file's header says of it (``__metadata__``), without reading its tensors.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.

    Raises:
        AdapterFileError: If the header is unreadable.
        FileNotFoundError: If there is no such file.
    """
    path = _weights_path(path)
    with path.open("rb") as file:
        return _read_header(path, file)[1]


def read_adapter_file(path: str | os.PathLike[str], *, settings: bool = False) -> dict[str, Tensor]:
    """Read an adapter file once, check what was read, and keep nothing of the file: it may change afterwards.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.
        settings: Give the tensor with the adapter's settings too, which the config beside the file says as well.

    Returns:
        Tensors by checkpoint key, on the CPU.

    Raises:
        AdapterFileError: As [`check_adapter_file`].
    """
    path = _weights_path(path)
    data = path.read_bytes()
    names = _check(path, io.BytesIO(data))
    try:
        tensors = load(data)
        return {name: tensors[name] for name in names if settings or name.rpartition(".")[2] != SETTINGS_NAME}
    except SafetensorError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}. Fetch or save it again.") from error


def adapter_sizes(path: str | os.PathLike[str]) -> AdapterSizes:
    """Bytes of an adapter file by purpose.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.
    """
    path = _weights_path(path)
    sums = {"mask": 0, "head": 0, "statistics": 0, "scores": 0}
    with path.open("rb") as file:
        header, _, _ = _read_header(path, file)
        total = file.seek(0, os.SEEK_END)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if name.rpartition(".")[2] != SETTINGS_NAME:
            sums[purpose_of(name)] += last - first
    return AdapterSizes(**sums, total=total)
