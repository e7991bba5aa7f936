# SPDX-License-Identifier: Apache-2.0
"""All masks of an adapter as one string of bytes: a header, a table, and each layer's payload.

```
magic "SMNM" · layout version, codec number (1 byte each) · 2 zero bytes
number of layers · bytes of the deflated table · bytes of the table · CRC-32 (4 bytes each, little-endian)
deflated table · payloads, one after the other
```

The checksum is of the table and of the DECODED bits, layer by layer: two builds of zlib may write one mask in
different bytes, and it is the mask that has to be right.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...functional.packing import packed_size
from .errors import CodecError
from .layer_codes import decode_layer, encode_layer
from .registry import codec_id, codec_name
from .table import LayerEntry, compress_table, decompress_table, read_table, write_table

__all__ = ["BLOB_NAME", "LayerEntry", "MaskBlob", "decode_masks", "encode_masks"]

BLOB_NAME = "smn_masks"
"""Last part of the key under which an adapter's file holds a blob."""
LAYOUT_VERSION = 1
_MAGIC = b"SMNM"
_HEADER = struct.Struct("<4sBBHIIII")

Selector = Callable[[str], NDArray[np.bool_]]


@dataclass(frozen=True)
class MaskBlob:
    """Coded masks, their table read and checked, their payloads not yet.

    Attributes:
        codec: Name of the codec.
        entries: The layers, in the order of the file.
        checksum: CRC-32 of the table and the decoded bits.
        data: The whole blob.
        table: The table as bytes.
        offset: Where the payloads start.
    """

    codec: str
    entries: tuple[LayerEntry, ...]
    checksum: int
    data: memoryview
    table: bytes
    offset: int

    @classmethod
    def parse(cls, data: bytes | memoryview) -> MaskBlob:
        """Read header and table; no payload is touched.

        Raises:
            CodecError: If the blob is cut, damaged or of an unknown kind.
        """
        view = memoryview(data).cast("B")
        if len(view) < _HEADER.size:
            raise CodecError(f"Coded masks of {len(view)} bytes are cut off. Fetch the file again.")
        magic, layout, codec, zero, count, deflated, size, checksum = _HEADER.unpack_from(view)
        if magic != _MAGIC or zero:
            raise CodecError("What should be coded masks is something else: the file is damaged. Fetch it again.")
        if layout != LAYOUT_VERSION:
            raise CodecError(
                f"The masks are coded in layout {layout}; this smn_peft reads layout {LAYOUT_VERSION}. Upgrade it: "
                "pip install -U smn_peft."
            )
        name, offset = codec_name(codec), _HEADER.size + deflated
        if offset > len(view):
            raise CodecError(f"Coded masks are cut off after {len(view)} bytes. Fetch the file again.")
        table = decompress_table(view[_HEADER.size : offset], size)
        entries = read_table(table, count)
        end = offset + sum(entry.length for entry in entries)
        if end != len(view):
            raise CodecError(f"Coded masks have {len(view)} bytes, their table says {end}. Fetch the file again.")
        return cls(name, tuple(entries), checksum, view, table, offset)

    @property
    def size(self) -> int:
        """Packed bytes of all masks together."""
        return sum(entry.size for entry in self.entries)

    def payload(self, entry: LayerEntry) -> memoryview:
        """A layer's bytes."""
        start = self.offset + entry.start
        return self.data[start : start + entry.length]

    def decode_entry(self, entry: LayerEntry, select: Selector | None = None) -> NDArray[np.uint8]:
        """Packed bits (size,) of one layer, not compared with the checksum, which is of all layers.

        Args:
            entry: One of `entries`. Whoever calls this has checked that `entry.size` is what can be.
            select: By name, the weights of a layer that selective masking trains, bool (weights,) in C order.

        Raises:
            CodecError: If the payload is damaged.
            ValueError: If only selected weights are coded and `select` is None.
        """
        part = np.empty(entry.coded, np.uint8)
        decode_layer(entry.code, entry.active, self.payload(entry), part)
        return _spread(part, entry, select) if entry.selected else part


