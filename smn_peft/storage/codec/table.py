# SPDX-License-Identifier: Apache-2.0
"""The table of a blob: for each layer its name, size, active bits and code, in columns that compress well."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import CodecError

__all__ = ["LayerEntry", "compress_table", "decompress_table", "read_table", "write_table"]

_MAX_TABLE = 1 << 26  # a million layers
_COLUMNS = 4  # of 8 bytes
_SELECTED = 0x80


@dataclass(frozen=True)
class LayerEntry:
    """One layer in a blob.

    Attributes:
        name: Its key in the adapter's file, without the part that all layers share.
        size: Packed bytes of its mask.
        coded: Packed bytes that are coded: `size`, or those of the selected weights.
        inactive: Coded bits that are off, those that pad the last byte included.
        code: How they are coded, see `LayerCode`.
        selected: Whether only the weights that selective masking trains are coded; all others are on.
        start: Where its payload starts, from the end of the table.
        length: Bytes of its payload.
    """

    name: str
    size: int
    coded: int
    inactive: int
    code: int
    selected: bool
    start: int
    length: int

    @property
    def active(self) -> int:
        """Coded bits that are on."""
        return 8 * self.coded - self.inactive


def write_table(entries: Sequence[LayerEntry]) -> bytes:
    """A table as bytes: names, then codes, then the columns byte plane by byte plane."""
    columns = np.array([[e.size, e.size - e.coded, e.inactive, e.length] for e in entries], "<u8").reshape(-1, 4)
    planes = columns.T.copy().view(np.uint8).reshape(_COLUMNS, len(entries), 8).transpose(0, 2, 1)
    codes = bytes(e.code | (_SELECTED if e.selected else 0) for e in entries)
    return codes + planes.tobytes() + "\n".join(e.name for e in entries).encode()


def read_table(raw: bytes, count: int) -> list[LayerEntry]:
    """The entries of a table of `count` layers.

    Raises:
        CodecError: If the table does not hold what it should.
    """
    fixed = count * (1 + 8 * _COLUMNS)
    if len(raw) < fixed:
        raise _damaged()
    try:
        names = raw[fixed:].decode().split("\n") if count else []
    except UnicodeDecodeError as error:
        raise _damaged() from error
    if len(names) != count or len(set(names)) != count or not all(names):
        raise _damaged()
    planes = np.frombuffer(raw, np.uint8, count * 8 * _COLUMNS, count).reshape(_COLUMNS, 8, count)
    columns: NDArray[np.uint64] = planes.transpose(0, 2, 1).copy().view("<u8").reshape(_COLUMNS, count)
    entries, start = [], 0
    for name, byte, *numbers in zip(names, raw[:count], *columns.tolist(), strict=True):
        size, left_out, inactive, length = numbers
        coded = size - left_out
        if max(numbers) >= 1 << 48 or coded < 0 or inactive > 8 * coded:
            raise _damaged()
        code, selected = byte & ~_SELECTED, bool(byte & _SELECTED)
        entries.append(LayerEntry(name, size, coded, inactive, code, selected, start, length))
        start += length
    return entries


def compress_table(raw: bytes) -> bytes:
    """Deflate a table."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return coder.compress(raw) + coder.flush()


def decompress_table(data: memoryview, size: int) -> bytes:
    """Inflate a table of a known size.

    Raises:
        CodecError: If it is damaged or has another size.
    """
    if size > _MAX_TABLE:
        raise _damaged()
    decoder = zlib.decompressobj(-15)
    try:
        raw = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise _damaged() from error
    if len(raw) != size or not decoder.eof or decoder.unused_data:
        raise _damaged()
    return raw


def _damaged() -> CodecError:
    return CodecError("The table of the coded masks is damaged: the file is cut or broken. Fetch it again.")
