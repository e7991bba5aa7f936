# SPDX-License-Identifier: Apache-2.0
"""The archival code of a layer: its bits in bins of like |θ|, which the decoder owns and the mask depends on.

The gradient of a score grows with |θ|, so under SGD small weights hardly ever flip. Bins of equal size by the rank of
|θ| have densities of their own; each bin's gaps are split at its own k, which makes the high parts of all bins alike,
so that one DEFLATE stream codes them together. Decoding takes the very weights that the mask was coded with.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .deflate import deflate, inflate
from .errors import CodecError
from .gaps import GO_ON, high_symbols, low_bits

__all__ = ["decode_ranked", "encode_ranked"]

_MAX_BINS = 5  # as a power of 2
_SHIFTS = 3


def _bins(order: NDArray[np.int64], exponent: int) -> Iterator[NDArray[np.int64]]:
    """Indices of the weights of each bin in rising order, the bin of the largest |θ| first."""
    edges = [len(order) * i >> exponent for i in range((1 << exponent) + 1)]
    for first, last in pairwise(edges):
        yield np.sort(order[first:last])


def _by_magnitude(weight: NDArray[np.floating]) -> NDArray[np.int64]:
    """Indices of the weights, the largest |θ| first; among equals the first."""
    return np.argsort(-np.abs(weight), kind="stable")


def encode_ranked(is_minority: NDArray[np.bool_], weight: NDArray[np.floating]) -> bytes:
    """Code which weights are in the minority, by whichever number of bins is the smallest.

    Args:
        is_minority: (weights,), True at least once.
        weight: Frozen weights θ, (weights,).

    Returns:
        One byte with the power of 2 of the bins (low half) and the shift of k (high half); the count of each bin
        (LEB128); the low bits of all gaps, packed; one DEFLATE stream of the high parts.
    """
    payloads, order = [], _by_magnitude(weight)
    for exponent in range(1, _MAX_BINS + 1):
        bins = list(_bins(order, exponent))
        positions, sizes = [np.flatnonzero(is_minority[index]) for index in bins], [len(index) for index in bins]
        payloads += [_encode(positions, sizes, exponent, shift) for shift in range(_SHIFTS)]
    return min(payloads, key=len)


def _encode(bins: list[NDArray[np.int64]], sizes: list[int], exponent: int, shift: int) -> bytes:
    low, high = [np.zeros(0, np.bool_)], [np.zeros(0, np.uint8)]
    counts = b"".join(_leb128(len(positions)) for positions in bins)
    for positions, size in zip(bins, sizes, strict=True):
        if len(positions):
            k = low_bits(size, len(positions), shift)
            gaps = np.diff(positions, prepend=-1) - 1
            low.append((gaps[:, None] >> np.arange(k) & 1).astype(np.bool_).reshape(-1))
            high.append(high_symbols(gaps >> k))
    head, planes = bytes([exponent | shift << 4]), np.packbits(np.concatenate(low)).tobytes()
    return b"".join([head, counts, planes, deflate(np.concatenate(high).tobytes())])


def decode_ranked(payload: memoryview, count: int, weight: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which weights are in the minority, (weights,).

    Args:
        payload: What [`encode_ranked`] gave.
        count: Number of weights in the minority.
        weight: The weights that it was coded with. Working memory is about 30 bytes for each.

    Raises:
        CodecError: If the payload is damaged, or was coded with other weights and shows it.
    """
    if not len(payload) or payload[0] & 15 not in range(1, _MAX_BINS + 1) or payload[0] >> 4 >= _SHIFTS:
        raise _damaged()
    exponent, shift = payload[0] & 15, payload[0] >> 4
    counts, start = [], 1
    for _ in range(1 << exponent):
        number, start = _read_leb128(payload, start)
        counts.append(number)
    edges = [len(weight) * i >> exponent for i in range(len(counts) + 1)]
    sizes = [last - first for first, last in pairwise(edges)]
    if sum(counts) != count or any(n > size for n, size in zip(counts, sizes, strict=True)):
        raise _damaged()
    ks = [low_bits(size, n, shift) if n else 0 for n, size in zip(counts, sizes, strict=True)]
    width = sum(n * k for n, k in zip(counts, ks, strict=True))
    end = start + (width + 7) // 8
    if end > len(payload):
        raise _damaged()
    low = np.unpackbits(np.frombuffer(payload[start:end], np.uint8), count=width)
    high = _read_high(payload[end:], count, len(weight))
    found = np.zeros(len(weight), np.bool_)
    done = read = 0
    for index, number, size, k in zip(_bins(_by_magnitude(weight), exponent), counts, sizes, ks, strict=True):
        if number:
            bits = low[read : read + number * k].reshape(number, k).astype(np.int64)
            gaps = (high[done : done + number] << k) + (bits << np.arange(k)).sum(1)
            positions = np.cumsum(gaps + 1) - 1
            if positions[-1] >= size:
                raise _damaged()
            found[index[positions]] = True
        done, read = done + number, read + number * k
    return found


def _read_high(stream: memoryview, count: int, total: int) -> NDArray[np.int64]:
    """High parts of all gaps, (count,)."""
    parts, found, carry = [np.zeros(0, np.int64)], 0, 0
    is_open = False
    for symbols in inflate(stream, count + total // GO_ON + 1):
        if not len(symbols):
            continue
        sums = np.cumsum(symbols, dtype=np.int64)
        ends = sums[symbols != GO_ON]
        if len(ends):
            parts.append(np.diff(ends, prepend=-carry))
            carry = int(sums[-1] - ends[-1])
        else:
            carry += int(sums[-1])
        found, is_open = found + len(ends), bool(symbols[-1] == GO_ON)
        if found > count:
            raise _damaged()
    if found != count or is_open:
        raise _damaged()
    return np.concatenate(parts)


def _leb128(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_leb128(data: memoryview, start: int) -> tuple[int, int]:
    number = 0
    for place in range(6):
        if start + place >= len(data):
            break
        byte = data[start + place]
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, start + place + 1
    raise _damaged()


def _damaged() -> CodecError:
    return CodecError("Coded masks do not fit their layer: the file is damaged. Fetch it again.")
