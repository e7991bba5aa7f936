# SPDX-License-Identifier: Apache-2.0
"""Raw DEFLATE that only counts symbols, written with Huffman codes alone and read in bounded pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .errors import CodecError

__all__ = ["PIECE", "deflate", "inflate"]

PIECE = 1 << 15
"""Symbols that [`inflate`] gives at a time: what is built from them stays in a core's cache."""
_SLICE = 1 << 14


def deflate(symbols: bytes) -> bytes:
    """Huffman-code bytes, each on its own.

    Repetitions are not looked for: on the symbols of a mask they are accidents, and plain DEFLATE is 8 % larger.
    """
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(symbols) + coder.flush()


def inflate(payload: memoryview, limit: int) -> Iterator[NDArray[np.uint8]]:
    """Symbols of a payload, in pieces of at most [`PIECE`].

    Args:
        payload: One whole DEFLATE stream, and nothing after it.
        limit: Symbols that the caller can use.

    Raises:
        CodecError: If the stream is damaged, ends early, goes on after its end, or holds more than `limit` symbols.
    """
    decoder, total = zlib.decompressobj(-15), 0
    for start in range(0, len(payload), _SLICE):
        data: bytes | memoryview = payload[start : start + _SLICE]
        while len(data):
            if decoder.eof:
                raise CodecError("Coded masks hold bytes after their end: the file is damaged. Fetch it again.")
            symbols = _next(decoder, data)
            data = decoder.unconsumed_tail
            total += len(symbols)
            yield _bounded(symbols, total, limit)
        if decoder.unused_data:
            raise CodecError("Coded masks hold bytes after their end: the file is damaged. Fetch it again.")
    while not decoder.eof:  # zlib may have read all of its input and still hold symbols back
        symbols = _next(decoder, b"")
        if not symbols:
            raise CodecError("Coded masks end early: the file is cut or damaged. Fetch it again.")
        total += len(symbols)
        yield _bounded(symbols, total, limit)


def _next(decoder: zlib._Decompress, data: bytes | memoryview) -> bytes:
    try:
        return decoder.decompress(data, PIECE)
    except zlib.error as error:
        raise CodecError(f"Coded masks cannot be read ({error}): the file is damaged. Fetch it again.") from error


def _bounded(symbols: bytes, total: int, limit: int) -> NDArray[np.uint8]:
    if total > limit:
        raise CodecError("Coded masks hold more than their layer has: the file is damaged. Fetch it again.")
    return np.frombuffer(symbols, np.uint8)
