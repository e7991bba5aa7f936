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

from .bins import bin_edges, in_bin_order, rank_bins
from .deflate import deflate, inflate
from .errors import CodecError
from .gaps import GO_ON, high_symbols, low_bits

__all__ = ["decode_ranked", "encode_ranked"]

_MAX_BINS = 5  # as a power of 2
_SHIFTS = 3


def encode_ranked(is_minority: NDArray[np.bool_], weight: NDArray[np.floating]) -> bytes:
    """Code which weights are in the minority, by whichever number of bins is the smallest.

    Args:
        is_minority: (weights,), True at least once.
        weight: Frozen weights θ, (weights,). Working memory is 8 bytes for each fp32 weight where 15 % are in the
            minority, and 4 where 1 % are; one core codes 9 and 16 million weights a second.

    Returns:
        One byte with the power of 2 of the bins (low half) and the shift of k (high half); the count of each bin
        (LEB128); the low bits of all gaps, packed; one DEFLATE stream of the high parts.
    """
    finest = rank_bins(weight, _MAX_BINS)
    return min(_payloads(is_minority, finest), key=len)


def _payloads(is_minority: NDArray[np.bool_], finest: NDArray[np.uint8]) -> Iterator[bytes]:
    """The code by every number of bins and every shift."""
    flags = np.empty(len(finest), np.bool_)
    for exponent in range(1, _MAX_BINS + 1):
        edges = bin_edges(len(finest), exponent)
        for index, places in in_bin_order(finest >> np.uint8(_MAX_BINS - exponent), edges):
            flags[places] = is_minority[index]
        positions = [np.flatnonzero(flags[first:last]) for first, last in pairwise(edges)]
        sizes = [last - first for first, last in pairwise(edges)]
        for shift in range(_SHIFTS):
            yield _encode(positions, sizes, exponent, shift)


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
        weight: The weights that it was coded with. Working memory is 5 bytes for each fp32 weight; one core decodes 47
            million weights a second where 15 % are in the minority, and 63 where 1 % are.

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
    edges = bin_edges(len(weight), exponent)
    sizes = [last - first for first, last in pairwise(edges)]
    if sum(counts) != count or any(n > size for n, size in zip(counts, sizes, strict=True)):
        raise _damaged()
    ks = [low_bits(size, n, shift) if n else 0 for n, size in zip(counts, sizes, strict=True)]
    width = sum(n * k for n, k in zip(counts, ks, strict=True))
    end = start + (width + 7) // 8
    if end > len(payload):
        raise _damaged()
    low = np.unpackbits(np.frombuffer(payload[start:end], np.uint8), count=width)
    flags, at, read = np.zeros(len(weight), np.bool_), edges[:-1], 0
    for number, high in _by_bin(_high_parts(payload[end:], count, len(weight)), counts):
        k = ks[number]
        bits = low[read : read + len(high) * k].reshape(len(high), k).astype(np.int64)
        gaps = (high << k) + (bits << np.arange(k)).sum(1)
        positions = at[number] + np.cumsum(gaps + 1) - 1
        at[number] = int(positions[-1]) + 1
        if at[number] > edges[number + 1]:
            raise _damaged()
        flags[positions] = True
        read += len(high) * k
    found = np.empty(len(weight), np.bool_)
    for index, places in in_bin_order(rank_bins(weight, exponent), edges):
        found[index] = flags[places]
    return found


def _high_parts(stream: memoryview, count: int, total: int) -> Iterator[NDArray[np.int64]]:
    """High parts of the gaps of all bins, (n,) at a time."""
    carry, is_open = 0, False
    for symbols in inflate(stream, count + total // GO_ON + 1):
        if not len(symbols):
            continue
        sums = np.cumsum(symbols, dtype=np.int64)
        ends = sums[symbols != GO_ON]
        if len(ends):
            yield np.diff(ends, prepend=-carry)
            carry = int(sums[-1] - ends[-1])
        else:
            carry += int(sums[-1])
        is_open = bool(symbols[-1] == GO_ON)
    if is_open:
        raise _damaged()


def _by_bin(parts: Iterator[NDArray[np.int64]], counts: list[int]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The parts cut where a bin ends: the bin, and (n,) of its `counts`, at least one."""
    number, missing = 0, counts[0]
    for part in parts:
        while len(part):
            while not missing:
                number += 1
                if number == len(counts):
                    raise _damaged()
                missing = counts[number]
            yield number, part[:missing]
            part, missing = part[missing:], max(missing - len(part), 0)
    if missing or any(counts[number + 1 :]):
        raise _damaged()


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
