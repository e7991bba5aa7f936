# SPDX-License-Identifier: Apache-2.0
"""All masks of an adapter as one string of bytes: a header, a table, and each layer's payload.

```
magic "SMNM" · layout version, codec number (1 byte each) · 2 zero bytes
number of layers · bytes of the deflated table · bytes of the table · CRC-32 (4 bytes each, little-endian)
deflated table · payloads, one after the other
```

The table holds the layers' codes, then their numbers byte plane by byte plane, which compresses well, and their names.
The checksum is of the table and of the DECODED bits, layer by layer: two builds of zlib may write one mask in
different bytes, and it is the mask that has to be right.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...functional.packing import packed_size
from ..files import AdapterFileError
from .layer import damaged, deflate, inflate
from .units import decode, encode, needs_before

BLOB_NAME = "smn_masks"
"""Last part of the key under which an adapter's file holds a blob."""
CODECS: dict[str, int] = {"bits": 0, "entropy": 1}
"""Codec numbers by name, never reused (2 was taken); 0 is a file of plain `smn_mask` tensors."""
LAYOUT_VERSION = 1
_MAGIC = b"SMNM"
_HEADER = struct.Struct("<4sBBHIIII")
_MAX_TABLE = 1 << 26  # bytes: a million layers
_COLUMNS = 4  # of 8 bytes
_SELECTED = 0x80
_TABLE = "have a table that is cut or broken"


class Base(Protocol):
    """What the base model knows of the layers, by their names in a blob."""

    def selected(self, name: str) -> NDArray[np.bool_] | None:
        """Weights that selective masking trains, (weights,) in C order; None if it trains all."""


@dataclass(frozen=True)
class LayerEntry:
    """One layer in a blob."""

    name: str  # its key in the adapter's file, without the part that all layers share
    size: int  # packed bytes of its mask
    coded: int  # packed bytes that are coded: `size`, or those of the selected weights
    inactive: int  # coded bits that are off, including those that pad the last byte
    code: int  # how they are coded, see `LayerCode`
    selected: bool  # whether only the weights that selective masking trains are coded; all others are on
    start: int  # where its payload starts, from the end of the table
    length: int  # bytes of its payload


@dataclass(frozen=True)
class MaskBlob:
    """Coded masks: the table of layers, read and checked, and their payloads, not yet decoded."""

    entries: tuple[LayerEntry, ...]
    checksum: int
    """CRC-32 of the table and the decoded bits."""
    table: bytes
    payloads: memoryview

    @classmethod
    def parse(cls, data: bytes | memoryview) -> MaskBlob:
        """Read header and table, no payload; AdapterFileError if they are cut, damaged or of an unknown kind."""
        view = memoryview(data).cast("B")
        if len(view) < _HEADER.size:
            raise damaged(f"of {len(view)} bytes are cut off")
        magic, layout, number, zero, count, deflated, size, checksum = _HEADER.unpack_from(view)
        if magic != _MAGIC or zero:
            raise damaged("are something else")
        if layout != LAYOUT_VERSION or number != CODECS["entropy"]:
            found = f"The masks are coded in layout {layout} by codec {number}, which this smn_peft does not know"
            raise AdapterFileError(f"{found}: damaged, or of a later release (pip install -U smn_peft).")
        offset = _HEADER.size + deflated
        if offset > len(view):
            raise damaged(f"are cut off after {len(view)} bytes")
        table = inflate_table(view[_HEADER.size : offset], size)
        entries = read_table(table, count)
        end = offset + sum(entry.length for entry in entries)
        if end != len(view):
            raise damaged(f"have {len(view)} bytes, their table says {end}")
        return cls(tuple(entries), checksum, table, view[offset:])

    @property
    def size(self) -> int:
        """Packed bytes of all masks together."""
        return sum(entry.size for entry in self.entries)

    @property
    def needs_base(self) -> bool:
        """Whether a layer can be decoded only with the base: selective masking left weights out."""
        return any(entry.selected for entry in self.entries)

    def decode_entry(self, index: int, base: Base | None = None) -> NDArray[np.uint8]:
        """Decode the packed bits (size,) of one layer, whose size the caller has checked; errors as [`decode_masks`].

        The checksum, which is of all layers, is not compared.
        """
        entry = self.entries[index]
        chosen = _selected(entry, base) if entry.selected else None
        part = self._decode_part(index)
        if chosen is None:
            return part
        full = np.ones(len(chosen), np.bool_)
        full[chosen] = np.unpackbits(part, count=int(np.count_nonzero(chosen))).view(np.bool_)
        return np.packbits(full)

    def _decode_part(self, index: int) -> NDArray[np.uint8]:
        """Decode the bits of a layer that are coded."""
        entry, before = self.entries[index], None
        if needs_before(entry.code):
            if not index or needs_before(self.entries[index - 1].code):
                raise damaged()
            before = self._decode_part(index - 1)
        part = np.empty(entry.coded, np.uint8)
        payload = self.payloads[entry.start : entry.start + entry.length]
        decode(entry.code, 8 * entry.coded - entry.inactive, payload, part, before)
        return part


