# SPDX-License-Identifier: Apache-2.0
"""What compressors make of masks and of fp32 weights, beside this package's codec (the paper's Tables 6 and 7).

The paper reports reductions of 78 to 83 %. They fit its own fractions (1.3 % of fp32) only if the mask before
compression counts two bits for each weight; against bit-packed masks lzma takes away about 62 to 67 %. So every row
here says bits per weight, and the entropy stands beside them.
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
from ..storage import MAX_UNPACKED, purpose_of, read_adapter_file
from ..storage.codec import encode_masks
from ..storage.inspection import binary_entropy
from ..storage.repack import unpack_tensors

__all__ = ["CompressionRow", "CompressionTable", "adapter_compression", "compression_table", "format_compression"]

_EXTRA = "pip install 'smn_peft[compression]'"


@dataclass(frozen=True)
class CompressionRow:
    """One compressor.

    Attributes:
        method: Its name.
        mask_bytes: Bytes of all masks.
        bits_per_weight: The same in bits for each masked weight.
        weight_bytes: Bytes of the fp32 weights; None if there are none, or it does not apply.
    """

    method: str
    mask_bytes: int
    bits_per_weight: float
    weight_bytes: int | None = None


@dataclass(frozen=True)
class CompressionTable:
    """Compressors on the same masks, and on the same weights.

    Attributes:
        rows: One per compressor, the uncompressed first, this package's codec last.
        mask_weights: Number of masked weights: the bits of the masks.
        weight_count: Number of fp32 weights; 0 if there are none.
        density: Fraction of mask bits that are on.
        entropy: Entropy of the masks layer by layer, in bits per weight.
        missing: Compressors that are not installed.
    """

    rows: tuple[CompressionRow, ...]
    mask_weights: int
    weight_count: int
    density: float
    entropy: float
    missing: tuple[str, ...]


def _cramjam(module: str, function: str, *arguments: Any) -> Callable[[bytes], int] | None:
    try:
        compress = getattr(getattr(importlib.import_module("cramjam"), module), function)
    except ImportError:
        return None
    return lambda data: len(compress(data, *arguments))


def _methods() -> dict[str, Callable[[bytes], int] | None]:
    return {
        "gzip": lambda data: len(gzip.compress(data, 9, mtime=0)),
        "bz2": lambda data: len(bz2.compress(data, 9)),
        "lzma": lambda data: len(lzma.compress(data, preset=6)),
        "lz4": _cramjam("lz4", "compress_block"),
        "snappy": _cramjam("snappy", "compress_raw"),
        "zstd": _cramjam("zstd", "compress", 19),
    }


def compression_table(masks: Mapping[str, NDArray[np.uint8]], weights: bytes | None = None) -> CompressionTable:
    """Compress masks, all layers in one string of packed bits, and weights by every compressor there is.

    Args:
        masks: Packed bits by name.
        weights: fp32 weights as bytes, such as those of a fully fine-tuned model.

    Raises:
        ValueError: If there is no mask.
    """
    if not masks:
        raise ValueError("There is no mask to compress: name the folder of an adapter.")
    packed = b"".join(masks[name].tobytes() for name in sorted(masks))
    counts = {name: (int(np.unpackbits(mask).sum()), 8 * len(mask)) for name, mask in masks.items()}
    total, missing = 8 * len(packed), []
    rows = [CompressionRow("uncompressed", len(packed), 1.0, None if weights is None else len(weights))]
    for method, size in _methods().items():
        if size is None:
            missing.append(method)
            continue
        found = size(packed)
        rows.append(CompressionRow(method, found, 8 * found / total, None if weights is None else size(weights)))
    coded = len(encode_masks(masks))
    rows.append(CompressionRow("smn_peft", coded, 8 * coded / total))
    return CompressionTable(
        rows=tuple(rows),
        mask_weights=total,
        weight_count=0 if weights is None else len(weights) // 4,
        density=sum(active for active, _ in counts.values()) / total,
        entropy=sum(binary_entropy(active / bits) * bits for active, bits in counts.values() if bits) / total,
        missing=tuple(missing),
    )


def adapter_compression(
    folder: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> CompressionTable:
    """The table of an adapter in a folder.

    Args:
        folder: Adapter, bit-packed or coded.
        weights: A safetensors file whose floats are compressed as fp32, such as a full fine-tuning's
            ``model.safetensors``.

    Raises:
        AdapterFileError: If the adapter's file is damaged.
        FileNotFoundError: If there is no such file.
        ValueError: If the adapter's masks take its base to decode, or there is none, or the weights cannot be read.
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
    """A Markdown table, and a line on what it means and what is missing."""
    rows = []
    for row in table.rows:
        bits = row.bits_per_weight
        cells = {"compressor": row.method, "mask bytes": f"{row.mask_bytes:,}", "bits per weight": f"{bits:.4f}"}
        cells |= {"× entropy": f"{bits / table.entropy:.3f}" if table.entropy else "–"}
        cells |= {"less than packed %": f"{100 * (1 - bits):.1f}", "of fp32 %": f"{100 * bits / 32:.3f}"}
        if table.weight_count:
            size = row.weight_bytes
            cells |= {"fp32 weights": "–" if size is None else f"{size:,}"}
            cells |= {"of them %": "–" if size is None else f"{100 * size / (4 * table.weight_count):.1f}"}
        rows.append(cells)
    lines = [
        markdown_table(rows),
        "",
        f"{table.mask_weights:,} masked weights, density {table.density:.4f}, entropy {table.entropy:.4f} bits each.",
    ]
    if table.missing:
        lines.append(f"Not installed and left out: {', '.join(table.missing)} ({_EXTRA}).")
    return "\n".join(lines)
