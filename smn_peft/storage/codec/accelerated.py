# SPDX-License-Identifier: Apache-2.0
"""An optional faster reader of gaps, compiled by numba: the same bits and the same errors as numpy's."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["accelerate", "compiled", "flip_gaps"]

_GO_ON = 255
_FLIP: list[Callable[..., bool]] = []


def accelerate(on: bool = True) -> None:
    """Decode by compiled code from now on, or by numpy again.

    It pays where many masks are read, as in a server: importing numba takes as long as numpy needs for some hundred
    million weights, and compiling, once per machine, longer.

    Raises:
        ImportError: If numba is not installed.
    """
    _FLIP.clear()
    if not on:
        return
    try:
        numba = importlib.import_module("numba")
    except ImportError as error:
        raise ImportError("The accelerated reader takes numba: pip install 'smn_peft[fast]'.") from error
    types = numba.types
    symbols = types.Array(types.uint8, 1, "C", readonly=True)  # zlib's bytes
    low, state, out = (types.Array(kind, 1, "C") for kind in (types.uint32, types.int64, types.uint8))
    signature = types.boolean(symbols, low, types.int64, state, out, types.int64, types.int64)
    _FLIP.append(numba.njit(signature, nogil=True, cache=True)(flip_gaps))


def compiled() -> Callable[..., bool] | None:
    """[`flip_gaps`] compiled, if [`accelerate`] was called."""
    return _FLIP[0] if _FLIP else None


def flip_gaps(
    symbols: NDArray[np.uint8],
    low: NDArray[np.uint32],
    k: int,
    state: NDArray[np.int64],
    out: NDArray[np.uint8],
    total: int,
    count: int,
) -> bool:
    """Flip the bits that a piece of a stream of gaps names; written for a compiler, symbol by symbol.

    Args:
        symbols: High parts, (n,).
        low: Low parts of all gaps, (count,), empty where `k` is 0.
        k: Number of low bits.
        state: Changed in place: where the gap that is being read has come to, gaps found, whether one is open.
        out: Packed bits.
        total: Number of bits of the layer.
        count: Number of gaps.

    Returns:
        Whether all of them fit the layer.
    """
    at, found, is_open = state[0], state[1], state[2]
    for index in range(len(symbols)):
        symbol = np.int64(symbols[index])
        at += symbol << k
        if symbol == _GO_ON:
            is_open = 1
            if at > total:
                return False
            continue
        if found >= count:
            return False
        if k:
            at += np.int64(low[found])
        if at >= total:
            return False
        out[at >> 3] ^= np.uint8(128 >> (at & 7))
        at += 1
        found += 1
        is_open = 0
    state[0], state[1], state[2] = at, found, is_open
    return True
