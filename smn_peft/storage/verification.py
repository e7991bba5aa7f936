# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter's file is whole: header, checksums, and masks that decode."""

from __future__ import annotations

import os

from .adapter_file import (
    REST_CHECKSUM,
    check_adapter_file,
    purpose_of,
    read_adapter_file,
    read_metadata,
)
from .codec import BLOB_NAME
from .repack import MAX_UNPACKED, check_bits, coded_masks, unpack_tensors

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
    blobs = [coded_masks(name, t) for name, t in tensors.items() if name.rpartition(".")[2] == BLOB_NAME]
    if not blobs:
        packed = [name for name in tensors if purpose_of(name) == "mask"]
        for name in packed:
            check_bits(name, tensors[name])
        facts.append(f"masks: {len(packed)}, bit-packed, without a checksum")
    for blob in blobs:
        if blob.needs_base:
            facts.append(f"masks: {len(blob.entries)}, coded ({blob.codec}); their checksum takes the base")
            continue
        unpack_tensors(tensors, limit)
        facts.append(f"masks: {len(blob.entries)}, coded ({blob.codec}), checksum crc32:{blob.checksum:08x} holds")
    if (checksum := read_metadata(path).get(REST_CHECKSUM)) is not None:
        facts.append(f"head and statistics: checksum {checksum} holds")
    return facts
