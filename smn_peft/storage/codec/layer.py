# SPDX-License-Identifier: Apache-2.0
"""The codes of one layer's bits, and the choice of the cheapest: constant, gaps, numbers, fours or packed bytes.

A gap is how many bits of the majority stand before a bit of the minority. It is split into its low k bits, stored raw
as k bit planes, and its high part, bytes that DEFLATE codes by Huffman alone: 255 adds 255 and goes on. k leaves the
high part a mean of about 16 to 32, where an alphabet of bytes costs nothing against the entropy and is cheap to read.
A layer of few gaps may take a larger k (`shift`): fewer symbols make a smaller table of Huffman codes.

Where two of every four bits are on, each four is one of six: five of them make a number below 6⁵, in 13 bits.

Few bits of the minority are a number, in a list of all ways to be in buckets of bits, and raw low bits that say where
in their bucket: within a percent of log2 of "N choose k", which no code beats, and without a table.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from enum import IntEnum
from math import comb

import numpy as np
from numpy.typing import NDArray

from ...functional.packing import packed_size
from ...functional.torch_kernels import compiled
from ..files import AdapterFileError

_SPARSE = 0.32  # above this share of the minority packed bytes are always the smaller code
_DENSE = 0.125  # and below this the gaps
_FEW = 1 << 15  # up to so many gaps other numbers of low bits are tried
_SHIFTS = 4
_SMALL = 1 << 13  # bits of a layer that may be numbered whatever they are
_FEWER = 1 << 9  # up to so many of the minority: each takes 2 µs to read
_MOST = 1 << 12  # and so many may be in a file
_TOGETHER = 192  # of them that make one number, about
_FASTER = 1.006  # packed bytes are read twice as fast as gaps of such shares: worth so much in size
_GO_ON = 255
_PIECE = 1 << 15  # symbols at a time: what is built from them stays in a core's cache
_SLICE = 1 << 14
_BIT = np.array([128, 64, 32, 16, 8, 4, 2, 1], np.uint8)
_TABLE = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
_ONES: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = getattr(np, "bitwise_count", _TABLE.__getitem__)


class LayerCode(IntEnum):
    """How a layer's bits are coded: the low three bits of the number in the file; above them is the gaps' shift."""

    ALL_OFF = 0
    ALL_ON = 1
    GAPS_OF_OFF = 2
    GAPS_OF_ON = 3
    PACKED = 4
    FOURS = 5
    UNITS = 6  # of `units`, which is made of the others
    NUMBERED = 7


_MAJORITY = {LayerCode.GAPS_OF_OFF: 255, LayerCode.GAPS_OF_ON: 0}
"""Codes by gaps, and the bytes of their majority."""


def damaged(what: str = "do not fit their layer") -> AdapterFileError:
    """The error about coded masks that cannot be read."""
    return AdapterFileError(f"Coded masks {what}: the file is damaged. Fetch it again.")


def popcount_bytes(packed: NDArray[np.uint8]) -> int:
    """Number of bits that are on."""
    return int(_ONES(packed).sum(dtype=np.int64))


def encode_layer(packed: NDArray[np.uint8]) -> tuple[int, int, bytes]:
    """Encode a layer's packed bits (size,): the cheapest code as the file has it, number of bits on, and payload."""
    total, active = 8 * len(packed), popcount_bytes(packed)
    if active in (0, total):
        return (LayerCode.ALL_ON if active else LayerCode.ALL_OFF), active, b""
    code = LayerCode.GAPS_OF_ON if 2 * active <= total else LayerCode.GAPS_OF_OFF
    share = min(active, total - active) / total
    candidates: list[tuple[int, bytes]] = []
    if share < _SPARSE or total <= _SMALL:
        positions = np.flatnonzero(np.unpackbits(packed if code is LayerCode.GAPS_OF_ON else ~packed))
        if total <= _SMALL or len(positions) <= _FEWER:
            candidates.append((LayerCode.NUMBERED, _encode_numbers(positions, total)))
    if active in (total // 2, total // 2 - 2):
        if (fours := _encode_fours(packed, active // 2)) is not None:
            candidates.append((LayerCode.FOURS, fours))
    if share < _SPARSE:
        for shift in range(_SHIFTS if len(positions) <= _FEW else 1):
            candidates.append((code | shift << 3, encode_gaps(positions, total, shift)))
    if share >= _DENSE:
        candidates.append((LayerCode.PACKED, deflate(packed.tobytes())))
    best, payload = min(candidates, key=lambda made: len(made[1]) * (1.0 if made[0] == LayerCode.PACKED else _FASTER))
    return best, active, payload


def decode_layer(code: int, active: int, payload: memoryview, out: NDArray[np.uint8]) -> None:
    """Decode a payload into `out`, (size,) packed bytes of which the file says that `active` bits are on.

    Raises:
        AdapterFileError: If the payload is damaged or disagrees with `active`; `out` then holds anything.
    """
    kind, shift, total = code & 7, code >> 3, 8 * len(out)
    if kind not in set(LayerCode) - {LayerCode.UNITS} or shift >= (_SHIFTS if kind in _MAJORITY else 1):
        raise AdapterFileError(f"Coded masks use layer code {code}, which this smn_peft does not know: upgrade it.")
    if kind in _MAJORITY:
        majority = _MAJORITY[LayerCode(kind)]
        count = total - active if majority else active
        if not 0 < count < total:
            raise damaged()
        out[:] = majority
        decode_gaps(payload, total, count, shift, out)
    elif kind == LayerCode.PACKED:
        done = found = 0
        for piece in inflate(payload, len(out)):
            out[done : done + len(piece)] = piece
            done += len(piece)
            found += popcount_bytes(piece)
        if done != len(out) or found != active:
            raise damaged()
    elif kind == LayerCode.FOURS:
        _decode_fours(payload, active, out)
    elif kind == LayerCode.NUMBERED:
        if not 0 < active < total:
            raise damaged()
        out[:] = 0 if 2 * active <= total else 255
        _decode_numbers(payload, total, min(active, total - active), out)
    else:
        if len(payload) or active not in (0, total):
            raise damaged()
        out[:] = 255 if active else 0


_NIBBLES = np.array([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], np.uint8)
_DIGITS = np.full(16, 6, np.uint8)
_DIGITS[_NIBBLES] = range(6)
_POWERS = 6 ** np.arange(5, dtype=np.uint16)


def _encode_fours(packed: NDArray[np.uint8], count: int) -> bytes | None:
    """Encode the first `count` fours; None if two of each are not on, or one is missing that does not pad a byte."""
    digits = _DIGITS[np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:count]]
    if (digits == 6).any():
        return None
    numbers = np.pad(digits, (0, -count % 5)).reshape(-1, 5) @ _POWERS
    return np.packbits(np.unpackbits(numbers.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 3:]).tobytes()


def _decode_fours(payload: memoryview, active: int, out: NDArray[np.uint8]) -> None:
    """Decode what [`_encode_fours`] made; errors as of [`decode_layer`]."""
    count, rest = divmod(active, 2)
    rows = -(-count // 5)
    if rest or count not in (2 * len(out), 2 * len(out) - 1) or len(payload) != packed_size(13 * rows):
        raise damaged()
    bits = np.unpackbits(np.frombuffer(payload, np.uint8), count=13 * rows).reshape(-1, 13)
    numbers = np.packbits(np.pad(bits, ((0, 0), (3, 0)))).view(">u2").astype(np.uint16)
    digits = (numbers[:, None] // _POWERS % 6).reshape(-1)
    if (numbers >= 6**5).any() or digits[count:].any():
        raise damaged()
    nibbles = np.zeros(2 * len(out), np.uint8)
    nibbles[:count] = _NIBBLES[digits[:count]]
    out[:] = nibbles[::2] << 4 | nibbles[1::2]


def _parts_of_number(total: int, count: int) -> tuple[int, int, int]:
    """Raw low bits k of the positions of the minority, buckets of 2ᵏ bits, and buckets that make one number."""
    k = max(0, (total // (8 * count)).bit_length() - 1)
    buckets = -(-total >> k)
    return k, buckets, -(-buckets // -(-count // _TOGETHER))


def _encode_numbers(positions: NDArray[np.int64], total: int) -> bytes:
    """Encode sorted positions of `total` bits: low bits plane by plane, how many are in each part, a number per part.

    The number is the place among all ways of so many to be in the buckets of the part: the sum of C(bucket, i + 1), of
    the i-th (from 0) in that bucket, where buckets are moved up by i if several may be in one.
    """
    k, buckets, width = _parts_of_number(total, len(positions))
    planes = np.packbits(positions >> np.arange(k)[:, None] & 1).tobytes()
    part, bucket = np.divmod(positions >> k, width)
    counts = np.bincount(part, minlength=-(-buckets // width))
    numbers, start = [], 0
    for count in counts.tolist():
        own = (bucket[start : start + count] + (np.arange(count) if k else 0)).tolist()
        number = sum(comb(place, i) for i, place in enumerate(own, 1))
        numbers.append(number.to_bytes(_number_size(k, width, count), "little"))
        start += count
    return b"".join([planes, counts[:-1].astype("<u2").tobytes(), *numbers])


def _decode_numbers(payload: memoryview, total: int, count: int, out: NDArray[np.uint8]) -> None:
    """Flip the bits of `out` that [`_encode_numbers`] coded; errors as of [`decode_layer`]."""
    if count > _MOST:
        raise damaged()
    k, buckets, width = _parts_of_number(total, count)
    parts, size = -(-buckets // width), packed_size(k * count)
    start = size + 2 * (parts - 1)
    if len(payload) < start:
        raise damaged()
    planes = np.unpackbits(np.frombuffer(payload[:size], np.uint8), count=k * count).reshape(k, count)
    counts = np.frombuffer(payload[size:start], "<u2").tolist()
    counts.append(count - sum(counts))
    if counts[-1] < 0:
        raise damaged()
    high = np.empty(count, np.int64)
    at = 0
    for part, left in enumerate(counts):
        end = start + _number_size(k, width, left)
        number, top = int.from_bytes(payload[start:end], "little"), width + (left - 1 if k and left else 0)
        if end > len(payload) or number >= (ways := comb(top, left)):
            raise damaged()
        at, start = at + left, end
        first = at - left
        while left:  # `ways` is C(top, left); `below`, C(top - 1, left), are those of which none is at top - 1
            below = ways * (top - left) // top
            top -= 1
            if number >= below:
                left -= 1
                high[first + left] = part * width + top - (left if k else 0)
                number, ways = number - below, ways - below
            else:
                ways = below
    positions = (high << k) + (planes.astype(np.int64) << np.arange(k)[:, None]).sum(0)
    if start != len(payload) or positions[-1] >= total or (np.diff(positions) <= 0).any():
        raise damaged()
    _flip_bits(out, positions)


def _number_size(k: int, width: int, count: int) -> int:
    """Bytes of a number that says in which of `width` buckets each of `count` is; with low bits, several in one."""
    return ((comb(width + (count - 1 if k and count else 0), count) - 1).bit_length() + 7) // 8


def low_bits(total: int, count: int, shift: int = 0) -> int:
    """Raw low bits k of the gaps between `count` of `total` bits: ``max(0, floor(log2(ln 2 / p)) − 4 + shift)``.

    In whole numbers (ln 2 ≈ 45426/65536), so that every machine says the same.
    """
    return max(0, (total * 45426 // (count * 65536)).bit_length() - 5 + shift)


def encode_gaps(positions: NDArray[np.int64], total: int, shift: int = 0) -> bytes:
    """Encode sorted positions, at least one, of `total` bits: k bit planes of ⌈count / 8⌉ bytes, and one stream."""
    k = low_bits(total, len(positions), shift)
    gaps = np.diff(positions, prepend=-1) - 1
    planes = [np.packbits((gaps >> bit & 1).astype(np.bool_)).tobytes() for bit in range(k)]
    high = gaps >> k
    lengths = high // _GO_ON + 1
    symbols = np.full(int(lengths.sum()), _GO_ON, np.uint8)
    symbols[np.cumsum(lengths) - 1] = high % _GO_ON
    return b"".join([*planes, deflate(symbols.tobytes())])


def decode_gaps(payload: memoryview, total: int, count: int, shift: int, out: NDArray[np.uint8]) -> None:
    """Flip the coded bits of `out`, which holds the majority everywhere; errors as of [`decode_layer`]."""
    k, size = low_bits(total, count, shift), packed_size(count)
    if len(payload) < k * size:
        raise damaged()
    low = np.zeros(count, np.uint32)
    for bit in range(k):
        plane = np.frombuffer(payload[bit * size : (bit + 1) * size], np.uint8)
        low |= np.unpackbits(plane, count=count).astype(np.uint32) << np.uint32(bit)
    state = np.zeros(3, np.int64)
    for symbols in inflate(payload[k * size :], count + total // _GO_ON + 1):
        if len(symbols) and not _flip_gaps(symbols, low, k, state, out):
            raise damaged()
    if state[1] != count or state[2]:
        raise damaged()


def _flip_by_numpy(
    symbols: NDArray[np.uint8], low: NDArray[np.uint32], k: int, state: NDArray[np.int64], out: NDArray[np.uint8]
) -> bool:
    """Flip the bits that a piece of a stream of gaps names; False if they do not fit the layer.

    `symbols` are high parts, (n,), at least one; `low` the low parts of all gaps, (count,). `state` is updated:
    position that the open gap has reached, gaps found, whether a gap is open.
    """
    at, found = int(state[0]), int(state[1])
    ends = symbols != _GO_ON
    number = int(np.count_nonzero(ends))
    if found + number > len(low):
        return False
    steps = symbols.astype(np.int64) << k
    steps += ends
    if k and number == len(symbols):
        steps += low[found : found + number]
    elif k:
        steps[ends] += low[found : found + number]
    reached = np.cumsum(steps, out=steps)
    reached += at
    if reached[-1] > 8 * len(out):
        return False
    if number:
        _flip_bits(out, (reached if number == len(symbols) else reached[ends]) - 1)
    state[:] = reached[-1], found + number, not ends[-1]
    return True


def _flip_bits(out: NDArray[np.uint8], positions: NDArray[np.int64]) -> None:
    """Flip sorted, distinct bits of packed bytes."""
    places = positions >> 3
    first, end = int(places[0]), int(places[-1]) + 1
    if end - first < 4 * len(positions):  # dense: through a byte per bit
        bits = np.zeros(8 * (end - first), np.uint8)
        bits[positions - 8 * first] = 1
        out[first:end] ^= np.packbits(bits)
    else:
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        out[places[starts]] ^= np.bitwise_or.reduceat(_BIT[positions & 7], starts)


def _flip_by_loop(
    symbols: NDArray[np.uint8], low: NDArray[np.uint32], k: int, state: NDArray[np.int64], out: NDArray[np.uint8]
) -> bool:
    """[`_flip_by_numpy`] symbol by symbol, for numba: the same bits and the same refusals."""
    at, found, is_open, total = state[0], state[1], state[2], 8 * len(out)
    for symbol in symbols:
        at += np.int64(symbol) << k
        is_open = symbol == 255
        if at > total or (not is_open and (found >= len(low) or at + np.int64(low[found]) >= total)):
            return False
        if not is_open:
            at += np.int64(low[found])
            out[at >> 3] ^= np.uint8(128 >> (at & 7))
            at += 1
            found += 1
    state[0], state[1], state[2] = at, found, is_open
    return True


_flip_gaps: Callable[..., bool] = _flip_by_numpy


def accelerate(on: bool = True) -> None:
    """Decode gaps by a loop that numba compiles (1.6 to 2.6 × as fast), where it is installed, or by numpy again.

    It pays where many masks are read, as in a server: importing numba and compiling take as long as numpy needs for
    some hundred million weights.
    """
    global _flip_gaps
    _flip_gaps = (compiled(_flip_by_loop) if on else None) or _flip_by_numpy


def deflate(data: bytes, strategy: int = zlib.Z_HUFFMAN_ONLY) -> bytes:
    """Compress bytes by Huffman codes alone: looking for repetitions too makes masks 8 % larger."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def inflate(payload: memoryview, limit: int) -> Iterator[NDArray[np.uint8]]:
    """Read a payload in bounded pieces; AdapterFileError if it is not one DEFLATE stream of at most `limit` bytes."""
    decoder, start, total = zlib.decompressobj(-15), 0, 0
    while not decoder.eof:
        data: bytes | memoryview = decoder.unconsumed_tail
        if not data:
            data = payload[start : start + _SLICE]
            start += len(data)
        try:
            symbols = decoder.decompress(data, _PIECE)
        except zlib.error as error:
            raise damaged(f"are unreadable ({error})") from error
        if not symbols and not data:  # zlib may have read all of its input and still hold symbols back
            raise damaged("end early")
        total += len(symbols)
        if total > limit:
            raise damaged("hold more than their layer has")
        yield np.frombuffer(symbols, np.uint8)
    if decoder.unused_data or start < len(payload):
        raise damaged("hold bytes after their end")
