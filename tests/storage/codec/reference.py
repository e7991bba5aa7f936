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


def read_numbers(bits: int, count: int, payload: bytes) -> list[int]:
    """Positions of the minority: low bits, the counts of all parts but the last, the number of each part."""
    k = max(0, math.floor(math.log2(max(1, bits // (8 * count)))))
    buckets = math.ceil(bits / 2**k)
    width = math.ceil(buckets / math.ceil(count / 192))
    parts, planes = math.ceil(buckets / width), bits_of(payload[: math.ceil(k * count / 8)])
    payload = payload[math.ceil(k * count / 8) :]
    counts = [int.from_bytes(payload[2 * i : 2 * i + 2], "little") for i in range(parts - 1)]
    payload, found = payload[2 * (parts - 1) :], []
    for part, own in enumerate([*counts, count - sum(counts)]):
        places = width + own - 1 if k and own else width  # with low bits several are in one bucket
        size = math.ceil(math.log2(math.comb(places, own)) / 8) if math.comb(places, own) > 1 else 0
        number, payload = int.from_bytes(payload[:size], "little"), payload[size:]
        high = []
        for left in range(own, 0, -1):
            place = max(p for p in range(places) if math.comb(p, left) <= number)
            number -= math.comb(place, left)
            high.append(part * width + place - (left - 1 if k else 0))
        found += high[::-1]
    lows = [sum(planes[plane * count + i] << plane for plane in range(k)) for i in range(count)]
    return [(high << k) + low for high, low in zip(found, lows, strict=True)]


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
    if code == 7:
        minority = int(2 * active <= 8 * size)
        places = set(read_numbers(8 * size, active if minority else 8 * size - active, payload))
        return bytes_of([minority if place in places else 1 - minority for place in range(8 * size)])
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