def decode_masks(blob: MaskBlob, limit: int, select: Selector | None = None) -> dict[str, NDArray[np.uint8]]:
    """Packed bits of all layers by name, compared with the checksum.

    Args:
        blob: From [`MaskBlob.parse`].
        limit: Bytes that all masks together may take; known from the base, or what the caller can spare.
        select: See [`MaskBlob.decode_entry`].

    Raises:
        CodecError: If the masks would be larger than `limit`, a payload is damaged, or the checksum differs.
        ValueError: If only selected weights are coded and `select` is None.
    """
    if blob.size > limit:
        raise CodecError(f"Coded masks say that they unpack to {blob.size} bytes; at most {limit} are possible here.")
    masks: dict[str, NDArray[np.uint8]] = {}
    checksum = zlib.crc32(blob.table)
    for entry in blob.entries:
        masks[entry.name] = blob.decode_entry(entry, select)
        checksum = zlib.crc32(masks[entry.name].data, checksum)
    if checksum != blob.checksum:
        raise CodecError(
            f"The decoded masks have the checksum {checksum:08x}, the file says {blob.checksum:08x}: the file is "
            "damaged, or the base's weights or dtype are not those that it was saved with. Fetch it again, or load "
            "the base that adapter_config.json names, in the dtype that base_fingerprint begins with."
        )
    return masks


def encode_masks(
    masks: Mapping[str, NDArray[np.uint8]],
    codec: str = "entropy",
    selected: Mapping[str, NDArray[np.bool_]] | None = None,
) -> bytes:
    """Masks as a blob; the same masks give the same bytes, in whatever order they come.

    Args:
        masks: Packed bits (size,) by name.
        codec: Name of a codec.
        selected: By name, the weights of a layer that selective masking trains, bool (weights,) in C order. All
            others have to be on to cost nothing; where one is off, the layer is coded in full.

    Raises:
        ValueError: If there is no such codec, or a name is empty or has a line break.
    """
    number, entries, payloads, start = codec_id(codec), [], [], 0
    checksums = []
    for name in sorted(masks):
        if not name or "\n" in name:
            raise ValueError(f"{name!r} cannot name a layer in a coded file.")
        packed, is_part = masks[name], False
        checksums.append(packed)
        if (chosen := (selected or {}).get(name)) is not None:
            bits = np.unpackbits(packed, count=len(chosen)).view(np.bool_)
            is_part = bool(bits[~chosen].all())
        part = np.packbits(bits[chosen]) if is_part else packed
        code, active, payload = encode_layer(part)
        inactive = 8 * len(part) - active
        entries.append(LayerEntry(name, len(packed), len(part), inactive, code, is_part, start, len(payload)))
        payloads.append(payload)
        start += len(payload)
    table = write_table(entries)
    checksum = zlib.crc32(table)
    for packed in checksums:
        checksum = zlib.crc32(np.ascontiguousarray(packed).data, checksum)
    deflated = compress_table(table)
    header = _HEADER.pack(_MAGIC, LAYOUT_VERSION, number, 0, len(entries), len(deflated), len(table), checksum)
    return b"".join([header, deflated, *payloads])


def _spread(part: NDArray[np.uint8], entry: LayerEntry, select: Selector | None) -> NDArray[np.uint8]:
    """The layer's packed bits from those of its selected weights."""
    if select is None:
        raise ValueError(
            f"{entry.name}: only the weights that selective masking trains are coded, and which they are follows from "
            "the base model: load the adapter over its base."
        )
    chosen = select(entry.name)
    count = int(np.count_nonzero(chosen))
    if packed_size(len(chosen)) != entry.size or packed_size(count) != entry.coded:
        raise CodecError(
            f"{entry.name} is coded for {entry.size} bytes of which {entry.coded} train, the base has "
            f"{packed_size(len(chosen))} and {packed_size(count)}: load the base that adapter_config.json names."
        )
    full = np.ones(len(chosen), np.bool_)
    full[chosen] = np.unpackbits(part, count=count).view(np.bool_)
    return np.packbits(full)