def decode_masks(blob: MaskBlob, limit: int, base: Base | None = None) -> dict[str, NDArray[np.uint8]]:
    """Decode the packed bits of all layers, by name, and compare them with the checksum.

    Raises:
        AdapterFileError: If all masks together take more than `limit` bytes, a payload is damaged, or the checksum
            differs.
        ValueError: If a mask is selective, so that decoding takes the base, and `base` is None.
    """
    if blob.size > limit:
        raise AdapterFileError(f"Coded masks say that they unpack to {blob.size} bytes; at most {limit} are possible.")
    masks: dict[str, NDArray[np.uint8]] = {}
    checksum = zlib.crc32(blob.table)
    for index, entry in enumerate(blob.entries):
        masks[entry.name] = blob.decode_entry(index, base)
        checksum = zlib.crc32(masks[entry.name].data, checksum)
    if checksum != blob.checksum:
        raise AdapterFileError(
            f"The decoded masks have the checksum {checksum:08x}, the file says {blob.checksum:08x}: damaged, or the "
            "base has other weights or another dtype. Fetch it again, or load the base that adapter_config.json "
            "names, in the dtype that base_fingerprint begins with."
        )
    return masks


def encode_masks(masks: Mapping[str, NDArray[np.uint8]], base: Base | None = None) -> bytes:
    """Encode packed bits (size,) by name as a blob; the same masks give the same bytes, in whatever order they come.

    With `base`, the weights that selective masking leaves out cost nothing if they are on; where one is off, the layer
    is coded in full. ValueError if a name is empty or has a line break.
    """
    entries: list[LayerEntry] = []
    payloads: list[bytes] = []
    start, before = 0, None
    for name in sorted(masks):
        if not name or "\n" in name:
            raise ValueError(f"{name!r} cannot name a layer in a coded file.")
        packed, part, selected = masks[name], masks[name], False
        if base is not None and (chosen := base.selected(name)) is not None:
            bits = np.unpackbits(packed, count=len(chosen)).view(np.bool_)
            if selected := bool(bits[~chosen].all()):
                part = np.packbits(bits[chosen])
        code, active, payload = encode(part, before)
        before = None if needs_before(code) else part
        inactive = 8 * len(part) - active
        entries.append(LayerEntry(name, len(packed), len(part), inactive, code, selected, start, len(payload)))
        payloads.append(payload)
        start += len(payload)
    table = write_table(entries)
    checksum = zlib.crc32(table)
    for name in sorted(masks):
        checksum = zlib.crc32(np.ascontiguousarray(masks[name]).data, checksum)
    deflated = deflate(table, zlib.Z_DEFAULT_STRATEGY)
    sizes = len(entries), len(deflated), len(table)
    header = _HEADER.pack(_MAGIC, LAYOUT_VERSION, CODECS["entropy"], 0, *sizes, checksum)
    return b"".join([header, deflated, *payloads])


def _selected(entry: LayerEntry, base: Base | None) -> NDArray[np.bool_]:
    """The weights that a layer codes, checked against its sizes."""
    if base is None:
        fix = "Load the adapter over its base, or name the base: smn unpack --base."
        raise ValueError(f"{entry.name}: only the weights that selective masking trains are coded. {fix}")
    chosen = base.selected(entry.name)
    if chosen is None:
        raise AdapterFileError(f"{entry.name} codes a part of its weights, the config trains all: it is damaged.")
    count = int(np.count_nonzero(chosen))
    if packed_size(len(chosen)) != entry.size or packed_size(count) != entry.coded:
        raise AdapterFileError(
            f"{entry.name} is coded for {entry.size} bytes of which {entry.coded} train, the base has "
            f"{packed_size(len(chosen))} and {packed_size(count)}: load the base that adapter_config.json names."
        )
    return chosen


def write_table(entries: Sequence[LayerEntry]) -> bytes:
    """Write the entries of a table as bytes."""
    columns = np.array([[e.size, e.size - e.coded, e.inactive, e.length] for e in entries], "<u8").reshape(-1, 4)
    planes = columns.T.copy().view(np.uint8).reshape(_COLUMNS, len(entries), 8).transpose(0, 2, 1)
    codes = bytes(e.code | (_SELECTED if e.selected else 0) for e in entries)
    return codes + planes.tobytes() + "\n".join(e.name for e in entries).encode()


def read_table(raw: bytes, count: int) -> list[LayerEntry]:
    """Read the entries of a table of `count` layers; AdapterFileError if it does not hold what it should."""
    fixed = count * (1 + 8 * _COLUMNS)
    if len(raw) < fixed or not (count or len(raw) == 0):
        raise damaged(_TABLE)
    try:
        names = raw[fixed:].decode().split("\n") if count else []
    except UnicodeDecodeError as error:
        raise damaged(_TABLE) from error
    if len(names) != count or len(set(names)) != count or not all(names):
        raise damaged(_TABLE)
    planes = np.frombuffer(raw, np.uint8, count * 8 * _COLUMNS, count).reshape(_COLUMNS, 8, count)
    columns: NDArray[np.uint64] = planes.transpose(0, 2, 1).copy().view("<u8").reshape(_COLUMNS, count)
    entries, start = [], 0
    for name, byte, *numbers in zip(names, raw[:count], *columns.tolist(), strict=True):
        size, left_out, inactive, length = numbers
        coded = size - left_out
        if max(numbers) >= 1 << 48 or coded < 0 or inactive > 8 * coded:
            raise damaged(_TABLE)
        code, selected = byte & ~_SELECTED, bool(byte & _SELECTED)
        entries.append(LayerEntry(name, size, coded, inactive, code, selected, start, length))
        start += length
    return entries


def inflate_table(data: memoryview, size: int) -> bytes:
    """Decompress a table of a known size; AdapterFileError if it is damaged or has another size."""
    try:
        raw = b"".join(piece.tobytes() for piece in inflate(data, size)) if size <= _MAX_TABLE else b""
    except AdapterFileError as error:
        raise damaged(_TABLE) from error
    if len(raw) != size:
        raise damaged(_TABLE)
    return raw
