# SPDX-License-Identifier: Apache-2.0
"""The codes of one layer's bits, and the choice of the cheapest."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from .deflate import deflate, inflate
from .errors import CodecError
from .gaps import decode_gaps, encode_gaps
from .ranked import decode_ranked, encode_ranked

__all__ = ["LayerCode", "decode_layer", "encode_layer", "needs_weight", "popcount_bytes"]

_SPARSE = 0.32  # above this share of the minority packed bytes are always the smaller code
_DENSE = 0.125  # and below this the gaps
_FEW = 1 << 15  # up to so many gaps other numbers of low bits are tried
_SHIFTS = 4
_FASTER = 1.006  # packed bytes are read twice as fast as gaps of such shares: worth so much in size

_TABLE = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
_ONES: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = getattr(np, "bitwise_count", _TABLE.__getitem__)


class LayerCode(IntEnum):
    """How a layer's bits are coded: the low three bits of the number in the file; above them is the gaps' shift."""

    ALL_OFF = 0
    ALL_ON = 1
    GAPS_OF_OFF = 2
    GAPS_OF_ON = 3
    PACKED = 4
    RANKED_OFF = 5
    RANKED_ON = 6


_GAPS = {LayerCode.GAPS_OF_OFF: 255, LayerCode.GAPS_OF_ON: 0}
"""Codes by gaps, and the bytes of their majority."""
_RANKED = {LayerCode.RANKED_OFF: 255, LayerCode.RANKED_ON: 0}


def popcount_bytes(packed: NDArray[np.uint8]) -> int:
    """Number of bits that are on."""
    return int(_ONES(packed).sum(dtype=np.int64))


def encode_layer(packed: NDArray[np.uint8], weight: NDArray[np.floating] | None = None) -> tuple[int, int, bytes]:
    """Code a layer's packed bits by the cheapest code, padding bits included.

    Args:
        packed: Packed bits, (size,).
        weight: Frozen weights θ of these bits, (weights,) of any float dtype: the archival code is tried too.

    Returns:
        The code as the file has it, the number of bits that are on, and the payload, empty if all bits are equal.
    """
    total, active = 8 * len(packed), popcount_bytes(packed)
    if active in (0, total):
        return (LayerCode.ALL_ON if active else LayerCode.ALL_OFF), active, b""
    code = LayerCode.GAPS_OF_ON if 2 * active <= total else LayerCode.GAPS_OF_OFF
    share = min(active, total - active) / total
    candidates: list[tuple[int, bytes]] = []
    if share < _SPARSE:
        minority = packed if code is LayerCode.GAPS_OF_ON else ~packed
        positions = np.flatnonzero(np.unpackbits(minority))
        for shift in range(_SHIFTS if len(positions) <= _FEW else 1):
            candidates.append((code | shift << 3, encode_gaps(positions, total, shift)))
    if share >= _DENSE or total < 1024:
        candidates.append((LayerCode.PACKED, deflate(packed.tobytes())))
    if weight is not None:
        bits = np.unpackbits(packed, count=len(weight)).view(np.bool_)
        on = code is LayerCode.GAPS_OF_ON
        if (bits == on).any():  # not so where only the bits that pad the last byte are off
            ranked = encode_ranked(bits == on, weight)
            candidates.append((LayerCode.RANKED_ON if on else LayerCode.RANKED_OFF, ranked))
    best, payload = min(candidates, key=lambda made: len(made[1]) * (1.0 if made[0] == LayerCode.PACKED else _FASTER))
    return best, active, payload


def needs_weight(code: int) -> bool:
    """Whether a layer cannot be decoded without the weights that it was coded with."""
    return code in set(_RANKED)


def decode_layer(
    code: int,
    active: int,
    payload: memoryview,
    out: NDArray[np.uint8],
    weight: NDArray[np.floating] | None = None,
) -> None:
    """Decode a layer's packed bits.

    Args:
        code: A [`LayerCode`], with the shift above its three bits.
        active: Number of bits that are on, as the file says.
        payload: The layer's bytes in the file.
        out: Filled in place, (size,) packed bytes.
        weight: Where [`needs_weight`], the weights that the layer was coded with, (weights,).

    Raises:
        CodecError: If the payload is damaged or disagrees with `active`; `out` then holds anything.
    """
    kind, shift = code & 7, code >> 3
    if kind not in set(LayerCode) or shift >= (_SHIFTS if kind in _GAPS else 1):
        raise CodecError(f"Coded masks use layer code {code}, which this smn_peft does not know: upgrade it.")
    if kind in _GAPS:
        _decode_gaps(active, payload, out, _GAPS[LayerCode(kind)], shift)
    elif kind in _RANKED:
        if weight is None or (len(weight) + 7) // 8 != len(out):
            raise CodecError("Coded masks take the weights of their layer, and these are of another size.")
        _decode_ranked(active, payload, out, _RANKED[LayerCode(kind)], weight)
    elif kind == LayerCode.PACKED:
        _decode_packed(active, payload, out)
    else:
        _decode_constant(active, payload, out)


def _decode_constant(active: int, payload: memoryview, out: NDArray[np.uint8]) -> None:
    if len(payload) or active not in (0, 8 * len(out)):
        raise CodecError("Coded masks do not fit their layer: the file is damaged. Fetch it again.")
    out[:] = 255 if active else 0


def _decode_gaps(active: int, payload: memoryview, out: NDArray[np.uint8], majority: int, shift: int) -> None:
    total = 8 * len(out)
    count = total - active if majority else active
    if not 0 < count < total:
        raise CodecError("Coded masks do not fit their layer: the file is damaged. Fetch it again.")
    out[:] = majority
    decode_gaps(payload, total, count, shift, out)


def _decode_ranked(
    active: int, payload: memoryview, out: NDArray[np.uint8], majority: int, weight: NDArray[np.floating]
) -> None:
    count = len(weight) - active if majority else active
    if not 0 < count < len(weight):
        raise CodecError("Coded masks do not fit their layer: the file is damaged. Fetch it again.")
    found = decode_ranked(payload, count, weight)
    out[:] = np.packbits(~found if majority else found)


def _decode_packed(active: int, payload: memoryview, out: NDArray[np.uint8]) -> None:
    done = found = 0
    for piece in inflate(payload, len(out)):
        out[done : done + len(piece)] = piece
        done += len(piece)
        found += popcount_bytes(piece)
    if done != len(out) or found != active:
        raise CodecError("Coded masks do not fit their layer: the file is damaged. Fetch it again.")
