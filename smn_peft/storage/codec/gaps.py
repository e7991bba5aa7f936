# SPDX-License-Identifier: Apache-2.0
"""The gap code: how many bits of the majority stand before each bit of the minority.

A gap is split into its low k bits, stored raw as k bit planes, and its high part, a string of bytes that DEFLATE
codes: 255 adds 255 and goes on. k leaves the high part a mean of about 16 to 32, where an alphabet of bytes costs
nothing against the entropy and is cheap to read. A layer of few gaps may take a larger k (`shift`): fewer symbols make
a smaller table of Huffman codes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...functional.packing import packed_size
from .accelerated import compiled
from .deflate import PIECE, deflate, inflate
from .errors import CodecError

__all__ = ["GO_ON", "decode_gaps", "encode_gaps", "high_symbols", "low_bits"]

GO_ON = 255
_COUNTING = np.arange(PIECE, dtype=np.int64)
_BIT = np.array([128, 64, 32, 16, 8, 4, 2, 1], np.uint8)


def low_bits(total: int, count: int, shift: int = 0) -> int:
    """Raw low bits k of the gaps between `count` of `total` bits: ``max(0, floor(log2(ln 2 / p)) − 4 + shift)``.

    In whole numbers (ln 2 ≈ 45426/65536), so that every machine says the same.
    """
    return max(0, (total * 45426 // (count * 65536)).bit_length() - 5 + shift)


def encode_gaps(positions: NDArray[np.int64], total: int, shift: int = 0) -> bytes:
    """Code the positions of the minority.

    Args:
        positions: Sorted positions, at least one, below `total`.
        total: Number of bits of the layer.
        shift: Low bits beyond the usual k.

    Returns:
        k bit planes of ⌈count / 8⌉ bytes, then one DEFLATE stream.
    """
    k = low_bits(total, len(positions), shift)
    gaps = np.diff(positions, prepend=-1) - 1
    planes = [np.packbits((gaps >> bit & 1).astype(np.bool_)).tobytes() for bit in range(k)]
    return b"".join([*planes, deflate(high_symbols(gaps >> k).tobytes())])


def high_symbols(high: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The bytes of high parts: 255 adds 255 and goes on, anything less ends a gap."""
    lengths = high // GO_ON + 1
    symbols = np.full(int(lengths.sum()), GO_ON, np.uint8)
    symbols[np.cumsum(lengths) - 1] = high % GO_ON
    return symbols


def decode_gaps(payload: memoryview, total: int, count: int, shift: int, out: NDArray[np.uint8]) -> None:
    """Flip the coded bits of a packed layer in place.

    Args:
        payload: What [`encode_gaps`] gave.
        total: Number of bits of the layer.
        count: Number of coded positions, at least one.
        shift: As it was coded with.
        out: The layer as packed bytes; it holds the majority everywhere.

    Raises:
        CodecError: If the payload is not the code of `count` positions below `total`.
    """
    k = low_bits(total, count, shift)
    low = _read_planes(payload, k, count)
    stream = payload[k * packed_size(count) :]
    if (flip := compiled()) is not None:
        state = np.zeros(3, np.int64)
        parts = np.zeros(0, np.uint32) if low is None else low
        for symbols in inflate(stream, count + total // GO_ON + 1):
            if not flip(symbols, parts, k, state, out, total, count):
                raise _damaged()
        if state[1] != count or state[2]:
            raise _damaged()
        return
    at = 0  # where the gap that is being read starts: one after the last position
    found, is_open = 0, False
    for symbols in inflate(stream, count + total // GO_ON + 1):
        if not len(symbols):
            continue
        sums = np.cumsum(symbols, dtype=np.int64)
        is_open, step = bool(symbols[-1] == GO_ON), int(sums[-1]) << k
        positions = sums if symbols.max() < GO_ON else sums[symbols != GO_ON]
        number = len(positions)
        if found + number > count:
            raise _damaged()
        if number:
            if low is not None:
                positions <<= k
            positions += _COUNTING[:number]
            if low is not None:
                lows = np.cumsum(low[found : found + number], dtype=np.int64)
                positions += lows
                step += int(lows[-1])
            if at + int(positions[-1]) >= total:
                raise _damaged()
            _flip(out, at, positions)
        found += number
        at += step + number
        if at > total:
            raise _damaged()
    if found != count or is_open:
        raise _damaged()


def _damaged() -> CodecError:
    return CodecError("Coded masks do not fit their layer: the file is damaged. Fetch it again.")


def _read_planes(payload: memoryview, k: int, count: int) -> NDArray[np.uint32] | None:
    """Low parts of all gaps, (count,); they are few where k is large."""
    size = packed_size(count)
    if len(payload) < k * size:
        raise _damaged()
    if not k:
        return None
    low = np.zeros(count, np.uint32)
    for bit in range(k):
        plane = np.frombuffer(payload[bit * size : (bit + 1) * size], np.uint8)
        low |= np.unpackbits(plane, count=count).astype(np.uint32) << np.uint32(bit)
    return low


def _flip(out: NDArray[np.uint8], start: int, positions: NDArray[np.int64]) -> None:
    """Flip sorted, distinct bits of packed bytes; positions count from `start`, and are overwritten."""
    first = start >> 3
    positions += start & 7
    span = (int(positions[-1]) >> 3) + 1
    if span < 4 * len(positions):  # dense: through a byte per bit
        bits = np.zeros(8 * span, np.uint8)
        bits[positions] = 1
        out[first : first + span] ^= np.packbits(bits)
        return
    places = positions >> 3
    values = _BIT[positions & 7]
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    out[first:][places[starts]] ^= np.bitwise_or.reduceat(values, starts)
