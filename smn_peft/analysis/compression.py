# SPDX-License-Identifier: Apache-2.0
"""Sizes of masks and of fp32 weights under compressors, beside this package's codec (Tables 6 and 7).

The paper's reductions of 78 to 83 % fit its own fractions (1.3 % of fp32) only if the mask before compression counts
two bits per weight; lzma takes 62 to 67 % off bit-packed masks. So every row here says bits per weight.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..evaluation import markdown_table
from ..functional.packing import binary_entropy
from ..storage.adapter_file import purpose_of, read_adapter_file
from ..storage.codec.blob import encode_masks
from ..storage.repack import MAX_UNPACKED, unpack_tensors

_COMPRESSORS: dict[str, Callable[[bytes], Any]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=6),
    "lz4": lambda data: importlib.import_module("cramjam").lz4.compress_block(data),
    "snappy": lambda data: importlib.import_module("cramjam").snappy.compress_raw(data),
    "zstd": lambda data: importlib.import_module("cramjam").zstd.compress(data, 19),
}
"""The last three raise ImportError where cramjam is not installed."""


@dataclass(frozen=True)
class CompressionRow:
    """Sizes of all masks under one compressor, and of the fp32 weights; None without weights, and for our codec."""

    method: str
    mask_bytes: int
    bits_per_weight: float
    weight_bytes: int | None = None


@dataclass(frozen=True)
class CompressionTable:
    """Compressors on the same masks and weights: the uncompressed first, this package's codec last.

    `entropy` is that of the masks layer by layer, in bits per weight; `missing` names what is not installed.
    """

    rows: tuple[CompressionRow, ...]
    mask_weights: int
    weight_count: int
    density: float
    entropy: float
    missing: tuple[str, ...]


def compression_table(masks: Mapping[str, NDArray[np.uint8]], weights: bytes | None = None) -> CompressionTable:
    """Compress packed masks, all layers in one string, and fp32 weights as bytes by every installed compressor."""
    if not masks:
        raise ValueError("There is no mask to compress: name the folder of an adapter.")
    packed = b"".join(masks[name].tobytes() for name in sorted(masks))
    counts = [(int(np.unpackbits(mask).sum()), 8 * len(mask)) for mask in masks.values()]
    total, missing = 8 * len(packed), []
    sizes = {"uncompressed": (len(packed), None if weights is None else len(weights))}
    for method, compress in _COMPRESSORS.items():
        try:
            sizes[method] = len(compress(packed)), None if weights is None else len(compress(weights))
        except ImportError:
            missing.append(method)
    sizes["smn_peft"] = len(encode_masks(masks)), None
    return CompressionTable(
        rows=tuple(CompressionRow(name, size, 8 * size / total, of) for name, (size, of) in sizes.items()),
        mask_weights=total,
        weight_count=len(weights or b"") // 4,
        density=sum(active for active, _ in counts) / total,
        entropy=sum(binary_entropy(active / bits) * bits for active, bits in counts if bits) / total,
        missing=tuple(missing),
    )


def adapter_compression(
    folder: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> CompressionTable:
    """Compress the masks of an adapter, and the floats of the safetensors file `weights` as fp32.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is damaged, the masks can only be decoded with their base, or there are none.
    """
    tensors = unpack_tensors(read_adapter_file(folder), MAX_UNPACKED)
    masks = {name: tensor.numpy() for name, tensor in tensors.items() if purpose_of(name) == "mask"}
    if weights is None:
        return compression_table(masks)
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{weights} does not exist: name a safetensors file of weights.")
    try:
        floats = [tensor for _, tensor in sorted(load_file(weights).items()) if tensor.is_floating_point()]
    except SafetensorError as error:
        raise ValueError(f"{weights} cannot be read: {error}. Name a safetensors file of weights.") from error
    if not floats:
        raise ValueError(f"{weights} holds no floats: name a safetensors file of weights.")
    return compression_table(masks, b"".join(tensor.float().numpy().astype("<f4").tobytes() for tensor in floats))


def format_compression(table: CompressionTable) -> str:
    """Render a table as Markdown, with the entropy and the missing compressors below it."""
    rows = []
    for row in table.rows:
        bits, size = row.bits_per_weight, row.weight_bytes
        cells = {
            "compressor": row.method,
            "mask bytes": f"{row.mask_bytes:,}",
            "bits per weight": f"{bits:.4f}",
            "× entropy": f"{bits / table.entropy:.3f}" if table.entropy else "–",
            "less than packed %": f"{100 * (1 - bits):.1f}",
            "of fp32 %": f"{100 * bits / 32:.3f}",
        }
        if table.weight_count:
            cells["fp32 weights"] = "–" if size is None else f"{size:,}"
            cells["of them %"] = "–" if size is None else f"{100 * size / (4 * table.weight_count):.1f}"
        rows.append(cells)
    text = f"{markdown_table(rows)}\n\n{table.mask_weights:,} masked weights, density {table.density:.4f}, "
    text += f"entropy {table.entropy:.4f} bits each."
    if table.missing:
        missing = ", ".join(table.missing)
        text += f"\nNot installed and left out: {missing} (pip install 'smn_peft[compression]')."
    return text
