# SPDX-License-Identifier: Apache-2.0
"""A layer's bits where whole rows or columns are off: those units coded as bits of their own, then what is left.

A layer of A × K × B bits has K units: rows (A = 1), or columns (B = 1, or the places of a convolution's kernel). The
sizes are found from the bits, so that the same masks give the same bytes whether their layer is known or not.

```
K · B (numbers of 7 bits a byte, the last below 128) · units · rest      each as: code · bits on · bytes · payload
```

Where the layer before, a bias that goes with its row, has the very bits of the units, they are not said again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...functional.packing import binary_entropy, packed_size
from .layer import LayerCode, damaged, decode_layer, encode_layer, popcount_bytes

Bits = NDArray[np.uint8]

_LEAST = 512  # bits of a layer worth looking through
_LINES = 16  # of a layer that are looked at first, and that it has at least
_OVERHEAD = 80  # bits that the sizes and the two headers take, about
_SQUARES = [side * side for side in range(1, 16)]
_SHARED = 1 << 3


def encode(packed: Bits, before: Bits | None = None) -> tuple[int, int, bytes]:
    """Encode packed bits (size,) by the cheapest code; see [`encode_layer`]. `before` is the layer before."""
    plain = encode_layer(packed)
    if plain[0] in (LayerCode.ALL_ON, LayerCode.ALL_OFF) or (sizes := find_units(packed)) is None:
        return plain
    k, b = sizes
    bits = np.unpackbits(packed).reshape(-1, k, b)
    units = bits.any((0, 2))
    shares = before is not None and np.array_equal(before, np.packbits(units))
    parts = [np.packbits(units)] * (not shares) + [np.packbits(bits[:, units])]
    payload = _number(k) + _number(b)
    for code, active, coded in map(encode_layer, parts):
        payload += bytes([code]) + _number(active) + _number(len(coded)) + coded
    best = LayerCode.UNITS | (_SHARED if shares else 0), plain[1], payload
    return min(best, plain, key=lambda made: len(made[2]))


def decode(code: int, active: int, payload: memoryview, out: Bits, before: Bits | None = None) -> None:
    """Decode a payload into `out`; errors as of [`decode_layer`]."""
    if code & 7 != LayerCode.UNITS or code > (LayerCode.UNITS | _SHARED):
        decode_layer(code, active, payload, out)
        return
    total = 8 * len(out)
    k, payload = _read_number(payload)
    b, payload = _read_number(payload)
    if not k or not b or total % (k * b):
        raise damaged()
    if needs_before(code):
        part = before
    else:
        part, payload = _read_part(payload, k)
    if part is None or len(part) != packed_size(k):
        raise damaged()
    units = np.unpackbits(part, count=k).view(np.bool_)
    number = int(np.count_nonzero(units)) * (total // k)
    rest, payload = _read_part(payload, number)
    bits = np.zeros((total // (k * b), k, b), np.uint8)
    bits[:, units] = np.unpackbits(rest, count=number).reshape(len(bits), -1, b)
    out[:] = np.packbits(bits)
    if payload or int(np.count_nonzero(bits)) != active:
        raise damaged()


def needs_before(code: int) -> bool:
    """Whether a layer is decoded from the layer before as well."""
    return code == LayerCode.UNITS | _SHARED


def find_units(packed: Bits) -> tuple[int, int] | None:
    """Find the numbers (K, B) of units, see above, by which packed bits (size,) take the least; None: there are none.

    Rows and lines of columns are looked for in whole bytes.
    """
    total, active = 8 * len(packed), popcount_bytes(packed)
    if total < _LEAST:
        return None
    best, least = None, total * binary_entropy(active / total) - _OVERHEAD
    for k, b, on in _candidates(packed):
        number = int(np.count_nonzero(on))
        if 0 < number < k:
            rest = number * (total // k)
            size = k * binary_entropy(number / k) + rest * binary_entropy(active / rest)
            if size < least:
                best, least = (k, b), size
    return best


def _candidates(packed: Bits) -> Iterator[tuple[int, int, Any]]:
    """Sizes (K, B) that rows and columns may have, and which of them hold a bit that is on, where one does not."""
    size = len(packed)
    small = [n for n in range(1, int(size**0.5) + 1) if size % n == 0]
    divisors = sorted({*small, *(size // n for n in small)})
    off = packed == 0
    if (off[:-3] & off[1:-2] & off[2:-1] & off[3:]).any():
        for n in (n for n in divisors if 4 <= n <= size // 2):
            yield size // n, 8 * n, packed.reshape(-1, n).any(1)
    for n in (n for n in divisors if n <= size // _LINES):
        lines = packed.reshape(-1, n)
        if (np.bitwise_or.reduce(lines[:_LINES]) != 255).any():
            column = np.unpackbits(np.bitwise_or.reduce(lines))
            for b in (b for b in _SQUARES if len(column) % b == 0 and not column.all()):
                yield len(column) // b, b, column.reshape(-1, b).any(1)


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_number(payload: memoryview) -> tuple[int, memoryview]:
    value = 0
    for place, byte in enumerate(payload[:7]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, payload[place + 1 :]
    raise damaged()


def _read_part(payload: memoryview, bits: int) -> tuple[Bits, memoryview]:
    """Decode what [`encode`] wrote of so many bits."""
    if not len(payload):
        raise damaged()
    code = payload[0]
    active, payload = _read_number(payload[1:])
    length, payload = _read_number(payload)
    part = np.empty(packed_size(bits), np.uint8)
    if active > 8 * len(part) or code & 7 == LayerCode.UNITS or length > len(payload):
        raise damaged()
    decode_layer(code, active, payload[:length], part)
    return part, payload[length:]
