# SPDX-License-Identifier: Apache-2.0
"""The dense write compiled by numba (extra ``fast``), where it is installed; without it numpy gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ..functional.compiled import compiled

__all__ = ["fast_write"]


def fast_write() -> Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], None] | None:
    """The compiled write, of ``(out, weight, packed)``; None without numba. The first call compiles, in half a second.

    `out` and `weight` are (N,) signed integers, the weights' bits; `packed` is uint8 (⌈N/8⌉,).
    """
    return compiled(_write)


def _write(out: Any, weight: Any, packed: Any) -> None:
    whole = len(out) // 8
    for byte in range(whole):
        bits = packed[byte]
        for bit in range(8):
            kept = out.dtype.type((bits >> (7 - bit)) & 1)
            out[8 * byte + bit] = weight[8 * byte + bit] & -kept
    for index in range(8 * whole, len(out)):
        kept = out.dtype.type((packed[whole] >> (7 - index % 8)) & 1)
        out[index] = weight[index] & -kept
