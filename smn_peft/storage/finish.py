# SPDX-License-Identifier: Apache-2.0
"""The last step of saving a coded or rounded adapter: what its file says of itself, and its head and statistics."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from .adapter_file import REST_CHECKSUM, purpose_of, read_adapter_file, rest_checksum
from .atomic import atomic_write
from .codec import BLOB_NAME, MaskBlob
from .formats import FORMAT_VERSION
from .rounding import rounded

__all__ = ["file_metadata", "finish_adapter_file", "write_adapter_file"]


def finish_adapter_file(
    path: str | os.PathLike[str], *, codec: str, save_dtype: str, base_fingerprint: str | None
) -> None:
    """Round head and statistics of a file that PEFT wrote, and give a coded file its metadata, whole or not at all.

    Bit-packed files in float32 are left as they are, byte for byte.

    Args:
        path: The safetensors file. If it does not exist, nothing is done.
        codec: The config's codec.
        save_dtype: The config's `save_dtype`.
        base_fingerprint: The base's fingerprint.

    Raises:
        ValueError: If a value is beyond what `save_dtype` can hold.
    """
    if (codec == "bits" and save_dtype == "float32") or not Path(path).is_file():
        return
    tensors, changed = read_adapter_file(path, settings=True), 0
    for name, tensor in tensors.items():
        if purpose_of(name) in ("head", "statistics"):
            tensors[name] = rounded(name, tensor, save_dtype)
            changed += int((tensors[name].to(tensor.dtype) != tensor).sum())
    if changed:
        warnings.warn(
            f"{changed} values of head and statistics were rounded to {save_dtype} on saving: the file is not what "
            "was evaluated. Call smn_peft.round_extras(model) before the evaluation.",
            stacklevel=2,
        )
    write_adapter_file(path, tensors, base_fingerprint)


def write_adapter_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], base_fingerprint: str | None
) -> None:
    """Write an adapter's tensors, whole or not at all; coded masks with what the file says of them."""
    data = save(dict(tensors), metadata=file_metadata(tensors, base_fingerprint))
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    # safetensors writes the metadata in a random order: sorted, the same adapter has the same bytes
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text + data[8 + length :])


def file_metadata(tensors: Mapping[str, Tensor], base_fingerprint: str | None) -> dict[str, str]:
    """What a file says of itself in its header, for whoever reads only that: codec, counts, checksums, fingerprint."""
    blobs = [tensor for name, tensor in tensors.items() if name.rpartition(".")[2] == BLOB_NAME]
    if not blobs:
        return {"format": "pt"}
    blob = MaskBlob.parse(blobs[0].numpy().data)
    inactive = sum(entry.inactive for entry in blob.entries)
    metadata = {
        "format": "pt",
        "smn_format": str(FORMAT_VERSION),
        "smn_codec": blob.codec,
        "smn_bit_order": "big",
        "smn_active": f"{8 * blob.size - inactive}/{8 * blob.size}",
        "smn_checksum": f"crc32:{blob.checksum:08x}",
    }
    if base_fingerprint is not None:
        metadata["smn_base"] = base_fingerprint
    if rest := {name: _bytes_of(tensor) for name, tensor in tensors.items() if purpose_of(name) != "mask"}:
        metadata[REST_CHECKSUM] = rest_checksum(rest)
    return metadata


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
