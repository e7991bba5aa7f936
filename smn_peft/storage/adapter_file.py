# SPDX-License-Identifier: Apache-2.0
"""The adapter's safetensors file: checked before it is read, and its bytes counted by what they are for."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = [
    "CONFIG_NAME",
    "REST_CHECKSUM",
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
_MAX_HEADER = 25_000_000  # a ViT-g header has 60 kB


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
        total: The whole file, header included.
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
    checksum = 0
    for name in sorted(parts):
        checksum = zlib.crc32(parts[name], zlib.crc32(name.encode(), checksum))
    return f"crc32:{checksum:08x}"


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Entries by tensor name, metadata, and where the tensors start."""
    advice = "The download or copy is incomplete or the file is damaged: fetch it again."
    size = path.stat().st_size
    with path.open("rb") as file:
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
    end = 0
    for name, entry in header.items():
        try:
            first, last = entry["data_offsets"]
            valid = type(first) is type(last) is int and 0 <= first <= last
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid:
            raise AdapterFileError(f"{path}: the header entry of {name!r} is unreadable. {advice}")
        end = max(end, last)
    if 8 + length + end != size:
        raise AdapterFileError(f"{path} has {size} bytes, its header promises {8 + length + end}. {advice}")
    return header, metadata if isinstance(metadata, dict) else {}, 8 + length


def check_adapter_file(path: str | os.PathLike[str]) -> None:
    """Check header and size of an adapter file, and head and statistics against their checksum if it has one.

    Masks are not read: a coded file has their checksum where they are decoded.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.

    Raises:
        AdapterFileError: If the file is truncated, its header is unreadable, it promises more bytes than it has, or
            the checksum differs.
        FileNotFoundError: If there is no such file.
    """
    path = _weights_path(path)
    header, metadata, offset = _read_header(path)
    if (expected := metadata.get(REST_CHECKSUM)) is None:
        return
    parts = {}
    with path.open("rb") as file:
        for name, entry in header.items():
            if purpose_of(name) != "mask":
                first, last = entry["data_offsets"]
                file.seek(offset + first)
                parts[name] = file.read(last - first)
    if (found := rest_checksum(parts)) != expected:
        raise AdapterFileError(
            f"{path}: head and statistics have the checksum {found}, the file says {expected}: it is damaged. "
            "Fetch it again."
        )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file's header says of it (``__metadata__``), without reading its tensors.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.

    Raises:
        AdapterFileError: If the header is unreadable.
        FileNotFoundError: If there is no such file.
    """
    return _read_header(_weights_path(path))[1]


def read_adapter_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read an adapter file after checking it.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.

    Returns:
        Tensors by checkpoint key, on the CPU.

    Raises:
        AdapterFileError: As [`check_adapter_file`], or if a tensor's shape and bytes disagree.
    """
    path = _weights_path(path)
    check_adapter_file(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}. Fetch or save it again.") from error


def adapter_sizes(path: str | os.PathLike[str]) -> AdapterSizes:
    """Bytes of an adapter file by purpose.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.
    """
    path = _weights_path(path)
    sums = {"mask": 0, "head": 0, "statistics": 0, "scores": 0}
    for name, entry in _read_header(path)[0].items():
        first, last = entry["data_offsets"]
        sums[purpose_of(name)] += last - first
    return AdapterSizes(**sums, total=path.stat().st_size)
