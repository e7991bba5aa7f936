# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter's file is whole: header, checksums, and masks that decode."""

from __future__ import annotations

import os

import torch

from .adapter_file import (
    REST_CHECKSUM,
    AdapterFileError,
    check_adapter_file,
    purpose_of,
    read_adapter_file,
    read_metadata,
)
from .codec import BLOB_NAME, MaskBlob
from .repack import MAX_UNPACKED, unpack_tensors

__all__ = ["verify_adapter_file"]


def verify_adapter_file(path: str | os.PathLike[str], limit: int = MAX_UNPACKED) -> list[str]:
    """Check all that can be checked without the base.

    Args:
        path: The safetensors file, or the folder that holds it.
        limit: Bytes that all masks together may take.

    Returns:
        What was found, one fact a line.

    Raises:
        AdapterFileError: If the file is damaged.
        FileNotFoundError: If there is no such file.
    """
    check_adapter_file(path)
    tensors = read_adapter_file(path)
    facts = [f"file: whole, {len(tensors)} tensors"]
    blobs = [MaskBlob.parse(t.numpy().tobytes()) for name, t in tensors.items() if name.endswith(BLOB_NAME)]
    if not blobs:
        packed = {name: tensor for name, tensor in tensors.items() if purpose_of(name) == "mask"}
        for name, tensor in packed.items():
            if tensor.dtype != torch.uint8 or tensor.dim() != 1:
                raise AdapterFileError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} and no packed mask.")
        facts.append(f"masks: {len(packed)}, bit-packed, without a checksum")
    for blob in blobs:
        if any(entry.selected for entry in blob.entries):
            facts.append(f"masks: {len(blob.entries)}, coded ({blob.codec}); their checksum takes the base")
            continue
        unpack_tensors(tensors, limit)
        facts.append(f"masks: {len(blob.entries)}, coded ({blob.codec}), checksum crc32:{blob.checksum:08x} holds")
    if (checksum := read_metadata(path).get(REST_CHECKSUM)) is not None:
        facts.append(f"head and statistics: checksum {checksum} holds")
    return facts
