# SPDX-License-Identifier: Apache-2.0
"""The adapter's safetensors file: checked before it is read, and its bytes counted by what they are for."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "AdapterFileError",
    "AdapterSizes",
    "adapter_sizes",
    "check_adapter_file",
    "read_adapter_file",
]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_MAX_HEADER = 25_000_000  # a ViT-g header has 60 kB


class AdapterFileError(ValueError):
    """An adapter file that cannot be trusted: truncated, damaged or hostile."""


@dataclass(frozen=True)
class AdapterSizes:
    """Bytes of an adapter file, split by purpose.

    Attributes:
        mask: Packed masks.
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


def _read_header(path: Path) -> dict[str, Any]:
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
    header.pop("__metadata__", None)
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
    return header


def check_adapter_file(path: str | os.PathLike[str]) -> None:
    """Check header and size of an adapter file without reading its tensors.

    Args:
        path: The file, or the folder that holds `adapter_model.safetensors`.

    Raises:
        AdapterFileError: If the file is truncated, its header is unreadable, or it promises more bytes than it has.
        FileNotFoundError: If there is no such file.
    """
    _read_header(_weights_path(path))


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
    for name, entry in _read_header(path).items():
        first, last = entry["data_offsets"]
        attribute = name.rpartition(".")[2]
        if not attribute.startswith("smn_"):
            purpose = "head"
        elif attribute.endswith("mask"):
            purpose = "mask"
        else:
            purpose = "scores" if attribute.endswith("scores") else "statistics"
        sums[purpose] += last - first
    return AdapterSizes(**sums, total=path.stat().st_size)
