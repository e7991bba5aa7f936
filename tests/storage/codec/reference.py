# SPDX-License-Identifier: Apache-2.0
"""The layer codes once more, bit by bit in plain Python: what the vectorised ones are compared with."""

from __future__ import annotations

import math
import zlib

__all__ = ["read_layer", "write_gaps"]


def bits_of(packed: bytes) -> list[int]:
    return [byte >> shift & 1 for byte in packed for shift in range(7, -1, -1)]


def bytes_of(bits: list[int]) -> bytes:
    padded = bits + [0] * (-len(bits) % 8)
    return bytes(int("".join(map(str, padded[i : i + 8])), 2) for i in range(0, len(padded), 8))


def low_bits(total: int, count: int, shift: int = 0) -> int:
    return max(0, math.floor(math.log2(math.log(2) * total / count)) - 4 + shift)


def write_gaps(bits: list[int], minority: int, shift: int = 0) -> tuple[bytes, bytes]:
    """(bit planes of the low parts, symbols of the high parts) of the gaps before each minority bit."""
    gaps, run = [], 0
    for bit in bits:
        if bit == minority:
            gaps.append(run)
            run = 0
        else:
            run += 1
    k = low_bits(len(bits), len(gaps), shift)
    planes = b"".join(bytes_of([gap >> plane & 1 for gap in gaps]) for plane in range(k))
    symbols = b"".join(b"\xff" * ((gap >> k) // 255) + bytes([(gap >> k) % 255]) for gap in gaps)
    return planes, symbols


def read_layer(code: int, active: int, payload: bytes, size: int) -> bytes:
    """Packed bytes of a layer from its payload."""
    if code in (0, 1):
        return bytes([255 * code]) * size
    if code == 4:
        return zlib.decompress(payload, -15)
    if code == 5:  # numbers of 13 bits, each of five digits that name the two of four bits that are on, lowest first
        bits, pairs = bits_of(payload), ["0011", "0101", "0110", "1001", "1010", "1100"]
        numbers = [int("".join(map(str, bits[i : i + 13])), 2) for i in range(0, len(bits) - 12, 13)]
        digits = [number // 6**place % 6 for number in numbers for place in range(5)][: active // 2]
        return bytes_of([int(bit) for digit in digits for bit in pairs[digit]])
    minority, shift = code % 8 - 2, code // 8
    count = active if minority else 8 * size - active
    k = low_bits(8 * size, count, shift)
    plane_size = -(-count // 8)
    planes = [bits_of(payload[i * plane_size : (i + 1) * plane_size]) for i in range(k)]
    bits, high, index = [], 0, 0
    for symbol in zlib.decompress(payload[k * plane_size :], -15):
        high += symbol
        if symbol == 255:
            continue
        low = sum(plane[index] << i for i, plane in enumerate(planes))
        bits += [1 - minority] * ((high << k) + low) + [minority]
        high, index = 0, index + 1
    bits += [1 - minority] * (8 * size - len(bits))
    return bytes_of(bits)
